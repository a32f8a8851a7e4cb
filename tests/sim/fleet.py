"""Simulated engines with their real physics and caches behind the pure core, on a simulated clock: no sockets.

What the doors do is done here by hand: keys, decision, first byte, usage at the end. Scrapes come at their interval.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from picker.core.datastore import Datastore
from picker.core.prefix.prompt import PromptKeys
from picker.core.scheduler import Scheduler
from picker.core.updates import Scraped
from picker.core.values import Decision, Signals
from sim.physics import Engine
from sim.profiles import Profile
from sim.requests import Emission, Request
from tests.unit.core.builders import datastore, pod, request, scheduler

SCRAPE_S = 0.2
TICK_S = 0.1


@dataclass(frozen=True)
class Ask:
    """One request: content keys of its blocks, and when it comes."""

    at: float
    blocks: Sequence[int]
    tokens: int
    output: int


@dataclass
class Result:
    """What came of a workload. Tokens are of prompts."""

    prompt_tokens: int
    cached_tokens: int
    ttft_s: list[float]
    chosen: Counter[str]

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class Fleet:
    """`replicas` brains in front of the same engines, each taking its turn. They share nothing but what `exchange` does
    after every decision of one of them.
    """

    def __init__(
        self,
        profile: Profile,
        engines: int,
        *,
        policy: str = "balanced",
        replicas: int = 1,
        seed: int = 1,
        exchange: Callable[[Sequence[Datastore], int, str, PromptKeys, float], None] | None = None,
    ) -> None:
        self.profile = profile
        self.engines = {f"pod-{number}": Engine(profile, noise_seed=number) for number in range(engines)}
        self.stores = [datastore(*(pod(name, address=f"{name}:80") for name in self.engines)) for _ in range(replicas)]
        self._schedulers: list[Scheduler] = [scheduler(policy) for _ in range(replicas)]
        self._rng = random.Random(seed)
        self._exchange = exchange
        self._owner: dict[str, int] = {}
        self._keys: dict[str, PromptKeys] = {}
        self._first: set[str] = set()
        self.result = Result(0, 0, [], Counter())

    def run(self, asks: Sequence[Ask]) -> Result:
        """Serves them all."""
        asks = sorted(asks, key=lambda ask: ask.at)
        events: list[tuple[float, int, str]] = [(0.0, 0, "scrape"), (0.0, 1, "tick")]
        taken, live = 0, 0
        while taken < len(asks) or live:
            due = [(at, name) for name, engine in self.engines.items() if (at := engine.next_step_at()) is not None]
            arrival = asks[taken].at if taken < len(asks) else float("inf")
            now = min(arrival, events[0][0], min(due)[0] if due else float("inf"))
            if events[0][0] == now:
                _, _, what = heapq.heappop(events)
                heapq.heappush(events, (now + (SCRAPE_S if what == "scrape" else TICK_S), len(events), what))
                self._scrape(now) if what == "scrape" else self._tick(now)
            elif arrival == now:
                self._send(taken, asks[taken], now)
                taken, live = taken + 1, live + 1
            else:
                name = min(due)[1]
                live -= sum(self._emitted(each, now) for each in self.engines[name].step(now))
        return self.result

    def _send(self, number: int, ask: Ask, now: float) -> None:
        replica = number % len(self.stores)
        keys = PromptKeys(learned=ask.blocks, tokens=ask.tokens, chunk_tokens=self.profile.block_size)
        store, ident = self.stores[replica], str(number)
        asked = request(number, received_at=now, prompt_tokens=ask.tokens, max_output_tokens=ask.output, keys=keys)
        asked = msgspec.structs.replace(asked, matches=store.prefixes.lookup(keys))
        verdict = self._schedulers[replica].schedule(asked, store.snapshot(now), now, self._rng)
        assert isinstance(verdict, Decision)
        name = verdict.endpoint.id
        store.reserve(asked, name, now)
        store.prefixes.routed(name, keys, now)
        self._owner[ident], self._keys[ident] = replica, keys
        self.result.chosen[name] += 1
        if self._exchange is not None:
            self._exchange(self.stores, replica, name, keys, now)
        refused = self.engines[name].submit(
            Request(
                id=ident,
                arrived_at_s=now,
                max_tokens=ask.output,
                block_hashes=ask.blocks,
                prompt_tokens=ask.tokens,
                ignore_eos=True,
            ),
            now,
        )
        assert refused is None, refused

    def _emitted(self, emission: Emission, now: float) -> bool:
        """Tells the brain. Returns whether the request ended."""
        ident = emission.request_id
        store, key = self.stores[self._owner[ident]], int(ident)
        if emission.first:
            self.result.ttft_s.append(emission.since_last_s)
        store.progressed(key, now)
        summary = emission.summary
        if summary is None:
            return False
        flight = store.ended(key, now, worked=True)
        assert flight is not None
        keys = self._keys.pop(ident)
        store.prefixes.observed(flight.endpoint_id, keys, summary.prompt_tokens, summary.cached_tokens, now)
        self.result.prompt_tokens += summary.prompt_tokens
        self.result.cached_tokens += summary.cached_tokens
        return True

    def _scrape(self, now: float) -> None:
        for name, engine in self.engines.items():
            signals = Signals(
                at=now,
                waiting=float(engine.waiting),
                running=float(engine.running),
                kv_usage=engine.kv_usage,
                block_tokens=self.profile.block_size,
                blocks=self.profile.kv_blocks,
                progress_tokens=float(engine.prompt_tokens_total + engine.generation_tokens_total),
            )
            for store in self.stores:
                store.apply(Scraped(name, signals))

    def _tick(self, now: float) -> None:
        for store in self.stores:
            store.prefixes.tick(now)
            store.tick(now)


def best_hit_rate(profile: Profile, engines: int, asks: Sequence[Ask]) -> float:
    """One engine with the cache of all of them that sees every request in arrival order, each done before the next."""
    one = Engine(msgspec.structs.replace(profile, kv_blocks=profile.kv_blocks * engines))
    cached = total = 0
    for number, ask in enumerate(sorted(asks, key=lambda each: each.at)):
        now = float(number) * 1000
        one.submit(
            Request(
                id=str(number),
                arrived_at_s=now,
                max_tokens=ask.output,
                block_hashes=ask.blocks,
                prompt_tokens=ask.tokens,
                ignore_eos=True,
            ),
            now,
        )
        while (at := one.next_step_at()) is not None:
            for emission in one.step(at):
                if emission.summary is not None:
                    cached += emission.summary.cached_tokens
                    total += emission.summary.prompt_tokens
    return cached / total
