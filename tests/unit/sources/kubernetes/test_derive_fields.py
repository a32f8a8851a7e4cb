"""Rule by rule: what labels, annotations, containers and nodes say of an endpoint's engine, ports and hardware."""

from __future__ import annotations

from typing import Any

import pytest

from picker.sources.kubernetes.objects import PoolV1
from picker.sources.kubernetes.pools import PoolSpec, read_pool
from tests.fakes.kube_pods import container, node, pod, pool_v1, read
from tests.unit.sources.kubernetes.views import endpoints_of, labelled, only, spec

RUNTIME = "inference.networking.x-k8s.io/model-server-runtime"


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "engine"),
    [
        ({"llm-d.ai/engine-type": "vllm"}, "vllm"),
        ({"inference.networking.k8s.io/engine-type": "SGLang"}, "sglang"),
        ({"llm-d.ai/engine-type": "trtllm-serve"}, "trtllm"),
        ({"llm-d.ai/engine-type": "tensorrt-llm"}, "trtllm"),
        ({"llm-d.ai/engine-type": "trt-llm"}, "trtllm"),
        ({"llm-d.ai/engine-type": "triton-tensorrt-llm"}, "triton"),
        ({"llm-d.ai/engine-type": "nim"}, "nim"),
        ({"model.aibrix.ai/engine": "sglang"}, "sglang"),
        ({"alibabacloud.com/inference_backend": "vllm"}, "vllm"),
        ({"alibabacloud.com/inference-backend": "vllm"}, "vllm"),
        ({"inference-backend": "vllm"}, "vllm"),
        ({"alibabacloud.com/inference-workload": "vllm"}, "auto"),
        ({"app.kubernetes.io/part-of": "nim-service"}, "nim"),
        ({"llm-d.ai/engine-type": "own-engine"}, "auto"),
        ({"llm-d.ai/engine-type": "own-engine", "model.aibrix.ai/engine": "vllm"}, "vllm"),
        ({}, "auto"),
    ],
)
def test_engines_by_label(labels: dict[str, str], engine: str) -> None:
    assert only(pod(labels=labelled(**labels))).engine == engine


def test_the_engine_of_labels_then_pool_then_entry() -> None:
    said = read_pool(read(pool_v1(annotations={RUNTIME: "sglang"}), PoolV1))
    assert isinstance(said, PoolSpec)
    labelled_pod = pod(labels=labelled(**{"llm-d.ai/engine-type": "vllm"}))
    assert only(labelled_pod, pool=said, entry={"engine": "nim"}).engine == "vllm"
    assert only(pod(), pool=said, entry={"engine": "nim"}).engine == "sglang"
    assert only(pod(), entry={"engine": "none"}).engine == "none"


# -- bootstrap ports ---------------------------------------------------------------------------------------------------


def prefill(engine: str = "sglang", **fields: Any) -> dict[str, Any]:
    labels = labelled(**{"llm-d.ai/role": "prefill", "llm-d.ai/engine-type": engine})
    return pod(labels=labels, **fields)


@pytest.mark.parametrize(
    ("fields", "port"),
    [
        ({}, 8998),
        ({"annotations": {"sglang.ai/bootstrap-port": "34000"}}, 34000),
        ({"annotations": {"model.aibrix.ai/sglang-bootstrap-port": " 34000 "}}, 34000),
        ({"annotations": {"sglang.ai/bootstrap-port": "99999"}}, 8998),
        ({"annotations": {"sglang.ai/bootstrap-port": "-1"}}, 8998),
        ({"annotations": {"sglang.ai/bootstrap-port": "9" * 100_000}}, 8998),
        ({"annotations": {"sglang.ai/bootstrap-port": "\u0663\u0664"}}, 8998),
        ({"containers": [container(env={"SGLANG_BOOTSTRAP_PORT": "34000"})]}, 34000),
        ({"containers": [container(env={"SGLANG_BOOTSTRAP_PORT": "$(OTHER)"})]}, 8998),
        ({"containers": [container(args=["--disaggregation-bootstrap-port", "34000"])]}, 34000),
        ({"containers": [container(args=["--disaggregation-bootstrap-port=34000"])]}, 34000),
        ({"containers": [container(command=["sh", "-c", "x --disaggregation-bootstrap-port '34000' -y"])]}, 34000),
        ({"containers": [container(args=["--disaggregation-bootstrap-port", "$PORT"])]}, 8998),
        ({"containers": [container(args=["--disaggregation-bootstrap-port", "340000000"])]}, 8998),
        ({"containers": [container(ports=[("bootstrap", 34000)])]}, 34000),
        ({"containers": [container(ports=[("bootstrap", 99999)])]}, 8998),
        (
            {
                "annotations": {"sglang.ai/bootstrap-port": "1"},
                "containers": [
                    container(env={"SGLANG_BOOTSTRAP_PORT": "2"}, args=["--disaggregation-bootstrap-port=3"])
                ],
            },
            1,
        ),
    ],
)
def test_bootstrap_ports(fields: dict[str, Any], port: int) -> None:
    assert only(prefill(**fields)).bootstrap_port == port


