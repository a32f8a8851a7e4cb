"""The scheduler: filters in order, scores added up, and a table that says everything."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import deque
from collections.abc import Sequence
from math import isnan
from typing import Any

import msgspec
import pytest

from picker.core import filters, pickers
from picker.core.scheduler import ROWS_KEPT, ROWS_MAX, Profile, Scheduler
from picker.core.values import (
    Decision,
    EndpointState,
    InferenceRequest,
    Lora,
    Rejection,
    RejectionCode,
    Role,
    Signals,
    Snapshot,
    Standing,
)
from tests.unit.core.builders import chosen, pod, request, scheduler, snapshot, state, with_fields

NOW = 1.0


class Fixed(msgspec.Struct, frozen=True):
    """A scorer with known answers."""

    scores: tuple[float | None, ...]
    name: str = "fixed"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        return [self.scores[int(each.endpoint.id[1:])] for each in states]


def of_scores(*columns: tuple[tuple[float | None, ...], float]) -> Scheduler:
    scorers = tuple((Fixed(scores, f"s{index}"), weight) for index, (scores, weight) in enumerate(columns))
    always = tuple(filters.build(name) for name in filters.ALWAYS)
    return Scheduler(Profile("test", always, scorers, pickers.build("max-score")))


def decide(made: Scheduler, view: Snapshot, seed: int = 1, **fields: Any) -> Decision:
    verdict = made.schedule(request(1, **fields), view, NOW, random.Random(seed))
    assert isinstance(verdict, Decision), verdict
    return verdict


def refuse(made: Scheduler, view: Snapshot, **fields: Any) -> Rejection:
    verdict = made.schedule(request(1, **fields), view, NOW, random.Random(1))
    assert isinstance(verdict, Rejection), verdict
    return verdict


def rows(count: int, **fields: Any) -> list[EndpointState]:
    return [state(f"p{index}", **fields) for index in range(count)]


def test_no_data_counts_as_the_mean_of_the_others_not_as_zero() -> None:
    decision = decide(of_scores(((0.9, None, 0.1), 2.0)), snapshot(*rows(3)))

    assert list(decision.table.totals) == pytest.approx([1.8, 1.0, 0.2])
    column = decision.table.scores["s0"]
    assert (column[0], column[2]) == (0.9, 0.1)
    assert isnan(column[1]), "the table shows that there was no data"
    assert chosen(decision) == "p0"


def test_an_endpoint_without_data_wins_where_others_are_bad() -> None:
    assert chosen(decide(of_scores(((0.0, None, 0.2), 1.0), ((0.5, 0.6, 0.5), 1.0)), snapshot(*rows(3)))) == "p1"


def test_a_scorer_without_any_data_changes_nothing() -> None:
    decision = decide(of_scores(((None, None), 5.0), ((0.2, 0.4), 1.0)), snapshot(*rows(2)))
    assert list(decision.table.totals) == pytest.approx([0.2, 0.4])
    assert all(isnan(value) for value in decision.table.scores["s0"])


def test_the_table_is_aligned_with_all_endpoints() -> None:
    view = snapshot(
        state("p0", standing=Standing.OUT, standing_reason="hung"),
        state("p1"),
        state("p2", endpoint={"role": Role.PREFILL}),
        state("p3"),
    )
    table = decide(of_scores(((0.1, 0.2, 0.3, 0.4), 3.0)), view).table

    assert table.endpoints == ("p0", "p1", "p2", "p3")
    assert table.reasons == ("health: hung", "", "role: prefill only", "")
    assert [value for value in table.totals if not isnan(value)] == pytest.approx([0.6, 1.2])
    assert [isnan(value) for value in table.scores["s0"]] == [True, False, True, False]
    assert table.weights == {"s0": 3.0}
    assert table.omitted == {}


def test_alternates_are_ranked_and_exclude_the_choice_and_the_filtered() -> None:
    view = snapshot(*rows(3), state("p3", standing=Standing.OUT))
    decision = decide(of_scores(((0.3, 0.9, 0.5, 1.0), 1.0)), view)
    assert chosen(decision) == "p1"
    assert [each.id for each in decision.alternates] == ["p2", "p0"]


@pytest.mark.parametrize(
    ("states", "fields", "code"),
    [
        ([], {}, RejectionCode.NO_ENDPOINTS),
        ([state("a", standing=Standing.OUT)], {}, RejectionCode.NO_READY_ENDPOINTS),
        ([state("a", endpoint={"role": Role.PREFILL})], {}, RejectionCode.NO_READY_ENDPOINTS),
        ([state("a")], {"subset": frozenset({"9.9.9.9"})}, RejectionCode.SUBSET_EMPTY),
        ([state("a")], {"subset": frozenset()}, RejectionCode.SUBSET_EMPTY),
        ([state("a")], {"pinned": "b"}, RejectionCode.RESPONSE_GONE),
        ([state("a", standing=Standing.OUT)], {"pinned": "a"}, RejectionCode.NO_READY_ENDPOINTS),
        ([state("a")], {"tried": frozenset({"a"})}, RejectionCode.NO_READY_ENDPOINTS),
        (
            [state("a", models=frozenset({"m"}))],
            {"model": "x", "strict_model": True},
            RejectionCode.MODEL_NOT_FOUND,
        ),
        (
            [state("a", models=frozenset({"m"})), state("b", standing=Standing.OUT)],
            {"model": "x", "strict_model": True},
            RejectionCode.NO_READY_ENDPOINTS,
        ),
        (
            [state("a", models=frozenset({"m"})), state("b", endpoint={"role": Role.PREFILL})],
            {"model": "x", "strict_model": True},
            RejectionCode.NO_READY_ENDPOINTS,
        ),
    ],
)
def test_refusals(states: list[EndpointState], fields: dict[str, Any], code: RejectionCode) -> None:
    rejection = refuse(scheduler(), snapshot(*states), **fields)
    assert rejection.code is code
    assert rejection.message
    assert len(rejection.table.reasons) == len(states)
    assert rejection.decided_at == NOW


def test_a_refusal_of_a_model_names_it() -> None:
    rejection = refuse(scheduler(), snapshot(state("a", models=frozenset({"m"}))), model="gpt-9", strict_model=True)
    assert "gpt-9" in rejection.message


def test_after_a_failure_a_degraded_endpoint_gets_its_chance() -> None:
    view = snapshot(state("a"), state("b", standing=Standing.DEGRADED))
    assert chosen(decide(scheduler(), view)) == "a"
    assert chosen(decide(scheduler(), view, tried=frozenset({"a"}))) == "b"


def test_the_same_seed_reproduces_a_decision() -> None:
    view = snapshot(*rows(20))
    for policy in ("balanced", "random"):
        picks = {chosen(decide(scheduler(policy), view, seed=5)) for _ in range(5)}
        assert len(picks) == 1
        assert len({chosen(decide(scheduler(policy), view, seed=seed)) for seed in range(20)}) > 5


def many(count: int, *, ready: bool = True) -> Snapshot:
    """A large pool; every third endpoint is out, or all of them."""
    states = []
    for index in range(count):
        signals = Signals(at=0.0, kv_usage=index % 7 / 7, lora=Lora(frozenset({"x"}), frozenset(), 2))
        out = not ready or index % 3 == 0
        states.append(
            state(
                f"pod-with-a-long-name-{index}",
                waiting=float(index % 11),
                running=float(index % 5),
                signals=signals,
                standing=Standing.OUT if out else Standing.READY,
                standing_reason="unreachable: connection refused" if out else "",
            )
        )
    return snapshot(*states)


def test_large_tables_keep_the_best_rows_and_count_the_others() -> None:
    view = many(300)
    table = decide(scheduler(), view).table

    assert len(table.endpoints) == ROWS_KEPT == len(table.reasons) == len(table.totals)
    assert all(len(column) == ROWS_KEPT for column in table.scores.values())
    assert set(table.reasons) == {""}
    assert table.omitted == {"health: unreachable: connection refused": 100, "lower total": 200 - ROWS_KEPT}
    assert list(table.totals) == sorted(table.totals, reverse=True)


def test_large_tables_agree_with_small_ones() -> None:
    """The kept rows are those a full table would have shown best."""
    view = many(ROWS_MAX)
    full = decide(scheduler(), view).table
    best = sorted((value for value in full.totals if not isnan(value)), reverse=True)[:ROWS_KEPT]
    extra = [with_fields(view.states[0], endpoint=pod(f"extra-{n}")) for n in range(5)]

    kept = decide(scheduler(), snapshot(*view.states, *extra)).table

    assert list(kept.totals) == pytest.approx(best)


def test_few_candidates_among_many_are_all_kept() -> None:
    states = list(many(200, ready=False).states)
    states[150] = state("only", waiting=0.0)
    decision = decide(scheduler(), snapshot(*states))
    assert chosen(decision) == "only"
    assert decision.table.endpoints == ("only",)
    assert decision.table.omitted == {"health: unreachable: connection refused": 199}


def test_a_large_refusal_counts_its_reasons() -> None:
    rejection = refuse(scheduler(), many(300, ready=False))
    assert rejection.table.endpoints == ()
    assert rejection.table.omitted == {"health: unreachable: connection refused": 300}


@pytest.mark.parametrize(("count", "ready"), [(128, True), (128, False), (200, True)])
def test_a_thousand_remembered_decisions_stay_under_32_mib(count: int, ready: bool) -> None:
    view, made = many(count, ready=ready), scheduler()
    rng = random.Random(1)
    gc.collect()
    tracemalloc.start()
    try:
        ring: deque[object] = deque(maxlen=1000)
        for key in range(1000):
            asked = request(key, model="some-model", session="s", tried=frozenset({f"pod-{key}"}))
            ring.append(made.schedule(asked, view, NOW, rng))
        size_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(ring) == 1000
    assert size_bytes < 32 * 2**20, f"{size_bytes / 2**20:.1f} MiB"


def test_scheduling_changes_neither_request_nor_snapshot() -> None:
    view, asked = many(40), request(1, model="m", session="s")
    before = msgspec.msgpack.encode([view, asked])
    for policy in ("balanced", "least-loaded", "round-robin", "random"):
        scheduler(policy).schedule(asked, view, NOW, random.Random(1))
    assert msgspec.msgpack.encode([view, asked]) == before
