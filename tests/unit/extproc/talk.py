"""Drives one session by hand against a fake director, on a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping

from picker.core.record import RequestRecord
from picker.core.values import Decision
from picker.extproc.messages import (
    Action,
    BodyMode,
    Close,
    Context,
    Decide,
    Decided,
    Immediate,
    Modes,
    Observe,
    Reply,
    Report,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Send,
    SessionEvent,
    SetDeadline,
)
from picker.extproc.session import Session
from picker.extproc.settings import SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector

FDS = BodyMode.FULL_DUPLEX_STREAMED
KEY = "Bearer s3cret"
COMPLETION = b'{"model": "m", "prompt": "hello", "seed": 123456789012345678901234567890}'


class Talk:
    """A conversation: feed events, read replies. `decide_at_once` False keeps decisions pending in `pending`. Endpoints
    with credentials want `KEY` as their authorization.
    """

    def __init__(
        self,
        director: FakeDirector | None = None,
        settings: SessionSettings | None = None,
        *,
        request: BodyMode = FDS,
        response: BodyMode = FDS,
        subset: tuple[str, ...] | None = None,
        observability: bool = False,
        decide_at_once: bool = True,
    ) -> None:
        self.director = director or FakeDirector()
        self.now = 100.0
        self.deadline: float | None = None
        self.closed: bool | None = None
        self.replies: list[Reply] = []
        self.pending: list[Decide] = []
        self.records: list[RequestRecord] = []
        self.context = Context(modes=Modes(request, response), subset=subset, observability=observability)
        self._decide_at_once = decide_at_once
        self.session = Session(
            key=self.director.new_key(),
            settings=settings or SessionSettings(),
            meanings=self.director,
            authorization=lambda endpoint: KEY.encode() if endpoint.credentials else None,
            new_id=lambda: "made-up-id",
        )

    def feed(self, event: SessionEvent) -> list[Reply]:
        """Hands in one event; returns the replies it caused."""
        before = len(self.replies)
        for action in self.session.handle(event, self.now):
            self.do(action)
        return self.replies[before:]

    def do(self, action: Action) -> None:
        assert self.closed is None or isinstance(action, Observe), f"{action} after Close"
        match action:
            case Send(reply):
                self.replies.append(reply)
            case Decide(request) if self._decide_at_once:
                self.feed(Decided(self.director.decide(request)))
            case Decide():
                self.pending.append(action)
            case Observe(event):
                self.director.observe(event)
            case Report(record):
                self.records.append(record)
            case SetDeadline(at):
                self.deadline = at
            case Close(ok):
                self.closed = ok

    def settle(self) -> list[Reply]:
        """Lets the pending decision be made."""
        return self.feed(Decided(self.director.decide(self.pending.pop().request)))

    def headers(self, fields: Mapping[str, str] | None = None, *, end: bool = False) -> list[Reply]:
        """Request headers of a completion, with the context of the first message."""
        head = {":method": "POST", ":path": "/v1/completions", "x-request-id": "r-1", **(fields or {})}
        return self.feed(RequestHeaders(head, end, self.context))

    def body(self, chunk: bytes = COMPLETION, *, end: bool = True) -> list[Reply]:
        """A chunk of the request body."""
        return self.feed(RequestBody(chunk, end))

    def response_headers(
        self,
        status: int = 200,
        fields: Mapping[str, str] | None = None,
        *,
        end: bool = False,
        served: str | None = None,
    ) -> list[Reply]:
        """Response headers, of a dated JSON answer unless told otherwise."""
        head = {":status": str(status), "content-type": "application/json", "date": "today", **(fields or {})}
        return self.feed(ResponseHeaders(status, head, end, Context(served=served)))

    def response_body(self, chunk: bytes, *, end: bool = False) -> list[Reply]:
        """A chunk of the response body."""
        return self.feed(ResponseBody(chunk, end))

    def ask(self) -> None:
        """A whole request phase in full duplex."""
        self.headers()
        self.body()
        self.replies.clear()

    def decision(self) -> Decision:
        """A decision for the last request."""
        decided = self.director.decide(self.director.requests[-1])
        assert isinstance(decided, Decision)
        return decided


def only_immediate(replies: list[Reply]) -> Immediate:
    """The one ImmediateResponse these replies are."""
    assert len(replies) == 1
    assert isinstance(replies[0], Immediate)
    return replies[0]
