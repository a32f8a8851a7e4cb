"""One ext-proc exchange, without I/O: `Session.handle(event, now) -> [actions]`.

No gRPC types, no asyncio, no clock, no randomness: time, keys and ids come in as arguments.

Theory of operation
===================

An exchange has two halves that run independently, because a proxy may show a response of its own (body too long,
timeout) at any time:

    request   IDLE -> RECEIVING -> DECIDING -> PASSING -> DONE          (`request`)
    response  IDLE -> BODY -> DONE                                      (`response`)

A session joins them and owns what spans both: the stream, the deadline, and the books (`booking`). Each half has a
table of legal (state, message) pairs; anything else is a broken proxy, and the stream is closed with an error. A
session never raises for what a proxy does.

When the decision is asked for, and which message its answer rides on, follows from the request body mode:

    mode                  asked at              answered with
    headers end stream    headers               headers reply (any mode)
    FULL_DUPLEX_STREAMED  end of body/trailers  headers reply, body in chunks, trailers reply if there were trailers
    BUFFERED              the body message      body reply (the headers message got an empty reply at once)
    BUFFERED_PARTIAL      the body message      body reply, never a new body: it may be cut off
    STREAMED              headers               headers reply; each chunk then gets an empty reply
    NONE                  headers               headers reply

Outside full duplex every message gets exactly one reply. In STREAMED mode a model name can only be rewritten at the
end: chunks are then cleared and the last one carries the whole body. In observability mode nothing is ever
answered, so nothing is decided either.

The end of a response
---------------------
The proxy tells the body modes in its first message, but not whether it sends trailers. So with response mode NONE
the stream may end at the response headers (trailers skipped) or with the response (trailers sent), and only the
circumstances tell which:

    the response headers end the stream                  finished
    they have a content-length                           finished: engines write one when the answer is computed
    otherwise, within 250 ms of our last reply           left: the end is unknown, the brain learns it from scrapes
    later, half-close                                    finished
    later, reset                                         the client went away

A response shorter than 250 ms without a length is thus booked as left, which only costs some delay in the books.
With the body modes that show the end, a stream that ends before it means that the client went away. A proxy that
skips the response headers looks the same as a client that went away while waiting.

Leaving
-------
With `response_path: leave`, and while draining, the stream is closed with status OK once the request is answered;
the proxy then goes on alone. While draining, a response in full duplex that has begun is let run: bytes may be on
their way to us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from picker.core.events import AttemptFailed, FailureKind, Finished, Left, Outcome
from picker.core.values import Decision
from picker.extproc import refusals
from picker.extproc.booking import Booking
from picker.extproc.messages import (
    Action,
    Close,
    Deadline,
    Decided,
    Draining,
    Evicted,
    Overloaded,
    PeerGone,
    ProxyMessage,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    Send,
    SessionEvent,
    SetDeadline,
)
from picker.extproc.mutation import Authorization
from picker.extproc.question import Meanings
from picker.extproc.refusals import Refusal
from picker.extproc.request import RequestHalf, RequestMessage, RequestState
from picker.extproc.response import ResponseHalf, ResponseMessage, ResponseState
from picker.extproc.settings import ResponsePath, SessionSettings


class Session:
    """One ext-proc stream. `key` names the request in the books; `meanings` says what the names in it stand for,
    `authorization` what endpoints want as such; `new_id` makes an `x-request-id` where there is none.
    """

    __slots__ = (
        "_booking",
        "_deciding",
        "_draining",
        "_observing",
        "_opened",
        "_request",
        "_response",
        "_settings",
        "closed",
    )

    def __init__(
        self,
        *,
        key: int,
        settings: SessionSettings,
        meanings: Meanings,
        authorization: Authorization,
        new_id: Callable[[], str],
    ) -> None:
        self.closed = False
        self._settings = settings
        self._booking = Booking(key)
        self._request = RequestHalf(self._booking, settings, meanings, authorization, new_id)
        self._response = ResponseHalf(self._booking, settings)
        self._opened = False
        self._observing = False
        self._deciding = False
        self._draining = False

    def __repr__(self) -> str:
        halves = f"{self._request.state.name.lower()}/{self._response.state.name.lower()}"
        return f"<Session {self._booking.key} [{halves}]{' closed' if self.closed else ''}>"

    @property
    def held_bytes(self) -> int:
        """Body bytes this exchange keeps in memory."""
        return self._request.held_bytes + self._response.held_bytes

    @property
    def in_request_phase(self) -> bool:
        """Whether the proxy has asked and waits for us, so that ending the stream now would cost the client its
        request.
        """
        return self._opened and not self.closed and not self._observing and self._request.undecided

    def handle(self, event: SessionEvent, now: float) -> list[Action]:
        """Takes in one event and says what to do, in order. Never raises; after `Close` there is nothing more to do."""
        if self.closed:
            return self._after_close(event, now)
        actions = _HANDLERS[type(event)](self, event, now)
        if not self.closed and self._may_leave:
            actions += self._leave(now)
        return actions

    # --- the proxy

    def _open(self, event: ProxyMessage) -> None:
        self._opened = True
        self._observing = event.context.observability
        if event.context.modes is not None:
            self._request.use(event.context.modes)
            self._response.use(event.context.modes)
            self._request.sees_response_body = self._response.sees_body

    def _on_request(self, event: RequestMessage, now: float) -> list[Action]:
        if not self._opened:
            self._open(event)
        if self._observing:
            return []
        step = self._request.handle(event, now)
        if step is None:
            return self._broken(now)
        if isinstance(step, Refusal):
            return self._refuse(step, now)
        self._deciding = self._deciding or self._request.state is RequestState.DECIDING
        return step

    def _on_response(self, event: ResponseMessage, now: float) -> list[Action]:
        if not self._opened:
            self._open(event)
        if self._observing:
            return []
        actions: list[Action] = []
        if self._request.undecided:
            # The proxy answers by itself.
            status = event.status if isinstance(event, ResponseHeaders) else 0
            actions = [*self._request.abandon(), *self._booking.report(Outcome.REJECTED, status, now)]
        step = self._response.handle(event, now)
        return self._broken(now) if step is None else actions + step

    def _on_peer_gone(self, event: PeerGone, now: float) -> list[Action]:
        ended = self._response.peer_gone(event.clean, now)
        return self._close([*ended, *self._booking.report(Outcome.CLIENT_GONE, 0, now)])

    # --- the brain and the server

    def _on_decided(self, event: Decided, now: float) -> list[Action]:
        if not self._deciding:
            return []
        self._deciding = False
        if isinstance(event.result, Decision):
            self._booking.decided(event.result)
        if self._request.state is not RequestState.DECIDING:
            return self._close_books(Outcome.CLIENT_GONE, 0, now)
        if not isinstance(event.result, Decision):
            return self._refuse(refusals.rejected(event.result), now)
        if not event.result.endpoint.address:
            return self._refuse(refusals.no_address(), now)
        actions = self._request.decided(event.result)
        self._response.expect(self._request.question)
        while not self.closed and (waiting := self._request.resume()) is not None:
            actions += self._on_request(waiting, now)
        return actions

    def _on_deadline(self, event: Deadline, now: float) -> list[Action]:
        if self._request.state is RequestState.RECEIVING:
            return self._refuse(refusals.slow_client(), now)
        if self._request.state is RequestState.DECIDING:
            return self._refuse(refusals.slow_decision(), now)
        return []

    def _on_evicted(self, event: Evicted, now: float) -> list[Action]:
        if not self._booking.open:
            return []
        return self._refuse(refusals.evicted(event.reason), now)

    def _on_overloaded(self, event: Overloaded, now: float) -> list[Action]:
        if self._observing:
            return self._close([])
        return self._refuse(refusals.overloaded(event.reason, self._settings.retry_after_ms), now)

    def _on_draining(self, event: Draining, now: float) -> list[Action]:
        self._draining = True
        return []

    # --- ends

    @property
    def _may_leave(self) -> bool:
        if self._observing:
            return self._draining
        if not self._request.answered or self._deciding:
            return False
        if self._draining:
            return not self._response.in_full_duplex
        return self._settings.response_path is ResponsePath.LEAVE and self._booking.open

    def _leave(self, now: float) -> list[Action]:
        flushed = self._response.flush()
        left = self._booking.end(Left(self._booking.key, now), status=self._response.status)
        return self._close([*flushed, *left])

    def _refuse(self, refusal: Refusal, now: float) -> list[Action]:
        answer = refusals.immediate(refusal, self._request.path, self._request.id)
        seen = self._response.state is not ResponseState.IDLE
        status = self._response.status if seen else answer.status
        ending = Outcome.TIMEOUT if seen and isinstance(refusal.ending, FailureKind) else refusal.ending
        reported = Outcome.TIMEOUT if isinstance(ending, FailureKind) else ending
        books = [*self._close_books(ending, status, now), *self._booking.report(reported, status, now)]
        return self._close([*books, Send(answer)])

    def _broken(self, now: float) -> list[Action]:
        books = [*self._close_books(Outcome.FAILED, 0, now), *self._booking.report(Outcome.FAILED, 0, now)]
        return self._close(books, ok=False)

    def _close(self, actions: list[Action], *, ok: bool = True) -> list[Action]:
        self.closed = True
        self._request.abandon()
        self._response.forget()
        return [*actions, SetDeadline(None), Close(ok)]

    def _close_books(self, ending: Outcome | FailureKind, status: int, now: float) -> list[Action]:
        key = self._booking.key
        if isinstance(ending, FailureKind):
            return self._booking.end(AttemptFailed(key, now, ending, status))
        return self._booking.end(Finished(key=key, at=now, outcome=ending, status=status))

    def _after_close(self, event: SessionEvent, now: float) -> list[Action]:
        """Only a decision that comes too late matters: it reserved something."""
        if not isinstance(event, Decided) or not self._deciding:
            return []
        self._deciding = False
        if isinstance(event.result, Decision):
            self._booking.decided(event.result)
        return self._close_books(Outcome.CLIENT_GONE, 0, now)


_HANDLERS: dict[type, Callable[[Session, Any, float], list[Action]]] = {
    RequestHeaders: Session._on_request,
    RequestBody: Session._on_request,
    RequestTrailers: Session._on_request,
    ResponseHeaders: Session._on_response,
    ResponseBody: Session._on_response,
    ResponseTrailers: Session._on_response,
    Decided: Session._on_decided,
    Deadline: Session._on_deadline,
    Evicted: Session._on_evicted,
    Overloaded: Session._on_overloaded,
    PeerGone: Session._on_peer_gone,
    Draining: Session._on_draining,
}
