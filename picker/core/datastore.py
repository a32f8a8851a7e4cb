"""What is known about every endpoint right now: the one writer behind all snapshots.

Sources say which endpoints exist, signals say how they are, the doors say what happened to requests (through the
director). Out comes an immutable snapshot whose rows are rebuilt only when something about them changed. It never
chooses and never does I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from picker.core.endpoint_record import EndpointRecord
from picker.core.estimate import estimate
from picker.core.events import FailureKind
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines, Eviction, Flight, Ledger
from picker.core.prefix.index import PrefixIndex
from picker.core.updates import (
    Alive,
    EndpointUpdate,
    ModelsListed,
    Remove,
    Replace,
    Scraped,
    ScrapeFailed,
    SignalUpdate,
    Upsert,
)
from picker.core.values import Endpoint, EndpointState, InferenceRequest, Signals, Snapshot, Standing


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


class Datastore:
    """Endpoints, their signals, health and load. Single-threaded: every method is synchronous and runs on one loop."""

    def __init__(
        self,
        *,
        health: HealthLimits,
        freshness: Freshness,
        deadlines: Deadlines,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        self.prefixes = prefixes or PrefixIndex()
        self._health = health
        self._freshness = freshness
        self._deadlines = deadlines
        self._records: dict[str, EndpointRecord] = {}
        self._by_address: dict[str, str] = {}
        self._rows: tuple[EndpointState, ...] | None = None
        self._synced: set[str] = set()
        # Endpoints that left while requests were on them, until those have ended.
        self._departed: dict[str, Endpoint] = {}
        self.ledger = Ledger()
        self.version = 0
        self.adapters: frozenset[str] = frozenset()
        """The LoRA adapters that any engine lists, of those that are gone too until another list comes."""

    def __repr__(self) -> str:
        return f"<Datastore [{len(self._records)} endpoints | {len(self.ledger)} in flight]>"

    # -- sources and signals -----------------------------------------------------------------------

    def apply(self, update: EndpointUpdate | SignalUpdate) -> None:
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
            case Remove(source, endpoint_id):
                record = self._records.get(endpoint_id)
                if record is not None and record.source == source:
                    self._remove(endpoint_id)

    def _upsert(self, source: str, endpoint: Endpoint) -> None:
        record = self._records.get(endpoint.id)
        if record is not None and record.endpoint == endpoint:
            return
        before = record.endpoint if record is not None else self._departed.pop(endpoint.id, None)
        moved = before is not None and not _same_process(before, endpoint)
        if moved:
            self.ledger.detach(endpoint.id)
            self.prefixes.restarted(endpoint.id)
        if record is not None:
            self._unindex(record)
        if record is None or moved:
            record = self._records[endpoint.id] = EndpointRecord(endpoint, source, self._health)
        record.endpoint = endpoint
        record.source = source
        if endpoint.address:
            self._by_address[endpoint.address] = endpoint.id
        self.version += 1
        self._touch(record)

    def _unindex(self, record: EndpointRecord) -> None:
        if self._by_address.get(record.endpoint.address) == record.endpoint.id:
            del self._by_address[record.endpoint.address]

    def _remove(self, endpoint_id: str) -> None:
        record = self._records.pop(endpoint_id, None)
        if record is not None:
            self._unindex(record)
            self.ledger.forget(endpoint_id)
            self.prefixes.forget(endpoint_id)
            if self.ledger.in_flight(endpoint_id):
                self._departed[endpoint_id] = record.endpoint
            self.version += 1
            self._rows = None

    def _apply_signal(self, record: EndpointRecord, update: SignalUpdate) -> None:
        match update:
            case Scraped(endpoint_id, signals):
                self._note_counter(record, signals)
                record.signals = signals
                if signals.blocks and signals.block_tokens:
                    self.prefixes.declare(endpoint_id, signals.blocks * signals.block_tokens)
                if _metrics_elsewhere(record.endpoint):
                    record.health.metrics_scraped()
                else:
                    record.health.scraped()
                self.ledger.load(endpoint_id).scraped(signals.at)
                if signals.waiting is not None and signals.running is not None:
                    self.ledger.release_departed(endpoint_id, signals.waiting + signals.running, signals.at)
            case ScrapeFailed(_, _, _, kind):
                if _metrics_elsewhere(record.endpoint):
                    record.health.metrics_failed()
                else:
                    record.health.scrape_failed(kind)
            case Alive():
                record.health.scraped()
            case ModelsListed(_, at, models, adapters):
                if adapters != record.adapters:
                    record.adapters = adapters
                    self.adapters = frozenset().union(*(each.adapters for each in self._records.values()))
                record.models, record.models_at = models, at

    def _note_counter(self, record: EndpointRecord, signals: Signals) -> None:
        before = record.signals.progress_tokens if record.signals is not None else None
        after = signals.progress_tokens
        if after is None or after == before:
            return
        record.counter_at = signals.at
        if before is not None and after < before:
            record.health.restarted()
            self.prefixes.restarted(record.endpoint.id)
        elif before is not None:
            record.health.progressed()

    def set_others(self, loads: Mapping[str, tuple[int, int]]) -> None:
        """Requests and tokens that other replicas have in flight, by endpoint id: all there is, nothing elsewhere."""
        for name, record in self._records.items():
            load = loads.get(name, (0, 0))
            if load != record.others:
                record.others = load
                self._touch(record)

    # -- requests ----------------------------------------------------------------------------------

    def reserve(self, request: InferenceRequest, endpoint_id: str, now: float) -> None:
        """Counts a request on the endpoint chosen for it."""
        if self.ledger.flight(request.key) is not None:
            self.ended(request.key, now)
        self.ledger.reserve(request, endpoint_id, now)
        record = self._records.get(endpoint_id)
        if record is not None:
            record.health.dispatched(request.key, now)
            if request.keys is not None and request.keys.known and endpoint_id not in request.matches:
                record.cold_at = now
            self._touch(record)

    def progressed(self, key: int, now: float, *, refused: bool = False) -> None:
        """Body bytes of a request arrived. Those of an error (`refused`) prove a front end, not an engine."""
        flight = self.ledger.flight(key)
        if flight is None:
            return
        first = flight.first_byte_at is None
        self.ledger.progress(key, now, works=not refused)
        record = self._records.get(flight.endpoint_id)
        if record is None:
            return
        if refused:
            record.health.alive()
            self._touch(record)
            return
        if not flight.telling and self._has_counters(record, now):
            record.health.answered(key)
        elif first:
            record.health.began(key)
        else:
            record.health.progressed()
        if first:
            record.pace.learn(flight, now)
            self._touch(record)

    def failed(self, key: int, kind: FailureKind, now: float) -> Flight | None:
        """An attempt failed before its first byte: releases it and blames the endpoint."""
        flight = self.ledger.release(key, now)
        record = self._records.get(flight.endpoint_id) if flight is not None else None
        if record is not None:
            record.health.failed(key, kind, now)
            self._touch(record)
        return flight

    def ended(self, key: int, now: float, *, worked: bool = False) -> Flight | None:
        """A request is over, however: releases it. `worked` says the endpoint answered it well. None when it was
        released before.
        """
        flight = self.ledger.release(key, now)
        record = self._records.get(flight.endpoint_id) if flight is not None else None
        if record is not None:
            if worked:
                record.health.succeeded(key)
            record.health.ended(key, now)
            self._touch(record)
        return flight

    def left(self, key: int, now: float) -> Flight | None:
        """The door stops watching a request: scrapes will tell its end. As a trial it proves nothing any more."""
        flight = self.ledger.flight(key)
        record = self._records.get(flight.endpoint_id) if flight is not None else None
        if flight is not None:
            flight.left = True
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
        return self.ledger.in_flight(endpoint_id)

    def models(self) -> Iterator[tuple[str, frozenset[str] | None]]:
        """Endpoint id and the models it serves, None when unknown."""
        return ((name, self._models(record)) for name, record in self._records.items())

    def snapshot(self, now: float) -> Snapshot:
        """All rows as of now. Costs a row per endpoint that changed since the last call."""
        rows = self._rows
        if rows is None:
            rows = self._rows = tuple([record.row or self._build(record, now) for record in self._records.values()])
        return Snapshot(now, rows)

    def _touch(self, record: EndpointRecord) -> None:
        record.row = None
        self._rows = None

    def _models(self, record: EndpointRecord) -> frozenset[str] | None:
        return record.endpoint.models or record.models

    def _build(self, record: EndpointRecord, now: float) -> EndpointState:
        load = self.ledger.load(record.endpoint.id)
        signals = self._fresh_signals(record, now)
        models = self._models(record)
        if not record.endpoint.models and now - record.models_at > self._freshness.models_s:
            models = None
        others, others_tokens = record.others
        waiting, running = estimate(signals, load.correction, len(load.flights) + others)
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
            others=others,
            others_tokens=others_tokens,
            cold_at=record.cold_at,
        )
        return record.row

    # -- time --------------------------------------------------------------------------------------

    def tick(self, now: float) -> Ticked:
        """To be called every 100 to 250 ms: ages signals, finds hung engines and overdue requests.

        The requests returned still hold their reservations; the door that gives one up says so with an event. One
        that nobody gives up is returned again after a while.
        """
        evictions = dict(self.ledger.overdue(now, self._deadlines))
        changes: list[StandingChange] = []
        for name, record in self._records.items():
            health = record.health
            if self._is_hung(record, now):
                health.eject("hung", now)
            standing, reason = health.standing(now)
            if standing is not record.standing:
                changes.append(StandingChange(name, record.standing, standing, reason))
                record.standing, record.standing_at = standing, now
            why = self._gives_up(record, now)
            if why is not None:
                for key, flight in self.ledger.load(name).flights.items():
                    if flight.first_byte_at is None and not flight.left and key != health.trial:
                        evictions.setdefault(key, why)
            if self._is_outdated(record, standing, reason, now):
                self._touch(record)
        self._departed = {name: gone for name, gone in self._departed.items() if self.ledger.in_flight(name)}
        news = tuple((key, why) for key, why in evictions.items() if self.ledger.evict(key, now))
        return Ticked(news, tuple(changes))

    def _gives_up(self, record: EndpointRecord, now: float) -> Eviction | None:
        """Why requests that wait for their first byte should wait no longer here; None when they may.

        An endpoint out of reach may only be deaf to probes: it loses its requests when nothing at all was heard of it
        for as long as a hung one may be silent. A dead process resets its connections; a lost host does not.
        """
        if record.standing is not Standing.OUT:
            return None
        if record.health.hung:
            return Eviction.HUNG
        silent_s = now - max(record.standing_at, self.ledger.load(record.endpoint.id).progress_at)
        return Eviction.UNREACHABLE if silent_s > self._health.hung_after_s else None

    def _is_outdated(self, record: EndpointRecord, standing: Standing, reason: str, now: float) -> bool:
        """Whether time alone made the endpoint's row wrong."""
        row = record.row
        if row is None:
            return False
        if row.standing is not standing or row.standing_reason != reason:
            return True
        if row.signals is not None and now - row.signals.at > self._freshness.signals_s:
            return True
        learnt_models = row.models is not None and not record.endpoint.models
        return learnt_models and now - record.models_at > self._freshness.models_s

    def _fresh_signals(self, record: EndpointRecord, now: float) -> Signals | None:
        signals = record.signals
        return signals if signals is not None and now - signals.at <= self._freshness.signals_s else None

    def _has_counters(self, record: EndpointRecord, now: float) -> bool:
        signals = self._fresh_signals(record, now)
        return signals is not None and signals.progress_tokens is not None

    def _is_hung(self, record: EndpointRecord, now: float) -> bool:
        load = self.ledger.load(record.endpoint.id)
        if not load.flights:
            return False
        counter_at = record.counter_at if self._has_counters(record, now) else None
        lag_s = record.signals.progress_lag_s if record.signals is not None else 0.0
        hung_after_s = self._health.hung_after_s + lag_s
        return record.pace.is_hung(load, now, counter_at=counter_at, hung_after_s=hung_after_s)


def _same_process(before: Endpoint, after: Endpoint) -> bool:
    """Whether what was learnt about an endpoint still holds. A host name that was not resolved has no address yet."""
    known = before.address and after.address
    moved = before.url != after.url or (known and before.address != after.address)
    return not moved and before.instance == after.instance


def _metrics_elsewhere(endpoint: Endpoint) -> bool:
    """Metrics on another port than the API say nothing about whether requests get through."""
    return bool(endpoint.metrics_url) and not endpoint.metrics_url.startswith(f"{endpoint.url}/")
