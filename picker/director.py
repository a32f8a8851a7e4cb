"""The life of a request: decide, reserve, attempt, observe, release. Both doors speak to the brain through this.

`decide` runs snapshot, schedule and reserve without an await, so on one event loop they need no lock. `observe` is
the only place that releases, and it is idempotent. The director loops over attempts; a door's executor makes exactly
one. It does no I/O itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from picker.core.datastore import Datastore, StandingChange
from picker.core.events import (
    AttemptFailed,
    Event,
    FailureKind,
    Finished,
    FirstByte,
    Left,
    Outcome,
    Progress,
    Served,
    Stalled,
    Usage,
)
from picker.core.ledger import Eviction, Flight
from picker.core.plugins import Rng
from picker.core.prefix.prompt import PromptKeys
from picker.core.rules import Rulebook
from picker.core.scheduler import Scheduler
from picker.core.values import Decision, Endpoint, InferenceRequest, Rejection, RejectionCode, Snapshot
from picker.telemetry.logs import Log
from picker.telemetry.metrics import Metrics

# Decisions remembered for /debug/decisions.
DECISIONS_MAX = 1000
# Clients choose these texts, and a thousand requests are remembered: a model's name may be as long as a body.
REMEMBERED_CHARS = 512
_TEXTS = ("id", "path", "model", "target_model", "session", "pool", "objective")

_OUTCOME_OF_EVICTION = {
    Eviction.HUNG: FailureKind.HUNG,
    Eviction.UNREACHABLE: FailureKind.CONNECT,
    Eviction.FIRST_BYTE_TIMEOUT: FailureKind.TIMEOUT,
    Eviction.IDLE_TIMEOUT: FailureKind.TIMEOUT,
    Eviction.TOTAL_TIMEOUT: FailureKind.TIMEOUT,
}


class Answer(msgspec.Struct, frozen=True):
    """A complete answer of an engine that asked for another attempt, kept in case there is none."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Failure(msgspec.Struct, frozen=True):
    """An attempt that ended before the client saw anything of it."""

    kind: FailureKind
    retry: bool = True
    answer: Answer | None = None


T = TypeVar("T")
Attempt = Callable[[Decision], Awaitable[T | Failure]]


class Guard:
    """Lets the brain, or a client that leaves, interrupt the task that serves a request.

    The task is cancelled, which costs nothing as long as nobody does it; `why` then tells a hung pod or a passed
    deadline from a client that left (`gone`). One guard serves one task.
    """

    __slots__ = ("_task", "gone", "why")

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self.why: Eviction | None = None
        self.gone = False

    def client_left(self) -> None:
        """The client closed its connection: nobody wants the answer any more."""
        if self._task is not None and not self.gone:
            self.gone = True
            self._task.cancel()

    def evict(self, why: Eviction) -> None:
        """Interrupts the task at its next await."""
        if self._task is not None and self.why is None:
            self.why = why
            self._task.cancel()

    def absorb(self) -> Eviction | None:
        """To be called on CancelledError: the reason if the brain caused it, and the task goes on; None if somebody
        else did.
        """
        why, self.why = self.why, None
        if why is None or self._task is None or self._task.uncancel() > 0:
            return None
        return why


