"""A cluster as a source: the reflectors of all pools, pods, nodes and rules, and the views they feed.

Owns the tasks and the order of things: first the whole picture, then every change. What a pod means is the view's
business, what the API server says the reflector's. While the API server is away, what was last known stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from picker.config import KubernetesSection, PoolEntry
from picker.core.updates import EndpointUpdate, Replace, RulesChanged, SourceUpdate
from picker.sources.kubernetes.merged import Merged
from picker.sources.kubernetes.objects import (
    Changed,
    Gone,
    Listed,
    Node,
    Pod,
    PoolV1,
    PoolV1Alpha2,
)
from picker.sources.kubernetes.pools import read_pool, spec_of
from picker.sources.kubernetes.reflector import Api, Reflector, ReflectorSettings
from picker.sources.kubernetes.rules import RULE_KINDS, RuleObjects
from picker.sources.kubernetes.view import PoolView
from picker.sources.source import SourceStatus

NAME = "kubernetes"
# Events read ahead of the datastore. Reflectors wait when it is full, and the API server with them.
INBOX_MAX = 1024
# Once one pool can be used, the first picture waits no longer than this for the others and for the labels of nodes:
# what cannot be read (no rights, no CRD) must not keep everything else away. What is late comes as changes.
GRACE_S = 5.0

V1 = "inference.networking.k8s.io"

OnTrouble = Callable[[str, str], None]
"""What it is about (a pool, a kind of object) and what is wrong."""

Event = Listed[Any] | Changed[Any] | Gone[Any]
Take = Callable[[Event], list[SourceUpdate]]


class _Pool:
    """One pool that is followed."""

    def __init__(self, pool_id: str, entry: PoolEntry, section: KubernetesSection) -> None:
        self.id = pool_id
        self.namespace, _, self.name = pool_id.partition("/")
        self.entry = entry
        self.view = PoolView(pool_id, entry, section)
        self.problem = ""


class KubernetesSource:
    """The pods of the configured pools.

    `namespace` is where pools named without one are. `h2c` says whether pools whose pods speak HTTP/2 without TLS can
    be used. Iterate `updates` once.
    """

    name = NAME

    def __init__(
        self,
        section: KubernetesSection,
        api: Api,
        *,
        namespace: str,
        h2c: bool,
        clock: Callable[[], float],
        on_trouble: OnTrouble,
        settings: ReflectorSettings | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._api = api
        self._grace_s = grace_s
        self._settings = settings
        self._h2c = h2c
        self._clock = clock
        self._on_trouble = on_trouble
        self._pools = [
            _Pool(entry.name if "/" in entry.name else f"{namespace}/{entry.name}", entry, section)
            for entry in section.pools
        ]
        self._reads_nodes = section.nodes
        self._rules = RuleObjects()
        self._merged = Merged(NAME)
        self._told: dict[str, str] = {}
        self._inbox: asyncio.Queue[tuple[Take, Event]] = asyncio.Queue(maxsize=INBOX_MAX)
        self._reflectors: list[Reflector[Any]] = []
        self._awaited: set[str] = set()

    def __repr__(self) -> str:
        return f"<KubernetesSource {', '.join(pool.id for pool in self._pools)}>"

    @property
    def pool_ids(self) -> tuple[str, ...]:
        """The pools, `namespace/name`, in the order of the configuration."""
        return tuple(pool.id for pool in self._pools)

    def status(self) -> SourceStatus:
        """A problem when no pool can be used; heard of when the quietest reflector was."""
        problems = [problem for problem in map(self._problem, self._pools) if problem]
        heard = [reflector.heard_at for reflector in self._reflectors if reflector.heard_at is not None]
        return SourceStatus(
            problem="; ".join(problems) if len(problems) == len(self._pools) else "",
            heard_at=min(heard) if heard else None,
        )

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """A `Replace` when every pool and its pods have been listed, then every change."""
        tasks = self._start()
        try:
            async for update in self._first_picture():
                yield update
            while True:
                take, event = await self._inbox.get()
                for update in take(event):
                    yield update
                self._report()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first_picture(self) -> AsyncGenerator[SourceUpdate, None]:
        """Takes events in silence until everything was listed once, or one pool was and the rest had its time."""
        deadline: float | None = None
        while self._awaited:
            timeout_s = None if deadline is None else max(0.0, deadline - self._clock())
            try:
                async with asyncio.timeout(timeout_s):
                    take, event = await self._inbox.get()
            except TimeoutError:
                break
            for update in take(event):
                if isinstance(update, RulesChanged):
                    yield update
            if deadline is None and not all(map(self._problem, self._pools)):
                deadline = self._clock() + self._grace_s
        yield Replace(NAME, self._merged.endpoints())
        self._report()

    def _problem(self, pool: _Pool) -> str:
        unread = _pods_name(pool.namespace)
        return pool.problem or (f"{unread} were not read yet" if unread in self._awaited else "")

    # -- reflectors ----------------------------------------------------------------------------------------------------

    def _start(self) -> list[asyncio.Task[None]]:
        """One reflector per namespace's pods, per pool, per kind of rule, and one for nodes."""
        tasks: list[asyncio.Task[None]] = []
        for rank, pool in enumerate(self._pools):
            if pool.entry.selector is not None:
                self._take_all(rank, pool.view.set_spec(spec_of(pool.entry)))
            else:
                tasks.append(self._follow_pool(rank, pool))
        for namespace in dict.fromkeys(pool.namespace for pool in self._pools):
            tasks.append(
                self._reflect(_pods_name(namespace), f"/api/v1/namespaces/{namespace}/pods", Pod, self._pods(namespace))
            )
        if self._reads_nodes:
            tasks.append(self._reflect("nodes", "/api/v1/nodes", Node, self._nodes, vital=False))
        for namespace in dict.fromkeys(pool.namespace for pool in self._pools if pool.entry.selector is None):
            tasks += [self._follow_rules(namespace, *kind) for kind in RULE_KINDS]
        return tasks

    def _follow_pool(self, rank: int, pool: _Pool) -> asyncio.Task[None]:
        group = pool.entry.group
        version, kind = ("v1", PoolV1) if group == V1 else ("v1alpha2", PoolV1Alpha2)
        pool.problem = f"InferencePool {pool.id} was not read yet"
        return self._reflect(
            f"pool {pool.id}",
            f"/apis/{group}/{version}/namespaces/{pool.namespace}/inferencepools",
            kind,
            lambda event: self._pool(rank, event),
            field_selector=f"metadata.name={pool.name}",
        )

    def _follow_rules(
        self, namespace: str, group: str, version: str, plural: str, kind: type[Any]
    ) -> asyncio.Task[None]:
        key = (namespace, group, plural)
        path = f"/apis/{group}/{version}/namespaces/{namespace}/{plural}"
        reflector = self._reflector(f"{plural} of {namespace}", path, kind, optional=True)

        def take(event: Event) -> list[SourceUpdate]:
            self._rules.apply(key, event, installed=reflector.present is True)
            return [self._rules.changed(NAME, frozenset(self.pool_ids))]

        return asyncio.create_task(self._pump(reflector, take, ""), name=f"{plural}.{group} of {namespace}")

    def _reflect(
        self,
        what: str,
        path: str,
        kind: type[Any],
        take: Take,
        *,
        field_selector: str = "",
        vital: bool = True,
    ) -> asyncio.Task[None]:
        reflector = self._reflector(what, path, kind, field_selector=field_selector, optional=not vital)
        self._awaited.add(what)
        if vital:
            self._reflectors.append(reflector)
        return asyncio.create_task(self._pump(reflector, take, what), name=what)

    def _reflector(
        self, what: str, path: str, kind: type[Any], *, field_selector: str = "", optional: bool = False
    ) -> Reflector[Any]:
        return Reflector(
            self._api,
            path,
            kind,
            clock=self._clock,
            field_selector=field_selector,
            optional=optional,
            settings=self._settings,
            on_trouble=lambda text: self._on_trouble(what, text),
        )

    async def _pump(self, reflector: Reflector[Any], take: Take, what: str) -> None:
        def taken(event: Event) -> list[SourceUpdate]:
            self._awaited.discard(what)
            return take(event)

        async with aclosing(reflector.events()) as events:
            async for event in events:
                await self._inbox.put((taken, event))

    # -- events --------------------------------------------------------------------------------------------------------

    def _pool(self, rank: int, event: Event) -> list[SourceUpdate]:
        pool = self._pools[rank]
        match event:
            case Changed(found) | Listed((found,)):
                spec = read_pool(found)
            case _:
                spec = "does not exist"
        if not isinstance(spec, str) and spec.h2c and not self._h2c:
            spec = "has appProtocol kubernetes.io/h2c, which only the picker supports"
        pool.problem = f"InferencePool {pool.id} {spec}" if isinstance(spec, str) else ""
        return self._take_all(rank, pool.view.set_spec(None if isinstance(spec, str) else spec))

    def _pods(self, namespace: str) -> Take:
        ranked = [(rank, pool) for rank, pool in enumerate(self._pools) if pool.namespace == namespace]

        def take(event: Event) -> list[SourceUpdate]:
            return [update for rank, pool in ranked for update in self._take_all(rank, pool.view.pods(event))]

        return take

    def _nodes(self, event: Event) -> list[SourceUpdate]:
        return [
            update for rank, pool in enumerate(self._pools) for update in self._take_all(rank, pool.view.nodes(event))
        ]

    def _take_all(self, rank: int, updates: Sequence[EndpointUpdate]) -> list[SourceUpdate]:
        merged = (self._merged.apply(rank, update) for update in updates)
        return [update for update in merged if update is not None]

    def _report(self) -> None:
        """Tells what is wrong with pools, once per change."""
        for pool in self._pools:
            self._say(pool.id, self._problem(pool) or pool.view.problem)
        self._say("pools", "two pools select the same pods; the first one keeps them" if self._merged.shared else "")

    def _say(self, what: str, problem: str) -> None:
        if self._told.get(what, "") != problem:
            self._told[what] = problem
            self._on_trouble(what, problem or "is usable again")


def _pods_name(namespace: str) -> str:
    return f"pods of {namespace}"
