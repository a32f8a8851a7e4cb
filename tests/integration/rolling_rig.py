"""A Deployment on loopback: pods are simulated engines in processes of their own, each on an address of its own.

A fake API server is told about them as a kubelet and a controller would.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.fakes.kube_api import FakeKube
from tests.integration.cluster_rig import pod_object
from tests.integration.fault_rig import WAYPOST
from tests.integration.test_faults_client import MODEL, PATIENCE_S

NAMESPACE = "default"


def free_port_on(addresses: Sequence[str]) -> int:
    """A port nobody uses on any of these addresses."""
    for _ in range(50):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind((addresses[0], 0))
            port = int(first.getsockname()[1])
            try:
                for address in addresses[1:]:
                    stack.enter_context(socket.socket()).bind((address, port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free on all addresses")


class LoopbackPod:
    """One pod. `pre_stop_s` is the sleep that deployments put before SIGTERM; the engine drains after it."""

    def __init__(self, kube: FakeKube, name: str, ip: str, port: int, *, drain_s: float = 10.0) -> None:
        self.name, self.ip, self.port = name, ip, port
        self.id = f"{NAMESPACE}/{name}:{port}"
        self._kube = kube
        self._drain_s = drain_s
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Scheduled, started, then ready."""
        self._tell(ready=False)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sim", "--host", self.ip, "--port", str(self.port), "--model", MODEL),
            *("--speed", "4", "--drain", str(self._drain_s)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE_S)
        assert line.startswith(b"ready "), line
        self._tell(ready=True)

    async def retire(self, pre_stop_s: float) -> None:
        """Deleted: marked first, then stopped, then gone."""
        self._tell(ready=True, deleted=True)
        await asyncio.sleep(pre_stop_s)
        await self.stop(signal.SIGTERM)
        self._tell(ready=False, deleted=True)
        self._kube.delete("pods", NAMESPACE, self.name)

    async def stop(self, how: signal.Signals) -> None:
        """Ends the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(how)
            await asyncio.wait_for(self._process.wait(), 2 * PATIENCE_S)

    def _tell(self, *, ready: bool, deleted: bool = False) -> None:
        self._kube.put("pods", NAMESPACE, pod_object(self.name, self.ip, ready=ready, deleted=deleted))


class Deployment:
    """Some pods, and the addresses there are for them: fewer than pods over time, so that addresses come again."""

    def __init__(self, kube: FakeKube, addresses: Sequence[str]) -> None:
        self.port = free_port_on(addresses)
        self.pods: list[LoopbackPod] = []
        self.past: list[LoopbackPod] = []
        self._kube = kube
        self._free = deque(addresses)
        self._count = 0

    @property
    def ids(self) -> set[str]:
        """Ids of the endpoints there should be."""
        return {pod.id for pod in self.pods}

    async def add(self) -> LoopbackPod:
        """One more pod, ready."""
        self._count += 1
        pod = LoopbackPod(self._kube, f"llama-{self._count}", self._free.popleft(), self.port)
        self.pods.append(pod)
        await pod.start()
        return pod

    async def roll(self, pre_stop_s: float) -> None:
        """Replaces every pod: a new one comes up, then an old one goes, and its address is the next to be used."""
        for old in list(self.pods):
            await self.add()
            self.pods.remove(old)
            self.past.append(old)
            await old.retire(pre_stop_s)
            self._free.appendleft(old.ip)

    async def close(self) -> None:
        """Ends every process."""
        for pod in [*self.pods, *self.past]:
            await pod.stop(signal.SIGKILL)


class Door:
    """A `waypost` in a process of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._arguments = arguments
        self.log = directory / "door.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it and waits until it listens."""
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(str(WAYPOST), *self._arguments, stderr=log)
        deadline = time.monotonic() + 2 * PATIENCE_S
        while b'"listening"' not in self.log.read_bytes():
            assert self._process.returncode is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            await asyncio.sleep(0.02)

    async def close(self) -> int:
        """SIGTERM and wait. Returns the exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        return await asyncio.wait_for(self._process.wait(), 2 * PATIENCE_S)


@contextlib.asynccontextmanager
async def deployed(kube: FakeKube, pods: int, addresses: int) -> AsyncIterator[Deployment]:
    """A Deployment of `pods` pods with `addresses` addresses to choose from."""
    deployment = Deployment(kube, [f"127.0.7.{number}" for number in range(1, addresses + 1)])
    try:
        await asyncio.gather(*(deployment.add() for _ in range(pods)))
        yield deployment
    finally:
        await deployment.close()
