"""The clients of the fault campaign: a closed loop of keep-alive connections that notes the fate of every request. The
tests here are about the clients alone: they must tell a whole answer from a broken one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import pytest

MODEL = "tiny"
CONCURRENCY = 64
PATIENCE_S = 20.0
NAP_S = 0.02
# What a client waits after a refusal; the SDK would wait longer.
REFUSED_PAUSE_S = 0.05
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")


@dataclass(slots=True)
class Call:
    """One request and what its client saw of it."""

    id: str
    stream: bool
    tokens: int
    prompt: str
    sent_at: float = 0.0
    first_byte_at: float | None = None
    ended_at: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    chunks: int = 0
    complete: bool = False
    left: bool = False
    settled: str = ""

    @property
    def endpoint(self) -> str:
        """Who answered, empty when nobody is named."""
        return self.headers.get("x-waypost-endpoint", "")

    @property
    def fate(self) -> str:
        """`ok`, `error_event`, `cut` (body began and broke off), `lost` (nothing came), `wrong` (an answer that is not
        what was asked for) or the status and code of an error.
        """
        if self.settled:
            return self.settled
        if self.left:
            return "left"
        if not self.complete:
            return "cut" if self.body else "lost"
        if self.status != 200:
            return f"{self.status} {self.error_code}"
        if not self.stream:
            return "ok" if self._counted == self.tokens else "wrong"
        if b'data: {"error"' in self.body:
            return f"error_event {self.error_code}"
        # Twice or missing data would show in the number of pieces.
        pieces = self.body.count(b'"delta":{"content"')
        whole = self.body.endswith(b"data: [DONE]\n\n") and pieces == self.tokens
        return "ok" if whole else "wrong"

    @property
    def _counted(self) -> object:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(self.body)["usage"]["completion_tokens"]
        return None

    @property
    def error_code(self) -> str:
        """The string code of an error body, or of the event at the end of a stream."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(self.body.rpartition(b"data: ")[2])["error"]["code"])
        return "?"

    @property
    def broken_off(self) -> bool:
        """Whether an answer began and did not get to its end."""
        return self.fate == "cut" or self.fate.startswith("error_event")

    @property
    def failed_early(self) -> bool:
        """Failed although no body byte of an answer had come."""
        return self.fate not in ("ok", "left") and not self.broken_off

    def outcomes(self) -> frozenset[str]:
        """The outcomes that the gateway's log may give for this call."""
        if self.left:
            return frozenset(("client_gone", "completed", "failed", "timeout", "rejected"))
        if self.fate == "ok":
            return frozenset(("completed",))
        if self.broken_off:
            return frozenset(("failed", "timeout"))
        return frozenset(("rejected", "completed", "failed", "timeout"))

    def settle(self) -> None:
        """Keeps the fate and drops the body, where there are too many calls to keep all."""
        self.settled = self.fate
        self.body.clear()

    def payload(self) -> bytes:
        """The request as it goes over the wire."""
        body = json.dumps(
            {
                "model": MODEL,
                "stream": self.stream,
                "max_tokens": self.tokens,
                "ignore_eos": True,
                "messages": [{"role": "user", "content": self.prompt}],
            }
        ).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: waypost\r\ncontent-type: application/json\r\n"
        return f"{head}x-request-id: {self.id}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


class Wire(asyncio.Protocol):
    """A client connection: one call at a time, keep-alive."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Whether it may be used for another call."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, call: Call) -> None:
        """Sends a call and waits for its end, whatever that is."""
        assert self._transport is not None
        self._call = call
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        call.sent_at = time.time()
        self._transport.write(call.payload())
        try:
            await self._done
        finally:
            call.ended_at = time.time()
            self._call = None
            if not call.complete:
                self.abort()

    def abort(self) -> None:
        """Cuts the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._call is not None:
            self._call.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        if self._call is not None:
            self._call.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        call = self._call
        if call is not None:
            call.chunks += 1
            if call.first_byte_at is None:
                call.first_byte_at = time.time()
            call.body += body

    def on_message_complete(self) -> None:
        if self._call is not None:
            self._call.complete = True
        if not self._parser.should_keep_alive():
            self.abort()
        self._end()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


async def connect(url: str) -> Wire:
    """A new client connection."""
    parts = urlsplit(url)
    _, wire = await asyncio.get_running_loop().create_connection(Wire, parts.hostname or "", parts.port or 80)
    return wire


