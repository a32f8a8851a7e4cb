"""The view as a state machine: what each event changes, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest

from picker.core.updates import Upsert
from picker.sources.kubernetes.groups import instance_of
from picker.sources.kubernetes.objects import Changed, Gone, Listed, Node, Pod
from picker.sources.kubernetes.pools import PoolSpec
from picker.sources.kubernetes.view import PoolView
from tests.fakes.kube_pods import node, pod, read, uid
from tests.unit.sources.kubernetes.views import labelled, new_view, said, spec, view_of


def changed(view: PoolView, **fields: Any) -> list[str]:
    return said(view.pods(Changed(read(pod(**fields), Pod))))


def gone(view: PoolView, **fields: Any) -> list[str]:
    return said(view.pods(Gone(read(pod(**fields), Pod))))


def listed(view: PoolView, *pods: dict[str, Any]) -> list[str]:
    return said(view.pods(Listed(tuple(read(each, Pod) for each in pods))))


def ids(view: PoolView) -> list[str]:
    return [endpoint.id for endpoint in view.endpoints]


def test_a_pods_life() -> None:
    view = view_of()
    assert changed(view, name="a", ip=None, node=None, ready=False, phase="Pending") == []
    assert changed(view, name="a", ready=False) == []
    assert changed(view, name="a") == ["+default/a:8000"]
    assert changed(view, name="a", version="1001") == []
    assert changed(view, name="a", ready=False) == ["-default/a:8000"]
    assert changed(view, name="a") == ["+default/a:8000"]
    assert changed(view, name="a", deleted=True) == ["-default/a:8000"]
    assert gone(view, name="a", deleted=True) == []
    assert ids(view) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": {"app": "other"}},
        {"labels": None, "ready": False},
        {"ip": None},
        {"ip": "garbage"},
        {"deleted": True},
    ],
)
def test_a_pod_that_stops_qualifying_is_removed(fields: dict[str, Any]) -> None:
    view = view_of(pod("a"))
    assert changed(view, name="a", **fields) == ["-default/a:8000"]
    assert changed(view, name="a") == ["+default/a:8000"]


def test_only_fields_that_matter_are_changes() -> None:
    view = view_of(pod("a"))
    assert changed(view, name="a", version="7", annotations={"note": "x"}) == []
    assert changed(view, name="a", version="8", annotations={"prometheus.io/port": "9090"}) == ["+default/a:8000"]
    assert changed(view, name="a", version="9", labels=labelled(more="x")) == ["+default/a:8000"]


def test_a_new_address_is_one_change() -> None:
    view = view_of(pod("a", ip="10.0.0.1"))
    assert changed(view, name="a", ip="10.0.0.2") == ["+default/a:8000"]
    assert [endpoint.address for endpoint in view.endpoints] == ["10.0.0.2:8000"]


def test_a_list_replaces_what_was_known() -> None:
    view = view_of(pod("a", ip="10.0.0.1"), pod("b", ip="10.0.0.2"))
    assert listed(view, pod("b", ip="10.0.0.2"), pod("c", ip="10.0.0.3")) == ["-default/a:8000", "+default/c:8000"]
    assert listed(view) == ["-default/b:8000", "-default/c:8000"]
    assert listed(view) == []


def test_a_recreated_pod_of_the_same_name_has_a_new_instance() -> None:
    view = view_of(pod("a", pod_uid="old"))
    before = view.endpoints[0].instance
    assert changed(view, name="a", pod_uid="new") == ["+default/a:8000"]
    assert (before, view.endpoints[0].instance) == ("old", "new")
    assert gone(view, name="a", pod_uid="old") == []
    assert ids(view) == ["default/a:8000"]


def test_pods_of_other_namespaces_are_not_heard() -> None:
    view = view_of(pod("a"))
    assert changed(view, name="a", namespace="elsewhere", ready=False) == []
    assert gone(view, name="a", namespace="elsewhere") == []
    assert listed(view, pod("a"), pod("a", namespace="elsewhere", ready=False)) == []
    assert ids(view) == ["default/a:8000"]


def test_without_a_pool_there_are_no_endpoints() -> None:
    view = new_view()
    assert changed(view, name="a") == []
    assert said(view.set_spec(spec())) == ["+default/a:8000"]
    assert said(view.set_spec(spec())) == []
    assert said(view.set_spec(None)) == ["-default/a:8000"]
    assert changed(view, name="b", ip="10.0.0.2") == []
    assert said(view.set_spec(spec())) == ["+default/a:8000", "+default/b:8000"]
    assert said(view.set_spec(spec(selector={"app": "other"}))) == ["-default/a:8000", "-default/b:8000"]
    assert view.problem == ""


def test_ports_of_a_pool_come_and_go() -> None:
    view = view_of(pod("a"))
    assert said(view.set_spec(spec(ports=(8000, 8001)))) == ["+default/a:8001"]
    assert said(view.set_spec(spec(ports=(8001,)))) == ["-default/a:8000", "+default/a:8001"]
    assert [endpoint.rank for endpoint in view.endpoints] == [0]


def test_an_address_used_again_belongs_to_the_younger_pod() -> None:
    old: dict[str, Any] = {"name": "z-old", "created": "2026-03-01T10:00:00Z"}
    young: dict[str, Any] = {"name": "a-young", "created": "2026-03-01T11:00:00Z"}
    view = view_of(pod(**old))
    assert changed(view, **young, ready=False) == []
    assert changed(view, **young) == ["-default/z-old:8000", "+default/a-young:8000"]
    assert changed(view, **old, version="2", labels=labelled(x="y")) == []
    assert changed(view, **young, ready=False) == ["-default/a-young:8000", "+default/z-old:8000"]
    assert changed(view, **young) == ["-default/z-old:8000", "+default/a-young:8000"]
    assert gone(view, **old) == []
    assert ids(view) == ["default/a-young:8000"]


def test_pods_of_one_age_do_not_share_an_address_either() -> None:
    one, other = pod("a"), pod("b")
    assert ids(view_of(one, other)) == ids(view_of(other, one)) == ["default/b:8000"]


def test_two_pods_that_exchange_addresses_in_one_list() -> None:
    view = view_of(pod("a", ip="10.0.0.1"), pod("b", ip="10.0.0.2"))
    assert listed(view, pod("a", ip="10.0.0.2"), pod("b", ip="10.0.0.1")) == ["+default/a:8000", "+default/b:8000"]
    assert [endpoint.address for endpoint in view.endpoints] == ["10.0.0.2:8000", "10.0.0.1:8000"]


def test_front_ends_give_way_to_servers_and_come_back() -> None:
    view = view_of(pod("front", ip="10.0.0.9", labels=labelled(**{"llm-d.ai/role": "router"})))
    assert ids(view) == ["default/front:8000"]
    assert changed(view, name="a", ready=False) == ["-default/front:8000"]
    assert view.problem == (
        "selects front ends (front) beside the model servers they route to; the front ends get no requests"
    )
    assert changed(view, name="a") == ["+default/a:8000"]
    assert gone(view, name="a") == ["-default/a:8000", "+default/front:8000"]
    assert view.problem == ""


def test_many_front_ends_are_not_all_named() -> None:
    router = labelled(**{"llm-d.ai/role": "router"})
    fronts = [pod(f"front-{number}", ip=f"10.0.1.{number}", labels=router) for number in range(5)]
    assert "(front-0, front-1, front-2 and 2 more)" in view_of(pod("a"), *fronts).problem


# -- nodes -------------------------------------------------------------------------------------------------------------


def node_changed(view: PoolView, name: str, **labels: str) -> list[str]:
    return said(view.nodes(Changed(read(node(name, labels=labels), Node))))


def test_a_node_changes_its_own_pods_only() -> None:
    view = view_of(pod("a", ip="10.0.0.1", node="n1"), pod("b", ip="10.0.0.2", node="n2"))
    product = {"nvidia.com/gpu.product": "H100"}
    assert node_changed(view, "n1", **product) == ["+default/a:8000"]
    assert node_changed(view, "n1", **product, **{"heartbeat.example.com/seen": "now"}) == []
    assert node_changed(view, "n3", **product) == []
    assert said(view.nodes(Listed((read(node("n2", labels=product), Node),)))) == ["+default/a:8000", "+default/b:8000"]
    assert said(view.nodes(Gone(read(node("n2"), Node)))) == ["+default/b:8000"]
    assert said(view.nodes(Gone(read(node("n2"), Node)))) == []
    assert {endpoint.endpoint_class for endpoint in view.endpoints} == {""}


def test_a_pod_that_moves_to_another_node() -> None:
    view = view_of(pod("a", node="n1"), nodes=(node("n1"), node("n2", labels={"nvidia.com/gpu.product": "H100"})))
    assert changed(view, name="a", node="n2") == ["+default/a:8000"]
    assert node_changed(view, "n1") == []
    assert (view.endpoints[0].place.node, view.endpoints[0].endpoint_class) == ("n2", "H100")


# -- replicas over several pods ----------------------------------------------------------------------------------------


def member(group: int, worker: int, *, size: str = "2", selected: bool = True, **fields: Any) -> dict[str, Any]:
    """A pod of a LeaderWorkerSet."""
    prefix = "leaderworkerset.sigs.k8s.io/"
    labels = {f"{prefix}name": "lws", f"{prefix}group-index": str(group), f"{prefix}worker-index": str(worker)}
    given: dict[str, Any] = {
        "name": f"lws-{group}" + (f"-{worker}" if worker else ""),
        "ip": f"10.0.{group}.{worker + 1}",
        "labels": labels | ({"app": "vllm"} if selected else {}),
        "annotations": {f"{prefix}size": size},
        "containers": [],
    }
    return given | fields


def test_a_replica_is_there_when_all_its_pods_are() -> None:
    view = view_of()
    assert changed(view, **member(0, 0)) == []
    assert changed(view, **member(0, 1, selected=False, ready=False)) == []
    assert changed(view, **member(0, 1, selected=False)) == ["+default/lws-0:8000"]
    assert changed(view, **member(1, 0)) == []
    assert changed(view, **member(0, 1, selected=False, deleted=True)) == ["-default/lws-0:8000"]
    assert changed(view, **member(0, 1, selected=False)) == ["+default/lws-0:8000"]
    assert gone(view, **member(0, 1, selected=False)) == ["-default/lws-0:8000"]


def test_a_recreated_worker_is_another_instance() -> None:
    first = view_of(pod(**member(0, 0)), pod(**member(0, 1))).endpoints[0]
    same = view_of(pod(**member(0, 1)), pod(**member(0, 0))).endpoints[0]
    other = view_of(pod(**member(0, 0)), pod(**member(0, 1, pod_uid="new"))).endpoints[0]
    assert first == same
    assert first.instance != other.instance
    assert first.instance == instance_of([uid("default", "lws-0-1"), uid("default", "lws-0")])
    assert len(first.instance) == 16


@pytest.mark.parametrize(
    ("workers", "ports", "command", "serves"),
    [
        ("auto", [8000], None, True),
        ("auto", [8001], None, False),
        ("auto", [], None, False),
        ("auto", [8000], ["vllm", "serve", "--headless"], False),
        ("auto", [8000], ["sh", "-c", "python3 -m sglang.launch_server --node-rank $I"], False),
        ("never", [8000], None, False),
        ("always", [], ["vllm", "serve", "--headless"], True),
    ],
)
def test_whether_workers_serve(workers: str, ports: list[int], command: list[str] | None, serves: bool) -> None:
    container = {"name": "c", "ports": [{"containerPort": port} for port in ports], "command": command}
    view = view_of(pod(**member(0, 0)), pod(**member(0, 1, containers=[container])), entry={"workers": workers})
    assert ("default/lws-0-1:8000" in ids(view)) is serves
    assert "default/lws-0:8000" in ids(view)


def test_a_worker_may_serve_through_a_sidecar() -> None:
    sidecar = {"name": "sidecar", "restartPolicy": "Always", "ports": [{"containerPort": 8000}]}
    view = view_of(pod(**member(0, 0)), pod(**member(0, 1, init_containers=[sidecar])))
    assert "default/lws-0-1:8000" in ids(view)


@pytest.mark.parametrize(
    ("size", "there"),
    [("", True), ("x", True), ("-3", True), ("2", True), ("3", False), ("9" * 400, True), ("0", True)],
)
def test_sizes_people_may_write(size: str, there: bool) -> None:
    view = view_of(pod(**member(0, 0, size=size)), pod(**member(0, 1, size=size)))
    assert bool(view.endpoints) is there


def test_workers_without_a_leader_are_no_replica() -> None:
    view = view_of(pod(**member(0, 1, size="")), entry={"workers": "always"})
    assert view.endpoints == ()


def test_a_pod_that_joins_a_replica_takes_its_address_along() -> None:
    view = view_of(pod("lws-0", ip="10.0.0.1"))
    assert changed(view, **member(0, 0, size="1")) == ["+default/lws-0:8000"]
    assert ids(view) == ["default/lws-0:8000"]
    assert changed(view, name="lws-0", ip="10.0.0.1") == ["+default/lws-0:8000"]
    assert ids(view) == ["default/lws-0:8000"]


def test_endpoints_in_updates_are_those_that_are_listed() -> None:
    view = view_of()
    updates = view.pods(Listed((read(pod("a"), Pod), read(pod("b", ip="10.0.0.2"), Pod))))
    assert tuple(each.endpoint for each in updates if isinstance(each, Upsert)) == view.endpoints


def test_one_change_looks_at_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work does not grow with the pool: of a hundred pods only the changed one is derived again."""
    pods = [pod(f"p-{number}", ip=f"10.0.{number // 200}.{number % 200 + 1}") for number in range(100)]
    view = view_of(*pods)
    derived: list[str] = []
    wants = PoolView._wants

    def counting(self: PoolView, replica: str) -> Any:
        derived.append(replica)
        return wants(self, replica)

    monkeypatch.setattr(PoolView, "_wants", counting)
    assert changed(view, name="p-7", ip="10.0.0.8", ready=False) == ["-default/p-7:8000"]
    assert derived == ["pod p-7"]
    derived.clear()
    assert listed(view, *pods) == ["+default/p-7:8000"]
    assert derived == ["pod p-7"]


def test_a_spec_without_requirements_selects_nobody() -> None:
    view = view_of(pod("a"))
    empty = PoolSpec(type(spec().selector)(), (8000,))
    assert said(view.set_spec(empty)) == ["-default/a:8000"]
