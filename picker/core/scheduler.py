"""The scheduler: filter, score, pick. Pure and synchronous; the decision it returns carries every number behind it.

Step 5 of the request path. It reserves nothing: the director does, right after, without an await between.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from math import nan

import msgspec

from picker.core.plugins import Filter, Picker, Rng, Scorer
from picker.core.values import (
    Decision,
    EndpointState,
    InferenceRequest,
    Rejection,
    RejectionCode,
    ScoreTable,
    Snapshot,
)

# Above ROWS_MAX endpoints a table keeps its ROWS_KEPT best rows, so that 1,000 remembered decisions stay under 32 MiB.
ROWS_MAX = 128
ROWS_KEPT = 32
# A message names at most this much of what a client called its model.
NAMED_CHARS = 256

_MESSAGES = {
    RejectionCode.NO_ENDPOINTS: "no model servers are known",
    RejectionCode.NO_READY_ENDPOINTS: "no model server is ready to serve this request",
    RejectionCode.SUBSET_EMPTY: "no model server of the proxy's subset is available",
    RejectionCode.POOL_NOT_FOUND: "no model server is in the pool this request asks for",
    RejectionCode.SATURATED: "all model servers are saturated",
    RejectionCode.RESPONSE_GONE: "the model server that holds this response is gone",
}


class Profile(msgspec.Struct, frozen=True):
    """An ordered set of plugins. `scorers` pairs each scorer with its weight (> 0)."""

    name: str
    filters: tuple[Filter, ...]
    scorers: tuple[tuple[Scorer, float], ...]
    picker: Picker


class Scheduler:
    """Runs a profile over a snapshot."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._weights = {scorer.name: weight for scorer, weight in profile.scorers}

    def schedule(self, request: InferenceRequest, snapshot: Snapshot, now: float, rng: Rng) -> Decision | Rejection:
        """Chooses an endpoint. A Rejection says which filter left nobody, and the table says why for each endpoint."""
        reasons = [""] * len(snapshot.states)
        indices, refusal = self._filter(request, snapshot, reasons)
        if not indices:
            return self._refuse(request, snapshot, now, refusal, reasons)
        states = [snapshot.states[index] for index in indices]
        columns, totals = self._score(request, states)
        ranking = self.profile.picker.rank(states, totals, rng)
        return Decision(
            request=request,
            endpoint=states[ranking[0]].endpoint,
            alternates=tuple(states[index].endpoint for index in ranking[1:]),
            profile=self.profile.name,
            table=self._table(snapshot, reasons, indices, columns, totals),
            decided_at=now,
        )

    def _filter(
        self, request: InferenceRequest, snapshot: Snapshot, reasons: list[str]
    ) -> tuple[list[int], RejectionCode]:
        indices = list(range(len(snapshot.states)))
        states: Sequence[EndpointState] = snapshot.states
        if not states:
            return indices, RejectionCode.NO_ENDPOINTS
        for plugin in self.profile.filters:
            verdicts = plugin.reject(request, states)
            if not any(verdicts):
                continue
            # One text per verdict, not per endpoint: a thousand remembered tables hold them.
            texts = {verdict: f"{plugin.name}: {verdict}" for verdict in set(verdicts) if verdict}
            for index, verdict in zip(indices, verdicts, strict=True):
                if verdict:
                    reasons[index] = texts[verdict]
            indices = [index for index, verdict in zip(indices, verdicts, strict=True) if not verdict]
            if not indices:
                return indices, plugin.refusal
            states = [snapshot.states[index] for index in indices]
        return indices, RejectionCode.NO_READY_ENDPOINTS

    def _score(
        self, request: InferenceRequest, states: Sequence[EndpointState]
    ) -> tuple[dict[str, list[float]], list[float]]:
        """Columns of scores (NaN where a scorer has no data) and weighted totals."""
        totals = [0.0] * len(states)
        columns: dict[str, list[float]] = {}
        for scorer, weight in self.profile.scorers:
            scores = scorer.score(request, states)
            known = [score for score in scores if score is not None]
            filled = known
            if len(known) < len(scores):
                columns[scorer.name] = [nan if score is None else score for score in scores]
                if not known:
                    continue
                # No data is neither good nor bad: it counts as the mean of those who told.
                mean = sum(known) / len(known)
                filled = [mean if score is None else score for score in scores]
            else:
                columns[scorer.name] = known
            totals = [total + weight * score for total, score in zip(totals, filled, strict=True)]
        return columns, totals

    def _table(
        self,
        snapshot: Snapshot,
        reasons: Sequence[str],
        indices: Sequence[int],
        columns: dict[str, list[float]],
        totals: Sequence[float],
    ) -> ScoreTable:
        """The score table over all endpoints, or over the best ones when there are too many."""
        rows: Sequence[int] = range(len(reasons))
        omitted: Counter[str] = Counter()
        if len(reasons) > ROWS_MAX:
            best = sorted(range(len(indices)), key=totals.__getitem__, reverse=True)[:ROWS_KEPT]
            rows = [indices[position] for position in best]
            omitted = Counter(reasons)
            omitted["lower total"] = omitted.pop("", 0) - len(rows)
            omitted = +omitted
            columns = {name: [column[position] for position in best] for name, column in columns.items()}
            totals = [totals[position] for position in best]
        elif len(indices) < len(reasons):
            columns = {name: _spread(column, indices, len(reasons)) for name, column in columns.items()}
            totals = _spread(totals, indices, len(reasons))
        return ScoreTable(
            endpoints=tuple([snapshot.states[row].endpoint.id for row in rows]),
            reasons=tuple([reasons[row] for row in rows]),
            scores={name: array("d", column) for name, column in columns.items()},
            weights=self._weights,
            totals=array("d", totals),
            omitted=omitted,
        )

    def _refuse(
        self, request: InferenceRequest, snapshot: Snapshot, now: float, code: RejectionCode, reasons: Sequence[str]
    ) -> Rejection:
        # A model is unknown for sure only when every endpoint told its models; one that is out of sight may serve it.
        if code is RejectionCode.MODEL_NOT_FOUND and any(state.models is None for state in snapshot.states):
            code = RejectionCode.NO_READY_ENDPOINTS
        message = _MESSAGES.get(code) or f"the model `{(request.model or '')[:NAMED_CHARS]}` does not exist"
        table = self._table(snapshot, reasons, (), {}, ())
        return Rejection(request=request, code=code, message=message, table=table, decided_at=now)


def _spread(values: Sequence[float], indices: Sequence[int], size: int) -> list[float]:
    """The values at their endpoints' places, NaN at those of filtered endpoints."""
    spread = [nan] * size
    for index, value in zip(indices, values, strict=True):
        spread[index] = value
    return spread
