"""Whatever happened before, the endpoints are those of the last state: no ghosts, no order that matters."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.updates import EndpointUpdate, Remove, Upsert
from picker.core.values import Endpoint
from picker.sources.kubernetes.objects import Changed, Gone, Listed, Node, Pod
from picker.sources.kubernetes.pools import PoolSpec
from picker.sources.kubernetes.view import PoolView
from tests.fakes.kube_pods import node, pod, read
from tests.unit.sources.kubernetes.views import POOL, new_view, spec

LWS = "leaderworkerset.sigs.k8s.io/"
NAMES = ["a", "b", "c", "d"]
NODES = ["n1", "n2"]

LABELS = st.one_of(
    st.sampled_from(
        [
            {"app": "vllm"},
            {"app": "other"},
            {"app": "vllm", "tier": "gold"},
            {"app": "vllm", "llm-d.ai/role": "prefill"},
            {"app": "vllm", "llm-d.ai/role": "router"},
            {"app": "vllm", "nvidia.com/dynamo-component-type": "planner"},
            {"app": "vllm", "ray.io/cluster": "r", "ray.io/node-type": "head"},
            {"ray.io/cluster": "r", "ray.io/node-type": "worker"},
        ]
    ),
    st.builds(
        lambda group, worker: {"app": "vllm", f"{LWS}group-key": group, f"{LWS}worker-index": worker},
        st.sampled_from(["g", "h"]),
        st.sampled_from(["0", "1"]),
    ),
)
ANNOTATIONS = st.sampled_from(
    [{}, {f"{LWS}size": "2"}, {"llm-d.ai/active-ports": "8001"}, {"llm-d.ai/active-ports": ""}, {f"{LWS}size": "x"}]
)


@st.composite
def pods(draw: st.DrawFn) -> dict[str, Any]:
    return pod(
        draw(st.sampled_from(NAMES)),
        ip=draw(st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::3", "nonsense", None])),
        labels=draw(LABELS),
        annotations=draw(ANNOTATIONS),
        namespace=draw(st.sampled_from(["default", "default", "default", "elsewhere"])),
        node=draw(st.sampled_from([*NODES, None])),
        ready=draw(st.integers(0, 3)) > 0,
        deleted=draw(st.integers(0, 5)) == 0,
        phase=draw(st.sampled_from(["Running", "Running", "Running", "Failed"])),
        created=f"2026-03-01T1{draw(st.integers(0, 2))}:00:00Z",
        pod_uid=draw(st.sampled_from(["u1", "u2"])),
        containers=[{"name": "c", "ports": [{"containerPort": draw(st.sampled_from([8000, 8001, 9000]))}]}],
    )


SPECS: list[PoolSpec | None] = [
    None,
    spec(),
    spec(ports=(8000, 8001)),
    spec(ports=(8001,)),
    spec(selector={"app": "vllm", "tier": "gold"}),
    spec(selector={"app": "other"}),
]
EVENTS = st.one_of(
    st.tuples(st.just("pod"), pods()),
    st.tuples(st.just("pod"), pods()),
    st.tuples(st.just("gone"), st.tuples(st.sampled_from(NAMES), st.booleans())),
    st.tuples(st.just("pods"), st.lists(pods(), max_size=4, unique_by=lambda each: each["metadata"]["name"])),
    st.tuples(
        st.just("node"), st.tuples(st.sampled_from(NODES), st.sampled_from([{}, {"nvidia.com/gpu.product": "H100"}]))
    ),
    st.tuples(st.just("node gone"), st.sampled_from(NODES)),
    st.tuples(st.just("spec"), st.sampled_from(SPECS)),
)


class World:
    """The cluster as it is, the view that hears of it, and what somebody believes who only hears the view."""

    def __init__(self, workers: str) -> None:
        self.workers = workers
        self.view = new_view(entry={"workers": workers})
        self.pods: dict[tuple[str, str], Pod] = {}
        self.nodes: dict[str, Node] = {}
        self.spec: PoolSpec | None = None
        self.believed: dict[str, Endpoint] = {}

    def happen(self, kind: str, what: Any) -> None:
        match kind:
            case "pod":
                self.hear(self.view.pods(Changed(self.put(what))))
            case "gone":
                name, of_before = what
                known = self.pods.get(("default", name))
                if known is not None and not of_before:
                    del self.pods["default", name]
                    self.hear(self.view.pods(Gone(known)))
                else:
                    self.hear(self.view.pods(Gone(read(pod(name, pod_uid="u0"), Pod))))
            case "pods":
                self.pods = {}
                self.hear(self.view.pods(Listed(tuple(self.put(each) for each in what))))
            case "node":
                found = read(node(what[0], labels=what[1]), Node)
                self.nodes[what[0]] = found
                self.hear(self.view.nodes(Changed(found)))
            case "node gone":
                self.nodes.pop(what, None)
                self.hear(self.view.nodes(Gone(read(node(what), Node))))
            case "spec":
                self.spec = what
                self.hear(self.view.set_spec(what))

    def put(self, json_value: dict[str, Any]) -> Pod:
        found = read(json_value, Pod)
        self.pods[found.metadata.namespace, found.metadata.name] = found
        return found

    def hear(self, updates: list[EndpointUpdate]) -> None:
        for update in updates:
            match update:
                case Upsert(source, endpoint):
                    assert self.believed.get(endpoint.id) != endpoint
                    self.believed[endpoint.id] = endpoint
                case Remove(source, endpoint_id):
                    del self.believed[endpoint_id]
                case _:
                    raise AssertionError(update)
            assert source == POOL
        assert tuple(self.believed[name] for name in sorted(self.believed)) == self.view.endpoints

    def afresh(self, *, backwards: bool) -> PoolView:
        """A view that only ever heard of the last state."""
        view = new_view(entry={"workers": self.workers})
        every = list(self.pods.values())
        if backwards:
            for each in reversed(every):
                view.pods(Changed(each))
            view.set_spec(self.spec)
            for found in self.nodes.values():
                view.nodes(Changed(found))
        else:
            view.set_spec(self.spec)
            view.nodes(Listed(tuple(self.nodes.values())))
            view.pods(Listed(tuple(every)))
        return view


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=25), st.sampled_from(["auto", "never", "always"]))
def test_the_endpoints_are_those_of_the_last_state(events: list[tuple[str, Any]], workers: str) -> None:
    world = World(workers)
    world.happen("spec", spec())
    for kind, what in events:
        world.happen(kind, what)

    addresses = [endpoint.address for endpoint in world.view.endpoints]
    assert len(set(addresses)) == len(addresses)
    for backwards in (False, True):
        fresh = world.afresh(backwards=backwards)
        assert fresh.endpoints == world.view.endpoints
        assert fresh.problem == world.view.problem
    world.happen("pods", [])
    assert world.view.endpoints == ()
    assert (world.view._wanted, world.view._claims, world.view._holders, world.view._replicas) == ({}, {}, {}, {})
