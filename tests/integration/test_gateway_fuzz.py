"""Arbitrary bytes at both of the gateway's sides: it answers or closes, and keeps serving others."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.gateway_rig import (
    CHAT,
    HELLO,
    JSON,
    STREAM,
    Gateway,
    backend,
    events,
    gateway,
    get,
    post,
    request_bytes,
    says,
)
from tests.unit.upstream.hostile import PATIENCE_S, Peer, Received, answer, chunked

OK = answer(b'{"ok":true}', JSON)
REQUESTS = b"".join(
    (
        post(HELLO, b"X-A: b"),
        request_bytes("POST", CHAT, JSON, b"Transfer-Encoding: chunked") + b"".join(chunked(HELLO[:9], HELLO[9:])),
        get("/v1/models"),
        post(HELLO, b"Connection: upgrade", b"Upgrade: h2c"),
        post(STREAM, b"Expect: 100-continue"),
    )
)
ANSWERS = (
    OK,
    events(b"data: 1\n\n", b"data: [DONE]\n\n"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b'{"error":{}}', JSON, status=b"503 Busy"),
    answer(b"<html>", status=b"400 Bad", framed=False),
)
# Places and bytes that mean something to a parser are more telling than others.
TELLING = st.sampled_from(
    [b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b":", b" ", b"0", b"f", b"-", b"chunked", b"\xff"]
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 20), TELLING | st.binary(max_size=4)), min_size=1, max_size=3
)


def changed(wire: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for start, length, new in changes:
        start %= len(wire) + 1
        wire = wire[:start] + new + wire[start + length :]
    return wire


@given(wires=st.lists(CHANGES, min_size=10, max_size=10), cut=st.integers(20, 700))
@settings(max_examples=6)
def test_whatever_clients_send_others_are_served(wires: list[list[tuple[int, int, bytes]]], cut: int) -> None:
    async def scenario() -> None:
        async with backend(says(OK)) as engine, gateway(engine.url) as door:
            await asyncio.gather(*(_send(door, changed(REQUESTS, changes), cut) for changes in wires))
            assert (await door.post()).status == 200
            assert door.lines("relay_failed") == []
            assert {request.method for request in engine.received} <= {"POST", "GET", "DELETE"}

    asyncio.run(scenario())


async def _send(door: Gateway, wire: bytes, cut: int) -> None:
    async with door.client() as client:
        await client.send(*(wire[i : i + cut] for i in range(0, len(wire), cut)))
        with contextlib.suppress(OSError, RuntimeError):
            client.writer.write_eof()
        said = await client.closed()
        assert said == b"" or said.startswith(b"HTTP/1.1 ")
        assert b"Internal Server Error" not in said


@given(wire=st.sampled_from(ANSWERS), changes=CHANGES, stream=st.booleans())
@settings(max_examples=25)
def test_whatever_engines_answer_the_client_hears_something(
    wire: bytes, changes: list[tuple[int, int, bytes]], stream: bool
) -> None:
    async def script(peer: Peer, request: Received) -> None:
        await peer.send(changed(wire, changes))
        peer.close()

    async def scenario() -> None:
        async with backend(script) as engine, gateway(engine.url) as door:
            got = await asyncio.wait_for(door.post(STREAM if stream else HELLO), PATIENCE_S)
            assert 200 <= got.status < 600
            assert "x-request-id" in got.headers
            assert door.lines("relay_failed") == []

    asyncio.run(scenario())


@given(cuts=st.lists(st.integers(1, 400), max_size=8), pieces=st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=10)
def test_however_a_request_is_cut_the_engine_gets_the_same_bytes(cuts: list[int], pieces: list[int]) -> None:
    edges = sorted({0, len(HELLO), *pieces})
    parts = chunked(*(HELLO[a:b] for a, b in pairwise(edges) if b <= len(HELLO)))
    wire = post() + request_bytes("POST", CHAT, JSON, b"Transfer-Encoding: chunked") + b"".join(parts)
    steps = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})

    async def scenario() -> None:
        async with backend(says(OK)) as engine, gateway(engine.url) as door, door.client() as client:
            await client.send(*(wire[a:b] for a, b in pairwise(steps)), pause_s=0.001)
            assert [(await client.answer()).status for _ in range(2)] == [200, 200]
            assert [request.body for request in engine.received] == [HELLO, HELLO]

    asyncio.run(scenario())
