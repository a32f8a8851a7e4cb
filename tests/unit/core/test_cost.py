"""What a decision and a tick may cost: the hot path of every request. Exact figures come from the benchmark."""

from __future__ import annotations

from bench.scheduler import decide_us, tick_us

# Five times what is wanted, for busy machines.
ALLOWANCE = 5


def test_a_decision_over_a_hundred_endpoints() -> None:
    assert decide_us(100, rounds=300) < 200 * ALLOWANCE


def test_a_tick_with_four_thousand_requests() -> None:
    """At ten ticks a second, 2 ms are two percent of a core."""
    assert tick_us(10, flights=4096) < 2000 * ALLOWANCE


def test_a_tick_over_a_frozen_endpoint_with_four_thousand_requests() -> None:
    """The costly case: every request has to be looked at."""
    assert tick_us(1, flights=4096, start_s=2.0) < 10_000 * ALLOWANCE