class Director:
    """Decides, remembers why, and keeps the books. One per process, used from one event loop."""

    def __init__(
        self,
        datastore: Datastore,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        rng: Rng,
        metrics: Metrics,
        log: Log,
        aliases: Mapping[str, str] | None = None,
        pools: Sequence[str] = (),
        max_attempts: int = 3,
    ) -> None:
        self.datastore = datastore
        self.scheduler = scheduler
        self.clock = clock
        self.draining = False
        self.rules = Rulebook()
        self.prefixes = datastore.prefixes
        self.on_routed: Callable[[Endpoint, PromptKeys], None] | None = None
        """Told of every prompt that was sent somewhere, for other replicas."""
        self.decisions: deque[Decision | Rejection] = deque(maxlen=DECISIONS_MAX)
        self._rng = rng
        self._metrics = metrics
        self._log = log
        self._aliases = dict(aliases or {})
        self.pools: tuple[str, ...] = tuple(pools)
        self._max_attempts = max_attempts
        self._keys = itertools.count(1)
        self._watchers: dict[int, Callable[[Eviction], None]] = {}

    def __repr__(self) -> str:
        return f"<Director [{len(self.datastore.ledger)} in flight | {len(self.decisions)} decisions]>"

    def new_key(self) -> int:
        """A request key no other request of this process has."""
        return next(self._keys)

    def pool_named(self, text: str | None) -> str | None:
        """The pool a request asks for by `namespace/name`, or by a name only one pool has.

        None where there is no choice to make. A name nobody has comes back as it is: nobody serves it then.
        """
        if not text or len(self.pools) < 2:
            return None
        if text in self.pools:
            return text
        same = [pool for pool in self.pools if pool.rpartition("/")[2] == text]
        return same[0] if len(same) == 1 else text

    def target_model(self, model: str | None, pool: str | None = None) -> str | None:
        """What the engines call a model that the configuration, or else the cluster, renames; None when it keeps its
        name. Rewrites of the cluster are drawn by weight, so ask once per request.
        """
        alias = self._aliases.get(model) if model is not None else None
        if alias is not None:
            return alias
        # Without a pool, a rewrite for any model of one pool would rename what is meant for the others.
        return self.rules.target(model, pool, self._rng, generic=pool is not None or len(self.pools) < 2)

    @property
    def renames(self) -> bool:
        """Whether any model may have to be renamed."""
        return bool(self._aliases or self.rules.rewrites)

    def priority(self, objective: str | None, model: str | None, pool: str | None) -> int:
        """The priority of a request by its objective or model; 0 is usual."""
        return self.rules.priority(objective, model, pool)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Client-side model names and what the engines call them."""
        return self._aliases

    def snapshot(self) -> Snapshot:
        """All endpoints now."""
        return self.datastore.snapshot(self.clock())

    def decide(self, request: InferenceRequest) -> Decision | Rejection:
        """Chooses an endpoint and reserves it. No await may ever get in here."""
        now = self.clock()
        if request.keys is not None:
            request = msgspec.structs.replace(request, matches=self.prefixes.lookup(request.keys))
        verdict = self.scheduler.schedule(request, self.datastore.snapshot(now), now, self._rng)
        if isinstance(verdict, Decision):
            self.datastore.reserve(request, verdict.endpoint.id, now)
            if request.keys is not None:
                self.prefixes.routed(verdict.endpoint.id, request.keys, now)
                if self.on_routed is not None:
                    self.on_routed(verdict.endpoint, request.keys)
            self._metrics.chosen(verdict.endpoint.id)
        else:
            self._metrics.rejections.labels(verdict.code.value).inc()
        self._metrics.decision_s.observe(self.clock() - now)
        self.decisions.append(_remembered(verdict))
        return verdict

    def observe(self, event: Event) -> None:
        """Takes in what happened to a request."""
        match event:
            case FirstByte(key, at, refused):
                self.datastore.progressed(key, at, refused=refused)
            case Progress(key, at):
                self.datastore.progressed(key, at)
            case Finished():
                self._watchers.pop(event.key, None)
                if event.outcome is Outcome.COMPLETED and event.status >= 500:
                    self.datastore.failed(event.key, FailureKind.SERVER_ERROR, event.at)
                elif event.outcome is Outcome.FAILED:
                    self.datastore.failed(event.key, FailureKind.RESET, event.at)
                else:
                    worked = event.outcome is Outcome.COMPLETED and 200 <= event.status < 400
                    flight = self.datastore.ended(event.key, event.at, worked=worked)
                    if worked and flight is not None and event.usage is not None:
                        self._learn_prefix(flight, event.usage, event.at)
            case AttemptFailed(key, at, kind):
                flight = self.datastore.failed(key, kind, at)
                # An endpoint that is gone must not get a series again: nobody would remove it.
                if flight is not None and self.datastore.endpoint(flight.endpoint_id) is not None:
                    self._metrics.attempts_failed.labels(flight.endpoint_id, kind.value).inc()
            case Left(key, at):
                self._watchers.pop(key, None)
                self.datastore.left(key, at)
            case Stalled(key, at, stalled):
                self.datastore.ledger.stall(key, at, stalled=stalled)
            case Served(key, at, address):
                self.datastore.served_by(key, address, at)

    def _learn_prefix(self, flight: Flight, usage: Usage, at: float) -> None:
        keys = flight.request.keys
        if keys is not None and usage.prompt_tokens:
            self.prefixes.observed(flight.endpoint_id, keys, usage.prompt_tokens, usage.cached_tokens, at)

    def watch(self, key: int, on_evict: Callable[[Eviction], None]) -> None:
        """Has `on_evict` called when the brain gives the request up; ends with Finished, Left or `unwatch`."""
        self._watchers[key] = on_evict

    def unwatch(self, key: int) -> None:
        """Ends a watch."""
        self._watchers.pop(key, None)

    def tick(self) -> tuple[StandingChange, ...]:
        """Ages everything; to be called every 100 ms. Gives up overdue requests and those on hung endpoints."""
        now = self.clock()
        self.prefixes.tick(now)
        ticked = self.datastore.tick(now)
        for key, why in ticked.evictions:
            self._metrics.evictions.labels(why.value).inc()
            watcher = self._watchers.get(key)
            if watcher is not None:
                watcher(why)
            else:
                self.observe(Finished(key=key, at=now, outcome=Outcome.TIMEOUT))
        for change in ticked.changes:
            self._metrics.standing_changes.labels(change.endpoint_id, change.after.value).inc()
            self._log.warning(
                "endpoint_standing",
                endpoint=change.endpoint_id,
                standing=change.after.value,
                before=change.before.value,
                reason=change.reason,
            )
        return ticked.changes

    async def dispatch(
        self, request: InferenceRequest, guard: Guard, attempt: Attempt[T]
    ) -> tuple[T | Failure | Rejection, Decision | None, int]:
        """Makes attempts until one commits, none is left to try, or the bound is reached.

        Returns what came out, the last decision, and the number of attempts. Committed attempts stay reserved and
        watched: the caller observes their end. A Rejection after a failed attempt gives way to that failure, which
        says more.
        """
        decision: Decision | None = None
        outcome: T | Failure | Rejection | None = None
        self.watch(request.key, guard.evict)
        try:
            for number in range(1, self._max_attempts + 1):
                verdict = self._decide_again(request, outcome, number)
                if isinstance(verdict, Rejection):
                    self.unwatch(request.key)
                    return (outcome if isinstance(outcome, Failure) else verdict), decision, number - 1
                decision = verdict
                outcome = await self._attempt(decision, guard, attempt)
                if not isinstance(outcome, Failure):
                    return outcome, decision, number
                self.observe(AttemptFailed(request.key, self.clock(), outcome.kind))
                if not outcome.retry or request.pinned is not None:
                    break
                tried = request.tried | {decision.endpoint.id}
                request = msgspec.structs.replace(request, tried=tried)
        except BaseException:
            self.observe(Finished(key=request.key, at=self.clock(), outcome=Outcome.CLIENT_GONE))
            raise
        self.unwatch(request.key)
        assert outcome is not None
        return outcome, decision, number

    def _decide_again(self, request: InferenceRequest, last: object, number: int) -> Decision | Rejection:
        verdict = self.decide(request)
        if (
            number == 2
            and isinstance(verdict, Rejection)
            and verdict.code is RejectionCode.NO_READY_ENDPOINTS
            and isinstance(last, Failure)
            and last.kind is FailureKind.RESET
        ):
            # Engines close idle connections while we send on them: the only endpoint deserves one more try on a new
            # connection.
            verdict = self.decide(msgspec.structs.replace(request, tried=frozenset()))
        return verdict

    async def _attempt(self, decision: Decision, guard: Guard, attempt: Attempt[T]) -> T | Failure:
        try:
            return await attempt(decision)
        except asyncio.CancelledError:
            why = guard.absorb()
            if why is None:
                raise
            kind = _OUTCOME_OF_EVICTION[why]
            return Failure(kind, retry=kind is not FailureKind.TIMEOUT)


def _remembered(verdict: Decision | Rejection) -> Decision | Rejection:
    """The verdict with its keys emptied, overlong texts of its request cut, and only the matches its table shows."""
    request = verdict.request
    changes: dict[str, Any] = {
        name: text[:REMEMBERED_CHARS]
        for name in _TEXTS
        if (text := getattr(request, name)) is not None and len(text) > REMEMBERED_CHARS
    }
    if request.keys is not None:
        shown = request.matches.keys() & verdict.table.endpoints
        # The chains themselves are long, and nobody looks at them.
        emptied = PromptKeys(exact=dict.fromkeys(request.keys.exact, ()), tokens=request.keys.tokens)
        changes |= {"keys": emptied, "matches": {name: request.matches[name] for name in shown}}
    if not changes:
        return verdict
    return msgspec.structs.replace(verdict, request=msgspec.structs.replace(request, **changes))