def test_who_has_a_bootstrap_port() -> None:
    annotated: dict[str, Any] = {"annotations": {"sglang.ai/bootstrap-port": "34000"}}
    launched: dict[str, Any] = {"containers": [container(command=["python3", "-m", "sglang.launch_server"])]}
    assert only(prefill("vllm", **annotated)).bootstrap_port == 0
    assert only(prefill("unknown", **annotated)).bootstrap_port == 34000
    assert only(prefill("unknown")).bootstrap_port == 0
    assert only(prefill("unknown", **launched)).bootstrap_port == 8998
    assert only(pod(**annotated)).bootstrap_port == 34000
    assert only(pod(labels=labelled(**{"llm-d.ai/engine-type": "sglang"}))).bootstrap_port == 0
    decode = labelled(**{"llm-d.ai/role": "decode", "llm-d.ai/engine-type": "sglang"})
    assert only(pod(labels=decode, **annotated)).bootstrap_port == 0
    front = labelled(**{"llm-d.ai/role": "router"})
    assert only(pod(labels=front, **annotated)).bootstrap_port == 0


def test_the_entrys_bootstrap_port_is_for_pods_that_do_not_say() -> None:
    entry = {"bootstrap_port": 5000}
    assert only(prefill(), entry=entry).bootstrap_port == 5000
    assert only(prefill(annotations={"sglang.ai/bootstrap-port": "34000"}), entry=entry).bootstrap_port == 34000


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "annotations", "url"),
    [
        ({}, {}, ""),
        ({}, {"port": "8000"}, ""),
        ({}, {"port": "9090"}, "http://10.0.0.1:9090"),
        ({}, {"port": "9090", "path": "/stats", "scheme": "HTTPS"}, "https://10.0.0.1:9090/stats"),
        ({}, {"port": "9090", "scrape": "False"}, ""),
        ({}, {"port": "9090", "scrape": "true"}, "http://10.0.0.1:9090"),
        ({}, {"path": "/metrics"}, "http://10.0.0.1:8000/metrics"),
        ({}, {"path": "metrics", "port": "99999", "scheme": "ftp"}, ""),
        ({}, {"path": "/a b", "port": "-1"}, ""),
        ({}, {"path": "/a?b"}, ""),
        ({}, {"path": "/" + "a" * 1000}, ""),
        ({}, {"path": "/\u0000"}, ""),
        ({}, {"path": "/"}, ""),
        ({"metrics_port": 7000}, {"port": "9090", "path": "/stats"}, "http://10.0.0.1:7000/stats"),
        ({"metrics_scheme": "https"}, {}, "https://10.0.0.1:8000"),
        ({"metrics_path": "/x"}, {"port": "9090", "scrape": "false"}, "http://10.0.0.1:8000/x"),
        ({"scheme": "https"}, {"port": "9090"}, "https://10.0.0.1:9090"),
        ({"scheme": "https", "metrics_scheme": "https"}, {}, ""),
        ({"engine": "triton"}, {}, "http://10.0.0.1:8002"),
        ({"engine": "triton", "scheme": "https"}, {}, "http://10.0.0.1:8002"),
        ({"engine": "triton"}, {"port": "9002"}, "http://10.0.0.1:9002"),
        ({"engine": "triton", "metrics_port": 7000, "metrics_path": "/m"}, {}, "http://10.0.0.1:7000/m"),
        ({"engine": "trtllm"}, {}, ""),
    ],
)
def test_metrics_urls(entry: dict[str, Any], annotations: dict[str, str], url: str) -> None:
    pod_json = pod(annotations={f"prometheus.io/{key}": value for key, value in annotations.items()})
    assert only(pod_json, entry=entry).metrics_url == url


def test_the_port_of_knatives_queue_proxy_is_not_the_engines() -> None:
    annotations = {"prometheus.io/port": "9091"}
    beside = [container(), container("queue-proxy", ports=(9091,))]
    assert only(pod(annotations=annotations)).metrics_url == "http://10.0.0.1:9091"
    assert only(pod(annotations=annotations, containers=beside)).metrics_url == ""


def test_ranks_have_metrics_of_their_own() -> None:
    found = endpoints_of(pod(annotations={"prometheus.io/port": "8000"}), pool=spec(ports=(8000, 8001)))
    assert [endpoint.metrics_url for endpoint in found.values()] == ["", ""]


def test_the_metrics_of_a_pod_with_ipv6() -> None:
    assert only(pod(ip="fd00::1", annotations={"prometheus.io/port": "9"})).metrics_url == "http://[fd00::1]:9"


# -- hardware and place ------------------------------------------------------------------------------------------------

CACHE = "internal.serving.kserve.io/localmodel"


