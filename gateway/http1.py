"""The server side of HTTP/1.1: uvicorn's httptools protocol, plus the limits and the signals it lacks.

Bounds the size, number and duration of a request's headers, tells the relay the moment its client is gone, and ends
connections so that the client can read our last word. It owns no routing and no bodies.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.intake import dialect_of, request_id
from picker.openai.errors import ApiError, bad_request, error_headers, headers_too_large, render_error
from picker.upstream.outbox import Outbox

CONNECTION = "waypost.connection"

# How long a refused client may go on sending before the connection is closed for good.
LINGER_S = 2.0
# Requests one connection may send ahead of the answers.
PIPELINED_MAX = 64
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CHUNKED = b"transfer-encoding: chunked\r\n"


class HeaderLimits:
    """Bounds on one request's header section."""

    __slots__ = ("count", "size_bytes", "timeout_s")

    def __init__(self, *, count: int, size_bytes: int, timeout_s: float) -> None:
        self.count = count
        self.size_bytes = size_bytes
        self.timeout_s = timeout_s


class HeadHolder:
    """The transport of one response: holds its head until its first body bytes, to spend one system call on both."""

    __slots__ = ("_begun", "_connection", "_held", "_transport")

    def __init__(self, connection: GatewayProtocol, *, bodiless: bool) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._held = b""
        self._begun = bodiless

    @property
    def unframed(self) -> bool:
        """Whether only the end of the connection tells the end of the body."""
        return False

    def write(self, data: bytes) -> None:
        """Writes, or holds a head. An interim `100 Continue` is no head: the client waits for it."""
        if self._held:
            data, self._held = self._held + data, b""
        elif not self._begun and not data.startswith(b"HTTP/1.1 100"):
            self._begun = True
            self._held = data
            return
        self._connection.outbox.write(self._transport, data)

    def close(self) -> None:
        """Closes, after what is held."""
        self._connection.outbox.flush()
        if self._held and not self._transport.is_closing():
            self._transport.write(self._held)
            self._held = b""
        self._connection.hang_up()

    def is_closing(self) -> bool:
        """Whether the connection is on its way down."""
        return self._transport.is_closing()


