"""Which endpoint the endpoint-picker contract's scheduling cases expect, asked of the policy `balanced`.

The numbers are those of the reference's test inventory (part A). How many adapter slots its pods have is not stated, so
every choice must hold for two and for four, and whether or not the engine tells its batch.
"""

from __future__ import annotations

import random

import pytest

from picker.core.values import Decision, EndpointState, Rejection, RejectionCode
from tests.unit.core.builders import chosen, contract_pod, request, scheduler, snapshot

TARGET = "sql-lora-1fdg2"
Pods = list[tuple[int, float, float, tuple[str, ...]]]

CASES: dict[str, tuple[Pods, str, int]] = {
    "1 lower queue and kv cache": ([(0, 3, 0.2, ()), (1, 0, 0.1, ()), (2, 10, 0.2, ())], "my-model-12345", 1),
    "2 active lora, low queue": (
        [(0, 0, 0.2, ("foo", "bar")), (1, 0, 0.1, ("foo", TARGET)), (2, 10, 0.2, ("foo", "bar"))],
        TARGET,
        1,
    ),
    "5 lora despite higher kv cache": (
        [(0, 10, 0.2, ("foo", "bar")), (1, 10, 0.4, ("foo", TARGET)), (2, 10, 0.3, ("foo",))],
        TARGET,
        1,
    ),
    "7 no shedding by default": (
        [(0, 6, 0.2, ("foo", "bar", TARGET)), (1, 0, 0.85, ("foo",)), (2, 10, 0.9, ("foo",))],
        TARGET,
        0,
    ),
    "10 best of the subset": ([(0, 3, 0.2, ()), (1, 0, 0.1, ()), (2, 10, 0.2, ())], "my-model-12345", 1),
}


def pods(given: Pods, slots: int, running: float | None) -> list[EndpointState]:
    return [
        contract_pod(index, queue, usage, *adapters, slots=slots, running=running)
        for index, queue, usage, adapters in given
    ]


def ask(states: list[EndpointState], model: str, subset: frozenset[str] | None) -> Decision | Rejection:
    asked = request(1, model="objective", target_model=model, subset=subset, max_output_tokens=100)
    return scheduler("balanced").schedule(asked, snapshot(*states), 1.0, random.Random(1))


@pytest.mark.parametrize("running", [None, 0.0])
@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_choice(case: str, slots: int, running: float | None) -> None:
    given, model, expected = CASES[case]
    subset = frozenset({"192.168.1.1", "192.168.1.2", "192.168.1.3"}) if case.startswith("10") else None

    decision = ask(pods(given, slots, running), model, subset)

    assert chosen(decision) == f"pod-{expected}"


@pytest.mark.parametrize("slots", [2, 4])
def test_11_a_subset_of_one_despite_its_load(slots: int) -> None:
    states = pods([(0, 0, 0.2, ()), (1, 0, 0.1, ()), (2, 10, 0.2, ())], slots, 0.0)
    assert chosen(ask(states, "my-model-12345", frozenset({"192.168.1.3"}))) == "pod-2"


def test_12_a_subset_nobody_is_in_is_refused() -> None:
    states = pods([(0, 0, 0.2, ()), (1, 0, 0.1, ())], 2, 0.0)
    rejection = ask(states, "my-model-12345", frozenset({"192.168.1.99"}))
    assert isinstance(rejection, Rejection)
    assert rejection.code is RejectionCode.SUBSET_EMPTY