@pytest.mark.parametrize(
    ("labels", "annotations", "node_labels", "name"),
    [
        ({}, {}, {}, ""),
        ({}, {}, {"nvidia.com/gpu.product": "H100"}, "H100"),
        ({}, {}, {"amd.com/gpu.product-name": "MI300X"}, "MI300X"),
        ({}, {}, {"cloud.google.com/gke-accelerator": "nvidia-l4"}, "nvidia-l4"),
        ({}, {}, {"karpenter.k8s.aws/instance-gpu-name": "h100"}, "h100"),
        ({}, {}, {"karpenter.k8s.aws/instance-accelerator-name": "inferentia"}, "inferentia"),
        ({}, {}, {"aliyun.accelerator/nvidia_name": "H20"}, "H20"),
        ({}, {}, {"node.kubernetes.io/instance-type": "p5"}, "p5"),
        ({}, {}, {"node.kubernetes.io/instance-type": "p5", "nvidia.com/gpu.product": "H100"}, "H100"),
        ({"llm-d.ai/accelerator-variant": "gpu"}, {}, {"nvidia.com/gpu.product": "H100"}, "H100"),
        ({"llm-d.ai/accelerator-variant": "gpu"}, {}, {}, "gpu"),
        ({"llm-d.ai/accelerator-vendor": "amd"}, {}, {}, "amd"),
        ({"inference.optimization/acceleratorName": "A100"}, {}, {"nvidia.com/gpu.product": "H100"}, "A100"),
        ({}, {"serving.kserve.io/nodegroup": "a100"}, {"nvidia.com/gpu.product": "H100"}, "a100"),
        ({CACHE: "m"}, {f"{CACHE}-pvc-name": "m-h100-x"}, {}, "h100-x"),
        ({CACHE: "m"}, {f"{CACHE}-pvc-name": "other-h100"}, {}, ""),
        ({CACHE: "m"}, {f"{CACHE}-pvc-name": "m"}, {}, ""),
        ({}, {"serving.kserve.io/nodegroup": "a\nb"}, {}, ""),
        ({}, {"serving.kserve.io/nodegroup": "a" * 100_000}, {"nvidia.com/gpu.product": "H100"}, "H100"),
    ],
)
def test_classes(labels: dict[str, str], annotations: dict[str, str], node_labels: dict[str, str], name: str) -> None:
    where = node(labels=node_labels)
    assert only(pod(labels=labelled(**labels), annotations=annotations), nodes=(where,)).endpoint_class == name


def test_the_users_class_labels_come_first_on_the_pod_then_on_the_node() -> None:
    section = {"class_labels": ["tier", "example.com/card"]}
    where = node(labels={"nvidia.com/gpu.product": "H100", "tier": "of-node", "example.com/card": "card"})
    assert only(pod(labels=labelled(tier="of-pod")), nodes=(where,), section=section).endpoint_class == "of-pod"
    assert only(pod(), nodes=(where,), section=section).endpoint_class == "of-node"
    assert only(pod(annotations={"serving.kserve.io/nodegroup": "g"}), section=section).endpoint_class == "g"


@pytest.mark.parametrize(
    ("node_labels", "rack"),
    [
        ({"nvidia.com/gpu.clique": "c.0", "topology.kubernetes.io/rack": "r"}, "c.0"),
        ({"topology.kubernetes.io/rack": "r"}, "r"),
        ({"cloud.google.com/gce-topology-subblock": "s"}, "s"),
        ({}, ""),
    ],
)
def test_places(node_labels: dict[str, str], rack: str) -> None:
    where = node(labels={"topology.kubernetes.io/zone": "z", **node_labels})
    place = only(pod(), nodes=(where,)).place
    assert (place.node, place.zone, place.rack) == ("node-1", "z", rack)


def test_without_nodes_the_zone_may_be_on_the_pod() -> None:
    place = only(pod(node="n", labels=labelled(**{"topology.kubernetes.io/zone": "z"}))).place
    assert (place.node, place.zone, place.rack) == ("n", "z", "")


# -- pairing and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "group", "revision"),
    [
        ({}, "", ""),
        ({"rbg.workloads.x-k8s.io/group-name": "g", "rbg.workloads.x-k8s.io/group-revision": "1"}, "g", "1"),
        ({"rolebasedgroup.workloads.x-k8s.io/name": "g"}, "g", ""),
        ({"roleset-name": "rs", "storm-service-revision": "2"}, "rs", "2"),
        ({"nvidia.com/dynamo-namespace": "d", "nvidia.com/dynamo-worker-hash": "h"}, "d", "h"),
        ({"app.kubernetes.io/name": "x", "app.kubernetes.io/part-of": "llminferenceservice"}, "x", ""),
        ({"app.kubernetes.io/name": "x", "app.kubernetes.io/part-of": "other"}, "", ""),
        ({"disaggregatedset.x-k8s.io/name": "n", "disaggregatedset.x-k8s.io/slice": "1"}, "n/1", ""),
        ({"pod-template-hash": "h", "controller-revision-hash": "h"}, "", ""),
    ],
)
def test_what_prefill_and_decode_share(labels: dict[str, str], group: str, revision: str) -> None:
    found = only(pod(labels=labelled(**labels)))
    assert (found.group, found.revision) == (group, revision)


def test_labels_are_the_pods_and_bounded() -> None:
    few = labelled(a="1")
    assert only(pod(labels=few)).labels == few
    many = labelled(**{f"label-{number}": "x" * 1000 for number in range(5000)})
    found = only(pod(labels=many)).labels
    assert len(found) == 64
    assert found.items() <= many.items()
