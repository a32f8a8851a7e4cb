"""What every scorer promises, asked of every registered one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

import scorers
from picker.core.plugins import Scorer
from picker.core.values import EndpointState, InferenceRequest, Lora, Signals
from tests.contract.strategies import requests, states
from tests.unit.core.builders import request, state

ALL = sorted(scorers.available())
# Times every scorer, and each example is a whole pool of endpoints.
EXAMPLES = settings(max_examples=25)
every_scorer = pytest.mark.parametrize("name", ALL)

# Scorer -> rows from best to worst: the direction it claims.
BETTER_FIRST: dict[str, list[EndpointState]] = {
    "queue-depth": [state(waiting=float(value)) for value in (0, 1, 2, 9, 500)],
    "running-requests": [state(running=float(value)) for value in (0, 1, 2, 9, 500)],
    "kv-usage": [state(kv_usage=value) for value in (0.0, 0.1, 0.5, 0.99, 1.0)],
    "in-flight-requests": [state(in_flight=value) for value in (0, 1, 2, 9, 500)],
    "in-flight-tokens": [state(in_flight_tokens=value) for value in (0, 1, 1000, 10**6)],
    "lora-affinity": [
        state(signals=Signals(at=0.0, lora=lora))
        for lora in (
            Lora(frozenset({"m"}), frozenset(), 1),
            Lora(frozenset(), frozenset(), 1),
            Lora(frozenset({"x"}), frozenset({"m"}), 1),
            Lora(frozenset({"x"}), frozenset(), 1),
        )
    ],
}
# Chosen by identity, not by load: there is no better and worse row.
NO_ORDER = {"no-hit-lru", "prefix-cache", "session-affinity"}


def scores(made: Scorer, asked: InferenceRequest, rows: Sequence[EndpointState]) -> list[float | None]:
    return list(made.score(asked, rows))


@every_scorer
@EXAMPLES
@given(asked=requests(), rows=states())
def test_one_score_per_row_within_zero_and_one(name: str, asked: InferenceRequest, rows: list[EndpointState]) -> None:
    found = scores(scorers.build(name), asked, rows)
    assert len(found) == len(rows)
    for score in found:
        assert score is None or 0.0 <= score <= 1.0, "NaN fails here too"


@every_scorer
@EXAMPLES
@given(asked=requests(), rows=states())
def test_pure(name: str, asked: InferenceRequest, rows: list[EndpointState]) -> None:
    made = scorers.build(name)
    asked_before, rows_before = copy.deepcopy(asked), copy.deepcopy(rows)

    first = scores(made, asked, rows)

    assert (asked, rows) == (asked_before, rows_before)
    assert scores(made, asked, rows) == first
    assert scores(scorers.build(name), asked, tuple(rows)) == first


@every_scorer
@EXAMPLES
@given(data=st.data(), asked=requests(), rows=states(max_size=4))
def test_the_order_of_rows_does_not_matter(
    name: str, data: st.DataObject, asked: InferenceRequest, rows: list[EndpointState]
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    made = scorers.build(name)
    straight = scores(made, asked, rows)
    assert scores(made, asked, [rows[index] for index in order]) == [straight[index] for index in order]


@every_scorer
def test_works_without_rows(name: str) -> None:
    assert scores(scorers.build(name), request(1, session="s", model="m"), []) == []


@every_scorer
def test_an_endpoint_that_tells_nothing_has_no_engine_data(name: str) -> None:
    """No data is not a bad score: only what we know ourselves may be scored without a scrape."""
    (score,) = scores(scorers.build(name), request(1, model="m"), [state()])
    assert score == (1.0 if name.startswith("in-flight") else None)


@every_scorer
def test_its_direction(name: str) -> None:
    if name in NO_ORDER:
        return
    found = scores(scorers.build(name), request(1, model="m"), BETTER_FIRST[name])
    known = [score for score in found if score is not None]
    assert len(known) == len(found)
    assert known == sorted(known, reverse=True)
    assert len(set(known)) == len(known)


@every_scorer
@EXAMPLES
@given(more=st.floats(0, 1e6), load=st.floats(0, 1e6))
def test_never_better_with_more_load(name: str, more: float, load: float) -> None:
    fields: dict[str, Any] = {"waiting": load, "running": load, "in_flight": int(load), "in_flight_tokens": int(load)}
    light = state("a", kv_usage=min(1.0, load / 1e6), **fields)
    worse = {key: type(value)(value + more) for key, value in fields.items()}
    heavy = state("a", kv_usage=min(1.0, (load + more) / 1e6), **worse)
    made, asked = scorers.build(name), request(1, model="m")
    before, after = scores(made, asked, [light])[0], scores(made, asked, [heavy])[0]
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert after <= before


def test_every_scorer_says_what_its_direction_is() -> None:
    """A new scorer needs a line here, or in NO_ORDER."""
    assert BETTER_FIRST.keys() | NO_ORDER == set(scorers.BUILTIN)


@every_scorer
def test_parameters_survive_a_round_trip(name: str) -> None:
    """Configured parameters are checked against the fields' types, so those must be plain data."""
    made = scorers.build(name)
    assert msgspec.convert(msgspec.to_builtins(made), type(made)) == made
