"""One exchange with a server that behaves, or does not."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.events import FailureKind
from picker.core.updates import ProbeFailure
from picker.upstream.client import Fetched
from picker.upstream.connection import BUFFER_BYTES, HEADERS_BYTES, Connection, Response
from picker.upstream.outbox import Outbox
from tests.unit.upstream.hostile import PATIENCE_S, Peer, Script, answer, chunked, hostile
from tests.unit.upstream.rig import ask, endpoint, read_all, until, upstream

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def replies(*pieces: bytes, pause_s: float = 0.0, close: bool = False) -> Script:
    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(*pieces, pause_s=pause_s)
            if close:
                return

    return script


@pytest.mark.parametrize(
    ("pieces", "close", "body"),
    [
        ((answer(b"hello"),), False, b"hello"),
        ((answer(b""),), False, b""),
        ((answer(b"hello")[:-2], b"lo"), False, b"hello"),
        ((CHUNKED, *chunked(b"a", b"bc")), False, b"abc"),
        ((CHUNKED + b"3;ext=1\r\nabc\r\n0\r\nTrailer: x\r\n\r\n",), False, b"abc"),
        ((answer(b"to the end", framed=False),), True, b"to the end"),
        ((HEAD + b"Transfer-Encoding: gzip\r\n\r\nto the end",), True, b"to the end"),
        ((b"HTTP/1.0 200 OK\r\n\r\n", b"old"), True, b"old"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", answer(b"x")), False, b"x"),
        ((b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + answer(b"x"),), False, b"x"),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), False, b""),
        ((b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n",), False, b""),
        ((HEAD + b"content-length: 2\r\nCONTENT-TYPE: X\r\n\r\nok",), False, b"ok"),
    ],
)
async def test_bodies_however_they_end(pieces: tuple[bytes, ...], close: bool, body: bytes) -> None:
    for pause_s in (0.0, 0.005):
        async with hostile(replies(*pieces, pause_s=pause_s, close=close)) as server, upstream() as client:
            assert await ask(client, server.url) == body
            assert await ask(client, server.url) == body
            assert server.connections == (2 if close else 1)


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"HTT",
        b"\x15\x03\x01\x00\x02\x02\x50",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nBad Header: x\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 99999 OK\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 999 OK\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 600 OK\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"5\r\nabc",
        CHUNKED + b"3\r\nabcXX",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"ffffffffffffffffff\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (HEADERS_BYTES + 100) + b"\r\n\r\n",
    ],
)
async def test_nonsense_is_a_failed_exchange_and_no_exception(wire: bytes) -> None:
    async with hostile(replies(wire, close=True)) as server, upstream() as client:
        assert await ask(client, server.url) is FailureKind.RESET
        assert await client.get(endpoint(server.url), server.url + "/m", timeout_s=2) is ProbeFailure.REFUSED


@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 200 " + b"o", HEAD + b"X: y", CHUNKED + b"0\r\nX: y", CHUNKED + b"1\r\nx\r\n0\r\nX: y"],
    ids=["reason", "header", "trailer", "trailer after a body"],
)
async def test_endless_lines_are_cut_off(start: bytes) -> None:
    sent = 0

    async def endless(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(start)
        while not peer.writer.is_closing():
            peer.writer.write(b"y" * 10_000)
            await peer.writer.drain()
            sent += 10_000
            await asyncio.sleep(0.001)

    async with hostile(endless) as server, upstream() as client:
        assert await asyncio.wait_for(ask(client, server.url), PATIENCE_S) is FailureKind.RESET
    assert sent < 4 * 2**20


async def test_chunk_sizes_that_come_alone_do_not_add_up() -> None:
    """A long stream whose frames and bytes come in separate packets is not an endless line."""
    pieces = [part for _ in range(3000) for part in (b"1;" + b"e" * 100 + b"\r\n", b"x\r\n")]
    async with hostile(replies(CHUNKED, *pieces, b"0\r\n\r\n")) as server, upstream() as client:
        assert await ask(client, server.url) == b"x" * 3000


async def test_heads_near_the_limit_pass_in_any_pieces() -> None:
    wire = HEAD + b"X: " + b"y" * 30_000 + b"\r\nY: " + b"z" * 30_000 + b"\r\nContent-Length: 2\r\n\r\nok"
    pieces = [wire[i : i + 7000] for i in range(0, len(wire), 7000)]
    async with hostile(replies(*pieces, pause_s=0.002)) as server, upstream() as client:
        assert await ask(client, server.url) == b"ok"


async def test_trailers_are_not_headers() -> None:
    wire = CHUNKED + b"1\r\nx\r\n0\r\nSet-Cookie: evil\r\nContent-Type: text/html\r\n\r\n"
    async with hostile(replies(wire)) as server, upstream() as client:
        response = await client.open(endpoint(server.url), "POST", "/x", [], b"")
        assert isinstance(response, Response)
        assert response.headers == ((b"Transfer-Encoding", b"chunked"),)
        assert await read_all(response) == b"x"


async def test_requests_are_written_as_they_should_be() -> None:
    heads: list[bytes] = []

    async def notes(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            heads.append(request.head)
            await peer.send(answer(b""))

    async with hostile(notes) as server, upstream() as client:
        to = endpoint(server.url)
        for method, body in (("GET", b""), ("POST", b""), ("POST", b"abc"), ("DELETE", b"")):
            await read_all(await client.open(to, method, "/p?q=%20", [(b"x-a", b"1"), (b"x-a", b"\xe9")], body))
    host = server.url.removeprefix("http://").encode()
    assert heads == [
        b"GET /p?q=%20 HTTP/1.1\r\nhost: " + host + b"\r\nx-a: 1\r\nx-a: \xe9\r\n\r\n",
        b"POST /p?q=%20 HTTP/1.1\r\nhost: " + host + b"\r\nx-a: 1\r\nx-a: \xe9\r\ncontent-length: 0\r\n\r\n",
        b"POST /p?q=%20 HTTP/1.1\r\nhost: " + host + b"\r\nx-a: 1\r\nx-a: \xe9\r\ncontent-length: 3\r\n\r\n",
        b"DELETE /p?q=%20 HTTP/1.1\r\nhost: " + host + b"\r\nx-a: 1\r\nx-a: \xe9\r\n\r\n",
    ]


async def test_an_early_answer_is_read_and_its_connection_not_used_again() -> None:
    """The server answers before the request is sent, which it never will be: it does not read."""

    async def early(peer: Peer) -> None:
        await peer.head()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(answer(b"too large", status=b"413 Too Large"))
        await asyncio.sleep(0.2)

    async with hostile(early) as server, upstream() as client:
        for _ in range(2):
            response = await client.open(endpoint(server.url), "POST", "/x", [], b"x" * 20_000_000)
            assert isinstance(response, Response)
            assert response.status == 413
            assert await read_all(response) == b"too large"
        assert server.connections == 2


async def test_a_slow_reader_pauses_the_server() -> None:
    sent = 0

    async def pours(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(1000):
            await peer.send(*chunked(b"x" * 60_000, end=False))
            sent += 60_000
        await peer.send(b"0\r\n\r\n")

    async with hostile(pours) as server, upstream() as client:
        response = await client.open(endpoint(server.url), "POST", "/x", [], b"")
        assert isinstance(response, Response)
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.05)
        assert sent < 30 * 2**20
        assert response._connection._size_bytes <= 2 * BUFFER_BYTES
        body = await read_all(response)
        assert body == b"x" * 60_000_000


@pytest.mark.parametrize("state", ["waiting", "headers", "body", "paused", "sending"])
async def test_cancelling_cuts_the_connection_in_every_state(state: str) -> None:
    started = asyncio.Event()
    gone: asyncio.Queue[float] = asyncio.Queue()
    begin = {"waiting": b"", "headers": CHUNKED, "body": CHUNKED + b"1\r\nx\r\n", "sending": b""}

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(begin.get(state, CHUNKED + b"ffffff\r\n" + b"x" * 4 * BUFFER_BYTES))
        started.set()
        gone.put_nowait(await peer.gone())

    async def work(url: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            response = await client.open(
                endpoint(url), "POST", "/x", [], b"y" * (8_000_000 if state == "sending" else 1)
            )
            assert isinstance(response, Response)
            try:
                if state == "paused":
                    await asyncio.sleep(PATIENCE_S)
                await response.read()
                await response.read()
            finally:
                response.close()

    async with hostile(script) as server, upstream() as client:
        task = asyncio.create_task(work(server.url))
        await started.wait()
        await asyncio.sleep(0.02)
        at = asyncio.get_running_loop().time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.wait_for(gone.get(), PATIENCE_S) - at < 0.5
        assert "0 idle" in repr(client)


async def test_closing_twice_and_reading_after_it_is_harmless() -> None:
    async with hostile(replies(answer(b"abc"))) as server, upstream() as client:
        response = await client.open(endpoint(server.url), "POST", "/x", [], b"")
        assert isinstance(response, Response)
        assert await response.read() == b"abc"
        assert response.finished
        response.close()
        response.close()
        assert await response.read() == b""
        assert "1 idle" in repr(client)


async def test_a_reset_in_the_middle_of_a_body() -> None:
    async def resets(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"1\r\nx\r\n", pause_s=0.01)
        await asyncio.sleep(0.02)
        peer.reset()

    async with hostile(resets) as server, upstream() as client:
        response = await client.open(endpoint(server.url), "POST", "/x", [], b"")
        assert isinstance(response, Response)
        assert await response.read() == b"x"
        assert await response.read() is FailureKind.RESET
        assert await response.read() is FailureKind.RESET
        response.close()


async def test_a_reset_is_no_end_of_a_body_without_a_length() -> None:
    async def resets(peer: Peer) -> None:
        await peer.request()
        await peer.send(HEAD + b"\r\n", b"half", pause_s=0.01)
        await asyncio.sleep(0.02)
        peer.reset()

    async with hostile(resets) as server, upstream() as client:
        assert await ask(client, server.url) is FailureKind.RESET


async def test_pages_are_cut_at_the_limit_and_late_ones_given_up() -> None:
    async def slow(peer: Peer) -> None:
        await peer.request()
        await peer.gone()

    async with hostile(replies(answer(b"x" * 1_000_000))) as server, upstream() as client:
        page = await client.get(endpoint(server.url), server.url + "/m", timeout_s=2, limit_bytes=1000)
        assert page == Fetched(200, b"x" * 1000)
    async with hostile(slow) as server, upstream() as client:
        assert await client.get(endpoint(server.url), server.url + "/m", timeout_s=0.05) is ProbeFailure.TIMEOUT
        await until(lambda: server.open == 0)


def test_a_connection_shows_its_state() -> None:
    async def scenario() -> str:
        return repr(Connection(_Nowhere(), Outbox(), asyncio.get_running_loop()))

    assert asyncio.run(scenario()) == "<Connection open status=0>"


class _Nowhere:
    def put(self, connection: Connection) -> None:
        raise AssertionError


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=50), max_size=8),
    cuts=st.lists(st.integers(0, 600), max_size=10),
    framing=st.sampled_from(["chunked", "length", "close"]),
)
@settings(max_examples=60)
def test_however_an_answer_is_cut_the_body_is_the_same(pieces: list[bytes], cuts: list[int], framing: str) -> None:
    body = b"".join(pieces)
    wire = CHUNKED + b"".join(chunked(*pieces)) if framing == "chunked" else answer(body, framed=framing == "length")
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    writes = [wire[a:b] for a, b in itertools.pairwise(edges)]

    async def scenario() -> None:
        async with hostile(replies(*writes, close=framing == "close")) as server, upstream() as client:
            assert await ask(client, server.url, b"{}") == body

    asyncio.run(scenario())