class UnframedHolder(HeadHolder):
    """For clients of HTTP/1.0, which know no chunks: a body without a length ends with the connection."""

    __slots__ = ("_unframed",)

    def __init__(self, connection: GatewayProtocol, *, bodiless: bool) -> None:
        super().__init__(connection, bodiless=bodiless)
        self._unframed = False

    @property
    def unframed(self) -> bool:
        """Whether only the end of the connection tells the end of the body."""
        return self._unframed

    def write(self, data: bytes) -> None:
        """Takes the frame off what uvicorn chunked: it writes one chunk, the last one or both at a time."""
        if self._unframed:
            size, _, rest = data.partition(b"\r\n")
            data = rest[: int(size or b"0", 16)]
        elif not self._begun and _CHUNKED in data:
            self._unframed = True
            data = data.replace(_CHUNKED, b"", 1)
        super().write(data)


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. `on_gone` is called once when it is lost; the relay sets it while a request is served."""

    limits: ClassVar[HeaderLimits]
    outbox: ClassVar[Outbox]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_gone: Callable[[], None] | None = None
        self.url = b""
        self._header_bytes = 0
        self._unseen_bytes = 0
        self._in_headers = False
        self._over_limit = False
        self._lingering = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client connected: the clock for its first request's headers runs."""
        super().connection_made(transport)
        self._arm_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we closed."""
        self._disarm_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self.on_gone is not None:
            on_gone, self.on_gone = self.on_gone, None
            on_gone()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; a header section still incomplete afterwards is on the clock."""
        if self._lingering:
            return
        # Bytes that complete no header and no piece of a body reach no callback, so they are counted here.
        self._unseen_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("the request is not valid HTTP/1.1")
        if self._unseen_bytes > 2 * self.limits.size_bytes:
            self._refuse(headers_too_large(self.limits.size_bytes))
        elif self._in_headers and self._timer is None and not self.transport.is_closing():
            self._arm_header_timer()

    def on_message_begin(self) -> None:
        """A request starts."""
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._in_headers = True
        self._header_bytes = self._unseen_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. What comes after the body is no header of this request: trailers are dropped."""
        self._count(len(name) + len(value) + 4)
        if not self._in_headers:
            return
        if len(self.headers) >= self.limits.count:
            self._over_limit = True
            raise _TooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The header section is complete."""
        if self.parser.should_upgrade():
            # The parser is about to stop; this head comes again without its offer.
            return
        self._in_headers = False
        self._disarm_timer()
        if len(self.pipeline) >= PIPELINED_MAX:
            raise _TooLarge
        super().on_headers_complete()
        scope = self.scope
        holder = UnframedHolder if scope["http_version"] == "1.0" else HeadHolder
        self.cycle.transport = holder(self, bodiless=scope["method"] == "HEAD")  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unseen_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is here, unless its head is to come again."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is written; the next pipelined request may start, unless that was the last word."""
        if self._lingering:
            self.pipeline.clear()
            return
        super().on_response_complete()

    def shutdown(self) -> None:
        """The server ends: closes if nothing is going on. What waits in the outbox is part of an answer."""
        self.outbox.flush()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's way out of a parser error: ours is JSON, and a 431 when a limit was the cause."""
        self._refuse(headers_too_large(self.limits.size_bytes) if self._over_limit else bad_request(msg))

    @property
    def body_arrived(self) -> bool:
        """Whether the whole body of the current request is here."""
        return not self.cycle.more_body

    @property
    def stuck(self) -> bool:
        """Whether the client does not take what was written for it."""
        return self.flow.write_paused

    def resume_body(self) -> None:
        """Reads on although the body is complete: only a reading socket notices that its peer left."""
        self.flow.resume_reading()

    def hang_up(self) -> None:
        """Closes after what was written. While a request is still being sent, its rest is read and dropped for a
        moment: the reset that unread bytes cause would overtake the answer.
        """
        if self.cycle is None or self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()

    def cut(self) -> None:
        """Breaks off an answer so that the client can tell: its last chunk is missing, or the connection is reset."""
        self.cycle.disconnected = True
        holder = cast(HeadHolder, self.cycle.transport)
        if self.transport.is_closing():
            return
        if self.stuck or holder.unframed:
            sock: socket.socket = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.transport.abort()
        else:
            holder.close()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:
                data = self._without_upgrade() + data[stopped.args[0] :]
            else:
                return

    def _without_upgrade(self) -> bytes:
        """A head that offers another protocol, without the offer, for a parser that has not seen it.

        Declining is our right (RFC 9110 section 7.8) and Java's client offers HTTP/2 with each first request, but
        httptools takes what follows such a head for the other protocol, even when it is the body.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("not a proxy")
        named = b",".join(value for name, value in self.headers if name == b"connection").lower()
        kept = [name + b": " + value for name, value in self.headers if name not in (b"upgrade", b"connection")]
        kept.append(b"connection: " + (b"close" if b"close" in named else b"keep-alive"))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"\r\n".join([method + b" " + self.url + b" HTTP/" + version.encode(), *kept, b"\r\n"])

    def _count(self, size_bytes: int) -> None:
        self._header_bytes += size_bytes
        if self._header_bytes > self.limits.size_bytes:
            self._over_limit = True
            raise _TooLarge

    def _refuse(self, error: ApiError) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or self.pipeline or not cycle.more_body:
                # Nonsense behind requests that are being answered must not cut into their answers.
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        ident = request_id(dict(self.headers or ()))
        body = render_error(error, dialect=dialect_of(self.url), request_id=ident)
        head = [STATUS_LINE[error.status], f"connection: close\r\ncontent-length: {len(body)}\r\n".encode()]
        head += [f"{name}: {value}\r\n".encode() for name, value in [*error_headers(error), ("x-request-id", ident)]]
        self.outbox.flush()
        self.transport.write(b"".join([*head, b"\r\n", body]))
        self._linger()

    def _linger(self) -> None:
        if self._lingering or self.transport.is_closing():
            return
        self._lingering = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._disarm_timer()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _arm_header_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.timeout_s, self._headers_late)

    def _disarm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


class _TooLarge(httptools.HttpParserError):
    """A limit on headers was passed; httptools turns it into a parser error."""


def limited(limits: HeaderLimits, outbox: Outbox) -> type[GatewayProtocol]:
    """The protocol class uvicorn is given, with these limits and the outbox of its loop."""
    return type("LimitedGatewayProtocol", (GatewayProtocol,), {"limits": limits, "outbox": outbox})
