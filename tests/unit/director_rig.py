"""A director over a few endpoints, with attempts that end as the test says and a clock that the test turns."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Awaitable, Callable
from typing import Any

from picker.core.events import FailureKind
from picker.core.values import Decision
from picker.director import Director, Failure, Guard
from picker.telemetry.logs import configure
from picker.telemetry.metrics import Metrics
from tests.unit.core.builders import datastore, pod, request, scheduler, scraped

Attempt = Callable[[Decision], Awaitable[str | Failure]]


class Rig:
    """A director over endpoints `a`, `b`, ... with a clock that the test turns."""

    def __init__(self, names: str = "ab", **options: Any) -> None:
        self.now = 100.0
        self.log = io.StringIO()
        self.metrics = Metrics("test")
        self.store = datastore(*(pod(name) for name in names))
        self.director = Director(
            self.store,
            scheduler("round-robin"),
            clock=lambda: self.now,
            rng=random.Random(1),
            metrics=self.metrics,
            log=configure("info", style="json", stream=self.log),
            **options,
        )
        self.seen: list[str] = []

    def attempt(self, *outcomes: str | FailureKind | Failure) -> Attempt:
        """Attempts that end as given, one after the other; the last repeats."""

        async def make(decision: Decision) -> str | Failure:
            self.seen.append(decision.endpoint.id)
            await asyncio.sleep(0)
            outcome = outcomes[min(len(self.seen), len(outcomes)) - 1]
            return Failure(outcome) if isinstance(outcome, FailureKind) else outcome

        return make

    async def dispatch(self, attempt: Attempt, key: int = 1, **fields: Any) -> tuple[Any, Decision | None, int]:
        asked = request(key, received_at=self.now, **fields)
        return await self.director.dispatch(asked, Guard(), attempt)

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def pass_time(self, seconds: float) -> None:
        """Ticks through the time, the engines of all endpoints frozen."""
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            for endpoint in self.store.endpoints():
                self.store.apply(scraped(endpoint.id, self.now, waiting=0.0, running=0.0, progress_tokens=5.0))
            self.director.tick()

    @property
    def empty(self) -> bool:
        """Whether nothing is booked and nobody is watched."""
        return not len(self.store.ledger) and not self.director._watchers and not self.tokens

    @property
    def tokens(self) -> int:
        return sum(each.in_flight_tokens for each in self.store.snapshot(self.now).states)


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until the condition holds."""
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("never came true")
