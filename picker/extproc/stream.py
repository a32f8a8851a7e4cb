"""One gRPC stream around one session: reads messages, does what the session says, and cleans up however it ends.

Runs on the event loop of the server. All events of a session are handled synchronously, so two of them never
interleave; only reading and writing wait. Deadlines, evictions and draining come from outside the read loop, and
whenever they have an effect it is to end the stream.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from typing import Protocol

import grpc

from picker.core.events import Event, Finished, Outcome
from picker.core.ledger import Eviction
from picker.core.record import RequestRecord
from picker.core.values import Decision, InferenceRequest, Rejection
from picker.extproc.codec import decode, encode
from picker.extproc.messages import (
    Action,
    Close,
    Deadline,
    Decide,
    Decided,
    Draining,
    Evicted,
    Observe,
    Overloaded,
    PeerGone,
    Report,
    RequestBody,
    ResponseBody,
    Send,
    SessionEvent,
    SetDeadline,
)
from picker.extproc.mutation import Authorization
from picker.extproc.question import Meanings
from picker.extproc.session import Session
from picker.extproc.settings import SessionSettings
from picker.openai.parse import ParsedBody
from protos import ext_proc_pb2 as pb

OnReport = Callable[[RequestRecord], None]
"""Called once for every request that ended, for the log and the metrics."""


class DirectorLike(Meanings, Protocol):
    """What the door needs of the brain."""

    def new_key(self) -> int:
        """A request key no other request of this process has."""

    def decide(self, request: InferenceRequest) -> Decision | Rejection:
        """Chooses and reserves, synchronously."""

    def observe(self, event: Event) -> None:
        """Takes in what happened to a request."""

    def watch(self, key: int, on_evict: Callable[[Eviction], None]) -> None:
        """Has `on_evict` called on the loop when the brain gives the request up."""

    def unwatch(self, key: int) -> None:
        """Ends a watch."""


class PromptsLike(Protocol):
    """Gives requests the keys of their prompts."""

    async def keyed(self, request: InferenceRequest, body: bytes, parsed: ParsedBody) -> InferenceRequest:
        """The request with its keys; may wait for some milliseconds."""


class Rpc(Protocol):
    """The part of a gRPC servicer context that a stream uses."""

    async def read(self) -> object:
        """The next message, or `grpc.aio.EOF`."""

    async def write(self, message: bytes) -> None:
        """Sends one serialised message."""


class Books:
    """What the streams of one server share: who is open, and how many body bytes they hold together."""

    __slots__ = ("draining", "held_bytes", "idle", "max_held_bytes", "max_streams", "streams")

    def __init__(self, *, max_streams: int, max_held_bytes: int) -> None:
        self.streams: set[Stream] = set()
        self.held_bytes = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.max_streams = max_streams
        self.max_held_bytes = max_held_bytes

    def add(self, stream: Stream) -> None:
        """A stream opened."""
        self.streams.add(stream)
        self.idle.clear()

    def remove(self, stream: Stream) -> None:
        """A stream ended."""
        self.streams.discard(stream)
        if not self.streams:
            self.idle.set()

    def __repr__(self) -> str:
        return f"<Books [{len(self.streams)} streams | {self.held_bytes} bytes]>"


def new_request_id() -> str:
    """An id for a request that came without one."""
    return str(uuid.uuid4())


class Stream:
    """Drives one session. `run` is the whole life of it.

    With `keeps_last` the last reply of the stream is returned by `run` instead of written, so that the caller can
    send it together with the status: see `server`.
    """

    __slots__ = (
        "_books",
        "_clock",
        "_director",
        "_held_bytes",
        "_keeps_last",
        "_key",
        "_on_report",
        "_out",
        "_pending",
        "_prompts",
        "_reading",
        "_refused",
        "_rpc",
        "_session",
        "_task",
        "_timer",
        "ok",
    )

    def __init__(
        self,
        rpc: Rpc,
        *,
        director: DirectorLike,
        authorization: Authorization,
        settings: SessionSettings,
        clock: Callable[[], float],
        books: Books,
        prompts: PromptsLike | None = None,
        on_report: OnReport | None = None,
        keeps_last: bool = False,
    ) -> None:
        self.ok = True
        self._prompts = prompts
        self._pending: Decide | None = None
        self._on_report = on_report
        self._keeps_last = keeps_last
        self._rpc = rpc
        self._director = director
        self._clock = clock
        self._books = books
        self._key = director.new_key()
        self._session = Session(
            key=self._key,
            settings=settings,
            meanings=director,
            authorization=authorization,
            new_id=new_request_id,
        )
        self._out: deque[bytes] = deque()
        self._held_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._reading = False
        self._refused = ""

    def __repr__(self) -> str:
        return f"<Stream {self._session!r}>"

    @property
    def in_request_phase(self) -> bool:
        """Whether ending the stream now would cost the client its request."""
        return self._session.in_request_phase

    async def run(self) -> bytes | None:
        """Serves the stream to its end. Whatever happens, the director hears of the end of what it reserved."""
        self._task = asyncio.current_task()
        if len(self._books.streams) >= self._books.max_streams:
            self._refused = "too many requests at once; try again shortly"
        self._books.add(self)
        if self._books.draining:
            self._feed(Draining())
        try:
            await self._serve()
            return self._out.popleft() if self._out else None
        finally:
            self._books.remove(self)
            self._feed(PeerGone(clean=False))
            self._director.unwatch(self._key)
            self._set_deadline(None)
            self._books.held_bytes -= self._held_bytes

    async def _serve(self) -> None:
        while not self._session.closed:
            message = await self._read()
            if message is None:
                break
            if message is grpc.aio.EOF:
                self._feed(PeerGone(clean=True))
                break
            assert isinstance(message, pb.ProcessingRequest)
            event = decode(message)
            if event is None:
                continue
            self._feed(self._admit(event))
            await self._decide_pending()
            await self._flush()
        await self._flush()

    async def _decide_pending(self) -> None:
        """Decides what the session asked for once its keys are there. Meanwhile nothing is read; whatever comes from
        outside (a deadline, draining) may end the session.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.parsed is None or self._prompts is None:
            return
        request = await self._prompts.keyed(pending.request, pending.body, pending.parsed)
        if not self._session.closed:
            self._feed(Decided(self._decide(request)))

    async def _read(self) -> object:
        """The next message; None when the session was closed meanwhile."""
        self._reading = True
        try:
            return await self._rpc.read()
        except asyncio.CancelledError:
            # Ours if the session is closed: see `_interrupt`. Otherwise the proxy reset the stream.
            if not self._session.closed or self._task is None:
                raise
            self._task.uncancel()
            return None
        finally:
            self._reading = False

    async def _flush(self) -> None:
        keep = 1 if self._keeps_last and self._session.closed else 0
        while len(self._out) > keep:
            await self._rpc.write(self._out.popleft())

    def _admit(self, event: SessionEvent) -> SessionEvent:
        if self._refused:
            return Overloaded(self._refused)
        if isinstance(event, RequestBody | ResponseBody):
            books = self._books
            if books.held_bytes + len(event.chunk) > books.max_held_bytes:
                return Overloaded("too many request bytes are in memory; try again shortly")
        return event

    def _feed(self, event: SessionEvent) -> None:
        """Hands an event to the session and does what it says; replies wait in `_out`."""
        for action in self._session.handle(event, self._clock()):
            self._do(action)
        held = self._session.held_bytes
        self._books.held_bytes += held - self._held_bytes
        self._held_bytes = held

    def _do(self, action: Action) -> None:
        if isinstance(action, Send):
            self._out.append(encode(action.reply).SerializeToString())
        elif isinstance(action, SetDeadline):
            self._set_deadline(action.at)
        elif isinstance(action, Observe):
            self._director.observe(action.event)
        elif isinstance(action, Decide):
            if self._prompts is None or action.parsed is None:
                self._feed(Decided(self._decide(action.request)))
            else:
                self._pending = action
        elif isinstance(action, Report):
            if self._on_report is not None:
                self._on_report(action.record)
        elif isinstance(action, Close):
            self.ok = action.ok

    def _decide(self, request: InferenceRequest) -> Decision | Rejection:
        try:
            result = self._director.decide(request)
        except BaseException:
            # It may have reserved before it failed.
            now = self._clock()
            self._director.observe(Finished(key=self._key, at=now, outcome=Outcome.FAILED))
            raise
        if isinstance(result, Decision):
            self._director.watch(self._key, self._on_evict)
        return result

    def _set_deadline(self, at: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock()), self._on_deadline)

    # --- from outside the read loop

    def _on_deadline(self) -> None:
        self._timer = None
        self._interrupt(Deadline())

    def _on_evict(self, reason: Eviction) -> None:
        self._interrupt(Evicted(reason))

    def drain(self) -> None:
        """Ends the stream as soon as the request is answered."""
        self._interrupt(Draining())

    def cut(self) -> None:
        """Ends the stream now. Whoever waits for us loses the request."""
        if self._task is not None:
            self._task.cancel()

    def _interrupt(self, event: SessionEvent) -> None:
        if not self._session.closed:
            self._feed(event)
            self._stop_reading_if_closed()

    def _stop_reading_if_closed(self) -> None:
        """A read may be interrupted only for good: one given up would lose its message. A write ends by itself, and the
        loop then sees that the session is closed.
        """
        if self._session.closed and self._reading and self._task is not None:
            self._task.cancel()
