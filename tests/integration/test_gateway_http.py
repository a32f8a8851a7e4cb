"""The client's side of the wire: limits, broken requests, old and odd clients."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.integration.gateway_rig import (
    CHAT,
    EVENT_STREAM,
    HELLO,
    JSON,
    STREAM,
    Got,
    backend,
    events,
    gateway,
    get,
    post,
    request_bytes,
    request_id_of,
    says,
    until,
)
from tests.unit.upstream.hostile import Peer, Received, answer, chunked

OK = answer(b'{"ok":true}', JSON)


def refused(got: Got, status: int, code: str) -> None:
    assert (got.status, got.error["code"]) == (status, code), got
    assert got.headers["content-type"] == "application/json"
    request_id_of(got)


# -- bodies -----------------------------------------------------------------------------------------------------------


async def test_bodies_over_the_limit_are_refused_before_they_are_read() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url, limits={"body": "1KiB"}) as door:
        assert (await door.post(HELLO.ljust(1024))).status == 200
        refused(await door.post(HELLO.ljust(1025)), 413, "request_too_large")
        # Declared, and never sent.
        for length in (b"1025", b"9" * 18, b"9" * 19, b"18446744073709551615"):
            async with door.client() as client:
                await client.send(request_bytes("POST", CHAT, JSON, b"Content-Length: " + length))
                got = await client.answer()
                refused(got, 413, "request_too_large")
                assert got.headers["connection"] == "close"
                assert await client.closed() == b""
        # Not declared: counted as it comes.
        head = request_bytes("POST", CHAT, JSON, b"Transfer-Encoding: chunked")
        refused(await door.ask(head, *chunked(b"x" * 700, b"x" * 700, end=False)), 413, "request_too_large")
        assert len(engine.received) == 1


async def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    """Closing with unread bytes resets the connection, and the reset overtakes the answer."""
    async with backend(says(OK)) as engine, gateway(engine.url, limits={"body": "1KiB"}) as door:
        for _ in range(5):
            refused(await door.post(b"x" * 4_000_000), 413, "request_too_large")
            got = await door.ask(request_bytes("POST", "/v1/nope", b"Content-Length: 3000000") + b"x" * 3_000_000)
            refused(got, 404, "not_found")


async def test_memory_for_bodies_is_reserved_before_reading() -> None:
    limits = {"bodies_in_memory": "4KiB", "body": "4KiB"}
    async with backend(says(OK)) as engine, gateway(engine.url, limits=limits) as door, door.client() as slow:
        await slow.send(request_bytes("POST", CHAT, JSON, b"Content-Length: 3000") + HELLO)
        await until(lambda: door.budget_bytes == 3000)
        got = await door.post(HELLO.ljust(2000))
        refused(got, 429, "memory_limit")
        assert (got.headers["retry-after"], got.headers["retry-after-ms"]) == ("1", "500")
        assert (await door.post(HELLO.ljust(1000))).status == 200
        await slow.send(b" " * (3000 - len(HELLO)))
        assert (await slow.answer()).status == 200
        assert (await door.post(HELLO.ljust(4000))).status == 200


async def test_memory_is_given_back_with_the_first_byte() -> None:
    """A long stream does not keep its prompt."""
    go_on = asyncio.Event()

    async def script(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(*chunked(b"data: 1\n\n", end=False))
        await go_on.wait()
        await peer.send(b"0\r\n\r\n")

    async with backend(script) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(post(STREAM.ljust(300_000)))
        await client.head()
        assert await client.chunk() == b"data: 1\n\n"
        assert door.budget_bytes == 0
        assert door.relay.active == 1
        go_on.set()
        assert await client.chunk() == b""


async def test_a_body_that_drips_is_late() -> None:
    async with (
        backend(says(OK)) as engine,
        gateway(engine.url, timeouts={"request_body": "200ms"}) as door,
        door.client() as client,
    ):
        await client.send(request_bytes("POST", CHAT, JSON, b"Content-Length: 1000"))
        drip = asyncio.create_task(client.send(*([b" "] * 100), pause_s=0.05))
        refused(await client.answer(), 408, "request_timeout")
        drip.cancel()
        await asyncio.gather(drip, return_exceptions=True)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"model":1,"messages":[{}]}', "invalid_type"),
        (b'{"model":"tiny"}', "missing_required_parameter"),
        (b"[" * 100_000, "invalid_json"),
    ],
)
async def test_bodies_that_make_no_sense_are_400(body: bytes, code: str) -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        refused(await door.post(body), 400, code)
        assert engine.received == []


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 5000 + b"\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000,
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + b"A: b\r\n" * 60 + b"\r\n",
        b"POST /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"POST /" + b"x" * 100_000,
    ],
    ids=["value", "endless value", "count", "target", "endless target"],
)
async def test_heads_over_the_limit_are_431(head: bytes) -> None:
    async with (
        backend(says(OK)) as engine,
        gateway(engine.url, limits={"headers": "4KiB", "header_count": 50}) as door,
        door.client() as client,
    ):
        await client.send(*(head[i : i + 10_000] for i in range(0, len(head), 10_000)), pause_s=0.005)
        refused(await client.answer(), 431, "headers_too_large")
        assert await client.closed() == b""


async def test_endless_trailers_are_cut() -> None:
    async with (
        backend(says(OK)) as engine,
        gateway(engine.url, limits={"headers": "4KiB"}) as door,
        door.client() as client,
    ):
        await client.send(request_bytes("POST", CHAT, JSON, b"Transfer-Encoding: chunked"))
        await client.send(*chunked(HELLO, end=False), b"0\r\nX: ", *([b"y" * 1000] * 12), pause_s=0.01)
        refused(await client.answer(), 431, "headers_too_large")
        await client.closed()
        assert engine.received == []


@pytest.mark.parametrize(
    "wire",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"nonsense\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/9.9\r\n\r\n",
        b"POST /v1/\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        request_bytes("POST", CHAT, b"Content-Length: 5", b"Content-Length: 6"),
        request_bytes("POST", CHAT, b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        request_bytes("POST", CHAT, b"Content-Length: -5"),
        request_bytes("POST", CHAT, b"Content-Length: 99999999999999999999999"),
        request_bytes("POST", CHAT, b"Content-Length: 5x"),
        request_bytes("POST", CHAT, b"Transfer-Encoding: gzip"),
        request_bytes("POST", CHAT, b"Transfer-Encoding: chunked") + b"zz\r\n",
        request_bytes("POST", CHAT, b"Bad Name: x"),
        request_bytes("POST", CHAT, b"X: a\x00b"),
        b"CONNECT engine:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_broken_requests_get_an_error_we_made_and_no_engine_hears_of_them(wire: bytes) -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(wire)
        got = await client.answer()
        assert got.status in (400, 404), got
        assert got.error["code"] in ("bad_request", "not_found")
        request_id_of(got)
        assert await client.closed() == b""
        assert engine.received == []


async def test_a_folded_header_cannot_smuggle_one() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        got = await door.post(HELLO, b"X-A: 1\r\n X-Evil: 2\r\n\tx: 3")
        assert got.status in (200, 400)
        for request in engine.received:
            assert request.header(b"x-evil") is None
            assert b"\r\n " not in request.head


async def test_slow_headers_lose_their_connection() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url, timeouts={"request_headers": "200ms"}) as door:
        for start in (b"", b"POST ", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"):
            async with door.client() as client:
                await client.send(start)
                assert await client.closed() == b""
        # Later requests of a connection are on the clock too, idleness between them is not.
        async with door.client() as client:
            await client.send(post())
            assert (await client.answer()).status == 200
            await asyncio.sleep(0.3)
            await client.send(post())
            assert (await client.answer()).status == 200
            await client.send(b"POST ")
            assert await client.closed() == b""


# -- connections ------------------------------------------------------------------------------------------------------


async def test_connections_are_kept_on_both_sides() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(post())
        assert (await client.answer()).status == 200
        before = engine.connections
        for _ in range(10):
            await client.send(post())
            assert (await client.answer()).status == 200
            await client.send(get("/v1/nope"))
            assert (await client.answer()).status == 404
        assert engine.connections == before


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def echo(peer: Peer, request: Received) -> None:
        name = request.header(b"x-name") or b""
        await asyncio.sleep(0.02 if name == b"0" else 0)
        await peer.send(answer(name, JSON))

    async with backend(echo) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(b"".join(post(HELLO, b"X-Name: %d" % number) for number in range(20)))
        assert [(await client.answer()).body for _ in range(20)] == [b"%d" % number for number in range(20)]


async def test_a_flood_of_pipelined_requests_is_bounded() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(post() * 1000)
        answered = 0
        while True:
            try:
                assert (await client.answer()).status == 200
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            answered += 1
        assert 1 <= answered <= 100


async def test_nonsense_behind_requests_does_not_touch_their_answers() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(*chunked(b"data: 1\n\n", end=False))
        await go_on.wait()
        await peer.send(*chunked(b"data: 2\n\n"))

    for behind in (b"\x00\x01 nonsense\r\n\r\n", post(STREAM) + b"\x00nonsense\r\n\r\n"):
        go_on.clear()
        async with backend(script) as engine, gateway(engine.url) as door, door.client() as client:
            await client.send(post(STREAM))
            await client.head()
            assert await client.chunk() == b"data: 1\n\n"
            await client.send(behind)
            await asyncio.sleep(0.02)
            go_on.set()
            assert [await client.chunk(), await client.chunk()] == [b"data: 2\n\n", b""]
            if behind.startswith(b"POST"):
                assert (await client.answer()).body == b"data: 1\n\ndata: 2\n\n"
            assert await client.closed() == b""


@pytest.mark.parametrize("kind", ["length", "chunked"])
async def test_http_1_0_clients_get_a_body_that_ends_with_the_connection(kind: str) -> None:
    wire = OK if kind == "length" else events(b"data: 1\n\n", b"data: 2\n\n")
    async with backend(says(wire)) as engine, gateway(engine.url) as door:
        for extra in ((), (b"Connection: keep-alive",), (b"Connection: close",)):
            async with door.client() as client:
                await client.send(post(STREAM, *extra).replace(b"HTTP/1.1", b"HTTP/1.0"))
                got = await client.answer()
                assert "transfer-encoding" not in got.headers
                assert got.headers["connection"] == "close"
                assert got.body == (b'{"ok":true}' if kind == "length" else b"data: 1\n\ndata: 2\n\n")
                assert await client.closed() == b""
        refused(await door.ask(get("/v1/nope").replace(b"HTTP/1.1", b"HTTP/1.0")), 404, "not_found")


async def test_http_1_0_clients_can_tell_a_broken_answer() -> None:
    async def dies(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n" + JSON + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(*chunked(b'{"half":', end=False))
        await asyncio.sleep(0.05)
        peer.reset()

    async with backend(dies) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        await client.head()
        with pytest.raises(ConnectionResetError):
            # Reads on until the end, which must not look like the end of the body.
            await client.reader.read()


async def test_expect_100_continue() -> None:
    expect = request_bytes("POST", CHAT, JSON, b"Expect: 100-continue", b"Content-Length: %d" % len(HELLO))
    async with backend(says(OK)) as engine, gateway(engine.url, limits={"body": "1KiB"}) as door:
        async with door.client() as client:
            await client.send(expect)
            assert (await client.head())[0] == 100
            await client.send(HELLO)
            assert (await client.answer()).status == 200
            assert engine.received[0].header(b"expect") is None
            # The connection is as good as before.
            await client.send(post())
            assert (await client.answer()).status == 200
        for head, status in (
            (expect.replace(b"Content-Length: %d" % len(HELLO), b"Content-Length: 5000"), 413),
            (expect.replace(CHAT.encode(), b"/v1/nope"), 404),
        ):
            async with door.client() as client:
                await client.send(head)
                got = await client.answer()
                # The client may or may not send its body now, so this connection must end.
                assert (got.status, got.headers["connection"]) == (status, "close")
                assert await client.closed() == b""


async def test_an_offer_of_http2_is_ignored() -> None:
    """Java's client offers it with every first request."""
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAAA")
    async with backend(says(OK)) as engine, gateway(engine.url) as door, door.client() as client:
        for _ in range(2):
            await client.send(post(HELLO, *offer) + post(HELLO, b"Connection: upgrade", b"Upgrade: websocket"))
            assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        for request in engine.received:
            assert (request.body, request.header(b"upgrade"), request.header(b"connection")) == (HELLO, None, None)
        whole = post(HELLO, *offer)
        await client.send(*(whole[i : i + 1] for i in range(len(whole))))
        assert (await client.answer()).status == 200
        await client.send(post())
        assert (await client.answer()).status == 200


