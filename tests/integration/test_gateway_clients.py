"""Clients that leave, stop halfway, or do not read: their request ends on the engine, and nothing piles up."""

from __future__ import annotations

import asyncio
import gc
import socket
import time

import pytest

from gateway.http1 import GatewayProtocol
from picker.upstream.connection import Connection
from tests.integration.gateway_rig import (
    ABORT_S,
    CHAT,
    EVENT_STREAM,
    HELLO,
    JSON,
    STREAM,
    Client,
    backend,
    gateway,
    post,
    request_bytes,
    says,
    until,
)
from tests.unit.upstream.hostile import PATIENCE_S, Peer, Received, answer, chunked

OK = answer(b'{"ok":true}', JSON)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
BEGUN: dict[str, tuple[bytes, ...]] = {
    "no answer yet": (),
    "only headers": (STREAM_HEAD,),
    "in the stream": (STREAM_HEAD, *chunked(b"data: 1\n\n", end=False)),
    "in a whole answer": (b"HTTP/1.1 200 OK\r\n" + JSON + b"\r\nContent-Length: 100\r\n\r\n{",),
    "in an error": (b"HTTP/1.1 400 Bad Request\r\n" + JSON + b"\r\nContent-Length: 100\r\n\r\n{",),
    "in a refusal": (b"HTTP/1.1 503 Busy\r\n" + JSON + b"\r\nContent-Length: 100\r\n\r\n{",),
}


class Unfinished:
    """A script that begins answers, never ends them, and notes when they were aborted."""

    def __init__(self, *begin: bytes) -> None:
        self._begin = begin
        self.begun: asyncio.Queue[None] = asyncio.Queue()
        self.aborted_at: asyncio.Queue[float] = asyncio.Queue()

    async def __call__(self, peer: Peer, request: Received) -> None:
        await peer.send(*self._begin)
        self.begun.put_nowait(None)
        self.aborted_at.put_nowait(await peer.gone())


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("state", BEGUN)
async def test_a_client_that_leaves_aborts_its_request_on_the_engine(state: str, how: str) -> None:
    script = Unfinished(*BEGUN[state])
    async with backend(script) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(post(STREAM))
        await script.begun.get()
        await asyncio.sleep(0.02)
        assert door.relay.active == 1
        left_at = asyncio.get_running_loop().time()
        _leave(client, how)
        assert await asyncio.wait_for(script.aborted_at.get(), PATIENCE_S) - left_at < ABORT_S
        await door.settled()
        (line,) = door.lines()
        assert (line["outcome"], len(engine.received)) == ("client_gone", 1)
        assert door.lines("relay_failed") == []


def _leave(client: Client, how: str) -> None:
    if how == "close":
        client.writer.close()
    elif how == "half-close":
        client.writer.write_eof()
    else:
        sock: socket.socket = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.writer.transport.abort()


async def test_a_client_that_leaves_while_it_sends_is_forgotten() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        for sent in (HELLO[:10], b""):
            async with door.client() as client:
                head = request_bytes("POST", CHAT, JSON, b"Content-Length: %d" % len(HELLO))
                await client.send(head + sent)
                await until(lambda: door.relay.active == 1)
                assert door.budget_bytes == len(HELLO)
            await door.settled()
        assert engine.received == []
        assert {line["outcome"] for line in door.lines()} == {"client_gone"}


async def test_clients_that_leave_say_nothing_about_the_endpoint() -> None:
    script = Unfinished()
    async with backend(script) as engine, gateway(engine.url) as door:
        for _ in range(8):
            async with door.client() as client:
                await client.send(post())
                await script.begun.get()
            await door.settled()
        (state,) = door.runtime.director.snapshot().states
        assert (state.standing.value, state.in_flight) == ("ready", 0)


async def test_a_client_that_leaves_behind_a_pipeline_aborts_what_runs_and_starts_nothing_more() -> None:
    script = Unfinished()
    async with backend(script) as engine, gateway(engine.url) as door:
        async with door.client() as client:
            await client.send(post() * 3)
            await script.begun.get()
        await asyncio.wait_for(script.aborted_at.get(), PATIENCE_S)
        await door.settled()
        assert len(engine.received) == 1


@pytest.mark.parametrize("kind", [EVENT_STREAM, b"Content-Type: application/octet-stream"])
async def test_a_slow_reader_slows_its_engine(kind: bytes) -> None:
    """60 MB for a client that does not read: the engine gets rid of what kernels hold, and of little more."""
    chunk = b"data: " + b"x" * 60_000 + b"\n\n"
    sent = 0

    async def pours(peer: Peer, request: Received) -> None:
        nonlocal sent
        await peer.send(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(1000):
            await peer.send(*chunked(chunk, end=False))
            sent += len(chunk)
        await peer.send(b"0\r\n\r\n")

    async with backend(pours) as engine, gateway(engine.url) as door, door.client(receive_bytes=2**16) as client:
        await client.send(post(STREAM))
        await client.head()
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.1)
        assert 0 < sent < 30 * 2**20
        assert _held_bytes() < 2 * 2**20
        got = 0
        while piece := await client.chunk():
            got += len(piece)
        assert got == 1000 * len(chunk)


def _held_bytes() -> int:
    """What this process holds of answers between its sockets."""
    held = 0
    for thing in gc.get_objects():
        if isinstance(thing, Connection):
            held += getattr(thing, "_size_bytes", 0)
        elif isinstance(thing, GatewayProtocol) and thing.transport is not None:
            held += thing.transport.get_write_buffer_size()
    return held


@pytest.mark.parametrize("kind", [EVENT_STREAM, JSON])
async def test_a_client_that_never_reads_is_cut_off(kind: bytes) -> None:
    async def pours(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not peer.writer.is_closing():
            await peer.send(*chunked(b"x" * 60_000, end=False))
            await asyncio.sleep(0)

    timeouts = {"between_chunks": "300ms"}
    async with (
        backend(pours) as engine,
        gateway(engine.url, timeouts=timeouts) as door,
        door.client(receive_bytes=2**16) as client,
    ):
        await client.send(post(STREAM))
        await client.head()
        await until(lambda: door.relay.active == 0)
        await door.settled()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await _read_on(client)
        assert door.lines()[0]["outcome"] == "timeout"
        assert door.lines("relay_failed") == []


async def _read_on(client: Client) -> None:
    while await client.chunk():
        pass


async def test_requests_at_once_do_not_mix() -> None:
    async def echo(peer: Peer, request: Received) -> None:
        await peer.send(answer(request.body, JSON))

    async with backend(echo) as one, backend(echo) as two, gateway(one.url, two.url) as door:

        async def ask(number: int) -> bool:
            body = HELLO.replace(b'"hi"', b'"%d"' % number)
            got = await door.post(body)
            return got.body == body

        begun = time.monotonic()
        assert all(await asyncio.gather(*(ask(number) for number in range(200))))
        assert time.monotonic() - begun < PATIENCE_S
        assert len(one.received) + len(two.received) == 200
