"""One HTTP/1.1 connection to a model server, one exchange at a time, on an asyncio Protocol and httptools.

Bytes pass through as they are: nothing is decompressed or decoded, and no more than a bounded buffer is held before
reading pauses. A response that ends early, breaks the protocol or has absurd headers is a failed exchange, never a
short one. Deadlines belong to the callers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol, cast

import httptools

from picker.core.events import FailureKind
from picker.upstream.outbox import Outbox

# Reading pauses above this much unread body; a client that does not keep up slows its engine, not our memory.
BUFFER_BYTES = 256 * 2**10
# An engine's header section: vLLM sends under 1 KB, and the NIXL hand-over rides in bodies.
HEADERS_BYTES = 64 * 2**10

RawHeaders = Iterable[tuple[bytes, bytes]]


class Home(Protocol):
    """Where a connection goes after an exchange that left it usable."""

    def put(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """A connection and the exchange on it. The exchange is over when `finished` or `failed`."""

    __slots__ = (
        "_body_seen",
        "_chunks",
        "_header_bytes",
        "_headers",
        "_headers_done",
        "_home",
        "_loop",
        "_outbox",
        "_parser",
        "_paused",
        "_quiet_bytes",
        "_reusable",
        "_size_bytes",
        "_transport",
        "_waiter",
        "failed",
        "finished",
        "idle_since",
        "status",
        "until_close",
    )

    def __init__(self, home: Home, outbox: Outbox, loop: asyncio.AbstractEventLoop) -> None:
        self._home = home
        self._outbox = outbox
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        self._begin()

    def __repr__(self) -> str:
        state = "failed" if self.failed else "finished" if self.finished else "open"
        return f"<Connection {state} status={self.status}>"

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._quiet_bytes = 0
        self._headers_done = False
        self._body_seen = False
        self.until_close = False
        self._reusable = False
        self._chunks: list[bytes] = []
        self._size_bytes = 0
        self._paused = False
        self.status = 0
        self.finished = False
        self.failed = False

    # -- the exchange -------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether the transport is there for another exchange."""
        return self._transport is not None and not self._transport.is_closing() and not self.failed

    async def exchange(self, head: bytes, body: bytes) -> Response | FailureKind:
        """Sends a request and waits for the response's headers. Cancelling cuts the connection."""
        if not self.usable:
            # A connection lost before this would wake nobody.
            return FailureKind.RESET
        self._begin()
        transport = cast(asyncio.Transport, self._transport)
        self._outbox.write(transport, head)
        if body:
            self._outbox.write(transport, body)
        try:
            while not self._headers_done:
                if self.failed:
                    self.abort()
                    return FailureKind.RESET
                await self._wait()
        except BaseException:
            self.abort()
            raise
        return Response(self, tuple(self._headers))

    async def read(self) -> bytes | FailureKind:
        """The next body bytes, empty at the end, RESET when the connection died before it."""
        while not self._chunks:
            if self.finished:
                return b""
            if self.failed:
                return FailureKind.RESET
            await self._wait()
        chunks, self._chunks, self._size_bytes = self._chunks, [], 0
        if self._paused and self._transport is not None:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @property
    def drained(self) -> bool:
        """Whether the body was read to its end."""
        return self.finished and not self._chunks

    def release(self) -> None:
        """Ends the exchange: back to the pool if it is complete and the peer keeps the connection, cut otherwise."""
        if self.drained and self._reusable and self.usable and not self._unsent:
            self._home.put(self)
        else:
            self.abort()

    @property
    def _unsent(self) -> bool:
        """Whether a part of the request is still to be sent: the answer came early."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def abort(self) -> None:
        """Cuts the connection, which aborts whatever the engine is doing for it."""
        self.failed = not self.finished
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- asyncio ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes from the engine."""
        if self.finished:
            # Bytes nobody asked for: what they answer is anybody's guess, so the connection is done.
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # An answer that was complete before the nonsense began stands; the connection does not.
            self.failed = not self.finished
            self._reusable = False
        # Unfinished lines reach no callback; they must not pile up in the parser.
        self._quiet_bytes = 0 if self._body_seen else self._quiet_bytes + len(data)
        self._body_seen = False
        if self._quiet_bytes > 2 * HEADERS_BYTES:
            self.failed = not self.finished
        if self._size_bytes > BUFFER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; that ends a body without a length, and breaks any other."""
        if not self.finished:
            self.finished = self.until_close and exc is None
            self.failed = not self.finished
        self._reusable = False
        self._wake()

    # -- httptools ----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer starts. A second one was asked for by nobody, and must not become a part of the first."""
        if self.finished:
            raise httptools.HttpParserError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One response header. Trailers are counted and dropped."""
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > HEADERS_BYTES:
            raise httptools.HttpParserError("header section too large")
        if not self._headers_done:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The header section is complete. Interim answers (1xx) are not the answer."""
        status = self._parser.get_status_code()
        if status < 200:
            self._headers = []
            return
        self.status = status
        if status >= 600:
            raise httptools.HttpParserError("no such status")
        self._headers_done = True
        self._reusable = self._parser.should_keep_alive()
        self.until_close = status not in (204, 304) and not any(map(_frames, self._headers))

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(body)
        self._size_bytes += len(body)
        self._body_seen = True

    def on_message_complete(self) -> None:
        """The end of the body."""
        if self._headers_done:
            self.finished = True


def _frames(header: tuple[bytes, bytes]) -> bool:
    """Whether a header tells where the body ends."""
    name = header[0].lower()
    return name == b"content-length" or (name == b"transfer-encoding" and header[1].lower().endswith(b"chunked"))


class Response:
    """An open response. Whoever holds it must `close` it; closing before the end aborts the request on the engine."""

    __slots__ = ("_connection", "headers", "status", "unframed")

    def __init__(self, connection: Connection, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self._connection = connection
        self.status = connection.status
        self.headers = headers
        # Only the end of the connection tells the end of the body.
        self.unframed = connection.until_close

    def header(self, name: bytes) -> bytes:
        """The first value of a header (`name` in lower case), empty when absent."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    async def read(self) -> bytes | FailureKind:
        """The next bytes as they arrived, empty at the end of the body; RESET when the connection died before it."""
        return await self._connection.read()

    async def read_up_to(self, limit_bytes: int, first: bytes = b"") -> bytes | FailureKind:
        """The body from `first` on, or its beginning once that passes `limit_bytes`; RESET when it breaks off."""
        parts, size_bytes = [first], len(first)
        while not self.finished and size_bytes <= limit_bytes:
            chunk = await self.read()
            if isinstance(chunk, FailureKind):
                return chunk
            parts.append(chunk)
            size_bytes += len(chunk)
        return b"".join(parts)

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.header(b"content-type").lower().startswith(b"text/event-stream")

    @property
    def finished(self) -> bool:
        """Whether the whole body has been read."""
        return self._connection.drained

    def close(self) -> None:
        """Gives the connection back when the body is read to its end, otherwise cuts it. Idempotent."""
        connection, self._connection = self._connection, _SPENT
        connection.release()


class _Spent(Connection):
    """Stands in for the connection of a closed response."""

    __slots__ = ()

    def __init__(self) -> None:
        self._chunks = []
        self.finished = True
        self.failed = False

    def release(self) -> None:
        """Nothing left to give back."""


_SPENT = _Spent()
