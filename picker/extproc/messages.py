"""The values a session speaks: events that come in, actions that go out, replies to the proxy.

Plain and immutable; no protobuf, no gRPC. Names follow Envoy's external processing API where it has a name for the
thing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from picker.core.events import Event
from picker.core.ledger import Eviction
from picker.core.record import RequestRecord
from picker.core.values import Decision, InferenceRequest, Rejection
from picker.openai.parse import ParsedBody


class BodyMode(enum.IntEnum):
    """How the proxy hands over a body. The numbers are those of Envoy's `ProcessingMode.BodySendMode`."""

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX_STREAMED = 4


class Direction(enum.StrEnum):
    """Which half of the exchange a reply belongs to."""

    REQUEST = "request"
    RESPONSE = "response"


class Modes(msgspec.Struct, frozen=True):
    """The body modes of both directions. A proxy that does not say gets the contract's mode, full duplex."""

    request: BodyMode = BodyMode.FULL_DUPLEX_STREAMED
    response: BodyMode = BodyMode.FULL_DUPLEX_STREAMED


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What may ride on any message of the proxy.

    `modes` only on the first (None: not said). `subset` is None when the hint is absent and empty when it names
    nobody. `pool` is the pool whose route matched, as far as the proxy was told to say. `served` is the endpoint that
    really served, on response headers.
    """

    modes: Modes | None = None
    observability: bool = False
    subset: tuple[str, ...] | None = None
    pool: str | None = None
    served: str | None = None


NO_CONTEXT = Context()


# --- events: the proxy speaks


class RequestHeaders(msgspec.Struct, frozen=True):
    """Header names are in lower case; of a repeated header the first value counts."""

    headers: Mapping[str, str]
    end_of_stream: bool = False
    context: Context = NO_CONTEXT


class RequestBody(msgspec.Struct, frozen=True):
    """A chunk, or the whole body in BUFFERED mode."""

    chunk: bytes
    end_of_stream: bool = False
    context: Context = NO_CONTEXT


class RequestTrailers(msgspec.Struct, frozen=True):
    """The end of a request that has trailers."""

    context: Context = NO_CONTEXT


class ResponseHeaders(msgspec.Struct, frozen=True):
    """The head of the response. `status` is 0 when the proxy did not say."""

    status: int
    headers: Mapping[str, str]
    end_of_stream: bool = False
    context: Context = NO_CONTEXT


class ResponseBody(msgspec.Struct, frozen=True):
    """A chunk, or the whole body in BUFFERED mode."""

    chunk: bytes
    end_of_stream: bool = False
    context: Context = NO_CONTEXT


class ResponseTrailers(msgspec.Struct, frozen=True):
    """The end of a response that has trailers."""

    context: Context = NO_CONTEXT


ProxyMessage = RequestHeaders | RequestBody | RequestTrailers | ResponseHeaders | ResponseBody | ResponseTrailers


# --- events: everybody else


class Decided(msgspec.Struct, frozen=True):
    """The answer to a `Decide` action."""

    result: Decision | Rejection


class Deadline(msgspec.Struct, frozen=True):
    """The time set with `SetDeadline` has come."""


class Evicted(msgspec.Struct, frozen=True):
    """The brain gives up on this request: its pod hangs, or one of the request's deadlines passed."""

    reason: Eviction


class Overloaded(msgspec.Struct, frozen=True):
    """The server has no room for this exchange: too many streams, or too many body bytes in memory."""

    reason: str


class PeerGone(msgspec.Struct, frozen=True):
    """The proxy ended the stream: `clean` for a half-close, otherwise a reset or a broken connection."""

    clean: bool


class Draining(msgspec.Struct, frozen=True):
    """The process is stopping. A request phase still finishes; afterwards the stream is closed."""


SessionEvent = ProxyMessage | Decided | Deadline | Evicted | Overloaded | PeerGone | Draining


# --- replies: what a Send action carries


class Hidden(str):
    """A header's value that never shows in a repr: a key."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'...'"


class Mutation(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of the headers. `destination` also goes into the dynamic metadata, where it must say the same
    as the header.
    """

    set_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: tuple[str, ...] = ()
    destination: str | None = None
    scores: tuple[tuple[str, float], ...] = ()


UNCHANGED = Mutation()


class HeadersReply(msgspec.Struct, frozen=True):
    """Answers a headers message. The route cache is cleared exactly when there is a destination."""

    direction: Direction
    mutation: Mutation = UNCHANGED


class StreamedBody(msgspec.Struct, frozen=True):
    """One chunk of a body in full duplex: at most `CHUNK_BYTES`. Chunks sent need not match chunks received."""

    direction: Direction
    chunk: bytes
    end_of_stream: bool


class BodyReply(msgspec.Struct, frozen=True):
    """Answers one body message outside full duplex. `body` None leaves it as it is, empty bytes remove it."""

    direction: Direction
    body: bytes | None = None
    mutation: Mutation = UNCHANGED


class TrailersReply(msgspec.Struct, frozen=True):
    """Answers a trailers message without changing them. `destination` only goes into the dynamic metadata."""

    direction: Direction
    destination: str | None = None


class Immediate(msgspec.Struct, frozen=True, kw_only=True):
    """Ends the exchange with a response of ours. `details` is for the proxy's access log."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    details: str


Reply = HeadersReply | StreamedBody | BodyReply | TrailersReply | Immediate


# --- actions


class Send(msgspec.Struct, frozen=True):
    """Write this reply to the proxy; replies are written in the order of the actions."""

    reply: Reply


class Decide(msgspec.Struct, frozen=True):
    """Ask the director where this request goes; the result comes back as `Decided`. `body` is what the engine shall get
    and `parsed` what was read of it, None where nothing was: the keys of the prompt are made of them.
    """

    request: InferenceRequest
    body: bytes = b""
    parsed: ParsedBody | None = None

    def __repr__(self) -> str:
        return f"Decide({self.request!r})"


class Observe(msgspec.Struct, frozen=True):
    """Tell the director."""

    event: Event


class Report(msgspec.Struct, frozen=True):
    """One request is over, for the log and the metrics. At most one per session."""

    record: RequestRecord


class SetDeadline(msgspec.Struct, frozen=True):
    """Send `Deadline` at this time of the session's clock; None: no longer needed. Replaces the deadline set before."""

    at: float | None


class Close(msgspec.Struct, frozen=True):
    """End the stream, with status OK or, when the proxy broke the protocol, with an error. Always the last action."""

    ok: bool = True


Action = Send | Decide | Observe | Report | SetDeadline | Close

CHUNK_BYTES = 62_000
"""Most bytes in one streamed chunk: Envoy asks for at most 64 KiB, and every Endpoint Picker so far used this."""


def chunks(direction: Direction, body: bytes, end_of_stream: bool) -> list[StreamedBody]:
    """Cuts a body into streamed replies; only the last carries `end_of_stream`. An empty body is one empty chunk if
    it ends the stream.
    """
    if len(body) <= CHUNK_BYTES:
        return [StreamedBody(direction, body, end_of_stream)] if body or end_of_stream else []
    starts = range(0, len(body), CHUNK_BYTES)
    last = starts[-1]
    return [StreamedBody(direction, body[at : at + CHUNK_BYTES], end_of_stream and at == last) for at in starts]
