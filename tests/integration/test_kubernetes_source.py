"""A cluster followed over real HTTP: from what a fake API server holds to the datastore and the rulebook."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.kube_api import FakeKube
from tests.integration.cluster_rig import Cluster, followed, pod_object, pool_object


async def synced(cluster: Cluster) -> None:
    await cluster.until(lambda: cluster.store.synced("kubernetes"))


async def test_a_pool_and_its_pods(tmp_path: Path) -> None:
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object(ports=(8000, 8001)))
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        kube.put("pods", "default", pod_object("other", "10.0.0.2", labels={"app": "web"}))
        kube.put("pods", "default", pod_object("starting", "10.0.0.3", ready=False))
        kube.put("pods", "other", pod_object("foreign", "10.0.0.4"))
        async with followed(tmp_path, kube) as cluster:
            await synced(cluster)
            assert cluster.addresses == {"default/a:8000": "10.0.0.1:8000", "default/a:8001": "10.0.0.1:8001"}
            assert cluster.source.status().problem == ""
            assert all(endpoint.pool == "default/llama" for endpoint in cluster.store.endpoints())

            kube.put("pods", "default", pod_object("starting", "10.0.0.3"))
            await cluster.until(lambda: len(cluster.addresses) == 4)
            kube.put("pods", "default", pod_object("a", "10.0.0.1", deleted=True))
            await cluster.until(lambda: len(cluster.addresses) == 2)
            kube.delete("pods", "default", "starting")
            await cluster.until(lambda: not cluster.addresses)


async def test_a_pool_is_deleted_and_comes_back(tmp_path: Path) -> None:
    async with FakeKube() as kube:
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        async with followed(tmp_path, kube) as cluster:
            await synced(cluster)
            assert "does not exist" in cluster.source.status().problem
            kube.put("inferencepools", "default", pool_object())
            await cluster.until(lambda: len(cluster.addresses) == 1)
            assert cluster.source.status().problem == ""
            kube.delete("inferencepools", "default", "llama")
            await cluster.until(lambda: not cluster.addresses)
            assert "does not exist" in cluster.source.status().problem
            kube.put("inferencepools", "default", pool_object(ports=(9000,)))
            await cluster.until(lambda: cluster.addresses == {"default/a:9000": "10.0.0.1:9000"})


async def test_without_the_crd_it_is_never_synced_and_says_why(tmp_path: Path) -> None:
    async with FakeKube(absent=("inferencepools",)) as kube:
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        async with followed(tmp_path, kube) as cluster:
            await cluster.until(lambda: any("CustomResourceDefinition" in text for _, text in cluster.troubles))
            assert not cluster.store.synced("kubernetes")
            assert cluster.source.status().problem
            kube.install("inferencepools")
            kube.put("inferencepools", "default", pool_object())
            await cluster.until(lambda: len(cluster.addresses) == 1)


async def test_selector_mode_needs_no_crd(tmp_path: Path) -> None:
    pool = {"name": "plain", "selector": "app in (vllm), !canary", "target_ports": [8000]}
    async with FakeKube(absent=("inferencepools", "inferencepools.x")) as kube:
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        kube.put("pods", "default", pod_object("b", "10.0.0.2", labels={"app": "vllm", "canary": "yes"}))
        async with followed(tmp_path, kube, [pool]) as cluster:
            await synced(cluster)
            assert cluster.addresses == {"default/a:8000": "10.0.0.1:8000"}
            asked = {seen.path for seen in kube.requests}
    assert asked == {"/api/v1/namespaces/default/pods", "/api/v1/nodes"}


async def test_the_old_pools_of_v1alpha2(tmp_path: Path) -> None:
    old: dict[str, Any] = {
        "metadata": {"name": "llama", "annotations": {"inference.networking.x-k8s.io/model-server-runtime": "sglang"}},
        "spec": {"targetPortNumber": 8000, "selector": {"app": "vllm"}, "extensionRef": {"name": "epp"}},
    }
    pool = {"name": "default/llama", "group": "inference.networking.x-k8s.io"}
    async with FakeKube() as kube:
        kube.put("inferencepools.x", "default", old)
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        model = {"modelName": "chat", "criticality": "Critical", "targetModels": [{"name": "chat-v2", "weight": 100}]}
        kube.put(
            "inferencemodels.x", "default", {"metadata": {"name": "m"}, "spec": {**model, "poolRef": {"name": "llama"}}}
        )
        async with followed(tmp_path, kube, [pool]) as cluster:
            await cluster.until(lambda: bool(cluster.addresses) and bool(cluster.rules))
            assert cluster.store.endpoints()[0].engine == "sglang"
            assert cluster.rules.priority(None, "chat", "default/llama") == 1
            assert cluster.rules.rewrites[0].targets[0].model == "chat-v2"


async def test_rules_come_and_go_with_their_crds(tmp_path: Path) -> None:
    def objective(priority: int) -> dict[str, Any]:
        return {"metadata": {"name": "chat"}, "spec": {"priority": priority, "poolRef": {"name": "llama"}}}

    absent = ("inferenceobjectives", "inferencemodelrewrites", "inferencemodelrewrites.x", "inferencemodels.x")
    async with FakeKube(absent=absent) as kube:
        kube.put("inferencepools", "default", pool_object())
        kube.put("inferenceobjectives.x", "default", objective(1))
        async with followed(tmp_path, kube) as cluster:
            await cluster.until(lambda: cluster.rules.priority("chat", None, None) == 1)
            kube.install("inferenceobjectives")
            kube.put("inferenceobjectives", "default", objective(7))
            await cluster.until(lambda: cluster.rules.priority("chat", None, None) == 7)
            kube.withdraw("inferenceobjectives")
            kube.drop()
            await cluster.until(lambda: cluster.rules.priority("chat", None, None) == 1)


async def test_h2c_is_refused_by_name_where_it_cannot_be_spoken(tmp_path: Path) -> None:
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object(appProtocol="kubernetes.io/h2c"))
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        async with followed(tmp_path, kube, h2c=False) as cluster:
            await synced(cluster)
            assert not cluster.addresses
            assert "h2c" in cluster.source.status().problem
            assert "default/llama" in cluster.source.status().problem
        async with followed(tmp_path, kube, h2c=True) as cluster:
            await synced(cluster)
            assert len(cluster.addresses) == 1


async def test_several_pools_in_several_namespaces(tmp_path: Path) -> None:
    pools = ["default/llama", "other/qwen", {"name": "other/all", "selector": "app", "target_ports": [8000]}]
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object())
        kube.put("inferencepools", "other", pool_object("qwen"))
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        kube.put("pods", "other", pod_object("b", "10.0.0.2"))
        kube.put("pods", "other", pod_object("c", "10.0.0.3", labels={"app": "x"}))
        async with followed(tmp_path, kube, pools) as cluster:
            await synced(cluster)
            found = {endpoint.id: endpoint.pool for endpoint in cluster.store.endpoints()}
            expected = {"default/a:8000": "default/llama", "other/b:8000": "other/qwen", "other/c:8000": "other/all"}
            assert found == expected
            assert cluster.source.pool_ids == ("default/llama", "other/qwen", "other/all")
            assert any("two pools" in text for _, text in cluster.troubles)
            kube.delete("inferencepools", "other", "qwen")
            await cluster.until(lambda: cluster.store.endpoint("other/b:8000").pool == "other/all")  # type: ignore[union-attr]
            assert cluster.source.status().problem == "", "two of three pools can be used"


async def test_what_cannot_be_read_keeps_nothing_else_away(tmp_path: Path) -> None:
    old = {"name": "default/old", "group": "inference.networking.x-k8s.io"}
    async with FakeKube(absent=("inferencepools.x",)) as kube:
        kube.put("inferencepools", "default", pool_object())
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        kube.fail(403, 10**6, path="/namespaces/secret/")
        async with followed(tmp_path, kube, ["default/llama", old, "secret/llama"], grace_s=0.2) as cluster:
            await synced(cluster)
            assert cluster.addresses == {"default/a:8000": "10.0.0.1:8000"}
            assert cluster.source.status().problem == ""
            assert cluster.source.status().heard_at is not None
            told = " ".join(text for _, text in cluster.troubles)
            assert "RBAC" in told
            assert "CustomResourceDefinition" in told


async def test_nodes_say_what_is_behind_an_endpoint_and_may_be_forbidden(tmp_path: Path) -> None:
    node = {
        "metadata": {"name": "node-1", "labels": {"nvidia.com/gpu.product": "H100", "topology.kubernetes.io/zone": "z"}}
    }
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object())
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        kube.put("nodes", "", node)
        async with followed(tmp_path, kube) as cluster:
            await synced(cluster)
            endpoint = cluster.store.endpoints()[0]
            assert (endpoint.endpoint_class, endpoint.place.zone, endpoint.place.node) == ("H100", "z", "node-1")
        kube.forbidden.add("nodes")
        began = time.monotonic()
        async with followed(tmp_path, kube) as cluster:
            await synced(cluster)
            assert time.monotonic() - began < 2.0
            assert cluster.store.endpoints()[0].endpoint_class == ""
            await cluster.until(lambda: any("RBAC" in text for _, text in cluster.troubles))
        async with followed(tmp_path, kube, nodes=False) as cluster:
            await synced(cluster)
            assert not cluster.troubles


async def test_the_last_state_stays_while_the_api_server_is_away(tmp_path: Path) -> None:
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object())
        kube.put("pods", "default", pod_object("a", "10.0.0.1"))
        kube.put("pods", "default", pod_object("b", "10.0.0.2"))
        async with followed(tmp_path, kube) as cluster:
            await synced(cluster)
            await kube.down()
            await asyncio.sleep(0.1)
            heard = cluster.source.status().heard_at
            await asyncio.sleep(0.2)
            assert len(cluster.addresses) == 2
            assert cluster.source.status().problem == ""
            assert cluster.source.status().heard_at == heard
            kube.delete("pods", "default", "a")
            kube.compact()
            await kube.up()
            await cluster.until(lambda: set(cluster.addresses) == {"default/b:8000"})
            later = cluster.source.status().heard_at
            assert heard is not None
            assert later is not None
            assert later > heard


@pytest.mark.parametrize("moment_s", [0.0, 0.01, 0.05])
async def test_cancelling_leaves_no_task_behind(tmp_path: Path, moment_s: float) -> None:
    async with FakeKube() as kube:
        kube.put("inferencepools", "default", pool_object())
        before = asyncio.all_tasks()
        async with followed(tmp_path, kube):
            await asyncio.sleep(moment_s)
        await asyncio.sleep(0.05)
        left = {task for task in asyncio.all_tasks() - before if "RequestHandler" not in repr(task)}
        assert not left
