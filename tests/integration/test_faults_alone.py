"""One endpoint and nobody to turn to: what clients are told while it is broken, and clients that leave in the middle of
each kind of trouble.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.fault_rig import Fleet, report, running, until
from tests.integration.test_faults_client import Call, connect

IDLE_S = 3.0
CONFIG = {
    "health": {"breaker_open": "500ms"},
    "timeouts": {"first_byte": "30s", "between_chunks": f"{IDLE_S}s"},
}
# Upstream is cut within 100 ms of a disconnect; five times that on a busy machine.
GONE_WITHIN_S = 0.5


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running(tmp_path_factory.mktemp("alone"), 1, CONFIG) as fleet:
        yield fleet


async def test_everything_hangs(fleet: Fleet) -> None:
    await fleet.heal()
    engine = fleet.engines[0]
    async with fleet.load() as load:
        await asyncio.sleep(0.5)
        hung_at = await engine.switch(hang="all")
        await load.pass_time(hung_at, IDLE_S + 0.5)
        healed_at = await engine.switch(hang=None)
        await until(lambda: load.served(healed_at), fleet.describe)
        back_s = time.time() - healed_at
        await asyncio.sleep(0.3)
    await fleet.audit()

    victims = [call for call in load.calls if call.sent_at < hung_at + 1.5 and call.ended_at > hung_at + 0.2]
    refused = [call for call in load.calls if hung_at + 2.5 < call.sent_at < healed_at - 0.5]
    waited_s = max(call.ended_at - hung_at for call in victims)
    slowest_s = max(call.ended_at - call.sent_at for call in refused)
    report("alone, hang all", waited_s=waited_s, slowest_refusal_s=slowest_s, back_s=back_s, fates=load.fates(hung_at))
    fates = {"504 upstream_timeout", "error_event upstream_timeout", "503 no_ready_endpoints"}
    assert {call.fate for call in victims} <= fates
    late_s = load.stalled_s(hung_at)
    assert waited_s < 2 * IDLE_S + late_s
    assert {call.fate for call in refused} == {"503 no_ready_endpoints"}
    assert slowest_s < 0.5 + late_s
    assert back_s < 5 + load.stalled_s(healed_at)


async def test_the_only_engine_dies(fleet: Fleet) -> None:
    await fleet.heal()
    engine = fleet.engines[0]
    async with fleet.load() as load:
        await asyncio.sleep(0.4)
        killed_at = engine.kill()
        await asyncio.sleep(0.5)
        started_at = time.time()
        ready_at = await engine.restarted()
        await until(lambda: load.served(ready_at), fleet.describe)
    await fleet.audit()

    victims = [call for call in load.calls if call.sent_at < killed_at < call.ended_at]
    refused = [call for call in load.calls if killed_at + 0.2 < call.sent_at and call.ended_at < started_at]
    report("alone, sigkill", victims=len(victims), fates=load.fates(killed_at))
    assert {call.fate for call in victims} <= {
        "ok",
        "error_event upstream_reset",
        "502 upstream_reset",
        "502 upstream_unreachable",
        "503 no_ready_endpoints",
    }
    assert max(call.ended_at for call in victims) - killed_at < 1 + load.stalled_s(killed_at)
    assert {call.fate for call in refused} == {"503 no_ready_endpoints"}


async def departure(
    fleet: Fleet, call: Call, *, then: dict[str, Any] | None = None, waits_for: str = "engine"
) -> float:
    """Sends a call, lets the fault `then` strike, and leaves. Returns the seconds until nothing was in flight."""
    wire = await connect(fleet.gateway.url)
    exchange = asyncio.create_task(wire.exchange(call))
    if waits_for == "chunk":
        await until(lambda: call.chunks)
    else:
        await asyncio.sleep(0.15)
    if then is not None:
        await fleet.engines[0].switch(**then)
        await asyncio.sleep(0.1)
    in_flight = sum(row["in_flight"] for row in (await fleet.gateway.endpoints()).values())
    assert in_flight == 1, call
    wire.abort()
    left_at = time.time()
    await exchange
    call.left = True
    return await fleet.emptied() - left_at


@pytest.mark.parametrize(
    ("before", "stream", "then"),
    [
        ({"hang": "all"}, False, None),
        ({"hang": "all"}, True, None),
        ({"hang": "engine"}, False, None),
        ({"hang": "engine"}, True, None),
        ({}, True, {"hang": "engine"}),
        ({}, True, {"hang": "all"}),
        ({"slow": 100.0}, False, None),
        ({}, True, {"slow": 100.0}),
    ],
    ids=str,
)
async def test_client_leaves(fleet: Fleet, before: dict[str, Any], stream: bool, then: dict[str, Any] | None) -> None:
    await fleet.heal()
    engine = fleet.engines[0]
    await engine.switch(**before)
    call = fleet.load().new_call(stream=stream, tokens=200)
    gone_s = await departure(fleet, call, then=then, waits_for="chunk" if then is not None else "engine")
    # The engine was told: nothing is left to do there, or will be once it reads again.
    await engine.switch(hang=None)

    async def dropped() -> bool:
        state = await engine.state()
        return not state["running"] and not state["waiting"]

    await until(dropped)
    report(f"client leaves, {before or then}, stream {stream}", gone_s=gone_s)
    assert gone_s < GONE_WITHIN_S
    (line,) = [line for line in fleet.gateway.log(fleet.audited_to) if line["event"] == "request"]
    assert line["outcome"] == "client_gone"
    await fleet.audit()


async def test_client_leaves_while_the_engine_is_stopped(fleet: Fleet) -> None:
    """A stopped process: the kernel accepts connections and nobody reads them."""
    await fleet.heal()
    engine = fleet.engines[0]
    engine.signal(signal.SIGSTOP)
    try:
        gone_s = await departure(fleet, fleet.load().new_call(stream=True))
    finally:
        engine.signal(signal.SIGCONT)
    report("client leaves, SIGSTOP", gone_s=gone_s)
    assert gone_s < GONE_WITHIN_S
    await fleet.audit()


async def test_client_leaves_in_the_middle_of_its_body(fleet: Fleet) -> None:
    await fleet.heal()
    call = fleet.load().new_call()
    reader, writer = await asyncio.open_connection(*fleet.gateway.url.removeprefix("http://").split(":"))
    payload = call.payload()
    writer.write(payload[:-20])
    await writer.drain()

    async def held() -> bool:
        return (await fleet.gateway.metrics())["waypost_request_bodies_bytes"] > 0

    await until(held)
    writer.transport.abort()
    left_at = time.time()
    call.left = True
    gone_s = await fleet.emptied() - left_at
    report("client leaves, half a body", gone_s=gone_s)
    assert gone_s < GONE_WITHIN_S
    await fleet.audit()
    assert reader.at_eof() or reader.exception()


async def test_errors_say_what_happened(fleet: Fleet) -> None:
    """The shape of the errors of this file, as the SDKs read it."""
    await fleet.heal()
    engine = fleet.engines[0]
    engine.kill()
    wire = await connect(fleet.gateway.url)
    load = fleet.load()
    calls = [load.new_call(stream=stream) for stream in (False, True)]
    for call in calls:
        await wire.exchange(call)
        error = json.loads(call.body)["error"]
        assert call.status in (502, 503)
        assert error["type"]
        assert error["message"]
        assert call.headers["x-request-id"] == call.id
    assert "retry-after-ms" in calls[1].headers
    wire.abort()
    await engine.restarted()
    await fleet.audit()
