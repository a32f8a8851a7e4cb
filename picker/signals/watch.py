"""One endpoint, watched: recognised, scraped, listed, for as long as it exists.

A watch is a loop of rounds. Each round asks one thing (detection, a scrape or a sign of life) and tells the datastore
what came of it; between rounds it sleeps in short naps, so that new work makes it hurry. Rounds never overlap. It
decides nothing about health.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from picker.core.updates import Alive, ModelsListed, ProbeFailure, Scraped, ScrapeFailed, SignalUpdate
from picker.core.values import Endpoint, Signals
from picker.openai.routes import target_path
from picker.signals.detect import LIVENESS_PATHS, Detected, detect
from picker.signals.engine import NO_METRICS, read
from picker.signals.engines import BUILTIN, identify
from picker.signals.getter import Answer, Getter
from picker.signals.models import read_models
from picker.signals.settings import ScrapeHooks, ScrapeSettings

_NETWORK_FAILURES = (ProbeFailure.REFUSED, ProbeFailure.TIMEOUT)
# Kinds of trouble remembered per endpoint so that each is reported once. Exception types are few.
_MAX_KINDS = 16


class SignalStore(Protocol):
    """The part of the datastore that watches use."""

    @property
    def version(self) -> int: ...

    def apply(self, update: SignalUpdate) -> None: ...

    def endpoints(self) -> tuple[Endpoint, ...]: ...

    def in_flight(self, endpoint_id: str) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all watches of one scraper share. `clock` gives monotonic seconds; `places` bounds the requests under
    way.
    """

    getter: Getter
    store: SignalStore
    settings: ScrapeSettings
    hooks: ScrapeHooks
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    rng: Random
    places: asyncio.Semaphore


@dataclass(slots=True)
class _Pace:
    """When to do the next thing, in seconds of the clock, and how often it went wrong."""

    sent_at: float = 0.0
    failures: int = 0
    network_failures: int = 0
    detect_at: float = math.inf
    detections: int = 0
    models_at: float = 0.0
    models_failures: int = 0


