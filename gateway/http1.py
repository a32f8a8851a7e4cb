"""The server side of HTTP/1.1: uvicorn's httptools protocol, plus the limits and the signal it lacks.

Bounds the size, number and duration of a request's headers, and tells the relay the moment its client is gone. It
owns no routing and no bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from picker.openai.errors import ApiError, bad_request, error_headers, headers_too_large, render_error

CONNECTION = "waypost.connection"


class HeaderLimits:
    """Bounds on one request's header section."""

    __slots__ = ("count", "size_bytes", "timeout_s")

    def __init__(self, *, count: int, size_bytes: int, timeout_s: float) -> None:
        self.count = count
        self.size_bytes = size_bytes
        self.timeout_s = timeout_s


class HeadHolder:
    """A transport that holds a response's head until its first body bytes, to spend one system call on both."""

    __slots__ = ("_held", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""

    def write(self, data: bytes) -> None:
        """Writes, or holds a head. An interim `100 Continue` is no head: the client waits for it."""
        if self._held:
            data, self._held = self._held + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._held = data
            return
        self._transport.write(data)

    def close(self) -> None:
        """Closes, after what is held."""
        if self._held:
            self._transport.write(self._held)
            self._held = b""
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is on its way down."""
        return self._transport.is_closing()


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. `on_gone` is called once when it is lost; the relay sets it while a request is served."""

    limits: ClassVar[HeaderLimits]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_gone: Callable[[], None] | None = None
        self._header_bytes = 0
        self._in_headers = False
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client connected: the clock for its first request's headers runs."""
        super().connection_made(transport)
        self._arm_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we closed."""
        self._disarm_header_timer()
        super().connection_lost(exc)
        if self.on_gone is not None:
            on_gone, self.on_gone = self.on_gone, None
            on_gone()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; a header section still incomplete afterwards is on the clock."""
        if self._in_headers:
            # Bytes that complete no line reach no callback, so they are counted here.
            self._header_bytes += len(data)
            if self._header_bytes > 2 * self.limits.size_bytes:
                self._refuse(headers_too_large(self.limits.size_bytes))
                return
        super().data_received(data)
        if self._in_headers and self._header_timer is None and not self.transport.is_closing():
            self._arm_header_timer()

    def on_message_begin(self) -> None:
        """A request starts."""
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._in_headers = True
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= self.limits.count:
            raise _TooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The header section is complete."""
        self._in_headers = False
        self._disarm_header_timer()
        super().on_headers_complete()
        self.cycle.transport = HeadHolder(self.transport)  # type: ignore[assignment]

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's way out of a parser error: ours is JSON, and a 431 when a limit was the cause."""
        over = self._header_bytes > self.limits.size_bytes or len(self.headers or ()) >= self.limits.count
        self._refuse(headers_too_large(self.limits.size_bytes) if over and self._in_headers else bad_request(msg))

    @property
    def body_arrived(self) -> bool:
        """Whether the whole body of the current request is here."""
        return not self.cycle.more_body

    def resume_body(self) -> None:
        """Reads on although the body is complete: only a reading socket notices that its peer left.

        With requests waiting behind this one it stays paused, or a client could pile up any number of them.
        """
        if not self.pipeline:
            self.flow.resume_reading()

    def _count(self, size_bytes: int) -> None:
        self._header_bytes += size_bytes
        if self._header_bytes > self.limits.size_bytes:
            raise _TooLarge

    def _refuse(self, error: ApiError) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            # Garbage behind a request that is being answered must not cut into its answer.
            self.cycle.keep_alive = False
            return
        body = render_error(error)
        head = [f"HTTP/1.1 {error.status} Refused\r\nconnection: close\r\ncontent-length: {len(body)}\r\n".encode()]
        head += [f"{name}: {value}\r\n".encode() for name, value in error_headers(error)]
        self.transport.write(b"".join([*head, b"\r\n", body]))
        self.transport.close()

    def _arm_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.timeout_s, self._headers_late)

    def _disarm_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()


class _TooLarge(httptools.HttpParserError):
    """A limit on headers was passed; httptools turns it into a parser error."""


def limited(limits: HeaderLimits) -> type[GatewayProtocol]:
    """The protocol class uvicorn is given, with these limits."""
    return type("LimitedGatewayProtocol", (GatewayProtocol,), {"limits": limits})
