"""The in-flight ledger: what we have sent where and not yet seen the end of.

It is the truth about our own requests. Every reservation is released exactly once: releasing twice, or a key never
reserved, changes nothing, so no counter can go negative. It also answers which requests are overdue. It decides
nothing and knows no engine metrics.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator

import msgspec

from picker.core.values import InferenceRequest

# Corrections remembered per endpoint between two scrapes. At 10,000 requests a second and a scrape every 200 ms there
# are 4,000.
CORRECTIONS_MAX = 8192
# A door that was told to give a request up is told again only after this long.
EVICT_AGAIN_S = 5.0
# Where the flights of an earlier process of an endpoint are kept until their ends are seen. No endpoint has this id.
DETACHED = ""


class Eviction(enum.StrEnum):
    """Why the brain gives up on a request that a door still holds."""

    HUNG = "hung"
    UNREACHABLE = "unreachable"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """How long a request may wait for its first byte, between two chunks, and in all."""

    first_byte_s: float = 300.0
    between_chunks_s: float = 120.0
    total_s: float = 3600.0


class Flight(msgspec.Struct):
    """One request on one endpoint, from its reservation to its release. Owned by the ledger."""

    request: InferenceRequest
    endpoint_id: str
    tokens: int
    reserved_at: float
    progress_at: float
    first_byte_at: float | None = None
    left: bool = False
    stalled: bool = False
    evicted_at: float | None = None

    @property
    def telling(self) -> bool:
        """Whether its first byte proves a working engine. The headers of a stream do not: a front end sends them
        while its engine is frozen.
        """
        return self.request.sees_body or not self.request.stream


class Load:
    """What one endpoint carries for us. `correction` is dispatched minus finished since the last scrape was sent.

    `progress_at` is when bytes last arrived, `proof_at` when they last proved a working engine. `gone` marks the books
    of an endpoint that left while requests were on it.
    """

    __slots__ = ("_scraped_at", "_since", "correction", "flights", "gone", "progress_at", "proof_at", "tokens")

    def __init__(self) -> None:
        self.flights: dict[int, Flight] = {}
        self.tokens = 0
        self.progress_at = 0.0
        self.proof_at = 0.0
        self.correction = 0
        self.gone = False
        self._scraped_at = 0.0
        self._since: deque[tuple[float, int]] = deque()

    def record(self, at: float, change: int) -> None:
        """Notes a dispatch (+1) or an end (-1) for the correction of the next estimate."""
        if at >= self._scraped_at and len(self._since) < CORRECTIONS_MAX:
            self._since.append((at, change))
            self.correction += change

    def scraped(self, sent_at: float) -> None:
        """Forgets what the scrape sent at `sent_at` already counted."""
        self._scraped_at = sent_at
        since = self._since
        while since and since[0][0] <= sent_at:
            self.correction -= since.popleft()[1]


class Ledger:
    """All flights, by request key and by endpoint id. Endpoints come and go without it noticing: a rejoining pod
    keeps its counts.
    """

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}
        self._loads: dict[str, Load] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {len(load.flights)}" for name, load in self._loads.items() if load.flights)
        return f"<Ledger [{len(self._flights)} in flight] {counts}>".replace("] >", "]>")

    def load(self, endpoint_id: str) -> Load:
        """The live load of one endpoint; an empty one for an endpoint never used."""
        load = self._loads.get(endpoint_id)
        if load is None:
            load = self._loads[endpoint_id] = Load()
        return load

    def loads(self) -> Iterator[tuple[str, Load]]:
        """Endpoint id and load of every endpoint that carries something."""
        return ((name, load) for name, load in self._loads.items() if load.flights and name != DETACHED)

    def in_flight(self, endpoint_id: str) -> int:
        """How many flights are on the endpoint."""
        load = self._loads.get(endpoint_id)
        return len(load.flights) if load is not None else 0

    def forget(self, endpoint_id: str) -> None:
        """Drops the books of an endpoint that is gone: now if it is idle, otherwise when its flights have ended."""
        load = self._loads.get(endpoint_id)
        if load is not None:
            load.gone = True
            self._drop_idle(endpoint_id, load)

    def detach(self, endpoint_id: str) -> None:
        """Another process took the endpoint's name: the flights on the old one no longer count on it."""
        old = self._loads.pop(endpoint_id, None)
        if old is None or not old.flights:
            return
        load = self.load(DETACHED)
        load.gone = True
        load.flights |= old.flights
        load.tokens += old.tokens
        for flight in old.flights.values():
            flight.endpoint_id = DETACHED

    def _drop_idle(self, endpoint_id: str, load: Load) -> None:
        if load.gone and not load.flights:
            del self._loads[endpoint_id]

    def flight(self, key: int) -> Flight | None:
        """The flight of a request, None when it is not reserved."""
        return self._flights.get(key)

    def flights(self) -> Iterator[Flight]:
        """All flights; do not reserve or release while iterating."""
        return iter(self._flights.values())

    def reserve(self, request: InferenceRequest, endpoint_id: str, now: float) -> None:
        """Counts the request on the endpoint. A request already reserved moves: it is never counted twice."""
        self.release(request.key, now)
        flight = Flight(request, endpoint_id, request.expected_tokens_at(endpoint_id), now, now)
        load = self.load(endpoint_id)
        load.gone = False
        load.flights[request.key] = flight
        load.tokens += flight.tokens
        load.record(now, 1)
        self._flights[request.key] = flight

    def progress(self, key: int, now: float, *, works: bool = True) -> Flight | None:
        """Notes body bytes of a request; with `works` they show that the engine works. Returns its flight, None when it
        is not reserved.
        """
        flight = self._flights.get(key)
        if flight is None:
            return None
        load = self._loads[flight.endpoint_id]
        if flight.first_byte_at is None:
            flight.first_byte_at = now
        flight.progress_at = now
        if not works:
            return flight
        load.progress_at = now
        if flight.telling:
            load.proof_at = now
        return flight

    def stall(self, key: int, now: float, *, stalled: bool) -> None:
        """Notes that the client stopped taking its answer, or goes on: the engine's silence counts from then."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.stalled = stalled
            if not stalled:
                self.progress(key, now)

    def release(self, key: int, now: float) -> Flight | None:
        """Ends a flight. Idempotent: None when there is nothing (any more) to release."""
        flight = self._flights.get(key)
        if flight is None:
            return None
        self._loads[flight.endpoint_id].record(now, -1)
        self._end(flight)
        return flight

    def _end(self, flight: Flight) -> None:
        key = flight.request.key
        del self._flights[key]
        load = self._loads[flight.endpoint_id]
        del load.flights[key]
        load.tokens -= flight.tokens
        self._drop_idle(flight.endpoint_id, load)

    def evict(self, key: int, now: float) -> bool:
        """Notes that a request is given up. False when that was said less than EVICT_AGAIN_S ago."""
        flight = self._flights.get(key)
        if flight is None or (flight.evicted_at is not None and now - flight.evicted_at < EVICT_AGAIN_S):
            return False
        flight.evicted_at = now
        return True

    def release_departed(self, endpoint_id: str, engine_total: float, sent_at: float) -> None:
        """Releases flights whose end no door sees (`left`), oldest first, as far as the engine shows they ended.

        `engine_total` is waiting + running of a scrape sent at `sent_at`. Flights reserved after that are not in it
        and stay. The ends are in that scrape, so they correct nothing.
        """
        load = self._loads.get(endpoint_id)
        if load is None:
            return
        seen = [flight for flight in load.flights.values() if flight.reserved_at < sent_at]
        departed = [flight for flight in seen if flight.left]
        surplus = len(seen) - int(engine_total)
        for flight in departed[: max(0, surplus)]:
            self._end(flight)

    def overdue(self, now: float, limits: Deadlines) -> list[tuple[int, Eviction]]:
        """Requests that passed one of their deadlines. Where the door does not see the body, silence after the
        headers is no offence.
        """
        late: list[tuple[int, Eviction]] = []
        for key, flight in self._flights.items():
            if now - flight.request.received_at > limits.total_s:
                late.append((key, Eviction.TOTAL_TIMEOUT))
            elif flight.left:
                continue
            elif flight.first_byte_at is None:
                if now - flight.reserved_at > limits.first_byte_s:
                    late.append((key, Eviction.FIRST_BYTE_TIMEOUT))
            elif flight.request.sees_body and now - flight.progress_at > limits.between_chunks_s:
                late.append((key, Eviction.IDLE_TIMEOUT))
        return late
