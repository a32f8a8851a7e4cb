"""The response half of an exchange: answers what the proxy shows of the response and notes how it ends.

Works without a request half (a proxy may skip it). In full duplex it gives every byte back. The only change it ever
makes is the model name: a client that asked for an alias reads the alias. For conformance tests it says who served.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

from picker.core.events import AttemptFailed, FailureKind, Finished, Left, Outcome, Usage
from picker.extproc import headers as names
from picker.extproc.booking import Booking, End
from picker.extproc.messages import (
    Action,
    BodyMode,
    BodyReply,
    Direction,
    HeadersReply,
    Modes,
    Mutation,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    Send,
    TrailersReply,
    chunks,
)
from picker.extproc.question import Question
from picker.extproc.settings import SessionSettings
from picker.openai import usage as usages
from picker.openai.rewrite import StreamModelRestorer, restore_model

ResponseMessage = ResponseHeaders | ResponseBody | ResponseTrailers

# A proxy that shows no more than the response headers ends the stream at once after our answer: one round trip.
LEFT_WITHIN_S = 0.25

_DIRECTION = Direction.RESPONSE
_UNCHANGED = Send(HeadersReply(_DIRECTION))

_BLAME = {
    500: FailureKind.SERVER_ERROR,
    502: FailureKind.RESET,
    503: FailureKind.OVERLOADED,
    504: FailureKind.TIMEOUT,
    529: FailureKind.OVERLOADED,
}


class ResponseState(enum.Enum):
    """IDLE until the first message; BODY until the end was seen; then DONE; ENDED once nothing may follow."""

    IDLE = enum.auto()
    BODY = enum.auto()
    DONE = enum.auto()
    ENDED = enum.auto()


def blame(status: int, headers: Mapping[str, str]) -> FailureKind | None:
    """What a status says against the endpoint; None for nothing.

    Servers date their answers and proxies add the date last, so an undated 503 is the proxy's own: it could not
    connect.
    """
    if status == 503 and "date" not in headers and headers.get("content-type", "").startswith("text/plain"):
        return FailureKind.CONNECT
    return _BLAME.get(status)


class ResponseHalf:
    """One response. `handle` returns None for a message that may not come now."""

    __slots__ = (
        "_blind",
        "_booking",
        "_events",
        "_has_length",
        "_headers_at",
        "_joined",
        "_joined_bytes",
        "_mode",
        "_question",
        "_restorer",
        "_settings",
        "_usage",
        "_whole",
        "state",
        "status",
    )

    def __init__(self, booking: Booking, settings: SessionSettings) -> None:
        self.state = ResponseState.IDLE
        self.status = 0
        self._booking = booking
        self._settings = settings
        self._question = Question()
        self._mode = BodyMode.FULL_DUPLEX_STREAMED
        self._blind = False
        self._events: usages.UsageScanner | None = None
        self._usage: usages.Usage | None = None
        self._restorer: StreamModelRestorer | None = None
        self._whole = False
        self._joined: list[bytes] = []
        self._joined_bytes = 0
        self._has_length = False
        self._headers_at = 0.0

    def use(self, modes: Modes) -> None:
        """Sets the body mode, known from the first message of the stream."""
        self._mode = modes.response
        self._blind = modes.response is BodyMode.NONE

    def expect(self, question: Question) -> None:
        """Tells what was asked, so that the answer is read accordingly."""
        self._question = question

    @property
    def sees_body(self) -> bool:
        """Whether the response body passes by as it arrives, so that silence means something."""
        return self._mode in (BodyMode.STREAMED, BodyMode.FULL_DUPLEX_STREAMED)

    @property
    def in_full_duplex(self) -> bool:
        """Whether response bytes may be on their way to us which the proxy no longer has."""
        return self._full_duplex and self.state is ResponseState.BODY

    @property
    def held_bytes(self) -> int:
        """Body bytes joined here."""
        return self._joined_bytes

    def handle(self, event: ResponseMessage, now: float) -> list[Action] | None:
        """One message of the response direction."""
        step = _TRANSITIONS.get((self.state, type(event)))
        return None if step is None else step(self, event, now)

    def _headers(self, event: ResponseHeaders, now: float) -> list[Action]:
        self.state = ResponseState.BODY
        self.status = event.status
        self._headers_at = now
        self._has_length = "content-length" in event.headers
        self._read_kind(event.headers.get("content-type", ""))
        actions: list[Action] = [self._tell_who_served(event) if self._settings.conformance else _UNCHANGED]
        if event.context.served:
            actions += self._booking.served(event.context.served, now)
        blamed = blame(event.status, event.headers)
        if blamed is not None:
            actions += self._booking.end(AttemptFailed(self._booking.key, now, blamed, event.status))
        if event.end_of_stream:
            return actions + self._end(now)
        return actions if self.sees_body else actions + self._booking.bytes_seen(now, refused=event.status >= 400)

    def _tell_who_served(self, event: ResponseHeaders) -> Send:
        served = event.context.served or self._booking.chosen
        if not served:
            return _UNCHANGED
        return Send(HeadersReply(_DIRECTION, Mutation(set_headers=((names.SERVED_ECHO, served),))))

    def _read_kind(self, kind: str) -> None:
        """Event streams pass by; a plain JSON answer is joined, to be read (and in full duplex passed on) as a
        whole.
        """
        streams = "text/event-stream" in kind
        parsed = self._question.parsed
        asked_stream = parsed is not None and parsed.stream
        self._whole = not streams and not asked_stream and (not kind or "json" in kind)
        if self._blind:
            return
        if not self._whole and self._booking.open:
            self._events = usages.UsageScanner()
        renamed = self._question.target_model is not None and self._question.model is not None
        if renamed and streams and self._full_duplex:
            assert self._question.target_model is not None
            assert self._question.model is not None
            self._restorer = StreamModelRestorer(self._question.target_model, self._question.model)

    def _body(self, event: ResponseBody, now: float) -> list[Action]:
        self.state = ResponseState.BODY
        actions = self._booking.bytes_seen(now, refused=self.status >= 400) if event.chunk else []
        if self._events is not None:
            self._events.feed(event.chunk)
        ends = event.end_of_stream or self._mode is BodyMode.BUFFERED
        if self._full_duplex:
            actions += self._duplex(event.chunk, ends)
        elif self._mode is BodyMode.BUFFERED and self._whole:
            actions.append(self._buffered(event.chunk))
        else:
            if self._whole and self._join(event.chunk) and ends:
                self._usage = usages.usage_from_json(self._take_joined())
            actions.append(Send(BodyReply(_DIRECTION)))
        if ends:
            return actions + self._end(now)
        if self._mode is BodyMode.BUFFERED_PARTIAL:
            # The beginning of a body too long to buffer: the proxy will not show the rest.
            self._blind, self._headers_at = True, now
        return actions

    def _duplex(self, chunk: bytes, ends: bool) -> list[Action]:
        if self._whole and self._join(chunk):
            if not ends:
                return []
            chunk = self._read_whole(self._take_joined())
        elif self._restorer is not None:
            chunk = self._restorer.feed(chunk)
            if ends:
                chunk += self._restorer.flush()
        elif self._joined:
            chunk = self._take_joined()
        return [Send(reply) for reply in chunks(_DIRECTION, chunk, ends)]

    def _buffered(self, body: bytes) -> Action:
        restored = self._read_whole(body)
        if restored == body:
            return Send(BodyReply(_DIRECTION))
        length = Mutation(set_headers=(("content-length", str(len(restored))),))
        return Send(BodyReply(_DIRECTION, restored, length))

    def _read_whole(self, body: bytes) -> bytes:
        self._usage = usages.usage_from_json(body)
        target, model = self._question.target_model, self._question.model
        return body if target is None or model is None else restore_model(body, target, model)

    def _join(self, chunk: bytes) -> bool:
        """Keeps a chunk; False once the answer is too long to be joined."""
        self._joined.append(chunk)
        self._joined_bytes += len(chunk) or 1
        self._whole = self._joined_bytes <= self._settings.hold_response_bytes
        if not self._whole and not self._full_duplex:
            self._take_joined()
        return self._whole

    def _take_joined(self) -> bytes:
        joined = b"".join(self._joined)
        self._joined, self._joined_bytes = [], 0
        return joined

    def _trailers(self, event: ResponseTrailers, now: float) -> list[Action]:
        actions = [*self.flush(), Send(TrailersReply(_DIRECTION)), *self._end(now)]
        self.state = ResponseState.ENDED
        return actions

    def _late_trailers(self, event: ResponseTrailers, now: float) -> list[Action]:
        """A buffered body came before its trailers; both want an answer."""
        self.state = ResponseState.ENDED
        return [Send(TrailersReply(_DIRECTION))]

    def flush(self) -> list[Action]:
        """Passes on what is held, so that trailers may follow or the stream may end without losing a byte."""
        held = self._read_whole(self._take_joined()) if self._joined else b""
        self._whole = False
        if not self._full_duplex:
            return []
        if self._restorer is not None:
            held += self._restorer.flush()
        return [Send(reply) for reply in chunks(_DIRECTION, held, False)]

    def forget(self) -> None:
        """Drops what is held; the stream is over."""
        self._take_joined()

    @property
    def _full_duplex(self) -> bool:
        return self._mode is BodyMode.FULL_DUPLEX_STREAMED

    def _end(self, now: float) -> list[Action]:
        self.state = ResponseState.DONE
        return self._booking.end(self._finished(Outcome.COMPLETED, now))

    def _finished(self, outcome: Outcome, now: float) -> Finished:
        if self.status >= 500 and outcome is Outcome.COMPLETED:
            outcome = Outcome.FAILED
        if self._events is not None:
            self._events.close()
            self._usage = self._events.usage
        return Finished(key=self._booking.key, at=now, outcome=outcome, status=self.status, usage=_usage(self._usage))

    def peer_gone(self, clean: bool, now: float) -> list[Action]:
        """The stream ended before the end of the response was seen. What that means: `session`, "The end of a
        response".
        """
        if not self._booking.open:
            return []
        event: End
        if self.state is not ResponseState.BODY or not self._blind:
            event = self._finished(Outcome.CLIENT_GONE, now)
        elif self._has_length:
            event = self._finished(Outcome.COMPLETED, now)
        elif now - self._headers_at < LEFT_WITHIN_S:
            event = Left(self._booking.key, now)
        else:
            event = self._finished(Outcome.COMPLETED if clean else Outcome.CLIENT_GONE, now)
        return self._booking.end(event, status=self.status)


def _usage(found: usages.Usage | None) -> Usage | None:
    if found is None:
        return None
    return Usage(
        prompt_tokens=found.prompt_tokens, output_tokens=found.completion_tokens, cached_tokens=found.cached_tokens
    )


_TRANSITIONS: dict[tuple[ResponseState, type], Callable[[ResponseHalf, Any, float], list[Action]]] = {
    (ResponseState.IDLE, ResponseHeaders): ResponseHalf._headers,
    (ResponseState.IDLE, ResponseBody): ResponseHalf._body,
    (ResponseState.IDLE, ResponseTrailers): ResponseHalf._trailers,
    (ResponseState.BODY, ResponseBody): ResponseHalf._body,
    (ResponseState.BODY, ResponseTrailers): ResponseHalf._trailers,
    (ResponseState.DONE, ResponseTrailers): ResponseHalf._late_trailers,
}
