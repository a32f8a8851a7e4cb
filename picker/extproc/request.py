"""The request half of an exchange: collects what the proxy shows of the request, asks for a decision, answers with it.

It builds the question and the answer. When to end the stream, and what the brain hears of the end, is the session's
business.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from picker.core.values import Decision
from picker.extproc import headers as names
from picker.extproc import refusals
from picker.extproc.booking import Booking
from picker.extproc.messages import (
    Action,
    BodyMode,
    BodyReply,
    Context,
    Decide,
    Direction,
    HeadersReply,
    Modes,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    Send,
    SetDeadline,
    TrailersReply,
    chunks,
)
from picker.extproc.mutation import Authorization, request_mutation, with_length, without_length
from picker.extproc.question import (
    Head,
    Meanings,
    Question,
    inference_request,
    read_body,
    read_head,
    read_nothing,
    read_part,
)
from picker.extproc.refusals import Refusal
from picker.extproc.settings import SessionSettings
from picker.openai.parse import BadRequest

RequestMessage = RequestHeaders | RequestBody | RequestTrailers
Step = list[Action] | Refusal | None
"""What to do; or why the exchange ends here; or None, when the message may not come now."""

_DIRECTION = Direction.REQUEST
# Messages a proxy may send ahead of an answer; more is no HTTP request any more.
_WAITING_MAX = 4096


class RequestState(enum.Enum):
    """See the theory of operation in `session`. ABANDONED: the proxy answered by itself before we did. ENDED: nothing
    may come any more, not even trailers.
    """

    IDLE = enum.auto()
    RECEIVING = enum.auto()
    DECIDING = enum.auto()
    PASSING = enum.auto()
    DONE = enum.auto()
    ABANDONED = enum.auto()
    ENDED = enum.auto()


class RequestHalf:
    """One request."""

    __slots__ = (
        "_authorization",
        "_body_bytes",
        "_body_parts",
        "_booking",
        "_head",
        "_last",
        "_meanings",
        "_mode",
        "_new_id",
        "_pool",
        "_question",
        "_rewrites_stream",
        "_settings",
        "_subset",
        "_waiting",
        "sees_response_body",
        "state",
    )

    def __init__(
        self,
        booking: Booking,
        settings: SessionSettings,
        meanings: Meanings,
        authorization: Authorization,
        new_id: Callable[[], str],
    ) -> None:
        self.state = RequestState.IDLE
        self.sees_response_body = True
        self._booking = booking
        self._settings = settings
        self._meanings = meanings
        self._authorization = authorization
        self._new_id = new_id
        self._mode = BodyMode.FULL_DUPLEX_STREAMED
        self._head: Head | None = None
        self._question = Question()
        self._subset: tuple[str, ...] | None = None
        self._pool: str | None = None
        self._body_parts: list[bytes] = []
        self._body_bytes = 0
        self._last: RequestMessage | None = None
        self._rewrites_stream = False
        self._waiting: deque[RequestMessage] = deque()

    def use(self, modes: Modes) -> None:
        """Sets the body mode, known from the first message of the stream."""
        self._mode = modes.request

    @property
    def question(self) -> Question:
        """What was read of the request so far."""
        return self._question

    @property
    def path(self) -> str:
        """The request's path, empty before its headers."""
        return self._head.path if self._head is not None else ""

    @property
    def id(self) -> str:
        """The request's id, empty before its headers."""
        return self._head.id if self._head is not None else ""

    @property
    def answered(self) -> bool:
        """Whether nothing is left to do for the request but a word to late trailers."""
        return self.state in (RequestState.DONE, RequestState.ABANDONED, RequestState.ENDED)

    @property
    def undecided(self) -> bool:
        """Whether the proxy waits for us."""
        return self.state in (RequestState.IDLE, RequestState.RECEIVING, RequestState.DECIDING)

    @property
    def held_bytes(self) -> int:
        """Body bytes in memory."""
        return self._body_bytes

    def handle(self, event: RequestMessage, now: float) -> Step:
        """One message of the request direction."""
        self._note(event.context)
        if self.state is RequestState.DECIDING:
            return self._keep_waiting(event)
        step = _TRANSITIONS.get((self.state, type(event)))
        return None if step is None else step(self, event, now)

    def _note(self, context: Context) -> None:
        """The last pool counts, and the last subset that names somebody; one that names nobody only if there is no
        other.
        """
        if context.pool and self.state in (RequestState.IDLE, RequestState.RECEIVING):
            self._pool = context.pool
        if self._settings.use_subset and context.subset is not None and (context.subset or self._subset is None):
            self._subset = context.subset

    def _keep_waiting(self, event: RequestMessage) -> Step:
        """The proxy need not wait for our answer; what it sends meanwhile is handled after the decision."""
        self._waiting.append(event)
        if isinstance(event, RequestBody):
            self._body_bytes += len(event.chunk)
        too_long = self._body_bytes > self._settings.max_body_bytes or len(self._waiting) > _WAITING_MAX
        return refusals.body_too_long(self._settings.max_body_bytes) if too_long else []

    def resume(self) -> RequestMessage | None:
        """The next message that came while the decision was pending."""
        if not self._waiting or self.state is RequestState.DECIDING:
            return None
        event = self._waiting.popleft()
        if isinstance(event, RequestBody):
            self._body_bytes -= len(event.chunk)
        return event

    # --- before the decision

    def _headers(self, event: RequestHeaders, now: float) -> Step:
        self._head = read_head(event.headers, now, self._new_id)
        self._booking.begin(self._head)
        if event.end_of_stream or self._mode in (BodyMode.NONE, BodyMode.STREAMED):
            named = names.first_of(event.headers, names.MODEL_REWRITE) is not None
            streamed = self._mode is BodyMode.STREAMED and not event.end_of_stream
            self._rewrites_stream = streamed and (named or self._meanings.renames)
            return self._ask(event, read_nothing(self._head), now)
        self.state = RequestState.RECEIVING
        deadline: list[Action] = [SetDeadline(now + self._settings.receive_timeout_s)]
        return deadline if self._full_duplex else [*deadline, Send(HeadersReply(_DIRECTION))]

    def _body(self, event: RequestBody, now: float) -> Step:
        self._body_parts.append(event.chunk)
        # Empty chunks cost a list entry each, so they count too.
        self._body_bytes += len(event.chunk) or not event.end_of_stream
        if self._body_bytes > self._settings.max_body_bytes:
            return refusals.body_too_long(self._settings.max_body_bytes)
        if self._full_duplex and not event.end_of_stream:
            return []
        return self._ask_with_body(event, now, cut_off=self._mode is BodyMode.BUFFERED_PARTIAL)

    def _trailers(self, event: RequestTrailers, now: float) -> Step:
        """Trailers end the body like a last chunk does."""
        return self._ask_with_body(event, now, cut_off=False)

    def _ask_with_body(self, event: RequestMessage, now: float, *, cut_off: bool) -> Step:
        assert self._head is not None
        body = self._body_parts[0] if len(self._body_parts) == 1 else b"".join(self._body_parts)
        self._body_parts = []
        if cut_off:
            return self._ask(event, read_part(self._head, body), now)
        question = read_body(self._head, body, self._meanings, self._wanted_pool())
        if isinstance(question, BadRequest):
            return refusals.bad_request(question)
        return self._ask(event, question, now)

    def _ask(self, event: RequestMessage, question: Question, now: float) -> list[Action]:
        assert self._head is not None
        self.state = RequestState.DECIDING
        self._last = event
        self._question = question
        subset = self._subset
        if self._settings.conformance:
            subset = names.in_both(subset, names.selection(self._head.headers))
        request = inference_request(
            self._head,
            question,
            self._meanings,
            key=self._booking.key,
            subset=subset,
            pool=self._wanted_pool(),
            sees_body=self.sees_response_body,
        )
        return [
            SetDeadline(now + self._settings.exchange_timeout_s),
            Decide(request, question.body or b"", question.parsed),
        ]

    def _wanted_pool(self) -> str | None:
        """The pool the proxy's route says, otherwise the client."""
        assert self._head is not None
        return self._meanings.pool_named(self._pool or self._head.headers.get(names.POOL))

    # --- the decision and after

    def decided(self, decision: Decision) -> list[Action]:
        """Answers with the decision the message that was waiting for it. Only in state DECIDING."""
        assert self._head is not None
        mutation = request_mutation(self._head, decision, self._settings, self._authorization)
        if self._rewrites_stream and "content-length" in self._head.headers:
            mutation = without_length(mutation)
        done: list[Action] = [SetDeadline(None)]
        last, self._last = self._last, None
        streamed = self._mode is BodyMode.STREAMED and isinstance(last, RequestHeaders) and not last.end_of_stream
        self.state = RequestState.PASSING if streamed else RequestState.DONE
        if isinstance(last, RequestTrailers):
            self.state = RequestState.ENDED
        if isinstance(last, RequestHeaders):
            return [Send(HeadersReply(_DIRECTION, mutation)), *done]
        body = self._question.body or b""
        self._question, self._body_bytes = msgspec.structs.replace(self._question, body=None), 0
        if self._full_duplex:
            ends = isinstance(last, RequestBody)
            if ends and body:
                mutation = with_length(mutation, body)
            replies: list[Reply] = [HeadersReply(_DIRECTION, mutation), *chunks(_DIRECTION, body, ends)]
            trailers = [] if ends else [Send(TrailersReply(_DIRECTION))]
            return [*(Send(reply) for reply in replies), *trailers, *done]
        if isinstance(last, RequestTrailers):
            return [Send(TrailersReply(_DIRECTION, mutation.destination)), *done]
        if self._question.target_model is None:
            return [Send(BodyReply(_DIRECTION, mutation=mutation)), *done]
        return [Send(BodyReply(_DIRECTION, body, with_length(mutation, body))), *done]

    def _pass_chunk(self, event: RequestBody, now: float) -> Step:
        """STREAMED, after the decision: each chunk wants its answer; a new body goes out with the last."""
        if event.end_of_stream:
            self.state = RequestState.DONE
        if not self._rewrites_stream:
            return [Send(BodyReply(_DIRECTION))]
        assert self._head is not None
        self._body_parts.append(event.chunk)
        self._body_bytes += len(event.chunk) or not event.end_of_stream
        if self._body_bytes > self._settings.max_body_bytes:
            return refusals.body_too_long(self._settings.max_body_bytes)
        if not event.end_of_stream:
            return [Send(BodyReply(_DIRECTION, b""))]
        body = b"".join(self._body_parts)
        self._body_parts, self._body_bytes = [], 0
        question = read_body(self._head, body, self._meanings, self._wanted_pool())
        if isinstance(question, BadRequest):
            return refusals.bad_request(question)
        self._question = msgspec.structs.replace(question, body=None)
        return [Send(BodyReply(_DIRECTION, question.body))]

    def _pass_trailers(self, event: RequestTrailers, now: float) -> Step:
        self.state = RequestState.ENDED
        if self._body_parts:
            # The chunks were cleared one by one, and no message is left that could carry the body.
            return refusals.cannot_rewrite()
        return [Send(TrailersReply(_DIRECTION))]

    def _late_trailers(self, event: RequestTrailers, now: float) -> Step:
        """Trailers after a body that was already answered."""
        self.state = RequestState.ENDED
        return None if self._full_duplex else [Send(TrailersReply(_DIRECTION))]

    def abandon(self) -> list[Action]:
        """The proxy answers by itself. Forgets the request; a decision on its way is not sent."""
        self.state = RequestState.ABANDONED
        self._body_parts, self._body_bytes = [], 0
        self._question = msgspec.structs.replace(self._question, body=None)
        self._waiting.clear()
        return [SetDeadline(None)] if self._head is not None else []

    def _ignore(self, event: RequestMessage, now: float) -> Step:
        """Abandoned: outside full duplex every message still wants an answer."""
        if isinstance(event, RequestTrailers):
            self.state = RequestState.ENDED
        if self._full_duplex:
            return []
        return [Send(BodyReply(_DIRECTION) if isinstance(event, RequestBody) else TrailersReply(_DIRECTION))]

    @property
    def _full_duplex(self) -> bool:
        return self._mode is BodyMode.FULL_DUPLEX_STREAMED


_TRANSITIONS: dict[tuple[RequestState, type], Callable[[RequestHalf, Any, float], Step]] = {
    (RequestState.IDLE, RequestHeaders): RequestHalf._headers,
    (RequestState.RECEIVING, RequestBody): RequestHalf._body,
    (RequestState.RECEIVING, RequestTrailers): RequestHalf._trailers,
    (RequestState.PASSING, RequestBody): RequestHalf._pass_chunk,
    (RequestState.PASSING, RequestTrailers): RequestHalf._pass_trailers,
    (RequestState.DONE, RequestTrailers): RequestHalf._late_trailers,
    (RequestState.ABANDONED, RequestBody): RequestHalf._ignore,
    (RequestState.ABANDONED, RequestTrailers): RequestHalf._ignore,
}
