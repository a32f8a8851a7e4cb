"""Engines that die under load: SIGKILL of one, SIGKILL of all, a restart that comes from within."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.integration.fault_rig import Fleet, Watch, report, running, standings, until

# Done when 3: out of rotation within 2 s. Back within 5 s of listening again.
OUT_WITHIN_S = 2.0
BACK_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("death"), 3, {}) as fleet:
        yield fleet


async def test_sigkill_of_one_engine(fleet: Fleet) -> None:
    await fleet.heal()
    victim = fleet.engines[1]
    async with Watch(fleet.gateway) as watch, fleet.load() as load:
        await asyncio.sleep(1)
        killed_at = victim.kill()
        await asyncio.sleep(1.5)
        ready_at = await victim.restarted()
        await until(lambda: watch.chosen(victim.id, ready_at))
        await asyncio.sleep(1)
    await fleet.audit()

    out_s, back_s = watch.out_after_s(victim.id, killed_at), watch.back_after_s(victim.id, ready_at)
    report("sigkill of one", out_s=out_s, back_s=back_s, fates=load.fates(killed_at))
    assert not load.early_failures()
    # What broke off was under way on the victim when it died; everything else is whole.
    assert set(load.fates()) <= {"ok", "error_event upstream_reset"}
    assert all(call.sent_at < killed_at and call.endpoint == victim.id for call in load.calls if call.broken_off)
    assert out_s < OUT_WITHIN_S + load.stalled_s(killed_at)
    assert back_s < BACK_WITHIN_S + load.stalled_s(ready_at)
    assert load.served(ready_at + back_s)[victim.id] > 0


async def test_all_engines_down(fleet: Fleet) -> None:
    await fleet.heal()
    async with fleet.load() as load:
        await asyncio.sleep(0.5)
        killed_at = [engine.kill() for engine in fleet.engines][-1]
        await asyncio.sleep(1)
        revived, started_at = fleet.engines[2], time.time()
        ready_at = await revived.restarted()
        await until(lambda: load.served(ready_at))
        back_s = min(call.first_byte_at or 0 for call in load.calls if call.sent_at > ready_at and call.fate == "ok")
        await asyncio.sleep(0.5)
    await asyncio.gather(*(engine.restarted() for engine in fleet.engines[:2]))
    await fleet.audit()

    refused = [call for call in load.calls if killed_at + 0.2 < call.sent_at and call.ended_at < started_at]
    slowest_s = max(call.ended_at - call.sent_at for call in refused)
    report("all down", back_s=back_s - ready_at, slowest_refusal_s=slowest_s, fates=load.fates(killed_at))
    assert {call.fate for call in refused} == {"503 no_ready_endpoints"}
    assert slowest_s < 0.5 + load.stalled_s(killed_at)
    for call in refused:
        assert int(call.headers["retry-after-ms"]) > 0
        assert int(call.headers["retry-after"]) > 0
    assert set(load.served(ready_at)) == {revived.id}
    assert back_s - ready_at < BACK_WITHIN_S + load.stalled_s(ready_at)


async def test_an_engine_restarts_by_itself(fleet: Fleet) -> None:
    await fleet.heal()
    victim = fleet.engines[0]
    position = fleet.gateway.position()
    async with Watch(fleet.gateway) as watch, fleet.load() as load:
        await asyncio.sleep(0.5)
        at = await victim.switch(restart=1.0)
        await asyncio.sleep(1.2)
        await until(lambda: watch.chosen(victim.id, at + 1.0))
        await asyncio.sleep(0.5)
    await fleet.audit()

    out_s, back_s = watch.out_after_s(victim.id, at), watch.back_after_s(victim.id, at + 1.0)
    report("restart", out_s=out_s, back_s=back_s, fates=load.fates(at))
    assert not load.early_failures()
    assert set(load.fates()) <= {"ok", "error_event upstream_reset"}
    assert out_s < OUT_WITHIN_S + load.stalled_s(at)
    assert back_s < BACK_WITHIN_S + load.stalled_s(at)
    assert standings(fleet.gateway.log(position), victim.id)[-1][1] == "ready"
