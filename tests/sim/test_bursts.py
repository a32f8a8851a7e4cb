"""Bursts, unequal engines and frozen engines, seeded, on a simulated clock."""

from __future__ import annotations

from collections import Counter

import pytest

from picker.core.values import Standing
from tests.sim.pool import Engine, Pool
from tests.unit.core.builders import row, scraped

SEEDS = range(5)


def pool_of(count: int, **options: object) -> Pool:
    return Pool({f"pod-{index:02}": Engine() for index in range(count)}, **options)  # type: ignore[arg-type]


def share(counts: Counter[str], name: str) -> float:
    return counts[name] / max(1, counts.total())


def drained(pool: Pool) -> bool:
    """Whether all counters are 0 after everything ended."""
    pool.run(60.0, clients=0)
    rows = pool.store.snapshot(pool.now).states
    return not len(pool.store.ledger) and all(each.in_flight == 0 and each.in_flight_tokens == 0 for each in rows)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("count", "spread"), [(3, 1.1), (10, 1.2)])
def test_a_burst_between_two_scrapes_is_spread(count: int, spread: float, seed: int) -> None:
    """64 requests in one instant, while every scrape still says that all are idle."""
    pool = pool_of(count, seed=seed)
    for _ in range(64):
        pool.send()
    counts = [pool.chosen[name] for name in pool.engines]
    assert sum(counts) == 64
    assert max(counts) / min(counts) <= spread


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [3, 10])
def test_a_burst_does_not_herd_onto_the_one_that_looked_idle(count: int, seed: int) -> None:
    """One stale scrape says idle, the others say eight running: it may get more, not everything."""
    pool = pool_of(count, seed=seed)
    for name in list(pool.engines)[1:]:
        pool.store.apply(scraped(name, pool.now, waiting=0.0, running=8.0, kv_usage=0.3))
    for _ in range(64):
        pool.send()
    fair = 64 / count
    assert fair <= pool.chosen["pod-00"] <= 2.5 * fair
    assert min(pool.chosen[name] for name in pool.engines) >= fair / 4


@pytest.mark.parametrize("seed", SEEDS)
def test_one_engine_without_metrics_gets_a_fair_part_of_a_burst(seed: int) -> None:
    pool = pool_of(3, seed=seed)
    for name in list(pool.engines)[1:]:
        pool.store.apply(scraped(name, pool.now + 0.001, waiting=0.0, running=0.0, kv_usage=0.0))
    pool.store.apply(scraped("pod-00", pool.now + 0.001))
    for _ in range(64):
        pool.send()
    assert 0.15 <= share(pool.chosen, "pod-00") <= 0.55


@pytest.mark.parametrize("scrape_s", [0.2, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_steady_load_on_equals_stays_even_with_late_scrapes(seed: int, scrape_s: float) -> None:
    pool = pool_of(3, seed=seed, scrape_s=scrape_s)
    pool.run(20.0, clients=64)
    counts = [pool.chosen[name] for name in pool.engines]
    assert max(counts) / min(counts) < 1.15
    assert drained(pool)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_engine_gets_less_and_the_mean_beats_round_robin(seed: int) -> None:
    def run(policy: str) -> Pool:
        engines = {"fast-1": Engine(), "fast-2": Engine(), "slow": Engine(service_s=4.0)}
        pool = Pool(engines, policy=policy, seed=seed)
        pool.run(40.0, clients=40)
        return pool

    balanced, turns = run("balanced"), run("round-robin")

    assert share(balanced.chosen, "slow") < 0.6 / 3
    assert len(balanced.latencies_s) > 1.5 * len(turns.latencies_s), "requests served in the same time"
    assert _mean(balanced.latencies_s) < _mean(turns.latencies_s)
    assert drained(balanced)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [3, 10])
def test_a_frozen_engine_is_left_and_its_requests_are_served_elsewhere(count: int, seed: int) -> None:
    pool = pool_of(count, seed=seed)
    pool.run(5.0, clients=64)
    before = len(pool.latencies_s)
    pool.engines["pod-00"].frozen = True
    frozen_at = pool.now
    while row(pool.store, "pod-00", pool.now).standing is not Standing.OUT:
        pool.run(0.1, clients=64)
        assert pool.now - frozen_at < 4.0

    sent = pool.chosen["pod-00"]
    pool.run(4.0, clients=64)

    assert pool.chosen["pod-00"] == sent, "nothing more goes there"
    assert pool.refused == 0
    assert 0 < pool.evicted["pod-00"] <= 64
    assert set(pool.evicted) == {"pod-00"}
    assert len(pool.latencies_s) > before + 64
    pool.run(60.0, clients=64)
    assert pool.chosen["pod-00"] - sent <= 6, "only trials, ever more rarely"

    pool.engines["pod-00"].frozen = False
    pool.run(120.0, clients=64)
    assert row(pool.store, "pod-00", pool.now).standing is Standing.READY
    assert drained(pool)


def test_a_frozen_engine_alone_takes_nobody_else_down() -> None:
    """The healthy engines are slow, busy and queueing; none of that is a hang."""
    engines = {f"pod-{index}": Engine(slots=2, service_s=3.0) for index in range(3)}
    pool = Pool(engines, seed=1)
    pool.run(30.0, clients=64)
    assert pool.evicted == Counter()
    assert all(each.standing is Standing.READY for each in pool.store.snapshot(pool.now).states)


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> tuple[Counter[str], list[float]]:
        pool = pool_of(3, seed=seed)
        pool.run(5.0, clients=20)
        return pool.chosen, pool.latencies_s

    assert run(1) == run(1)
    assert run(1) != run(2)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
