"""A pool of small engines on a simulated clock, driven through the pure core: datastore and scheduler, no sockets.

An engine serves up to `slots` requests at a time, each taking `service_s`; the rest waits. Its scrapes are late by
`lag_s`, and a frozen engine answers them with gauges of 0 and counters that stand still.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from picker.core.datastore import Datastore
from picker.core.ledger import Eviction
from picker.core.scheduler import Scheduler
from picker.core.updates import Scraped
from picker.core.values import Decision, Signals
from tests.unit.core.builders import datastore, pod, request, scheduler

STEP_S = 0.01
TICK_STEPS = 10


@dataclass
class Engine:
    """One model server. `queue` and `batch` hold request keys; `batch` also when each one ends."""

    slots: int = 16
    service_s: float = 1.0
    frozen: bool = False
    tokens: float = 0.0
    queue: deque[int] = field(default_factory=deque)
    batch: dict[int, float] = field(default_factory=dict)

    def step(self, now: float) -> list[int]:
        """Keys that ended by now."""
        if self.frozen:
            return []
        done = [key for key, ends_at in self.batch.items() if ends_at <= now]
        for key in done:
            del self.batch[key]
        while self.queue and len(self.batch) < self.slots:
            self.batch[self.queue.popleft()] = now + self.service_s
        self.tokens += len(self.batch)
        return done

    def signals(self, at: float) -> Signals:
        """What a scrape sent at `at` says."""
        waiting, running = (0, 0) if self.frozen else (len(self.queue), len(self.batch))
        usage = running / self.slots
        return Signals(
            at=at, waiting=float(waiting), running=float(running), kv_usage=usage, progress_tokens=self.tokens
        )

    def drop(self, key: int) -> None:
        """A request was cut."""
        self.batch.pop(key, None)
        if key in self.queue:
            self.queue.remove(key)


class Pool:
    """Engines, the brain, and clients who each send the next request when the last one ended."""

    def __init__(
        self, engines: dict[str, Engine], *, policy: str = "balanced", seed: int = 1, scrape_s: float = 0.2
    ) -> None:
        self.engines = engines
        self.store: Datastore = datastore(*(pod(name, address=f"{name}:80") for name in engines))
        self.scheduler: Scheduler = scheduler(policy)
        self.rng = random.Random(seed)
        self.now = 100.0
        self.chosen: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self.evicted: Counter[str] = Counter()
        self.refused = 0
        self._scrape_steps = round(scrape_s / STEP_S)
        self._late: list[Scraped] = []
        self._keys = 0
        self._clients = 0
        self._step = 0
        self.scrape()
        self.scrape()

    def scrape(self) -> None:
        """The answers of the last round arrive, the next round is sent: figures are always one interval old."""
        for update in self._late:
            self.store.apply(update)
        self._late = [Scraped(name, engine.signals(self.now)) for name, engine in self.engines.items()]

    def send(self, *, received_at: float | None = None, tried: frozenset[str] = frozenset()) -> str | None:
        """One request arrives now. Returns where it went."""
        self._keys += 1
        asked = request(
            self._keys,
            received_at=self.now if received_at is None else received_at,
            prompt_tokens=200,
            stream=False,
            tried=tried,
        )
        verdict = self.scheduler.schedule(asked, self.store.snapshot(self.now), self.now, self.rng)
        if not isinstance(verdict, Decision):
            self.refused += 1
            return None
        name = verdict.endpoint.id
        self.store.reserve(asked, name, self.now)
        self.engines[name].queue.append(asked.key)
        self.chosen[name] += 1
        return name

    def run(self, seconds: float, *, clients: int = 0) -> None:
        """Lets time pass with that many clients in a closed loop."""
        for _ in range(clients - self._clients):
            self.send()
        self._clients = clients
        for _ in range(round(seconds / STEP_S)):
            self._step += 1
            self.now += STEP_S
            for engine in self.engines.values():
                for key in engine.step(self.now):
                    self._end(key)
            if self._step % self._scrape_steps == 0:
                self.scrape()
            if self._step % TICK_STEPS == 0:
                self._tick()

    def _end(self, key: int) -> None:
        self.store.progressed(key, self.now)
        flight = self.store.ended(key, self.now, worked=True)
        assert flight is not None
        self.latencies_s.append(self.now - flight.request.received_at)
        if len(self.store.ledger) < self._clients:
            self.send()

    def _tick(self) -> None:
        for key, why in self.store.tick(self.now).evictions:
            assert why is Eviction.HUNG
            flight = self.store.ended(key, self.now)
            assert flight is not None
            self.engines[flight.endpoint_id].drop(key)
            self.evicted[flight.endpoint_id] += 1
            self.send(received_at=flight.request.received_at, tried=frozenset({flight.endpoint_id}))
