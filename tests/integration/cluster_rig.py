"""A fake API server, the real source on the real client, and a datastore behind it: what cluster tests share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picker.config import KubernetesSection
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.rules import Rulebook
from picker.sources.follow import follow
from picker.sources.kubernetes.api import ClusterApi
from picker.sources.kubernetes.reflector import ReflectorSettings
from picker.sources.kubernetes.source import KubernetesSource
from tests.fakes.kube_api import FakeKube

PATIENCE_S = 15.0
# Pauses of a hundredth of the real ones, so that a test sees many troubles.
HASTY = ReflectorSettings(backoff_least_s=0.005, backoff_most_s=0.05, watch_apart_s=0.01, absent_s=0.1)
LABELS = {"app": "vllm"}


@dataclass
class Cluster:
    """Everything up. `troubles` is what the log was told."""

    kube: FakeKube
    source: KubernetesSource
    store: Datastore
    rules: Rulebook
    troubles: list[tuple[str, str]] = field(default_factory=list)

    @property
    def addresses(self) -> dict[str, str]:
        """Address of each endpoint by its id."""
        return {endpoint.id: endpoint.address for endpoint in self.store.endpoints()}

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for a condition; fails with what is known when it does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, (self.addresses, self.source.status(), self.troubles[-5:])
            await asyncio.sleep(0.005)


def pool_object(name: str = "llama", *, ports: Sequence[int] = (8000,), **spec: Any) -> dict[str, Any]:
    """An InferencePool v1 as the API server gives it."""
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": dict(LABELS)},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": "epp", "port": {"number": 9002}},
            **spec,
        },
    }


def pod_object(
    name: str,
    ip: str,
    *,
    labels: Mapping[str, str] = LABELS,
    ready: bool = True,
    deleted: bool = False,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A small pod."""
    meta: dict[str, Any] = {"name": name, "labels": dict(labels), "annotations": dict(annotations or {})}
    if deleted:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta,
        "spec": {"nodeName": "node-1", "containers": [{"name": "vllm", "ports": [{"containerPort": 8000}]}]},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


@contextlib.asynccontextmanager
async def followed(
    directory: Path,
    kube: FakeKube,
    pools: Sequence[Any] = ("default/llama",),
    *,
    settings: ReflectorSettings | None = HASTY,
    h2c: bool = True,
    grace_s: float = PATIENCE_S,
    **section: Any,
) -> AsyncIterator[Cluster]:
    """The pools of `kube`, followed."""
    config = KubernetesSection.model_validate({"pools": list(pools), **section})
    api = ClusterApi(kubeconfig=kube.kubeconfig(directory))
    await api.start()
    troubles: list[tuple[str, str]] = []
    source = KubernetesSource(
        config,
        api,
        namespace="default",
        h2c=h2c,
        clock=time.monotonic,
        on_trouble=lambda what, text: troubles.append((what, text)),
        settings=settings,
        grace_s=grace_s,
    )
    store = Datastore(health=HealthLimits(), freshness=Freshness(), deadlines=Deadlines())
    rules = Rulebook()
    task = asyncio.create_task(follow(source, store, rules))
    try:
        yield Cluster(kube, source, store, rules, troubles)
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await api.close()
