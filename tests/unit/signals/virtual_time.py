"""Time that moves only when a test says so: a clock and a sleep for code that takes both as arguments."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class VirtualTime:
    """`clock()` and `sleep(s)` agree; `advance(s)` wakes the sleepers in order, each at its own time."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now = start_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Lets `seconds` pass. Everything that becomes due in between runs at its own time."""
        end = self.now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, future = heapq.heappop(self._sleepers)
            self.now = max(self.now, at)
            if not future.done():
                future.set_result(None)
                await self.settle()
        self.now = end

    async def settle(self) -> None:
        """Lets every task run until it waits for time or for the outside."""
        for _ in range(30):
            await asyncio.sleep(0)
