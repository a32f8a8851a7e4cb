"""What the brain and the log are told about one request, so that each hears of its end exactly once.

Owned by a session. It decides nothing: the session says how the request ended.
"""

from __future__ import annotations

from picker.core.events import (
    PROGRESS_EVERY_S,
    AttemptFailed,
    FailureKind,
    Finished,
    FirstByte,
    Left,
    Outcome,
    Progress,
    Served,
    Usage,
)
from picker.core.record import LEFT, RequestRecord
from picker.core.values import Decision
from picker.extproc.messages import Action, Observe, Report
from picker.extproc.question import Head

End = Finished | AttemptFailed | Left
"""The events that end a request's books."""


class Booking:
    """The books of one request key. `open` from the decision until the end is observed."""

    __slots__ = ("_decision", "_first_byte_at", "_head", "_progress_at", "key", "open")

    def __init__(self, key: int) -> None:
        self.key = key
        self.open = False
        self._head: Head | None = None
        self._decision: Decision | None = None
        self._first_byte_at: float | None = None
        self._progress_at = 0.0

    def __repr__(self) -> str:
        return f"<Booking {self.key} {'open' if self.open else 'closed'}>"

    @property
    def chosen(self) -> str:
        """The address of the endpoint that was chosen, empty before."""
        return self._decision.endpoint.address if self._decision is not None else ""

    def begin(self, head: Head) -> None:
        """The request's headers came: from now on its end will be reported."""
        self._head = head

    def decided(self, decision: Decision) -> None:
        """Something is reserved: from now on its end will be observed."""
        self.open = True
        self._decision = decision

    def served(self, address: str, now: float) -> list[Action]:
        """The proxy said who served."""
        return [Observe(Served(self.key, now, address))] if self.open else []

    def bytes_seen(self, now: float, *, refused: bool) -> list[Action]:
        """Response bytes passed by: the first of them, then a sign of life now and then."""
        if not self.open:
            return []
        if self._first_byte_at is None:
            self._first_byte_at = now
            self._progress_at = now
            return [Observe(FirstByte(self.key, now, refused))]
        if now - self._progress_at < PROGRESS_EVERY_S:
            return []
        self._progress_at = now
        return [Observe(Progress(self.key, now))]

    def end(self, event: End, *, status: int = 0) -> list[Action]:
        """Tells the end, if it was not told before. `status` is what is known of it where the event has none."""
        if not self.open:
            return []
        self.open = False
        return [Observe(event), *self._report_of(event, status)]

    def _report_of(self, event: End, status: int) -> list[Action]:
        match event:
            case Finished():
                return self.report(event.outcome, event.status, event.at, usage=event.usage)
            case AttemptFailed(_, at, kind, failed_with):
                timeout = kind in (FailureKind.TIMEOUT, FailureKind.HUNG)
                return self.report(Outcome.TIMEOUT if timeout else Outcome.FAILED, failed_with, at)
            case Left(_, at):
                return self.report(LEFT, status, at)

    def report(self, outcome: str, status: int, now: float, *, usage: Usage | None = None) -> list[Action]:
        """The line for the log and the metrics, if there was a request and it was not reported before."""
        head, self._head = self._head, None
        if head is None:
            return []
        request = self._decision.request if self._decision is not None else None
        record = RequestRecord(
            id=head.id,
            path=head.path,
            status=status,
            outcome=outcome,
            duration_s=now - head.received_at,
            model=request.model if request is not None else None,
            target_model=request.target_model if request is not None else None,
            priority=request.priority if request is not None else 0,
            endpoint=self._decision.endpoint.id if self._decision is not None else None,
            stream=request is not None and request.stream,
            attempts=0 if self._decision is None else 1,
            first_byte_s=None if self._first_byte_at is None else self._first_byte_at - head.received_at,
            usage=usage,
        )
        return [Report(record)]
