"""What is known about every endpoint right now: the one writer behind all snapshots.

Sources say which endpoints exist, signals say how they are, the doors say what happened to requests (through the
director). Out comes an immutable snapshot whose rows are rebuilt only when something about them changed. It never
chooses and never does I/O.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from picker.core.events import FailureKind
from picker.core.health import EndpointHealth, HealthLimits
from picker.core.ledger import Deadlines, Eviction, Flight, Ledger
from picker.core.updates import (
    Alive,
    ModelsListed,
    ProbeFailure,
    Remove,
    Replace,
    Scraped,
    ScrapeFailed,
    SignalUpdate,
    SourceUpdate,
    Upsert,
)
from picker.core.values import Endpoint, EndpointState, InferenceRequest, Signals, Snapshot, Standing

# Expected time to the first byte before anything was observed: fixed part, and prefill at a modest 4,000 tokens a
# second. Only prompts of some length tell the prefill rate; what is learnt stays within what accelerators do (1,000
# to 50,000 tokens a second).
FIRST_BYTE_PRIOR_S = 0.3
PREFILL_PRIOR_S_PER_TOKEN = 1 / 4000
PREFILL_S_PER_TOKEN_MIN = 1 / 50_000
PREFILL_S_PER_TOKEN_MAX = 1 / 1000
TELLING_PROMPT_TOKENS = 1024
# Without token counters a non-streaming answer is silent until its end, and nothing tells a long answer from a hung
# engine.
SILENT_ANSWER_S = 30.0


class Freshness(msgspec.Struct, frozen=True, kw_only=True):
    """How long a scrape and a model list may be believed."""

    signals_s: float = 5.0
    models_s: float = 60.0


class StandingChange(msgspec.Struct, frozen=True):
    """An endpoint's standing changed; for logs and metrics."""

    endpoint_id: str
    before: Standing
    after: Standing
    reason: str


class Ticked(msgspec.Struct, frozen=True):
    """What one tick found: requests to give up on, and endpoints whose standing changed."""

    evictions: tuple[tuple[int, Eviction], ...] = ()
    changes: tuple[StandingChange, ...] = ()


class _Record:
    """Everything about one endpoint, mutable, owned by the datastore."""

    __slots__ = (
        "counter_at",
        "endpoint",
        "first_byte_s",
        "health",
        "models",
        "models_at",
        "prefill_s_per_token",
        "row",
        "signals",
        "silent_s",
        "source",
        "standing",
    )

    def __init__(self, endpoint: Endpoint, source: str, limits: HealthLimits) -> None:
        self.endpoint = endpoint
        self.source = source
        self.health = EndpointHealth(limits)
        self.signals: Signals | None = None
        self.models: frozenset[str] | None = None
        self.models_at = 0.0
        self.counter_at = 0.0
        self.first_byte_s = 0.0
        self.prefill_s_per_token = PREFILL_PRIOR_S_PER_TOKEN
        self.silent_s = 0.0
        self.row: EndpointState | None = None
        self.standing = Standing.READY


