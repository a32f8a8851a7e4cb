"""Rule by rule: which pods and ports are endpoints, and in which role."""

from __future__ import annotations

from typing import Any

import pytest

from picker.config import PoolEntry
from picker.core.values import Role
from picker.sources.kubernetes.objects import PoolV1, PoolV1Alpha2
from picker.sources.kubernetes.pools import PoolSpec, read_pool, spec_of
from tests.fakes.kube_pods import pod, pool_v1, pool_v1alpha2, read
from tests.unit.sources.kubernetes.views import endpoints_of, labelled, only, spec, view_of

RUNTIME = "inference.networking.x-k8s.io/model-server-runtime"


# -- pools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "wrong"),
    [
        (pool_v1(selector={}), "no selector"),
        (pool_v1(ports=()), "no target port"),
        (pool_v1(ports=(0,)), "target port 0"),
        (pool_v1(ports=(8000, 99999)), "99999"),
        (pool_v1(ports=(-1,)), "-1"),
        (pool_v1(ports=range(8000, 8009)), "9 target ports"),
        (pool_v1alpha2(selector={}), "no selector"),
        (pool_v1alpha2(port=0), "no target port"),
        (pool_v1alpha2(port=65536), "65536"),
        ({"kind": "InferencePool", "metadata": {"name": "p"}}, "no selector"),
    ],
)
def test_a_pool_that_cannot_be_used_says_why(pool: dict[str, Any], wrong: str) -> None:
    old = str(pool.get("apiVersion", "")).endswith("v1alpha2")
    refusal = read_pool(read(pool, PoolV1Alpha2) if old else read(pool, PoolV1))
    assert isinstance(refusal, str)
    assert wrong in refusal


def test_a_pool_of_v1() -> None:
    found = spec(ports=(8000, 8001, 8000), app_protocol="kubernetes.io/h2c")
    assert (found.ports, found.h2c, found.engine) == ((8000, 8001), True, "")
    assert found.selector.matches({"app": "vllm", "more": "x"})
    assert not found.selector.matches({"app": "other"})


@pytest.mark.parametrize(
    ("runtime", "engine"),
    [("vllm", "vllm"), ("sglang", "sglang"), ("SGLang ", "sglang"), ("trt-llm", "triton"), ("mlx", "")],
)
def test_a_pool_of_v1alpha2_may_name_its_engine(runtime: str, engine: str) -> None:
    found = read_pool(read(pool_v1alpha2(annotations={RUNTIME: runtime}), PoolV1Alpha2))
    assert isinstance(found, PoolSpec)
    assert (found.ports, found.h2c, found.engine) == ((8000,), False, engine)


def test_a_selector_of_the_configuration() -> None:
    found = spec_of(PoolEntry(name="p", selector="app in (a, b),!canary", target_ports=(8000,)))
    assert found.ports == (8000,)
    assert found.selector.matches({"app": "b"})
    assert not found.selector.matches({"app": "b", "canary": ""})
    with pytest.raises(ValueError, match="has no selector"):
        spec_of(PoolEntry(name="p"))


# -- readiness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"ready": False},
        {"deleted": True},
        {"ip": None},
        {"ip": ""},
        {"ip": "not-an-ip"},
        {"ip": "10.0.0.256"},
        {"ip": "10.0.0.1/24"},
        {"ip": "fe80::1%eth0"},
        {"ip": "[::1]"},
        {"phase": "Succeeded"},
        {"phase": "Failed"},
        {"labels": {"app": "other"}},
        {"labels": {}},
        {"namespace": "elsewhere"},
        {"labels": labelled(**{"rbg.workloads.x-k8s.io/role-instance-lifecycle-state": "PreparingDelete"})},
        {"annotations": {"rbg.workloads.x-k8s.io/role-instance-lifecycle-state": "PreparingUpdate"}},
        {"annotations": {"rbg.workloads.x-k8s.io/role-instance-lifecycle-state": "Updating"}},
        {"labels": labelled(**{"ray.io/serve": "false", "ray.io/cluster": "c", "ray.io/node-type": "head"})},
    ],
)
def test_not_an_endpoint(fields: dict[str, Any]) -> None:
    assert endpoints_of(pod(**fields)) == {}


@pytest.mark.parametrize("state", ["Normal", "Updated", ""])
def test_a_pod_in_these_states_serves(state: str) -> None:
    assert only(pod(annotations={"rbg.workloads.x-k8s.io/role-instance-lifecycle-state": state}))


def test_where_an_endpoint_is() -> None:
    found = only(pod("a", ip="10.1.2.3"))
    assert (found.id, found.url, found.address) == ("default/a:8000", "http://10.1.2.3:8000", "10.1.2.3:8000")
    assert (found.pool, found.pod, found.rank) == ("default/pool", "a", 0)
    found = only(pod("a", ip="fd00::12"), entry={"scheme": "https", "credentials": "tls", "path_prefix": "/openai"})
    assert (found.url, found.address) == ("https://[fd00::12]:8000", "[fd00::12]:8000")
    assert (found.credentials, found.path_prefix) == ("tls", "/openai")


@pytest.mark.parametrize("status", [{}, {"phase": None, "podIP": None, "conditions": None}])
def test_null_and_missing_fields_are_no_endpoint(status: dict[str, Any]) -> None:
    bare = {"metadata": {"name": "a", "namespace": "default", "labels": {"app": "vllm"}}, "status": status}
    assert endpoints_of(bare) == {}


