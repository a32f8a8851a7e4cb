"""The picker behind a real Envoy knows what engines hold, and learns from the answers that pass by."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.integration.envoy import RealEnvoy
from tests.integration.envoy_config import BodyMode, EnvoyListener
from tests.integration.prefix_rig import (
    ONLINE,
    Sim,
    Site,
    check_exact,
    configured,
    converse,
    door_process,
    heard,
    ids,
    running,
    settled,
    worker_of,
)
from tests.integration.rolling_rig import Door, free_port_on

ENCODINGS = ("vllm", "sglang-array")
FULL: BodyMode = "FULL_DUPLEX_STREAMED"


# Request and response mode by listener.
MODES: dict[str, tuple[BodyMode, BodyMode]] = {
    "duplex": (FULL, FULL),
    "buffered": ("BUFFERED", "NONE"),
    "streamed": ("STREAMED", FULL),
    "headers": ("NONE", "NONE"),
}


@contextlib.asynccontextmanager
async def envoy(directory: Path, urls: Sequence[str]) -> AsyncIterator[tuple[Site, Door, RealEnvoy]]:
    """An Envoy that asks `waypost picker`; requests go through its duplex listener."""
    grpc, health, admin = (str(free_port_on(["127.0.0.1"])) for _ in range(3))
    file = configured(directory, urls, {}, log={"format": "json"}, picker={"secure_serving": False})
    ports = ("--grpc-port", grpc, "--grpc-health-port", health, "--metrics-port", admin)
    arguments = ("picker", "--bind", "127.0.0.1", "--config", file, *ports)
    listeners = [
        EnvoyListener(
            name=name,
            request_body_mode=request,
            response_body_mode=response,
            buffer_bytes=1 << 20 if request == "BUFFERED" else None,
        )
        for name, (request, response) in MODES.items()
    ]
    async with (
        door_process(directory, arguments, "", f"http://127.0.0.1:{admin}") as (site, door),
        RealEnvoy(directory, listeners, picker_address=f"127.0.0.1:{grpc}") as proxy,
    ):
        site.url, site.proxied = proxy.url("duplex"), True
        yield site, door, proxy


async def test_chats_are_decided_by_what_the_engines_hold(tmp_path: Path) -> None:
    sims = [
        Sim("--model", encoding, "--kv-events", encoding, "--block-size", "16", engines=2) for encoding in ENCODINGS
    ]
    async with running(*sims) as urls, envoy(tmp_path, urls) as (site, door, _):
        await heard(site, 4, *ENCODINGS)
        for encoding in ENCODINGS:
            await asyncio.gather(*(converse(site, encoding, number=n, turns=1) for n in range(100, 108)))
            chats = await asyncio.gather(*(converse(site, encoding, number=n, turns=13) for n in range(8)))
            told = [turn for chat in chats for turn in chat]
            check_exact(told)
        os.kill(worker_of(door), signal.SIGKILL)
        await site.until(ONLINE, lambda online: online == 0)
        # Without replays, engines are known again by what they tell from then on.
        await heard(site, 4, *ENCODINGS)
        again = await settled(site, {"model": ENCODINGS[0], "prompt": ids(7, 300)})
        assert again.held_tokens == again.cached == 288


async def test_other_ways_of_showing_a_body(tmp_path: Path) -> None:
    """What the picker does not see before it has to decide, it cannot have keys of."""
    sim = Sim("--kv-events", "vllm", "--block-size", "16")
    async with running(sim) as urls, envoy(tmp_path, urls) as (site, _, proxy):
        await heard(site)
        body = {"prompt": ids(1, 500)}
        told = await settled(site, body)
        for name, keys in (("duplex", "tokens"), ("buffered", "tokens"), ("streamed", None), ("headers", None)):
            site.url = proxy.url(name)
            told = await site.ask(body)
            assert (told.keys, told.held_tokens, told.cached) == (keys, 496 if keys else 0, 496), name
