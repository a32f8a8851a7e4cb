"""What a reader of a reflector ends up with: the objects as its events tell them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from picker.sources.kubernetes.api import ClusterApi
from picker.sources.kubernetes.objects import Changed, Gone, Listed, Pod
from picker.sources.kubernetes.reflector import Reflector, ReflectorSettings
from tests.fakes.kube_api import FakeKube
from tests.fakes.kube_state import Key

PODS = "/api/v1/namespaces/default/pods"
FAST = ReflectorSettings(
    list_timeout_s=5.0,
    lasted_s=0.05,
    watch_apart_s=0.02,
    absent_s=0.05,
    backoff_least_s=0.005,
    backoff_most_s=0.05,
)
"""The same machine with shorter pauses."""


class Mirror:
    """Versions of objects by key, built from nothing but events."""

    def __init__(self) -> None:
        self.versions: dict[Key, str] = {}
        self.lists = 0
        self.changes = 0
        self.troubles: list[str] = []

    def take(self, event: Listed[Any] | Changed[Any] | Gone[Any]) -> None:
        if isinstance(event, Listed):
            self.lists += 1
            self.versions = {_key(found): found.metadata.resource_version for found in event.objects}
            assert len(self.versions) == len(event.objects), "the same object twice in one list"
            return
        self.changes += 1
        if isinstance(event, Changed):
            self.versions[_key(event.object)] = event.object.metadata.resource_version
        else:
            self.versions.pop(_key(event.object), None)

    def shows(self, kube: FakeKube, kind: str = "pods") -> bool:
        """Whether it is exactly the truth."""
        truth = {key: found["metadata"]["resourceVersion"] for key, found in kube.objects(kind).items()}
        return self.versions == truth


def _key(found: Any) -> Key:
    return found.metadata.namespace, found.metadata.name


@asynccontextmanager
async def started(api: ClusterApi) -> AsyncIterator[ClusterApi]:
    """A client from its start to its end."""
    await api.start()
    try:
        yield api
    finally:
        await api.close()


def connected(config: Path, **options: Any) -> AbstractAsyncContextManager[ClusterApi]:
    """A started client for a kubeconfig."""
    return started(ClusterApi(kubeconfig=config, **options))


@asynccontextmanager
async def mirrored(
    api: ClusterApi, path: str = PODS, kind: type[Any] = Pod, **options: Any
) -> AsyncIterator[tuple[Mirror, Reflector[Any]]]:
    """A reflector that runs, and what its reader has. An exception in it fails the test."""
    mirror = Mirror()
    options.setdefault("settings", FAST)
    reflector: Reflector[Any] = Reflector(
        api, path, kind, clock=time.monotonic, on_trouble=mirror.troubles.append, **options
    )

    async def follow() -> None:
        async with aclosing(reflector.events()) as events:
            async for event in events:
                mirror.take(event)

    task = asyncio.create_task(follow())
    try:
        yield mirror, reflector
    finally:
        failed = task.done()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert not failed, "events() ended by itself"


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Waits for something to become true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
