"""All endpoints, watched: one watch per endpoint of the datastore, started when it appears and ended when it goes.

Owns every task it starts and ends them on `close`. What a watch does is in `watch.py`; what the figures mean, in
`engine.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from random import Random

from picker.core.values import Endpoint
from picker.signals.getter import Getter
from picker.signals.settings import ScrapeHooks, ScrapeSettings
from picker.signals.watch import SignalStore, Surroundings, Watch


class Scraper:
    """Keeps the datastore's signals fresh.

    `clock` must be the clock of the datastore's times. `start` needs a running loop; `close` may be called twice. As
    a context manager it does both.
    """

    def __init__(
        self,
        *,
        getter: Getter,
        store: SignalStore,
        clock: Callable[[], float],
        settings: ScrapeSettings | None = None,
        hooks: ScrapeHooks | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: Random | None = None,
    ) -> None:
        settings = settings or ScrapeSettings()
        self._around = Surroundings(
            getter=getter,
            store=store,
            settings=settings,
            hooks=hooks or ScrapeHooks(),
            clock=clock,
            sleep=sleep,
            rng=rng or Random(),
            places=asyncio.Semaphore(settings.concurrency),
        )
        self._watches: dict[str, tuple[Watch, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Scraper [{len(self._watches)} watched, {len(self._ending)} ending]>"

    async def __aenter__(self) -> Scraper:
        self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begins to follow the datastore."""
        if self._follower is None:
            self._follower = asyncio.create_task(self._follow(), name="scraper")

    async def close(self) -> None:
        """Cancels every watch and waits for its end."""
        tasks = [task for _, task in self._watches.values()] + list(self._ending)
        if self._follower is not None:
            tasks.append(self._follower)
        self._follower = None
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def engines(self) -> Mapping[str, str]:
        """The engine of every endpoint that was recognised, by endpoint id; for people who debug."""
        return {name: watch.detected.engine for name, (watch, _) in self._watches.items() if watch.detected is not None}

    async def _follow(self) -> None:
        seen: int | None = None
        while True:
            try:
                if self._around.store.version != seen:
                    seen = self._around.store.version
                    self._reconcile(self._around.store.endpoints())
            except Exception as error:
                # A bug here must not leave the whole fleet unwatched without a word.
                self._around.hooks.on_trouble("", type(error).__name__, str(error))
            await self._around.sleep(self._around.settings.follow_s)

    def _reconcile(self, endpoints: tuple[Endpoint, ...]) -> None:
        wanted = {endpoint.id: endpoint for endpoint in endpoints}
        for name, (watch, _) in list(self._watches.items()):
            now = wanted.get(name)
            # Most are the very same object as last time; fields are compared only where they are not.
            if now is None or (now is not watch.endpoint and _another_process(watch.endpoint, now)):
                self._end(name)
        new = [endpoint for endpoint in endpoints if endpoint.id not in self._watches]
        # A few start at once; many are spread out, and their intervals keep them apart from then on.
        spread_s = min(self._around.settings.busy_s, len(new) * 0.002)
        for endpoint in new:
            watch = Watch(endpoint, self._around)
            task = asyncio.create_task(watch.run(self._around.rng.uniform(0, spread_s)), name=f"watch {endpoint.id}")
            self._watches[endpoint.id] = (watch, task)
        for name, endpoint in wanted.items():
            self._watches[name][0].endpoint = endpoint

    def _end(self, name: str) -> None:
        _, task = self._watches.pop(name)
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _another_process(before: Endpoint, after: Endpoint) -> bool:
    """Whether what was learnt about `before` may not hold for `after`. Labels, role and models may change on a
    running engine.
    """
    parts = ("url", "address", "instance", "engine", "metrics_url", "credentials")
    return any(getattr(before, part) != getattr(after, part) for part in parts)
