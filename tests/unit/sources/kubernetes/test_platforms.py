"""Golden tests: manifests of every platform that is named as supported, and the endpoints that must come of them.

Each file in tests/data/kubernetes holds what the API server would show (custom resources for the reader, then pools,
nodes and pods) and, last, what is expected. Only fields that are not the default are written there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from picker.config import KubernetesSection, PoolEntry
from picker.core.values import Endpoint
from picker.sources.kubernetes.objects import Listed, Node, Pod, PoolV1, PoolV1Alpha2
from picker.sources.kubernetes.pools import PoolSpec, read_pool, spec_of
from picker.sources.kubernetes.view import PoolView
from tests.fakes.kube_pods import read

DATA = Path(__file__).resolve().parents[3] / "data" / "kubernetes"
FILES = sorted(DATA.glob("*.yaml"))
ROWS = {
    "vLLM": "vllm-deployment",
    "SGLang": "sglang-roles",
    "TRT-LLM": "trtllm-serve",
    "Triton": "triton",
    "NIM": "nim",
    "Dynamo A": "dynamo-a-black-box",
    "Dynamo B": "dynamo-b-workers",
    "Dynamo C": "dynamo-c-plain-vllm",
    "RBG v1alpha1": "rbg-v1alpha1-2p1d",
    "RBG v1alpha2": "rbg-v1alpha2-leader-worker",
    "LWS": "lws-vllm",
    "Ray": "ray-cluster",
    "RayService": "ray-service",
    "KServe InferenceService": "kserve-inferenceservice",
    "KServe LLMInferenceService": "kserve-llmisvc-multi-node",
    "llm-d": "llm-d-wide-ep",
    "ACK": "ack-v1alpha2",
    "LocalModelCache": "kserve-local-model-cache",
}


def told(endpoint: Endpoint) -> dict[str, Any]:
    """An endpoint as the files write it down, without what goes without saying."""
    fields = {
        "address": endpoint.address,
        "url": endpoint.url if endpoint.url != f"http://{endpoint.address}" else "",
        "path_prefix": endpoint.path_prefix,
        "credentials": endpoint.credentials,
        "role": endpoint.role.value if endpoint.role != "both" else "",
        "rank": endpoint.rank,
        "engine": endpoint.engine if endpoint.engine != "auto" else "",
        "group": endpoint.group,
        "revision": endpoint.revision,
        "class": endpoint.endpoint_class,
        "zone": endpoint.place.zone,
        "rack": endpoint.place.rack,
        "bootstrap_port": endpoint.bootstrap_port,
        "metrics_url": endpoint.metrics_url,
    }
    return {name: value for name, value in fields.items() if value}


def load(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    *objects, last = yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return objects, last["expect"]


def spec_from(objects: list[dict[str, Any]], entry: PoolEntry) -> PoolSpec:
    if entry.selector is not None:
        return spec_of(entry)
    (pool,) = [each for each in objects if each["kind"] == "InferencePool"]
    old = pool["apiVersion"].endswith("v1alpha2")
    spec = read_pool(read(pool, PoolV1Alpha2) if old else read(pool, PoolV1))
    assert isinstance(spec, PoolSpec)
    return spec


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_platforms_pods_become_these_endpoints(path: Path) -> None:
    objects, expect = load(path)
    entry = PoolEntry(name=expect["pool"], **expect.get("entry", {}))
    view = PoolView(expect["pool"], entry, KubernetesSection())

    view.set_spec(spec_from(objects, entry))
    view.nodes(Listed(tuple(read(each, Node) for each in objects if each["kind"] == "Node")))
    view.pods(Listed(tuple(read(each, Pod) for each in objects if each["kind"] == "Pod")))

    assert {endpoint.id: told(endpoint) for endpoint in view.endpoints} == expect["endpoints"]
    assert expect.get("problem", "") in view.problem
    assert bool(view.problem) == ("problem" in expect)
    pods = {each["metadata"]["name"]: each for each in objects if each["kind"] == "Pod"}
    for endpoint in view.endpoints:
        assert (endpoint.pool, endpoint.place.node) == (
            expect["pool"],
            pods[endpoint.pod]["spec"].get("nodeName", ""),
        )
        assert endpoint.labels == pods[endpoint.pod]["metadata"]["labels"]
        assert endpoint.instance
        assert endpoint.models == frozenset()


def test_every_platform_has_a_file() -> None:
    assert set(ROWS.values()) <= {path.stem for path in FILES}
