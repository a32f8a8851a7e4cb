"""Random histories of pods and pools through a troubled API server: the datastore always ends up at the truth."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fakes.kube_api import FakeKube
from tests.integration.cluster_rig import Cluster, followed, pod_object, pool_object

NAMES = ("a", "b", "c", "d", "e")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "")
QUIET_S = 0.03

PUTS = st.tuples(
    st.just("put"),
    st.sampled_from(NAMES),
    st.sampled_from(ADDRESSES),
    st.sampled_from(("vllm", "vllm", "vllm", "web")),
    st.sampled_from((True, True, True, False)),
    st.sampled_from((False, False, False, True)),
)
POOLS = st.tuples(st.just("pool"), st.sets(st.sampled_from((8000, 8001, 8002)), min_size=1))
TROUBLES = st.sampled_from(
    ("compact", "cut", "expire", "close", "drop", "away", "401", "403", "410", "429", "500", "garbage", "rotate")
)
STEPS = st.lists(
    st.one_of(
        PUTS,
        PUTS,
        PUTS,
        POOLS,
        st.tuples(st.just("delete"), st.sampled_from(NAMES)),
        st.tuples(st.just("no pool")),
        st.tuples(TROUBLES),
        st.tuples(st.just("wait"), st.sampled_from((0.0, 0.002, 0.02))),
    ),
    min_size=3,
    max_size=30,
)
Step = tuple[Any, ...]
# Something that can be lost, known before anything happens.
BEGINNING: list[Step] = [
    ("pool", {8000}),
    *(("put", name, ip, "vllm", True, False) for name, ip in zip(NAMES, ADDRESSES[:4], strict=False)),
    ("known",),
]


class History:
    """Makes things happen to an API server."""

    def __init__(self, kube: FakeKube, known: Callable[[], Awaitable[None]]) -> None:
        self._kube = kube
        self._known = known
        self._born = 0

    async def play(self, step: Step) -> None:
        """One step."""
        kube = self._kube
        match step:
            case ("put", name, ip, app, ready, deleted):
                self._born += 1
                pod = pod_object(name, ip, labels={"app": app}, ready=ready, deleted=deleted)
                pod["metadata"]["creationTimestamp"] = f"2026-01-01T00:{self._born // 60:02}:{self._born % 60:02}Z"
                kube.put("pods", "default", pod)
            case ("delete", name):
                if ("default", name) in kube.objects("pods"):
                    kube.delete("pods", "default", name)
            case ("pool", ports):
                kube.put("inferencepools", "default", pool_object(ports=sorted(ports)))
            case ("no pool",):
                if ("default", "llama") in kube.objects("inferencepools"):
                    kube.delete("inferencepools", "default", "llama")
            case ("known",):
                await self._known()
            case ("wait", seconds):
                await asyncio.sleep(seconds)
            case ("away",):
                await kube.down()
                await asyncio.sleep(0.01)
                await kube.up()
            case ("401" | "403" | "410" | "429" | "500" as status,):
                kube.fail(int(status), 2)
                kube.drop()
            case ("garbage",):
                kube.send_raw(b'{"type":"ADDED","object":{"metadata":17}}\n{"ty\n')
            case ("rotate",):
                kube.token = None if kube.token else "another"
                kube.drop()
                await asyncio.sleep(0.01)
                kube.token = None
            case _:
                acts: dict[str, Callable[[], None]] = {
                    "compact": kube.compact,
                    "cut": kube.cut_watches,
                    "expire": kube.expire_watches,
                    "close": kube.close_watches,
                    "drop": kube.drop,
                }
                acts[step[0]]()


def truth(kube: FakeKube) -> dict[str, str]:
    """What must be known in the end, read from what the API server holds. Of two ready pods with one address the
    younger has it.
    """
    pool = kube.objects("inferencepools").get(("default", "llama"))
    if pool is None:
        return {}
    eligible = [
        pod
        for pod in kube.objects("pods").values()
        if pod["metadata"]["labels"]["app"] == "vllm"
        and "deletionTimestamp" not in pod["metadata"]
        and pod["status"]["conditions"][0]["status"] == "True"
        and pod["status"]["podIP"]
    ]
    known: dict[str, str] = {}
    for port in (each["number"] for each in pool["spec"]["targetPorts"]):
        for pod in sorted(eligible, key=lambda pod: str(pod["metadata"]["creationTimestamp"])):
            ip = pod["status"]["podIP"]
            known[f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"] = f"default/{pod['metadata']['name']}:{port}"
    return {name: address for address, name in known.items()}


async def check(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with FakeKube(bookmark_s=0.02) as kube, followed(Path(directory), kube) as cluster:
            history = History(kube, lambda: settled(cluster))
            for step in [*BEGINNING, *steps]:
                await history.play(step)
            await settled(cluster)
            await asyncio.sleep(QUIET_S)
            await settled(cluster)


async def settled(cluster: Cluster) -> None:
    await cluster.until(lambda: cluster.store.synced("kubernetes") and cluster.addresses == truth(cluster.kube))
    addresses = list(cluster.addresses.values())
    assert len(set(addresses)) == len(addresses)


def campaign(examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(STEPS)
    def run(steps: list[Step]) -> None:
        asyncio.run(check(steps))

    run()


def test_the_datastore_ends_up_at_the_truth() -> None:
    campaign(60)


@pytest.mark.long
def test_the_datastore_ends_up_at_the_truth_many_times() -> None:
    campaign(1500)