def test_nulls_around_a_ready_pod() -> None:
    bare = {
        "metadata": {"name": "a", "namespace": "default", "labels": {"app": "vllm"}, "annotations": None},
        "spec": {"nodeName": None, "containers": None},
        "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }
    assert only(bare).address == "10.0.0.1:8000"


# -- ports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        (None, [8000, 8001, 8002]),
        ("", []),
        (" ", []),
        ("8000", [8000]),
        ("8000,8002", [8000, 8002]),
        (" 8002 , 8000 ", [8000, 8002]),
        ("8000,8000", [8000]),
        ("8000,abc,-8001,8.5,0x1f42", [8000]),
        ("9000", []),
        ("99999,8001", [8001]),
        ("8001\u0660", []),
        ("8000;8001", []),
        ("," * 5000 + "8001", [8001]),
    ],
)
@pytest.mark.parametrize("key", ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"])
def test_active_ports(key: str, text: str | None, ports: list[int]) -> None:
    annotations = {} if text is None else {key: text}
    found = endpoints_of(pod("a", annotations=annotations), pool=spec(ports=(8000, 8001, 8002)))
    assert [(endpoint.url, endpoint.rank) for endpoint in found.values()] == [
        (f"http://10.0.0.1:{port}", port - 8000) for port in ports
    ]


def test_the_newer_annotation_of_active_ports_wins() -> None:
    annotations = {"llm-d.ai/active-ports": "8001", "inference.networking.k8s.io/active-ports": "8000"}
    assert only(pod(annotations=annotations), pool=spec(ports=(8000, 8001))).rank == 1


# -- roles -------------------------------------------------------------------------------------------------------------

ROLE_LABELS = [
    "llm-d.ai/role",
    "rbg.workloads.x-k8s.io/role-name",
    "rolebasedgroup.workloads.x-k8s.io/role",
    "disaggregatedset.x-k8s.io/role",
    "role-name",
    "nvidia.com/dynamo-sub-component-type",
    "nvidia.com/dynamo-component-type",
]


@pytest.mark.parametrize("label", ROLE_LABELS)
@pytest.mark.parametrize(
    ("value", "role"),
    [
        ("prefill", Role.PREFILL),
        ("Prefiller", Role.PREFILL),
        ("context", Role.PREFILL),
        ("CTX", Role.PREFILL),
        ("decode", Role.DECODE),
        ("decoder", Role.DECODE),
        ("generation", Role.DECODE),
        ("gen", Role.DECODE),
        ("both", Role.BOTH),
        ("prefill_decode", Role.BOTH),
        ("prefill-decode", Role.BOTH),
        ("encode", Role.ENCODE),
        ("encoder", Role.ENCODE),
        ("frontend", Role.BOTH),
        ("worker", Role.BOTH),
        ("backend", Role.BOTH),
        ("", Role.BOTH),
    ],
)
def test_roles(label: str, value: str, role: Role) -> None:
    assert only(pod(labels=labelled(**{label: value}))).role is role


@pytest.mark.parametrize(
    ("component", "role"),
    [
        ("llminferenceservice-workload", Role.BOTH),
        ("llminferenceservice-workload-leader", Role.BOTH),
        ("llminferenceservice-workload-prefill", Role.PREFILL),
        ("llminferenceservice-workload-leader-prefill", Role.PREFILL),
        ("llminferenceservice-workload-worker-prefill", Role.PREFILL),
        ("prefill", Role.BOTH),
        ("frontend", Role.BOTH),
    ],
)
def test_kserves_component_label_has_words_of_its_own(component: str, role: Role) -> None:
    plain = pod("z", ip="10.0.0.2")
    found = endpoints_of(pod("a", labels=labelled(**{"app.kubernetes.io/component": component})), plain)
    assert found["a:8000"].role is role


def test_labels_are_asked_in_order_and_words_nobody_knows_are_passed_over() -> None:
    labels = labelled(
        **{
            "llm-d.ai/role": "something",
            "rbg.workloads.x-k8s.io/role-name": "decode",
            "rolebasedgroup.workloads.x-k8s.io/role": "prefill",
        }
    )
    assert only(pod(labels=labels)).role is Role.DECODE


def test_the_users_labels_come_first() -> None:
    own = {"role_labels": [{"label": "stage", "values": {"First": "prefill", "junk": "ignore", "decode": "both"}}]}
    role_of = {
        value: [each.role for each in endpoints_of(pod(labels=labels), section=own).values()]
        for value in ("first", "generation", "decode", "junk", "unheard-of")
        for labels in [labelled(**{"stage": value, "llm-d.ai/role": "encode"})]
    }
    assert role_of == {
        "first": [Role.PREFILL],
        "generation": [Role.DECODE],
        "decode": [Role.BOTH],
        "junk": [],
        "unheard-of": [Role.ENCODE],
    }


def test_front_ends_serve_only_where_no_servers_are() -> None:
    front = pod("front", labels=labelled(**{"llm-d.ai/role": "router"}))
    server = pod("server", ip="10.0.0.2", ready=False)
    gone = pod("gone", ip="10.0.0.3", phase="Failed")
    assert [each.pod for each in view_of(front).endpoints] == ["front"]
    assert view_of(front, gone).problem == ""
    both = view_of(front, server)
    assert both.endpoints == ()
    assert "front" in both.problem
