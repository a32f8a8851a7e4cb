"""A rolling update under load: pods are added, drained and deleted, addresses are used again, and no request is lost.

Behind a real Envoy (override_host, fallbacks, its own retries) and through the gateway. The engines are simulated ones
in processes of their own; the API server is a fake one that speaks real HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.kube_api import FakeKube
from tests.integration.cluster_rig import pool_object
from tests.integration.envoy import RealEnvoy
from tests.integration.envoy_config import EnvoyListener, Retries
from tests.integration.fault_rig import fetch
from tests.integration.rolling_rig import Deployment, Door, deployed, free_port_on
from tests.integration.test_faults_client import PATIENCE_S, Call, Load

PODS = 3
# One address more than pods at once: each address serves several pods in turn.
ADDRESSES = PODS + 1
CLIENTS = 16
CONFIG: dict[str, Any] = {
    "picker": {"fallbacks": 2, "secure_serving": False},
    "scrape": {"busy_interval": "200ms", "idle_interval": "400ms"},
    "log": {"format": "json"},
}


@contextlib.asynccontextmanager
async def envoy_door(directory: Path, kube: FakeKube, deployment: Deployment) -> AsyncIterator[tuple[str, str]]:
    """URL of an Envoy with a picker behind it, and the picker's admin URL."""
    grpc, health, admin = (free_port_on(["127.0.0.1"]) for _ in range(3))
    ports = ("--grpc-port", grpc, "--grpc-health-port", health, "--metrics-port", admin)
    door = Door(directory, "picker", "--bind", "127.0.0.1", *configured(directory, kube), *map(str, ports))
    listener = EnvoyListener(
        name="pool",
        cluster="override_host",
        endpoints=tuple(f"127.0.7.{number}:{deployment.port}" for number in range(1, ADDRESSES + 1)),
        retries=Retries(attempts=3),
    )
    await door.start()
    try:
        async with RealEnvoy(directory, [listener], picker_address=f"127.0.0.1:{grpc}") as envoy:
            yield envoy.url("pool"), f"http://127.0.0.1:{admin}"
    finally:
        assert await door.close() == 0, door.log.read_text()


@contextlib.asynccontextmanager
async def gateway_door(directory: Path, kube: FakeKube, deployment: Deployment) -> AsyncIterator[tuple[str, str]]:
    """URL of a gateway and its admin URL."""
    listen, admin = (f"127.0.0.1:{free_port_on(['127.0.0.1'])}" for _ in range(2))
    door = Door(directory, "run", *configured(directory, kube), "--listen", listen, "--admin", admin)
    await door.start()
    try:
        yield f"http://{listen}", f"http://{admin}"
    finally:
        assert await door.close() == 0, door.log.read_text()


def configured(directory: Path, kube: FakeKube) -> tuple[str, ...]:
    """The arguments for a configuration that follows the fake cluster."""
    file = directory / "waypost.yaml"
    section = {"pools": ["default/llama"], "kubeconfig": str(kube.kubeconfig(directory))}
    # JSON is YAML.
    file.write_text(json.dumps({**CONFIG, "kubernetes": section}))
    return ("--config", str(file))


async def known(admin: str) -> set[str]:
    """Ids of the endpoints the door knows."""
    return {row["id"] for row in json.loads(await fetch(admin, "/debug/endpoints"))}


DOORS = {"envoy": envoy_door, "gateway": gateway_door}


# Both what good deployments do (the engine keeps serving for a moment after the pod is marked), and what happens
# without it: the engine stops listening in the instant in which the cluster is told.
@pytest.mark.parametrize("pre_stop_s", [1.0, 0.0], ids=["pre-stop", "abrupt"])
@pytest.mark.parametrize("kind", DOORS)
async def test_no_request_is_lost(kind: str, pre_stop_s: float, tmp_path: Path) -> None:
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object())
        async with deployed(kube, PODS, ADDRESSES) as deployment:
            kube.put("inferencepools", "default", pool_object(ports=(deployment.port,)))
            first = deployment.ids
            async with DOORS[kind](tmp_path, kube, deployment) as (url, admin):
                calls: list[Call] = []
                async with Load(url, calls, concurrency=CLIENTS, tokens=(4, 60)) as load:
                    await until_served(load, 100)
                    await deployment.roll(pre_stop_s)
                    await deployment.roll(pre_stop_s)
                    await until_served(load, 100)
                assert await known(admin) == deployment.ids
                assert not deployment.ids & first
                assert load.fates().keys() == {"ok"}, (load.fates(), load.early_failures()[:5])
                await books_empty(admin)


async def books_empty(admin: str) -> None:
    """Waits until nothing is in flight: Envoy tells ends a moment after the clients have them."""
    async with asyncio.timeout(5.0):
        while any(row["in_flight"] for row in json.loads(await fetch(admin, "/debug/endpoints"))):
            await asyncio.sleep(0.05)


async def until_served(load: Load, more: int) -> None:
    """Waits until so many more calls were answered."""
    wanted = len(load.calls) + more
    async with asyncio.timeout(PATIENCE_S):
        while len(load.calls) < wanted:
            await asyncio.sleep(0.02)