class Datastore:
    """Endpoints, their signals, health and load. Single-threaded: every method is synchronous and runs on one loop."""

    def __init__(self, *, health: HealthLimits, freshness: Freshness, deadlines: Deadlines) -> None:
        self._health = health
        self._freshness = freshness
        self._deadlines = deadlines
        self._records: dict[str, _Record] = {}
        self._by_address: dict[str, str] = {}
        self._rows: tuple[EndpointState, ...] | None = None
        self._synced: set[str] = set()
        self.ledger = Ledger()
        self.version = 0

    def __repr__(self) -> str:
        return f"<Datastore [{len(self._records)} endpoints | {len(self.ledger)} in flight]>"

    # -- sources and signals -----------------------------------------------------------------------

    def apply(self, update: SourceUpdate | SignalUpdate) -> None:
        """Takes in one update. Signals about an endpoint that is gone are ignored."""
        match update:
            case Scraped() | ScrapeFailed() | Alive() | ModelsListed():
                record = self._records.get(update.endpoint_id)
                if record is not None:
                    self._apply_signal(record, update)
                    self._touch(record)
            case Replace(source, endpoints):
                keep = {endpoint.id for endpoint in endpoints}
                for name in [
                    name for name, record in self._records.items() if record.source == source and name not in keep
                ]:
                    self._remove(name)
                for endpoint in endpoints:
                    self._upsert(source, endpoint)
                self._synced.add(source)
            case Upsert(source, endpoint):
                self._upsert(source, endpoint)
            case Remove(_, endpoint_id):
                self._remove(endpoint_id)

    def _upsert(self, source: str, endpoint: Endpoint) -> None:
        record = self._records.get(endpoint.id)
        if record is None:
            record = self._records[endpoint.id] = _Record(endpoint, source, self._health)
        elif record.endpoint == endpoint:
            return
        elif record.endpoint.url != endpoint.url or record.endpoint.address != endpoint.address:
            # Another address is another process: what was learnt about the old one does not hold.
            self._unindex(record)
            record = self._records[endpoint.id] = _Record(endpoint, source, self._health)
        record.endpoint = endpoint
        record.source = source
        if endpoint.address:
            self._by_address[endpoint.address] = endpoint.id
        self.version += 1
        self._touch(record)

    def _unindex(self, record: _Record) -> None:
        if self._by_address.get(record.endpoint.address) == record.endpoint.id:
            del self._by_address[record.endpoint.address]

    def _remove(self, endpoint_id: str) -> None:
        record = self._records.pop(endpoint_id, None)
        if record is not None:
            self._unindex(record)
            self.ledger.forget(endpoint_id)
            self.version += 1
            self._rows = None

    def _apply_signal(self, record: _Record, update: SignalUpdate) -> None:
        match update:
            case Scraped(endpoint_id, signals):
                self._note_counter(record, signals)
                record.signals = signals
                record.health.scraped()
                self.ledger.load(endpoint_id).scraped(signals.at)
                if signals.waiting is not None and signals.running is not None:
                    self.ledger.release_departed(endpoint_id, signals.waiting + signals.running, signals.at, signals.at)
            case ScrapeFailed(_, _, _, kind):
                # Metrics on another port than the API say nothing about whether requests get through.
                record.health.scrape_failed(ProbeFailure.HTTP if record.endpoint.metrics_url else kind)
            case Alive():
                record.health.scraped()
            case ModelsListed(_, at, models):
                record.models, record.models_at = models, at

    def _note_counter(self, record: _Record, signals: Signals) -> None:
        before = record.signals.progress_tokens if record.signals is not None else None
        after = signals.progress_tokens
        if after is None or after == before:
            return
        record.counter_at = signals.at
        if before is not None and after < before:
            record.health.restarted()
        elif before is not None:
            record.health.progressed()

    # -- requests ----------------------------------------------------------------------------------

    def reserve(self, request: InferenceRequest, endpoint_id: str, now: float) -> None:
        """Counts a request on the endpoint chosen for it."""
        self.ledger.reserve(request, endpoint_id, now)
        record = self._records.get(endpoint_id)
        if record is not None:
            record.health.dispatched(request.key, now)
            self._touch(record)

    def progressed(self, key: int, now: float) -> None:
        """Body bytes of a request arrived."""
        flight = self.ledger.flight(key)
        if flight is None:
            return
        first = flight.first_byte_at is None
        self.ledger.progress(key, now)
        record = self._records.get(flight.endpoint_id)
        if record is None:
            return
        if first:
            self._learn_first_byte(record, flight, now)
            record.health.succeeded()
            self._touch(record)
        else:
            record.health.progressed()

    def _learn_first_byte(self, record: _Record, flight: Flight, now: float) -> None:
        took_s = now - flight.reserved_at
        if not flight.request.stream:
            record.silent_s = _smoothed(record.silent_s, took_s)
            return
        record.first_byte_s = _smoothed(record.first_byte_s, took_s)
        if flight.request.prompt_tokens >= TELLING_PROMPT_TOKENS:
            rate = min(max(took_s / flight.request.prompt_tokens, PREFILL_S_PER_TOKEN_MIN), PREFILL_S_PER_TOKEN_MAX)
            record.prefill_s_per_token = _smoothed(record.prefill_s_per_token, rate)

    def failed(self, key: int, kind: FailureKind, now: float) -> Flight | None:
        """An attempt failed before its first byte: releases it and blames the endpoint."""
        flight = self.ledger.release(key, now)
        record = self._records.get(flight.endpoint_id) if flight is not None else None
        if record is not None:
            record.health.failed(key, kind, now)
            self._touch(record)
        return flight

    def ended(self, key: int, now: float) -> Flight | None:
        """A request is over, however: releases it. None when it was released before."""
        flight = self.ledger.release(key, now)
        record = self._records.get(flight.endpoint_id) if flight is not None else None
        if record is not None:
            record.health.ended(key, now)
            self._touch(record)
        return flight

    def served_by(self, key: int, address: str, now: float) -> str | None:
        """Moves a request to the endpoint the proxy really used. Returns its id, None when unknown or unchanged."""
        flight = self.ledger.flight(key)
        endpoint_id = self._by_address.get(address)
        if flight is None or endpoint_id is None or endpoint_id == flight.endpoint_id:
            return None
        before = self._records.get(flight.endpoint_id)
        started, reserved_at = flight.first_byte_at is not None, flight.reserved_at
        self.ledger.reserve(flight.request, endpoint_id, reserved_at)
        if started:
            self.ledger.progress(key, now)
        if before is not None:
            before.health.ended(key, now)
            self._touch(before)
        self._touch(self._records[endpoint_id])
        return endpoint_id

    # -- reading -----------------------------------------------------------------------------------

    def synced(self, source: str) -> bool:
        """Whether a source has said once what exists."""
        return source in self._synced

    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints, in the order they were first seen."""
        return tuple(record.endpoint for record in self._records.values())

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        """One endpoint by id."""
        record = self._records.get(endpoint_id)
        return record.endpoint if record is not None else None

    def in_flight(self, endpoint_id: str) -> int:
        """How many of our requests are on the endpoint."""
        return len(self.ledger.load(endpoint_id).flights)

    def models(self) -> Iterator[tuple[str, frozenset[str] | None]]:
        """Endpoint id and the models it serves, None when unknown."""
        return ((name, self._models(record)) for name, record in self._records.items())

    def snapshot(self, now: float) -> Snapshot:
        """All rows as of now. Costs a row per endpoint that changed since the last call."""
        rows = self._rows
        if rows is None:
            rows = self._rows = tuple(record.row or self._build(record, now) for record in self._records.values())
        return Snapshot(now, rows)

    def _touch(self, record: _Record) -> None:
        record.row = None
        self._rows = None

    def _models(self, record: _Record) -> frozenset[str] | None:
        return record.endpoint.models or record.models

    def _build(self, record: _Record, now: float) -> EndpointState:
        load = self.ledger.load(record.endpoint.id)
        signals = record.signals
        if signals is not None and now - signals.at > self._freshness.signals_s:
            signals = None
        models = self._models(record)
        if not record.endpoint.models and now - record.models_at > self._freshness.models_s:
            models = None
        waiting, running = _estimate(signals, load.correction, len(load.flights))
        standing, reason = record.health.standing(now)
        record.row = EndpointState(
            endpoint=record.endpoint,
            standing=standing,
            standing_reason=reason,
            signals=signals,
            models=models,
            waiting=waiting,
            running=running,
            in_flight=len(load.flights),
            in_flight_tokens=load.tokens,
        )
        return record.row

    # -- time --------------------------------------------------------------------------------------

    def tick(self, now: float) -> Ticked:
        """To be called every 100 to 250 ms: ages signals, finds hung engines and overdue requests.

        The requests returned still hold their reservations; the door that gives one up says so with an event.
        """
        evictions = dict(self.ledger.overdue(now, self._deadlines))
        changes: list[StandingChange] = []
        for name, record in self._records.items():
            if self._is_hung(record, now):
                record.health.eject("hung", now)
            standing, reason = record.health.standing(now)
            if standing is not record.standing:
                changes.append(StandingChange(name, record.standing, standing, reason))
                record.standing = standing
            if record.health.hung and standing is Standing.OUT:
                for key, flight in self.ledger.load(name).flights.items():
                    if flight.first_byte_at is None and not flight.left:
                        evictions.setdefault(key, Eviction.HUNG)
            self._touch(record)
        return Ticked(tuple(evictions.items()), tuple(changes))

    def _is_hung(self, record: _Record, now: float) -> bool:
        """Our own requests are there, no data chunk came and no token counter moved, for longer than the work explains.

        A frozen engine looks like the best pod: its front end answers probes, its gauges say 0. Only the absence of
        progress tells.
        """
        load = self.ledger.load(record.endpoint.id)
        signals = record.signals
        fresh = signals is not None and now - signals.at <= self._freshness.signals_s
        counters = fresh and signals is not None and signals.progress_tokens is not None
        waiting_on = [
            flight
            for flight in load.flights.values()
            if not flight.left and (counters or flight.first_byte_at is None or flight.request.sees_body)
        ]
        if not waiting_on:
            return False
        silent_since = max(load.busy_since, load.progress_at, record.counter_at if counters else 0.0)
        expected_s = FIRST_BYTE_PRIOR_S + load.unstarted_tokens * record.prefill_s_per_token
        if counters or any(flight.request.stream for flight in waiting_on):
            expected_s = max(expected_s, record.first_byte_s)
        else:
            expected_s = max(SILENT_ANSWER_S, record.silent_s)
        return now - silent_since > max(self._health.hung_after_s, 4 * expected_s)


def _smoothed(mean: float, sample: float) -> float:
    return sample if not mean else 0.8 * mean + 0.2 * sample


def _estimate(signals: Signals | None, correction: int, in_flight: int) -> tuple[float | None, float | None]:
    """Waiting and running now: the scrape plus what we dispatched minus what ended since, at least our own in-flight.

    New work joins the queue where there is one, otherwise the batch; ends drain the queue first, since the engine
    refills the batch from it.
    """
    if signals is None or (signals.waiting is None and signals.running is None):
        return None, None
    waiting, running = signals.waiting or 0.0, signals.running or 0.0
    change = max(float(correction), in_flight - waiting - running)
    if change >= 0:
        return (waiting + change, running) if waiting > 0 else (waiting, running + change)
    from_queue = min(waiting, -change)
    return waiting - from_queue, max(0.0, running + change + from_queue)
