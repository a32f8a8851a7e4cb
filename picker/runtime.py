"""The wiring: from a configuration to a running brain. The only module that knows every room.

It starts and stops things in order and owns the background tasks: sources, scraper, tick. The doors are built around
it elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from picker import settings
from picker.config import Config
from picker.core.datastore import Datastore
from picker.core.scheduler import Scheduler
from picker.director import Director
from picker.prefixes import Prefixes
from picker.prompts import Prompts
from picker.replicas import Replicas
from picker.signals.scrape import Scraper
from picker.signals.settings import ScrapeHooks
from picker.sources.dns import DnsSource
from picker.sources.file import FileSource
from picker.sources.follow import follow
from picker.sources.kubernetes.source import KubernetesSource
from picker.sources.registered import RegisteredSource
from picker.sources.resolve import Resolving, look_up
from picker.sources.source import Source
from picker.sources.static import StaticSource
from picker.telemetry.logs import Log
from picker.telemetry.metrics import Metrics
from picker.upstream.client import Upstream

if TYPE_CHECKING:
    from picker.sources.kubernetes.api import ClusterApi

# Hung engines and passed deadlines are found within this time.
TICK_S = 0.1
# A model list is believed for this many of its intervals.
MODELS_BELIEVED_INTERVALS = 4


class Runtime:
    """One brain and everything that feeds it. Build it anywhere, start it on the loop it will live on.

    `h2c` says whether the door can use pods that speak HTTP/2 without TLS.
    """

    def __init__(
        self, config: Config, *, log: Log, version: str, h2c: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self._h2c = h2c
        self.log = log
        self.version = version
        self.metrics = Metrics(version)
        self.prefixes = Prefixes(
            config.index,
            clock=clock,
            on_trouble=lambda what, text: log.warning("prefixes", what=what, message=text),
        )
        self.datastore = Datastore(
            prefixes=self.prefixes.index,
            health=settings.health_limits(config),
            freshness=settings.freshness(config),
            deadlines=settings.deadlines(config),
        )
        self.director = Director(
            self.datastore,
            Scheduler(settings.build_profile(config)),
            clock=clock,
            rng=random.Random(),
            metrics=self.metrics,
            log=log,
            aliases=config.models,
            max_attempts=config.gateway.max_attempts,
        )
        self._replicas: Replicas | None = None
        if config.index.backend == "redis":
            self._replicas = Replicas(
                config.index,
                self.datastore,
                self.prefixes,
                clock=clock,
                on_trouble=lambda text: log.warning("shared_state", message=text),
            )
            self.director.on_routed = self._replicas.routed
        self.upstream = Upstream(settings.credentials(config), connect_timeout_s=config.timeouts.connect)
        self.stopping = False
        self._synced = asyncio.Event()
        self._scraper = Scraper(
            getter=self.upstream,
            store=self.datastore,
            clock=clock,
            settings=settings.scrape_settings(config),
            hooks=ScrapeHooks(on_scrape=self._on_scrape, on_engine=self._on_engine, on_trouble=self._on_trouble),
        )
        self._sources = _sources(config, log, clock)
        self.registered: RegisteredSource | None = None
        if config.endpoints.registration.enabled:
            self.registered = RegisteredSource(
                config.endpoints.registration,
                on_change=lambda name, what: log.info("registration", endpoint=name, what=what),
                clock=clock,
            )
            self._sources.append(Resolving(self.registered))
        self._cluster: ClusterApi | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._export()

    def _export(self) -> None:
        """What is read when somebody asks for the metrics."""
        self.metrics.watch(self.director.snapshot)
        self.metrics.watch_sources(self._source_ages_s)
        self.metrics.watch_prefixes(self.prefixes.figures())
        if self._replicas is not None:
            self.metrics.watch_replicas(self._replicas.figures)
        if self.config.admin.reference_metrics:
            self.metrics.show_reference(
                self.director.snapshot, self.datastore.ledger.flights, lambda: self.director.pools
            )

    def __repr__(self) -> str:
        return f"<Runtime {self.director!r} {self.datastore!r}>"

    async def start(self) -> None:
        """Starts everything. Raises OSError or ssl.SSLError when a credential's files are unusable, and RuntimeError
        when there is no way to talk to the cluster.
        """
        await self.upstream.start()
        if self.config.kubernetes.pools:
            self._sources.append(await self._kubernetes())
        for source in self._sources:
            self._run(follow(source, self.datastore, self.director.rules), name=f"source {source.name}")
        self._scraper.start()
        if self._replicas is not None:
            await self.prefixes.use(self._replicas.secret)
            self._replicas.start()
        await self.prefixes.start(
            self.upstream, self.datastore, recognised=self._scraper.engines, snapshot=self.director.snapshot
        )
        self._run(self._tick(), name="tick")

    async def close(self) -> None:
        """Stops everything; what is in flight upstream is cut."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._replicas is not None:
            await self._replicas.close()
        await self.prefixes.close()
        await self._scraper.close()
        await self.upstream.close()
        if self._cluster is not None:
            await self._cluster.close()

    def checks(self) -> dict[str, str | None]:
        """The conditions of readiness: None where one holds, otherwise why it does not."""
        waiting = [f"{source.name}: not synced yet" for source in self._sources if not self._has_synced(source)]
        unusable = [f"{source.name}: {problem}" for source in self._sources if (problem := source.status().problem)]
        # One source that offers something is enough to be of use.
        nothing = unusable if len(unusable) == len(self._sources) else []
        dead = [task.get_name() for task in self._tasks if task.done()]
        return {
            "draining": "this process is stopping" if self.stopping else None,
            "sources": "; ".join(nothing or waiting) or None,
            "tasks": f"ended: {', '.join(dead)}" if dead else None,
        }

    @property
    def prompts(self) -> Prompts | None:
        """What gives requests the keys of their prompts, once started; None where prefixes do not matter."""
        return self.prefixes.prompts

    def engines(self) -> Mapping[str, str]:
        """The engine of each endpoint that was recognised, by endpoint id."""
        return self._scraper.engines()

    def details(self) -> dict[str, str]:
        """What is worth knowing beside readiness: how sharing with other replicas goes."""
        if self._replicas is None:
            return {}
        status = self._replicas.status()
        return {"shared_state": status.problem or f"{status.replicas} replicas"}

    def ready(self) -> bool:
        """Whether all conditions of readiness hold."""
        return not any(self.checks().values())

    async def synced(self, timeout_s: float) -> None:
        """Waits until every source has said once what exists, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._synced.wait(), timeout_s)

    async def _kubernetes(self) -> Source:
        # Half a second of imports, for those who have a cluster.
        from picker.sources.kubernetes.api import ClusterApi

        section = self.config.kubernetes
        self._cluster = ClusterApi(kubeconfig=section.kubeconfig, context=section.context)
        await self._cluster.start()
        source = KubernetesSource(
            section,
            self._cluster,
            namespace=section.namespace or os.environ.get("NAMESPACE") or self._cluster.namespace or "default",
            h2c=self._h2c,
            clock=self.director.clock,
            on_trouble=lambda what, text: self.log.warning("kubernetes", what=what, message=text),
        )
        self.director.pools = source.pool_ids
        return source

    def _has_synced(self, source: Source) -> bool:
        return self.datastore.synced(source.name)

    def _source_ages_s(self) -> dict[str, float]:
        now = self.director.clock()
        heard = ((source.name, source.status().heard_at) for source in self._sources)
        return {name: max(0.0, now - at) for name, at in heard if at is not None}

    def _run(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.log.error("task_died", task=task.get_name(), error=repr(task.exception()))

    async def _tick(self) -> None:
        known: frozenset[str] = frozenset()
        version = -1
        while True:
            await asyncio.sleep(TICK_S)
            self.director.tick()
            if all(map(self._has_synced, self._sources)):
                self._synced.set()
            if self.datastore.version != version:
                version = self.datastore.version
                present = frozenset(endpoint.id for endpoint in self.datastore.endpoints())
                self.metrics.forget(known - present)
                known = present
                if self._replicas is not None:
                    self._replicas.follow()
                self.log.info("endpoints", count=len(present))

    def _on_scrape(self, endpoint_id: str, seconds: float, ok: bool) -> None:
        if ok:
            self.metrics.scrape_s.observe(seconds)
        else:
            self.metrics.scrape_errors.labels(endpoint_id).inc()

    def _on_engine(self, endpoint_id: str, engine: str) -> None:
        self.log.info("engine", endpoint=endpoint_id, engine=engine)

    def _on_trouble(self, endpoint_id: str, kind: str, message: str) -> None:
        self.log.error("scrape_trouble", endpoint=endpoint_id, kind=kind, error=message)


def _sources(config: Config, log: Log, clock: Callable[[], float]) -> list[Source]:
    sources: list[Source] = []
    if config.endpoints.static:
        sources.append(Resolving(StaticSource(config.endpoints.static)))
    if config.endpoints.file is not None:
        sources.append(
            Resolving(
                FileSource(
                    config.endpoints.file,
                    credentials=frozenset(config.credentials),
                    on_problems=lambda problems: log.error("endpoints_file", problems=[str(each) for each in problems]),
                )
            )
        )
    sources += [
        DnsSource(
            entry,
            lookup=look_up,
            clock=clock,
            sleep=asyncio.sleep,
            rng=random.Random(),
            on_trouble=lambda name, text: log.warning("dns", source=name, message=text),
        )
        for entry in config.endpoints.dns
    ]
    return sources
