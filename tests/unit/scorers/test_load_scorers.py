"""The scorers of load: queue, batch, KV cache, and our own requests and tokens."""

from __future__ import annotations

import pytest

from picker.core.values import EndpointState
from scorers.in_flight_requests import InFlightRequests
from scorers.in_flight_tokens import InFlightTokens
from scorers.kv_usage import KvUsage
from scorers.queue_depth import QueueDepth
from scorers.running_requests import RunningRequests
from tests.unit.core.builders import request, state

ASKED = request(1)


def test_queue_depth() -> None:
    states = [state(waiting=0.0), state(waiting=4.0), state(waiting=12.0), state()]
    assert list(QueueDepth().score(ASKED, states)) == [1.0, 0.5, 0.25, None]
    assert list(QueueDepth(scale=12.0).score(ASKED, states)) == [1.0, 0.75, 0.5, None]


def test_running_requests() -> None:
    states = [state(running=0.0), state(running=32.0), state()]
    assert list(RunningRequests().score(ASKED, states)) == [1.0, 0.5, None]


def test_kv_usage() -> None:
    states = [state(kv_usage=0.0), state(kv_usage=0.25), state(kv_usage=1.0), state(kv_usage=None), state()]
    assert list(KvUsage().score(ASKED, states)) == [1.0, 0.75, 0.0, None, None]


def test_in_flight_requests_always_has_data() -> None:
    states = [state(), state(in_flight=8), state(in_flight=24)]
    assert list(InFlightRequests().score(ASKED, states)) == [1.0, 0.5, 0.25]


def test_in_flight_tokens_weighs_one_long_prompt_more_than_ten_questions() -> None:
    one_long, ten_short = state(in_flight=1, in_flight_tokens=100_000), state(in_flight=10, in_flight_tokens=3_000)
    long, short = InFlightTokens().score(ASKED, [one_long, ten_short])
    assert long is not None
    assert short is not None
    assert long < short


@pytest.mark.parametrize(("few", "many"), [((0.0, 1.0), (0.0, 500.0))])
def test_a_small_difference_weighs_less_than_a_large_one(few: tuple[float, float], many: tuple[float, float]) -> None:
    """Min-max scaling would give both pairs the same scores."""

    def gap(pair: tuple[float, float]) -> float:
        first, second = QueueDepth().score(ASKED, [state(waiting=value) for value in pair])
        assert first is not None
        assert second is not None
        return first - second

    assert gap(few) < 0.25 < 0.9 < gap(many)


def test_a_score_does_not_depend_on_the_neighbours() -> None:
    here: EndpointState = state("a", waiting=3.0)
    alone = QueueDepth().score(ASKED, [here])[0]
    assert QueueDepth().score(ASKED, [state("b", waiting=900.0), here])[1] == alone
