"""What following a cluster costs: `python -m bench.cluster`.

A fake API server in another process lists pods and changes them at a fixed rate; this process follows it with the real
client, source and datastore, and takes a snapshot after every change, as the next decision would. It measures; it
judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from picker.config import KubernetesSection
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.updates import EndpointUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources.kubernetes.api import ClusterApi
from picker.sources.kubernetes.source import KubernetesSource
from tests.fakes import kube_pods
from tests.fakes.kube_api import FakeKube

# Real pods are about this large, most of it written by controllers for themselves.
POD_BYTES = 8 * 1024
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """CPU is this process's, with the HTTP client and TLS-free sockets; times are of the clock on the wall."""

    pods: int
    listed_cpu_s: float
    changes: int
    seconds: float
    cpu_s: float
    snapshot_us: Sequence[float]

    @property
    def core_share(self) -> float:
        """CPU seconds per second while changes came."""
        return self.cpu_s / self.seconds

    def __str__(self) -> str:
        median, worst = statistics.median(self.snapshot_us), max(self.snapshot_us)
        return (
            f"{self.pods} pods listed in {self.listed_cpu_s * 1000:.0f} ms of CPU; "
            f"{self.changes / self.seconds:.0f} changes a second cost {self.core_share:.1%} of a core "
            f"({self.cpu_s / self.changes * 1e6:.0f} us each); one change to its snapshot: median {median:.0f} us, "
            f"worst {worst:.0f} us"
        )


def _pod(number: int, version: int) -> dict[str, Any]:
    """A pod whose readiness or address differs with every version."""
    ip = f"10.{version % 200}.{number // 250}.{number % 250 + 1}"
    pod = kube_pods.pod(f"llama-{number}", ip=ip, ready=version % 3 != 2, node=f"node-{number // 8}")
    pod["metadata"]["managedFields"] = [{"manager": "kubelet", "fieldsV1": {"f:status": "x" * (POD_BYTES - 2500)}}]
    return pod


def _serve(pipe: Connection, pods: int, rate: float, seconds: float) -> None:
    """The other process: a cluster that waits for a word, changes for a while, and says how often."""

    async def run() -> None:
        async with FakeKube() as kube:
            kube.put("inferencepools", "default", kube_pods.pool_v1("llama"))
            for number in range(pods):
                kube.put("pods", "default", _pod(number, 0))
            with tempfile.TemporaryDirectory() as directory:
                pipe.send(kube.kubeconfig(Path(directory)))
                await asyncio.to_thread(pipe.recv)
                changes = round(rate * seconds)
                began = time.monotonic()
                for change in range(changes):
                    kube.put("pods", "default", _pod(change % pods, change // pods + 1))
                    await asyncio.sleep(max(0.0, began + (change + 1) / rate - time.monotonic()))
                pipe.send(changes)
                await asyncio.to_thread(pipe.recv)

    asyncio.run(run())


async def _follow(pipe: Connection, pods: int) -> Figures:
    api = ClusterApi(kubeconfig=pipe.recv())
    await api.start()
    section = KubernetesSection.model_validate({"pools": ["default/llama"]})
    troubles: list[str] = []
    source = KubernetesSource(
        section,
        api,
        namespace="default",
        h2c=True,
        clock=time.monotonic,
        on_trouble=lambda what, text: troubles.append(f"{what}: {text}"),
    )
    store = Datastore(health=HealthLimits(), freshness=Freshness(), deadlines=Deadlines())
    updates = source.updates()
    samples: list[float] = []

    async def apply_all() -> None:
        async for update in updates:
            if isinstance(update, EndpointUpdate):
                began = time.perf_counter()
                store.apply(update)
                store.snapshot(0.0)
                samples.append((time.perf_counter() - began) * 1e6)

    cpu = time.process_time()
    task = asyncio.create_task(apply_all())
    await _until(lambda: store.synced("kubernetes") and len(store.endpoints()) == pods, troubles)
    listed_cpu_s = time.process_time() - cpu
    samples.clear()
    cpu, began = time.process_time(), time.monotonic()
    pipe.send("go")
    changes: int = await asyncio.to_thread(pipe.recv)
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu
    pipe.send("end")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await updates.aclose()
    await api.close()
    return Figures(
        pods=pods, listed_cpu_s=listed_cpu_s, changes=changes, seconds=seconds, cpu_s=cpu_s, snapshot_us=samples
    )


async def _until(holds: Any, troubles: Sequence[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the cluster was not read in time: {troubles}")
        await asyncio.sleep(0.01)


def publish_us(size: int, *, rounds: int = 300) -> float:
    """Median microseconds from one changed endpoint among `size` to the snapshot that shows it, without any cluster."""
    store = Datastore(health=HealthLimits(), freshness=Freshness(), deadlines=Deadlines())
    for number in range(size):
        store.apply(Upsert("bench", _endpoint(number, 0)))
    store.snapshot(0.0)
    samples: list[float] = []
    for number in range(rounds):
        changed = Upsert("bench", _endpoint(number % size, number + 1))
        began = time.perf_counter()
        store.apply(changed)
        store.snapshot(0.0)
        samples.append((time.perf_counter() - began) * 1e6)
    return statistics.median(samples)


def _endpoint(number: int, version: int) -> Endpoint:
    address = f"10.0.{number // 250}.{number % 250 + 1}:8000"
    return Endpoint(id=f"default/llama-{number}:8000", url=f"http://{address}", address=address, revision=str(version))


def measure(pods: int = 1000, *, rate: float = 100.0, seconds: float = 10.0) -> Figures:
    """Follows a cluster of `pods` pods that changes `rate` times a second for `seconds`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, pods, rate, seconds), daemon=True)
    server.start()
    try:
        return uvloop.run(_follow(ours, pods))
    finally:
        server.terminate()
        server.join()


def main() -> None:
    """Measures with what the command line says and prints a line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster")
    parser.add_argument("--pods", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0, help="changes a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    print(measure(given.pods, rate=given.rate, seconds=given.seconds))


if __name__ == "__main__":
    main()
