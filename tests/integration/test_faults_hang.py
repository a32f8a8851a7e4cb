"""Engines that stop answering without dying, under load: everything silent, or only the engine behind a live front
end that answers probes, shows an idle engine and sends the headers of streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.integration.fault_rig import Fleet, Watch, report, running, standings, until

# Done when 3: out within 2 s; a frozen engine within 2 s after max(2 s, 4 x the expected first byte) without progress.
# With prompts as short as these the expected first byte is under 0.5 s.
OUT_WITHIN_S = 2.0
FROZEN_S = 2.0
BACK_WITHIN_S = 5.0
IDLE_S = 3.0
CONNECT_S = 2.0
CONFIG = {
    "health": {"breaker_open": "1s"},
    "timeouts": {"connect": f"{CONNECT_S}s", "first_byte": "30s", "between_chunks": f"{IDLE_S}s"},
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("hang"), 3, CONFIG) as fleet:
        yield fleet


@pytest.mark.parametrize(
    ("hang", "streams", "limit_s"),
    [
        ("all", 0.5, OUT_WITHIN_S),
        ("all", 0.0, OUT_WITHIN_S),
        ("engine", 0.5, FROZEN_S + OUT_WITHIN_S),
    ],
)
async def test_hang(fleet: Fleet, hang: str, streams: float, limit_s: float) -> None:
    await fleet.heal()
    victim = fleet.engines[1]
    position = fleet.gateway.position()
    async with Watch(fleet.gateway) as watch, fleet.load(streams=streams) as load:
        await asyncio.sleep(0.7)
        hung_at = await victim.switch(hang=hang)
        await load.pass_time(hung_at, IDLE_S + 2.5)
        healed_at = await victim.switch(hang=None)
        await until(lambda: load.served(healed_at)[victim.id] > 20, fleet.describe)
    await fleet.audit()

    out = [at - hung_at for at, standing, _ in standings(fleet.gateway.log(position), victim.id) if standing == "out"]
    elsewhere = [call for call in load.calls if call.sent_at < hung_at + out[0] and hung_at + 1 < call.ended_at]
    waited = [call for call in elsewhere if call.fate == "ok" and call.ended_at - call.sent_at > 1]
    broken = [call for call in load.calls if call.broken_off]
    report(
        f"hang {hang}, {streams:.0%} streams",
        out_s=out[0],
        last_decision_s=watch.out_after_s(victim.id, hung_at),
        back_s=watch.back_after_s(victim.id, healed_at),
        rescued=len(waited),
        rescued_after_s=max((call.ended_at - hung_at for call in waited), default=0.0),
        broken_off_after_s=max((call.ended_at - hung_at for call in broken), default=0.0),
        fates=load.fates(hung_at),
    )
    late_s = load.stalled_s(hung_at)
    assert out[0] < limit_s + late_s
    assert watch.out_after_s(victim.id, hung_at) < limit_s + late_s
    assert not load.early_failures()
    # Whoever had no first byte yet was served elsewhere, while the victim still hung.
    assert waited
    assert all(call.ended_at < healed_at and call.endpoint != victim.id for call in waited)
    # Whoever was in the middle of a stream got an error event when the idle timeout passed.
    assert set(load.fates()) <= {"ok", "error_event upstream_timeout"}
    assert all(call.first_byte_at is not None and call.first_byte_at < hung_at + 0.2 for call in broken)
    assert all(call.ended_at - hung_at < 2 * IDLE_S + late_s for call in broken)
    assert watch.back_after_s(victim.id, healed_at) < BACK_WITHIN_S + load.stalled_s(healed_at)


async def test_a_lost_host(fleet: Fleet) -> None:
    """Connects get no answer at all: the connect timeout of 2 s passes, then others serve."""
    await fleet.heal()
    victim = fleet.engines[2]
    position = fleet.gateway.position()
    async with Watch(fleet.gateway) as watch, fleet.load() as load:
        await asyncio.sleep(0.5)
        with victim.swallowed() as lost_at:
            await load.pass_time(lost_at, 3)
        ready_at = await victim.restarted()
        await until(lambda: load.served(ready_at)[victim.id] > 20, fleet.describe)
    await fleet.audit()

    out = [at - lost_at for at, standing, _ in standings(fleet.gateway.log(position), victim.id) if standing == "out"]
    slowest_s = max(call.ended_at - call.sent_at for call in load.calls)
    back_s = watch.back_after_s(victim.id, ready_at)
    report("lost host", out_s=out[0], back_s=back_s, slowest_s=slowest_s, fates=load.fates(lost_at))
    assert out[0] < OUT_WITHIN_S + load.stalled_s(lost_at)
    assert not load.early_failures()
    assert set(load.fates()) <= {"ok", "error_event upstream_reset"}
    assert slowest_s < 5 * CONNECT_S + load.stalled_s(lost_at)
    assert back_s < BACK_WITHIN_S + load.stalled_s(ready_at)