@dataclass(slots=True)
class Watch:
    """The watch of one endpoint. `run` loops until cancelled; `endpoint` may be replaced by one with the same
    address.
    """

    endpoint: Endpoint
    around: Surroundings
    detected: Detected | None = None
    last: Signals | None = None
    _pace: _Pace = field(default_factory=_Pace)
    _liveness_path: str = ""
    _troubles: set[str] = field(default_factory=set)

    async def run(self, first_nap_s: float) -> None:
        """Rounds and naps, beginning after `first_nap_s`. Exceptions are bugs; they are reported and do not end
        the watch.
        """
        listing: asyncio.Task[bool] | None = None
        await self.around.sleep(first_nap_s)
        try:
            while True:
                if not await self._contained(self._round):
                    self._pace.failures += 1
                if self._models_due() and (listing is None or listing.done()):
                    listing = asyncio.create_task(self._contained(self._list_models))
                await self._pause()
        finally:
            if listing is not None:
                listing.cancel()
                await asyncio.gather(listing, return_exceptions=True)

    async def _contained(self, step: Callable[[], Awaitable[None]]) -> bool:
        try:
            await step()
        except Exception as error:
            kind = type(error).__name__
            if kind not in self._troubles and len(self._troubles) < _MAX_KINDS:
                self._troubles.add(kind)
                self.around.hooks.on_trouble(self.endpoint.id, kind, str(error))
            return False
        return True

    # -- rounds ------------------------------------------------------------------------------------------------------

    async def _round(self) -> None:
        now = self.around.clock()
        self._pace.sent_at = now
        if self.detected is None or now >= self._pace.detect_at:
            failure = await self._detect()
            if failure is not None:
                self._failed(failure, now)
                return
        if self.detected is None or self.detected.engine == NO_METRICS:
            await self._see_life()
        else:
            await self._scrape(self.detected)

    async def _detect(self) -> ProbeFailure | None:
        found = await detect(self.endpoint, self._ask)
        if isinstance(found, ProbeFailure):
            return found
        if found != self.detected:
            self.around.hooks.on_engine(self.endpoint.id, found.engine)
        self.detected = found
        self._pace.detect_at = math.inf
        settings = self.around.settings
        if found.engine == NO_METRICS and self.endpoint.engine not in (NO_METRICS, *BUILTIN):
            # Metrics may be switched on later, or the engine was not up yet behind its front end. Ask ever more rarely.
            wait_s = min(settings.detect_max_s, settings.detect_s * 2.0**self._pace.detections)
            self._pace.detect_at = self.around.clock() + wait_s
            self._pace.detections = min(self._pace.detections + 1, 16)
        return None

    async def _scrape(self, detected: Detected) -> None:
        answer, sent_at = await self._timed(detected.metrics_url)
        if isinstance(answer, ProbeFailure):
            self._failed(answer, sent_at)
            return
        if answer.status != 200:
            if answer.status < 500:
                self._detect_again()
            self._failed(ProbeFailure.HTTP, sent_at)
            return
        signals = read(BUILTIN[detected.engine], answer.body, sent_at)
        if isinstance(signals, ProbeFailure):
            self._detect_again()
            self._failed(signals, sent_at)
            return
        if signals == Signals(at=sent_at):
            # Nothing wanted on the page: if it is another engine's now, the table has to change.
            written_by = identify(answer.body)
            if written_by is not None and written_by.name != detected.engine:
                self._detect_again()
        self.last = signals
        self._succeeded(sent_at)
        self.around.store.apply(Scraped(self.endpoint.id, signals))

    async def _see_life(self) -> None:
        paths = (self._liveness_path,) if self._liveness_path else LIVENESS_PATHS
        for path in paths:
            answer, sent_at = await self._timed(self.endpoint.url + target_path(path, self.endpoint.path_prefix))
            if isinstance(answer, ProbeFailure):
                self._failed(answer, sent_at)
                return
            if answer.status < 500 and (answer.status not in (404, 405) or path == LIVENESS_PATHS[-1]):
                self._liveness_path = path
                self.last = None
                self._succeeded(sent_at)
                self.around.store.apply(Alive(self.endpoint.id, sent_at))
                return
            if answer.status >= 500:
                break
        self._liveness_path = ""
        self._failed(ProbeFailure.HTTP, sent_at)

    async def _list_models(self) -> None:
        settings, pace = self.around.settings, self._pace
        pace.models_at = self.around.clock() + settings.models_s
        async with self.around.places:
            sent_at = self.around.clock()
            answer = await self.around.getter.get(
                self.endpoint,
                self.endpoint.url + target_path("/v1/models", self.endpoint.path_prefix),
                timeout_s=settings.models_timeout_s,
                limit_bytes=settings.models_bytes,
            )
        models = None
        if not isinstance(answer, ProbeFailure) and answer.status == 200:
            models = read_models(answer.body)
        if models is None:
            wait_s = min(settings.models_s, settings.models_retry_s * 2.0 ** min(pace.models_failures, 10))
            pace.models_failures += 1
        else:
            wait_s = settings.models_s
            pace.models_failures = 0
            self.around.store.apply(ModelsListed(self.endpoint.id, sent_at, models.models, models.adapters))
        pace.models_at = self.around.clock() + self._jittered(wait_s)

    # -- requests and their outcome ----------------------------------------------------------------------------------

    async def _ask(self, url: str) -> Answer | ProbeFailure:
        settings = self.around.settings
        async with self.around.places:
            return await self.around.getter.get(
                self.endpoint, url, timeout_s=settings.timeout_s, limit_bytes=settings.page_bytes
            )

    async def _timed(self, url: str) -> tuple[Answer | ProbeFailure, float]:
        settings = self.around.settings
        async with self.around.places:
            # Taken here and not before waiting for a place: what was dispatched while we waited is in the engine's
            # figures.
            sent_at = self._pace.sent_at = self.around.clock()
            answer = await self.around.getter.get(
                self.endpoint, url, timeout_s=settings.timeout_s, limit_bytes=settings.page_bytes
            )
        return answer, sent_at

    def _failed(self, kind: ProbeFailure, sent_at: float) -> None:
        now = self.around.clock()
        self._pace.failures += 1
        self._pace.network_failures = self._pace.network_failures + 1 if kind in _NETWORK_FAILURES else 0
        self.around.hooks.on_scrape(self.endpoint.id, now - sent_at, False)
        self.around.store.apply(ScrapeFailed(self.endpoint.id, sent_at, now, kind))

    def _succeeded(self, sent_at: float) -> None:
        pace = self._pace
        now = self.around.clock()
        if pace.failures:
            pace.models_at = min(pace.models_at, now)
            pace.models_failures = 0
        if pace.network_failures:
            # It may be another process, so what it was says little: ask again soon if it told nothing before.
            pace.detections = 0
            if pace.detect_at < math.inf:
                pace.detect_at = now
        pace.failures = pace.network_failures = 0
        self.around.hooks.on_scrape(self.endpoint.id, now - sent_at, True)

    def _detect_again(self) -> None:
        """Plans another detection: at once the first time, then after ever longer waits."""
        pace = self._pace
        if self.endpoint.engine in (NO_METRICS, *BUILTIN) or pace.detect_at < math.inf:
            return
        settings = self.around.settings
        wait_s = min(settings.detect_max_s, settings.detect_s * (2.0**pace.detections - 1))
        pace.detect_at = self.around.clock() + wait_s
        pace.detections = min(pace.detections + 1, 16)

    # -- pace --------------------------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        if self.around.store.in_flight(self.endpoint.id) > 0:
            return True
        return self.last is not None and ((self.last.waiting or 0) > 0 or (self.last.running or 0) > 0)

    def _models_due(self) -> bool:
        return not self._pace.network_failures and self.around.clock() >= self._pace.models_at

    def _jittered(self, seconds: float) -> float:
        jitter = self.around.settings.jitter
        return seconds * self.around.rng.uniform(1 - jitter, 1 + jitter)

    def _interval_s(self) -> float:
        settings, failures = self.around.settings, self._pace.failures
        if not failures:
            return settings.busy_s if self._busy else settings.idle_s
        beyond = max(0, failures - settings.patience)
        return min(settings.trouble_s, settings.busy_s * 2.0 ** min(beyond, 10))

    async def _pause(self) -> None:
        """Sleeps until the next round is due, counted from the last request's start, in naps of at most `busy_s`."""
        settings = self.around.settings
        # An endpoint that answers slower than it is asked still gets a moment between two scrapes.
        earliest = self.around.clock() + settings.busy_s / 4
        due_at = max(earliest, self._pace.sent_at + self._jittered(self._interval_s()))
        hurry_at = max(earliest, self._pace.sent_at + settings.busy_s)
        while (now := self.around.clock()) < due_at:
            if now >= hurry_at and not self._pace.failures and self._busy:
                return
            await self.around.sleep(min(settings.busy_s, due_at - now))