class Load:
    """Clients in a closed loop, half of their requests streamed. As a context manager it runs them; leaving waits for
    what is under way.
    """

    def __init__(
        self,
        url: str,
        log: list[Call],
        *,
        concurrency: int = CONCURRENCY,
        seed: int = 1,
        tokens: tuple[int, int] = (4, 24),
        streams: float = 0.5,
        words: tuple[int, int] = (3, 12),
        leave: float = 0.0,
        keep_bodies: bool = True,
    ) -> None:
        self._url = url
        self._log = log
        self._rng = random.Random(seed)
        self._concurrency = concurrency
        self._tokens = tokens
        self._streams = streams
        self._words = words
        self._leave = leave
        self._keep_bodies = keep_bodies
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self._napper: asyncio.Task[None] | None = None
        self._late: list[tuple[float, float]] = []
        self.calls: list[Call] = []

    async def __aenter__(self) -> Load:
        self._napper = asyncio.create_task(self._nap())
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._concurrency)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        _, late = await asyncio.wait(self._tasks, timeout=3 * PATIENCE_S)
        for task in late:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._napper is not None:
            self._napper.cancel()
        if kind is None:
            assert not late, f"{len(late)} calls never ended"
            assert not any(results), results

    def new_call(self, **fields: Any) -> Call:
        """A call that the audit will look for."""
        rng = self._rng
        given = {
            "id": f"{rng.getrandbits(64):016x}",
            "stream": rng.random() < self._streams,
            "tokens": rng.randint(*self._tokens),
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(*self._words))),
        }
        call = Call(**{**given, **fields})
        self.calls.append(call)
        self._log.append(call)
        return call

    async def _client(self) -> None:
        wire: Wire | None = None
        try:
            while not self._stopped:
                if wire is None or not wire.open:
                    wire = await connect(self._url)
                call = self.new_call()
                if self._rng.random() < self._leave:
                    await leave_after(wire, call, self._rng.uniform(0, 0.3))
                else:
                    await wire.exchange(call)
                if not self._keep_bodies:
                    call.settle()
                if call.status >= 400:
                    await asyncio.sleep(REFUSED_PAUSE_S)
        finally:
            if wire is not None:
                wire.abort()

    async def _nap(self) -> None:
        while True:
            begun_at = time.time()
            await asyncio.sleep(NAP_S)
            late_s = time.time() - begun_at - 2 * NAP_S
            if late_s > 0:
                self._late.append((begun_at, late_s))

    def stalled_s(self, since: float, *, span_s: float = 30.0) -> float:
        """By how much this machine ran late in a span: what a deadline stretches by when others load the machine."""
        return sum(late_s for at, late_s in self._late if since - NAP_S <= at < since + span_s)

    async def pass_time(self, since: float, seconds: float) -> None:
        """Waits until so many seconds have passed since a time, not counting those in which the machine stood still."""
        while time.time() < since + seconds + self.stalled_s(since):
            await asyncio.sleep(NAP_S)

    def fates(self, since: float = 0.0, until: float = float("inf")) -> Counter[str]:
        """How the calls that ended in a span of time ended."""
        return Counter(call.fate for call in self.calls if since <= call.ended_at < until)

    def served(self, since: float, until: float = float("inf")) -> Counter[str]:
        """Calls sent in a span of time and answered well, by endpoint."""
        return Counter(call.endpoint for call in self.calls if since <= call.sent_at < until and call.fate == "ok")

    def early_failures(self) -> list[tuple[str, str, float]]:
        """Calls that failed before any body byte: fate, id, seconds they took."""
        return [(call.fate, call.id, call.ended_at - call.sent_at) for call in self.calls if call.failed_early]


async def leave_after(wire: Wire, call: Call, seconds: float) -> float:
    """Sends a call and leaves after a while, unless the answer was complete before. Returns when."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wire.exchange(call), seconds)
    call.left = not call.complete
    return time.time()


# -- the clients themselves ---------------------------------------------------------------------------------------

PIECE = b'data: {"choices":[{"delta":{"content":"w"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
BROKEN = b'data: {"error":{"message":"m","type":"t","param":null,"code":"upstream_reset"}}\n\n'


def _answer(status: int, body: bytes, *, missing: int = 0) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body) + missing, body)


@pytest.mark.parametrize(
    ("stream", "answer", "fate"),
    [
        (True, _answer(200, 2 * PIECE + DONE), "ok"),
        (True, _answer(200, PIECE + DONE), "wrong"),
        (True, _answer(200, 3 * PIECE + DONE), "wrong"),
        (True, _answer(200, 2 * PIECE), "wrong"),
        (True, _answer(200, PIECE + BROKEN), "error_event upstream_reset"),
        (True, _answer(200, PIECE, missing=9), "cut"),
        (True, _answer(200, b"", missing=9), "lost"),
        (True, b"", "lost"),
        (False, _answer(200, b'{"usage":{"completion_tokens":2}}'), "ok"),
        (False, _answer(200, b'{"usage":{"completion_tokens":1}}'), "wrong"),
        (False, _answer(200, b"not json"), "wrong"),
        (False, _answer(503, b'{"error":{"code":"no_ready_endpoints"}}'), "503 no_ready_endpoints"),
        (False, _answer(502, b"<html>"), "502 ?"),
    ],
)
async def test_clients_tell_fates_apart(stream: bool, answer: bytes, fate: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]}")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        wire = await connect(f"http://127.0.0.1:{port}")
        call = Call("one", stream, 2, "hello")
        await wire.exchange(call)
        wire.abort()
    assert call.fate == fate
    assert call.failed_early == (fate not in ("ok", "cut", "error_event upstream_reset"))
