"""How long one decision takes with the default policy, by number of endpoints.

One decision is a snapshot, filters, scores, the pick, the reservation and the release of an older request: the whole
synchronous path of a request through the brain. It measures; it judges nothing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque

from picker import policies
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.scheduler import Scheduler
from picker.core.updates import Replace, Scraped
from picker.core.values import Decision, Endpoint, InferenceRequest, Lora, Signals

SIZES = (3, 10, 100, 1000)
# Requests in flight per endpoint while measuring: a busy pool.
IN_FLIGHT = 8


def datastore(size: int, *, seed: int = 1) -> Datastore:
    """A pool of `size` endpoints with one fresh scrape each, at time 0."""
    rng = random.Random(seed)
    store = Datastore(health=HealthLimits(), freshness=Freshness(), deadlines=Deadlines())
    pods = [Endpoint(id=f"pod-{n}", url=f"http://10.0.0.{n}:8000", address=f"10.0.0.{n}:8000") for n in range(size)]
    store.apply(Replace("bench", tuple(pods)))
    for pod in pods:
        signals = Signals(
            at=0.0,
            waiting=float(rng.randrange(4)),
            running=float(rng.randrange(32)),
            kv_usage=rng.random(),
            lora=Lora(frozenset({f"adapter-{rng.randrange(8)}"}), frozenset(), 2),
            progress_tokens=1000.0,
        )
        store.apply(Scraped(pod.id, signals))
    return store


def decide_us(size: int, *, rounds: int, session: str | None = None) -> float:
    """Median microseconds of one decision over `size` endpoints."""
    store, rng = datastore(size), random.Random(2)
    scheduler = Scheduler(policies.build("balanced", policies.BUILTIN["balanced"]))
    open_keys: deque[int] = deque()
    samples: list[int] = []
    for key in range(rounds + IN_FLIGHT * size):
        now = 0.001
        request = InferenceRequest(
            key=key, id=f"request-{key}", received_at=now, model="adapter-3", prompt_tokens=900, session=session
        )
        begin = time.perf_counter_ns()
        verdict = scheduler.schedule(request, store.snapshot(now), now, rng)
        assert isinstance(verdict, Decision)
        store.reserve(request, verdict.endpoint.id, now)
        if len(open_keys) >= IN_FLIGHT * size:
            store.ended(open_keys.popleft(), now)
            samples.append(time.perf_counter_ns() - begin)
        open_keys.append(key)
    return statistics.median(samples) / 1000


def tick_us(size: int, *, flights: int, rounds: int = 20, start_s: float = 0.1) -> float:
    """Median microseconds of one tick with that many requests in flight, and of the snapshot after it. Nothing moves
    from 0 on, so with a later `start_s` the engines look frozen.
    """
    store = datastore(size)
    for key in range(flights):
        request = InferenceRequest(key=key, id=str(key), received_at=0.0, prompt_tokens=900, stream=True)
        store.reserve(request, f"pod-{key % size}", 0.001)
    samples: list[int] = []
    for turn in range(rounds):
        now = start_s + turn / 100
        begin = time.perf_counter_ns()
        store.tick(now)
        store.snapshot(now)
        samples.append(time.perf_counter_ns() - begin)
    return statistics.median(samples) / 1000


def main() -> None:
    """Prints the table."""
    print(f"{'median us':<28}" + "".join(f"{f'{size} pods':>12}" for size in SIZES))
    rounds = {size: max(200, 20_000 // size) for size in SIZES}
    rows = {
        "decide": [decide_us(size, rounds=rounds[size]) for size in SIZES],
        "decide, with a session": [decide_us(size, rounds=rounds[size], session="s-1") for size in SIZES],
        "tick, 4096 in flight": [tick_us(size, flights=4096) for size in SIZES],
        "same, engines frozen": [tick_us(size, flights=4096, start_s=2.0) for size in SIZES],
    }
    for name, values in rows.items():
        print(f"{name:<28}" + "".join(f"{value:>12.0f}" for value in values))


if __name__ == "__main__":
    main()
