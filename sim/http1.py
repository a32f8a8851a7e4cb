"""A small HTTP/1.1 server side on asyncio and httptools, made for misbehaving on purpose.

It parses requests and writes answers; what to answer is the business of the ``Application``. Written by hand because
a web framework costs several times the CPU and hides the socket, which the faults need (RST, silence, sudden close).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Protocol, cast

import httptools
import msgspec

MAX_BODY_BYTES: Final = 64 << 20
MAX_HEADERS: Final = 256
MAX_PIPELINED: Final = 64
# A reader this far behind is cut off: nothing here may grow without a bound.
MAX_UNSENT_BYTES: Final = 16 << 20
_CRLF: Final = b"\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}


class HttpRequest(msgspec.Struct, frozen=True):
    """One parsed request: upper-case method, path and query as sent, lower-case header names, whole body."""

    method: str
    path: str
    query: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by lower-case name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Application(Protocol):
    """What the connections of one server serve."""

    connections: set[Connection]
    head: bytes

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Answer now, or keep ``reply`` and answer later."""

    def silent(self, path: str) -> bool:
        """True while a request for ``path`` must not even be read (the process looks stopped)."""


class Reply:
    """The answer to one request. Calls after the client has gone do nothing; ``on_gone`` is called once when it goes.

    Either ``send`` once, or ``open_stream``, ``write`` any number of times, ``end``.
    """

    __slots__ = ("_connection", "_echo", "on_gone", "streaming")

    def __init__(self, connection: Connection, request_id: bytes | None) -> None:
        self._connection: Connection | None = connection
        self._echo = b"x-request-id: " + request_id + _CRLF if request_id is not None else b""
        self.on_gone: Callable[[], None] | None = None
        self.streaming = False

    def send(self, body: bytes, *, status: int = 200, content_type: bytes = b"application/json") -> None:
        """A whole answer."""
        if self._connection is None:
            return
        self._connection.write(
            b"%sContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (self._head(status), content_type, len(body), body)
        )
        self._done()

    def open_stream(self, content_type: bytes = b"text/event-stream; charset=utf-8") -> None:
        """Status 200 and headers of an answer of unknown length."""
        if self._connection is None:
            return
        self.streaming = True
        self._connection.write(
            b"%sContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % (self._head(200), content_type)
        )

    def write(self, pieces: list[bytes]) -> None:
        """Each piece becomes one HTTP chunk; all of them go out in one write."""
        if self._connection is not None and pieces:
            self._connection.write(b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]))

    def end(self) -> None:
        """The end of a stream."""
        if self._connection is not None:
            self._connection.write(_LAST_CHUNK)
            self._done()

    def close(self) -> None:
        """Close the connection (FIN) whatever was promised."""
        if self._connection is not None:
            self._connection.close()

    def reset(self) -> None:
        """Break the connection with a TCP RST. What has not left this process yet is lost."""
        if self._connection is not None:
            self._connection.reset()

    def gone(self) -> None:
        """Called by the connection when the client is gone."""
        self._connection = None
        if self.on_gone is not None:
            self.on_gone()

    def _head(self, status: int) -> bytes:
        assert self._connection is not None
        start = b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, "Unknown").encode())
        return start + self._connection.application.head + self._echo

    def _done(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.answered()


class Connection(asyncio.Protocol):
    """One client connection: one request at a time is answered, further pipelined ones wait in order."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._reply: Reply | None = None
        self._queue: deque[HttpRequest] = deque()
        self._keep_alive = True
        self._muted = False
        self._leaving = False
        self.lost = asyncio.Event()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.application.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.lost.set()
        self.application.connections.discard(self)
        self._queue.clear()
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.gone()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(b"upgrade is not supported")
        except (httptools.HttpParserError, UnicodeDecodeError):
            self._refuse(b"bad HTTP request")

    # httptools

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._body = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._headers) < MAX_HEADERS:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.application.silent(self._url.partition(b"?")[0].decode("latin-1")):
            self._mute()
        for name, value in self._headers:
            if name == b"expect" and value.lower() == b"100-continue" and not self._muted:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= MAX_BODY_BYTES:
            self._body.append(body)

    def on_message_complete(self) -> None:
        path, _, query = self._url.partition(b"?")
        request = HttpRequest(
            self._parser.get_method().decode(),
            path.decode("latin-1"),
            query.decode("latin-1"),
            tuple(self._headers),
            b"".join(self._body),
        )
        self._keep_alive = self._parser.should_keep_alive()
        if self._body_bytes > MAX_BODY_BYTES or len(self._queue) >= MAX_PIPELINED:
            self._refuse(b"request too large")
        elif self._reply is not None or self._muted:
            self._queue.append(request)
        else:
            self._serve(request)

    # What replies and the application use

    def write(self, data: bytes) -> None:
        """Send bytes, unless the connection is gone."""
        if self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._transport.abort()

    def answered(self) -> None:
        """The current request has its whole answer: take the next one, or close if the client asked for that."""
        self._reply = None
        if self._queue and not self._muted:
            self._serve(self._queue.popleft())
        elif (self._leaving or not self._keep_alive) and not self._queue:
            self.close()

    def close(self) -> None:
        """FIN, after what was written."""
        if self._transport is not None:
            self._transport.close()

    def finish(self) -> None:
        """Close as soon as what was asked has been answered."""
        self._leaving = True
        if self._reply is None and not self._queue:
            self.close()

    def drop(self) -> None:
        """Close at once and lose what was not sent, as when a process dies."""
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """RST: with a linger time of zero the kernel closes without the usual handshake."""
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def wake(self) -> None:
        """Read and answer again after a silence."""
        if not self._muted:
            return
        self._muted = False
        if self._transport is not None:
            self._transport.resume_reading()
        if self._queue and self._reply is None:
            self._serve(self._queue.popleft())

    def _mute(self) -> None:
        # Not reading is what a stopped process does: large uploads block, and a client that leaves goes unnoticed.
        self._muted = True
        if self._transport is not None:
            self._transport.pause_reading()

    def _serve(self, request: HttpRequest) -> None:
        self._reply = reply = Reply(self, request.header(b"x-request-id"))
        self.application.handle(request, reply)

    def _refuse(self, message: bytes) -> None:
        body = b'{"error":{"message":"%b","type":"BadRequestError","param":null,"code":400}}' % message
        self.write(
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.close()
