"""Decisions and endpoints as plain data for people: the debug pages, the explain header and the demo read the same
shape.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from math import isnan
from typing import Any

from picker.core.values import Decision, EndpointState, Rejection, ScoreTable, Snapshot


def explained(verdict: Decision | Rejection) -> dict[str, Any]:
    """A decision or a rejection with its whole table. Holds no prompt and no header."""
    request = verdict.request
    shape: dict[str, Any] = {
        "request_id": request.id,
        "path": request.path,
        "model": request.model,
        "target_model": request.target_model,
        "pool": request.pool,
        "objective": request.objective,
        "priority": request.priority,
        "stream": request.stream,
        "prompt_tokens_estimate": request.prompt_tokens,
        "prefix_keys": None if request.keys is None else "tokens" if request.keys.exact else "text",
        "held": {
            name: {"tokens": match.tokens, "slow": match.slow, "exact": match.exact}
            for name, match in request.matches.items()
        },
        "attempt": len(request.tried) + 1,
        "tried": sorted(request.tried),
        "decision_ms": round((verdict.decided_at - request.received_at) * 1000, 3),
    }
    if isinstance(verdict, Decision):
        shape |= {
            "endpoint": verdict.endpoint.id,
            "alternates": [endpoint.id for endpoint in verdict.alternates],
            "profile": verdict.profile,
        }
    else:
        shape |= {"rejected": verdict.code.value, "message": verdict.message}
    return shape | {"weights": dict(verdict.table.weights), "endpoints": rows(verdict.table)} | _omitted(verdict.table)


def rows(table: ScoreTable) -> list[dict[str, Any]]:
    """The table by endpoint: total and scores of those scored, the reason of those filtered."""
    return [_row(table, index) for index in range(len(table.endpoints))]


def best_rows(decision: Decision, limit: int) -> dict[str, Any]:
    """The choice and the `limit` best rows, compact."""
    table = decision.table
    scored = [index for index, reason in enumerate(table.reasons) if not reason]
    best = heapq.nlargest(limit, scored, key=table.totals.__getitem__)
    return {
        "endpoint": decision.endpoint.id,
        "profile": decision.profile,
        "endpoints": [_row(table, index) for index in best],
    }


def endpoints(snapshot: Snapshot, engines: Mapping[str, str]) -> list[dict[str, Any]]:
    """All endpoints as of a snapshot. `engines` names the engines that were recognised, by endpoint id."""
    return [_endpoint(state, snapshot.now, engines) for state in snapshot.states]


def _row(table: ScoreTable, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {"endpoint": table.endpoints[index]}
    if table.reasons[index]:
        return row | {"filtered": table.reasons[index]}
    scores = {name: _number(column[index]) for name, column in table.scores.items()}
    return row | {"total": _number(table.totals[index]), "scores": scores}


def _number(value: float) -> float | None:
    return None if isnan(value) else round(value, 4)


def _omitted(table: ScoreTable) -> dict[str, Any]:
    return {"omitted": dict(table.omitted)} if table.omitted else {}


def _endpoint(state: EndpointState, now: float, engines: Mapping[str, str]) -> dict[str, Any]:
    signals, endpoint = state.signals, state.endpoint
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "address": endpoint.address,
        "path_prefix": endpoint.path_prefix,
        "pool": endpoint.pool,
        "pod": endpoint.pod,
        "rank": endpoint.rank,
        "role": endpoint.role.value,
        "engine": engines.get(endpoint.id, endpoint.engine),
        "group": endpoint.group,
        "revision": endpoint.revision,
        "endpoint_class": endpoint.endpoint_class,
        "node": endpoint.place.node,
        "zone": endpoint.place.zone,
        "bootstrap_port": endpoint.bootstrap_port or None,
        "metrics_url": endpoint.metrics_url,
        "labels": dict(endpoint.labels),
        "standing": state.standing.value,
        "reason": state.standing_reason,
        "models": sorted(state.models) if state.models is not None else None,
        "waiting": state.waiting,
        "running": state.running,
        "kv_usage": signals.kv_usage if signals is not None else None,
        "signal_age_s": round(now - signals.at, 3) if signals is not None else None,
        "in_flight": state.in_flight,
        "in_flight_tokens": state.in_flight_tokens,
        "others_in_flight": state.others,
    }
