"""The page under the reference pickers' names stays small and cheap, whatever names clients invent."""

from __future__ import annotations

import asyncio
import gc
import time
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import generate_latest

from picker.admin import app
from picker.core.events import Outcome, Usage
from picker.core.record import RequestRecord
from picker.telemetry import reference_metrics
from tests.unit.core.builders import state
from tests.unit.reference_rig import FLOW, Rig


def models_on(rig: Rig) -> set[str]:
    return {
        sample.labels["model_name"]
        for family in rig.families()
        for sample in family.samples
        if "model_name" in sample.labels
    }


def test_model_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_metrics, "NAMES_MAX", 20)
    rig = Rig()
    for number in range(200):
        rig.finish(model=f"m{number}")
    rig.finish(model="m1", target_model="m777")
    assert models_on(rig) == {f"m{number}" for number in range(20)} | {"other"}
    other = FLOW | {"model_name": "other", "target_model_name": "other"}
    assert rig.value("llm_d_epp_request_total", **other) == 180
    assert rig.value("llm_d_epp_request_total", **other | {"model_name": "m1"}) == 1


def test_invented_names_take_no_places() -> None:
    rig = Rig(state("a", models=frozenset({"real"})))
    for number in range(50):
        rig.finish(model=f"invented-{number}", status=404)
        rig.finish(model=f"gone-{number}", status=0, outcome=Outcome.CLIENT_GONE)
        rig.finish(model=f"refused-{number}", status=404, outcome=Outcome.REJECTED, endpoint=None)
        rig.fly(f"flying-{number}")
    rig.fly("real")
    assert models_on(rig) == {"real", "other"}
    assert rig.value("inference_objective_running_requests", model_name="other") == 50
    rig.finish(model="x" * 300)
    assert models_on(rig) == {"real", "other"}


def test_flows_and_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_metrics, "FLOWS_MAX", 5)
    monkeypatch.setattr(reference_metrics, "ATTEMPTS_MAX", 7)
    rig = Rig()
    for number in range(50):
        rig.finish(priority=number, endpoint=f"e{number}")
    reference = rig.metrics.reference
    assert reference is not None
    assert len(reference._flows) == 6
    assert len(reference._attempts) == 8
    rig.rows = tuple(state(f"e{number}") for number in range(7))
    total = sum(
        sample.value
        for family in rig.families()
        for sample in family.samples
        if sample.name == "llm_d_epp_scheduler_attempts_total"
    )
    assert total == 50


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "new\nline", "ünïcode 🦊", "other", " ", ""])
def test_odd_names_survive_the_page(name: str) -> None:
    rig = Rig()
    rig.finish(model=name)
    assert name in models_on(rig)


def test_a_record_costs_little() -> None:
    rig = Rig()
    assert rig.metrics.reference is not None
    usage = Usage(prompt_tokens=100, output_tokens=11, cached_tokens=64)
    given: dict[str, Any] = {"id": "r", "path": "/", "status": 200, "outcome": Outcome.COMPLETED, "duration_s": 3.0}
    record = RequestRecord(**given, model="m", endpoint="a", stream=True, first_byte_s=1.0, usage=usage)
    started = time.process_time()
    for _ in range(2000):
        rig.metrics.reference.record(record)
    assert (time.process_time() - started) / 2000 < 5 * 20e-6


async def test_other_tasks_get_their_turn_while_a_long_page_is_made() -> None:
    rig = Rig(state("a"))
    for number in range(200):
        rig.finish(model=f"m{number}", first_byte_s=1.0, usage=Usage(prompt_tokens=5, output_tokens=9), stream=True)
    turns: list[float] = []

    async def other() -> None:
        while True:
            turns.append(time.thread_time())
            await asyncio.sleep(0)

    # Thousands of tests leave a large heap behind, and one collection of it takes longer than any slice.
    gc.disable()
    try:
        task = asyncio.create_task(other())
        page = await app._page(rig.metrics.registry)
        task.cancel()
    finally:
        gc.enable()
    assert page == generate_latest(rig.metrics.registry)
    longest_s = max(later - earlier for earlier, later in pairwise(turns))
    assert longest_s < (turns[-1] - turns[0]) / 3
