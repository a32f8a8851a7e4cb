"""The built-in filters, one by one."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from picker import policies
from picker.core import filters
from picker.core.scheduler import Scheduler
from picker.core.values import EndpointState, Lora, Rejection, RejectionCode, Role, Standing
from tests.unit.core.builders import request, snapshot, state


def kept(name: str, states: list[EndpointState], params: dict[str, Any] | None = None, **fields: Any) -> list[str]:
    """Ids of the rows a filter keeps."""
    verdicts = filters.build(name, params).reject(request(1, **fields), states)
    assert len(verdicts) == len(states)
    return [each.endpoint.id for each, verdict in zip(states, verdicts, strict=True) if verdict is None]


def address(name: str, text: str) -> EndpointState:
    return state(name, endpoint={"address": text})


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        (None, ["a", "b", "c", "d", "e"]),
        (frozenset[str](), []),
        (frozenset({"10.0.0.1:8000"}), ["a"]),
        (frozenset({"10.0.0.1"}), ["a", "b"]),
        (frozenset({"10.0.0.1:8001", "fd00::1"}), ["b", "c", "d"]),
        (frozenset({"[fd00::1]:8000"}), ["c"]),
        (frozenset({"[fd00::1]"}), ["c", "d"]),
        (frozenset({"10.0.0.99"}), []),
        (frozenset({"", ":", "8000"}), []),
        (frozenset({"10.0.0.1:80", "10.0.0"}), []),
    ],
)
def test_subset(subset: frozenset[str] | None, expected: list[str]) -> None:
    states = [
        address("a", "10.0.0.1:8000"),
        address("b", "10.0.0.1:8001"),
        address("c", "[fd00::1]:8000"),
        address("d", "[fd00::1]:8001"),
        address("e", ""),
    ]
    assert kept("subset", states, subset=subset) == expected


def test_pinned() -> None:
    states = [state("a"), state("b")]
    assert kept("pinned", states) == ["a", "b"]
    assert kept("pinned", states, pinned="b") == ["b"]
    assert kept("pinned", states, pinned="gone") == []


def test_pool() -> None:
    states = [
        state("a", endpoint={"pool": "ns/a"}),
        state("b", endpoint={"pool": "ns/b"}),
        state("outside"),
    ]
    assert kept("pool", states) == ["a", "b", "outside"]
    assert kept("pool", states, pool="ns/b") == ["b"]
    assert kept("pool", states, pool="b") == []
    assert kept("pool", states, pool="ns/gone") == []


def test_a_pool_is_no_preference() -> None:
    """Neither health nor models, nor what failed before, send a request to another pool."""
    made = policies.build("balanced", policies.BUILTIN["balanced"])
    assert [each.name for each in made.filters[:3]] == ["pinned", "pool", "subset"]
    rows = snapshot(
        state("a", endpoint={"pool": "ns/a"}, standing=Standing.OUT),
        state("b", endpoint={"pool": "ns/b"}, models=frozenset({"m"})),
    )
    for pool, code in (("ns/a", RejectionCode.NO_READY_ENDPOINTS), ("ns/c", RejectionCode.POOL_NOT_FOUND)):
        verdict = Scheduler(made).schedule(request(1, model="m", pool=pool), rows, 1.0, Random(1))
        assert isinstance(verdict, Rejection)
        assert verdict.code is code
        assert "model `" not in verdict.message
        assert [reason.partition(":")[0] for reason in verdict.table.reasons][1] == "pool"


def test_role() -> None:
    states = [state(role.value, endpoint={"role": role}) for role in Role]
    assert kept("role", states) == ["both", "decode"]


def test_health_prefers_the_ready_and_falls_back_to_the_degraded() -> None:
    ready = state("r")
    degraded = state("d", standing=Standing.DEGRADED, standing_reason="metrics failing")
    out = state("o", standing=Standing.OUT, standing_reason="hung")
    bare = state("b", standing=Standing.OUT)

    assert kept("health", [ready, degraded, out]) == ["r"]
    assert kept("health", [degraded, out]) == ["d"]
    assert kept("health", [out]) == []
    verdicts = filters.build("health").reject(request(), [ready, degraded, out, bare])
    assert verdicts == [None, "metrics failing", "hung", "out"]


def test_tried() -> None:
    assert kept("tried", [state("a"), state("b")], tried=frozenset({"a", "x"})) == ["b"]


@pytest.mark.parametrize("strict", [False, True])
def test_model(strict: bool) -> None:
    states = [state("a", models=frozenset({"m", "l"})), state("b", models=frozenset({"n"})), state("c")]
    assert kept("model", states, strict_model=strict) == ["a", "b", "c"]
    assert kept("model", states, model="m", strict_model=strict) == ["a", "c"]
    assert kept("model", states, model="alias", target_model="n", strict_model=strict) == ["b", "c"]
    assert kept("model", states[:2], model="nobody", strict_model=strict) == ([] if strict else ["a", "b"])


def test_a_known_empty_model_list_serves_nothing() -> None:
    assert kept("model", [state("a", models=frozenset())], model="m", strict_model=True) == []


def test_label() -> None:
    states = [
        state("a", endpoint={"labels": {"zone": "x", "gpu": "h100"}}),
        state("b", endpoint={"labels": {"zone": "y"}}),
        state("c"),
    ]
    assert kept("label", states, {"labels": {"zone": "x"}}) == ["a"]
    assert kept("label", states, {"labels": {"zone": "x", "gpu": "l4"}}) == []
    assert kept("label", states) == ["a", "b", "c"]


def test_saturation_keeps_all_when_all_are_over_unless_it_sheds() -> None:
    states = [state("a", waiting=6.0), state("b", waiting=5.0, kv_usage=0.9), state("c", waiting=5.0, kv_usage=0.8)]
    assert kept("saturation", states) == ["c"]
    assert kept("saturation", states[:2]) == ["a", "b"]
    assert kept("saturation", states[:2], {"shed": True}) == []
    assert filters.build("saturation").refusal is RejectionCode.SATURATED


def test_unknown_figures_are_not_saturated() -> None:
    assert kept("saturation", [state("a"), state("b", waiting=9.0)]) == ["a"]


def test_lora_keeps_those_that_need_evict_nothing() -> None:
    full = state("full", lora=Lora(frozenset({"x"}), frozenset({"y"}), 2))
    room = state("room", lora=Lora(frozenset({"x"}), frozenset(), 2))
    holds = state("holds", lora=Lora(frozenset({"m"}), frozenset({"y"}), 2))
    queued = state("queued", lora=Lora(frozenset({"x"}), frozenset({"m"}), 2))
    plain = state("plain")
    assert kept("lora", [full, room, holds, queued, plain], model="m") == ["room", "holds", "queued", "plain"]
    assert kept("lora", [full], model="m") == ["full"]


def test_what_may_not_be_switched_off_exists_and_tries_before_health() -> None:
    assert set(filters.ALWAYS) <= filters.BUILTIN.keys()
    assert filters.ALWAYS.index("tried") < filters.ALWAYS.index("health")


def test_unknown_names_and_parameters() -> None:
    with pytest.raises(KeyError):
        filters.build("nope")
    with pytest.raises(TypeError):
        filters.build("health", {"x": 1})
