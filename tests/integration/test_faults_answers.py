"""Engines that answer badly under load: errors, resets, closed connections, slowness, metrics that lie or are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.fault_rig import Fleet, Watch, report, running, standings
from tests.integration.test_faults_client import Load

FAULT_S = 1.2
# A third of the traffic is a fair share; these leave room for the noise of some hundred requests.
LITTLE = 0.22
FAIR = (0.12, 0.55)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("answers"), 3, {"health": {"breaker_open": "500ms"}}) as fleet:
        yield fleet


async def campaign(fleet: Fleet, **faults: Any) -> tuple[Load, float, float, float]:
    """Load, a fault, and its end. Returns the load, when the fault began, and the victim's share of the decisions
    during the fault and after it.
    """
    await fleet.heal()
    victim = fleet.engines[1]
    position = fleet.gateway.position()
    async with Watch(fleet.gateway) as watch, fleet.load() as load:
        await asyncio.sleep(0.4)
        at = await victim.switch(**faults)
        await asyncio.sleep(FAULT_S)
        healed_at = await victim.switch(reset=True)
        # The breaker may have to run out, doubled by a failed trial.
        await asyncio.sleep(0.6)
        back_at = await fleet.all_ready(signals=False)
        await asyncio.sleep(0.7)
    await fleet.audit()
    # The first moments belong to what was decided before, and to the engine's own catching up.
    during, after = watch.share(victim.id, at + 0.2, healed_at), watch.share(victim.id, back_at, float("inf"))
    changes = [
        (round(when - at, 2), standing) for when, standing, _ in standings(fleet.gateway.log(position), victim.id)
    ]
    report(str(faults), share=during, after=after, back_s=back_at - healed_at, fates=load.fates(at), standings=changes)
    assert 0.05 < after < 0.6
    return load, at, during, after


async def test_503_is_retried_elsewhere(fleet: Fleet) -> None:
    load, _, during, _ = await campaign(fleet, error_rate={"503": 0.5})
    assert set(load.fates()) == {"ok"}
    assert during < LITTLE


async def test_500_passes_to_the_client_and_opens_the_breaker(fleet: Fleet) -> None:
    load, at, during, _ = await campaign(fleet, error_rate={"500": 1.0})
    fates = load.fates(at)
    assert set(fates) == {"ok", "500 500"}
    # Five in a row open the breaker; answers begun before the fault come in between.
    assert 5 <= fates["500 500"] < 150
    assert all(b"Injected fault." in call.body for call in load.calls if call.status == 500)
    assert during < LITTLE


async def test_closed_before_the_response(fleet: Fleet) -> None:
    load, _, during, _ = await campaign(fleet, close_before_response=True)
    assert set(load.fates()) == {"ok"}
    assert during < LITTLE


async def test_reset_in_the_middle_of_every_stream(fleet: Fleet) -> None:
    victim = fleet.engines[1]
    load, at, during, _ = await campaign(fleet, reset_after_chunks=3)
    assert not load.early_failures()
    assert set(load.fates()) <= {"ok", "error_event upstream_reset"}
    broken = [call for call in load.calls if call.broken_off]
    assert broken
    assert all(call.stream and call.endpoint == victim.id and call.ended_at > at for call in broken)
    assert during < LITTLE


async def test_slow_engine_gets_less(fleet: Fleet) -> None:
    load, _, during, _ = await campaign(fleet, slow=8.0)
    assert set(load.fates()) == {"ok"}
    assert during < LITTLE


async def test_stale_metrics_do_not_attract_traffic(fleet: Fleet) -> None:
    load, _, during, _ = await campaign(fleet, stale_metrics=True)
    assert set(load.fates()) == {"ok"}
    assert during < FAIR[1]


async def test_no_metrics_any_more(fleet: Fleet) -> None:
    """The engine is then routed on what is in flight there, like one that never had metrics."""
    load, _, during, _ = await campaign(fleet, metrics="off")
    assert set(load.fates()) == {"ok"}
    assert FAIR[0] < during < FAIR[1]
