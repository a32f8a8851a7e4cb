"""`waypost run` as people run it: a process, its signals, its exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.integration.gateway_rig import CHAT, EVENT_STREAM, HELLO, JSON, MODEL, STREAM, backend, says
from tests.unit.upstream.hostile import PATIENCE_S, Peer, Received, answer, chunked

# Starting takes half a second of imports on a quiet machine.
START_S = 6 * PATIENCE_S
STREAM_BEGIN = b"".join(
    (
        b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\nTransfer-Encoding: chunked\r\n\r\n",
        *chunked(b"data: 1\n\n", end=False),
    )
)


class Process:
    """A running `waypost run`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    @property
    def cut(self) -> list[int]:
        """What it said at its end about requests it cut."""
        return [line["cut"] for line in self.lines if line["event"] == "stopped"]

    async def line(self, event: str) -> dict[str, Any]:
        """The next log line of one kind."""
        assert self.process.stderr is not None
        async with asyncio.timeout(START_S):
            while raw := await self.process.stderr.readline():
                assert raw.startswith(b"{"), raw
                self.lines.append(json.loads(raw))
                if self.lines[-1]["event"] == event:
                    return self.lines[-1]
        raise AssertionError(f"ended without {event}: {self.lines}")

    async def exit_code(self) -> int:
        """Waits for the end."""
        async with asyncio.timeout(START_S):
            assert self.process.stderr is not None
            for raw in (await self.process.stderr.read()).splitlines():
                assert raw.startswith(b"{"), raw
                self.lines.append(json.loads(raw))
            return await self.process.wait()


@contextlib.asynccontextmanager
async def waypost(*arguments: str) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "gateway.cli", *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WAYPOST_")}
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environ)
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def run(url: str, *more: str) -> contextlib.AbstractAsyncContextManager[Process]:
    return waypost("run", "--to", url, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", *more)


@contextlib.asynccontextmanager
async def streaming(url: str) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncIterator[bytes]]]:
    """A client of the gateway, and the pieces of a stream whose first event came."""
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=START_S) as client,
        client.stream("POST", CHAT, content=STREAM, headers={"content-type": "application/json"}) as got,
    ):
        pieces = aiter(got.aiter_bytes())
        assert await anext(pieces) == b"data: 1\n\n"
        yield client, pieces


async def test_sigterm_lets_a_stream_finish_and_exits_0() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer, request: Received) -> None:
        await peer.send(STREAM_BEGIN)
        await go_on.wait()
        await peer.send(*chunked(b"data: 2\n\n"))

    async with backend(script, models=[MODEL]) as engine, run(engine.url) as gateway:
        url = (await gateway.line("listening"))["gateway"]
        async with streaming(url) as (_, pieces):
            gateway.process.send_signal(signal.SIGTERM)
            assert (await gateway.line("draining"))["active"] == 1
            await _refuses(url)
            assert gateway.process.returncode is None
            go_on.set()
            assert b"".join([piece async for piece in pieces]) == b"data: 2\n\n"
        assert await gateway.exit_code() == 0
        assert gateway.cut == [0]


async def _refuses(url: str) -> None:
    """New connections are refused once the listener is closed."""
    deadline = time.monotonic() + PATIENCE_S
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as client:
        while time.monotonic() < deadline:
            try:
                answer = await client.post(CHAT, content=HELLO, headers={"connection": "close"})
            except httpx.TransportError:
                return
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "shutting_down"
            await asyncio.sleep(0.02)
    raise AssertionError("still takes requests")


async def test_a_second_signal_ends_at_once_and_says_what_it_cut() -> None:
    async with backend(hangs, models=[MODEL]) as engine, run(engine.url, "--drain-timeout", "60s") as gateway:
        async with streaming((await gateway.line("listening"))["gateway"]):
            gateway.process.send_signal(signal.SIGTERM)
            await gateway.line("draining")
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            assert await gateway.exit_code() == 1
            assert time.monotonic() - begun < PATIENCE_S
        assert gateway.cut == [1]


async def hangs(peer: Peer, request: Received) -> None:
    """Never ends an answer."""
    if request.body == STREAM:
        await peer.send(STREAM_BEGIN)
    await peer.gone()


async def test_what_does_not_end_in_time_is_told_so_and_counted() -> None:
    async with backend(hangs, models=[MODEL]) as engine, run(engine.url, "--drain-timeout", "1s") as gateway:
        async with streaming((await gateway.line("listening"))["gateway"]) as (client, pieces):
            whole = asyncio.create_task(client.post(CHAT, content=HELLO, headers={"content-type": "application/json"}))
            while sum(request.method == "POST" for request in engine.received) < 2:
                await asyncio.sleep(0.005)
            gateway.process.send_signal(signal.SIGTERM)
            rest = b"".join([piece async for piece in pieces])
            assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
            answered = await whole
            assert (answered.status_code, answered.json()["error"]["code"]) == (503, "shutting_down")
        assert await gateway.exit_code() == 1
        assert gateway.cut == [2]


async def test_a_bare_address_and_the_admin_port() -> None:
    async with (
        backend(says(answer(b'{"ok":1}', JSON)), models=[MODEL]) as engine,
        run(engine.url.removeprefix("http://")) as gateway,
    ):
        listening = await gateway.line("listening")
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
            headers = {"content-type": "application/json"}
            got = await client.post(listening["gateway"] + CHAT, content=HELLO, headers=headers)
            assert (got.status_code, got.content) == (200, b'{"ok":1}')
            assert (await client.get(listening["admin"] + "/readyz")).status_code == 200
            assert "waypost_requests_total{" in (await client.get(listening["admin"] + "/metrics")).text
        gateway.process.send_signal(signal.SIGINT)
        assert await gateway.exit_code() == 0


async def test_a_taken_port_is_an_error_one_can_read() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with waypost("run", "--to", "http://127.0.0.1:1", "--listen", address) as gateway:
            assert gateway.process.stderr is not None
            said = await asyncio.wait_for(gateway.process.stderr.read(), START_S)
            assert await gateway.process.wait() == 1
            assert b"waypost: " in said
            assert b"Address already in use" in said
            assert b"Traceback" not in said