async def test_too_many_requests_at_once_are_429() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer, request: Received) -> None:
        await go_on.wait()
        await peer.send(OK)

    async with backend(script) as engine, gateway(engine.url, limits={"concurrent_requests": 2}) as door:
        waiting = [asyncio.create_task(door.post()) for _ in range(2)]
        await until(lambda: len(engine.received) == 2)
        async with door.client() as client:
            await client.send(post())
            got = await client.answer()
            refused(got, 429, "saturated")
            assert got.headers["retry-after-ms"] == "500"
            go_on.set()
            assert [got.status for got in await asyncio.gather(*waiting)] == [200, 200]
            # Its body was there, so the connection lives on.
            await client.send(post())
            assert (await client.answer()).status == 200


async def test_a_draining_gateway_refuses_and_finishes() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        door.runtime.director.draining = True
        got = await door.post()
        refused(got, 503, "shutting_down")
        assert got.headers["retry-after-ms"] == "500"
        body = HELLO.replace(b"}]}", b'}],"max_tokens":5}')
        got = await door.post(body, path="/v1/messages")
        assert json.loads(got.body)["error"]["type"] == "overloaded_error"
        assert json.loads(got.body)["request_id"] == got.headers["x-request-id"]


async def test_nothing_behind_it_is_503() -> None:
    async with gateway() as door:
        refused(await door.post(), 503, "no_endpoints")


async def test_a_bug_is_a_500_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:

        def boom(*_: object) -> None:
            raise RuntimeError("the secret reason")

        monkeypatch.setattr(door.relay._upstream, "authorization", boom)
        got = await door.post()
        refused(got, 500, "internal_error")
        assert b"secret" not in got.body
        (line,) = door.lines("relay_failed")
        assert "the secret reason" in line["trace"]
        monkeypatch.undo()
        assert (await door.post()).status == 200
