"""Policies by name, and profiles put together from plugins."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from picker import policies
from picker.core import filters
from picker.core.scheduler import Scheduler
from picker.core.values import Decision
from picker.policies import PluginSpec, PolicyProblem, PolicySpec
from tests.unit.core.builders import chosen, request, scheduler, snapshot, state


def picks(policy: str, *states: Any, rounds: int = 200, **fields: Any) -> Counter[str]:
    """Who is chosen how often when nothing changes in between."""
    made, rng = scheduler(policy), random.Random(3)
    view = snapshot(*states)
    return Counter(chosen(made.schedule(request(1, **fields), view, 1.0, rng)) for _ in range(rounds))


def test_the_promised_policies_exist() -> None:
    assert set(policies.BUILTIN) == {"balanced", "least-loaded", "round-robin", "random"}


@pytest.mark.parametrize("name", sorted(policies.BUILTIN))
def test_no_policy_goes_without_the_filters_that_keep_requests_safe(name: str) -> None:
    profile = policies.build(name, policies.BUILTIN[name])
    assert [each.name for each in profile.filters] == list(filters.ALWAYS)
    assert profile.name == name


def test_balanced_prefers_the_idle_one() -> None:
    idle = state("idle", waiting=0.0, running=1.0, kv_usage=0.1)
    busy = state("busy", waiting=4.0, running=30.0, kv_usage=0.7, in_flight=10, in_flight_tokens=20_000)
    assert picks("balanced", busy, idle) == {"idle": 200}


def test_balanced_shares_between_equals() -> None:
    counts = picks("balanced", state("a"), state("b"), rounds=1000)
    assert min(counts.values()) > 400


def test_balanced_keeps_a_session_home_against_small_differences_only() -> None:
    rows = [state(name, waiting=0.0, running=0.0, kv_usage=0.1) for name in "abc"]
    (home,) = picks("balanced", *rows, session="s")
    small = [state(n, waiting=0.0, running=2.0 if n == home else 0.0, kv_usage=0.1) for n in "abc"]
    large = [state(n, waiting=20.0 if n == home else 0.0, running=0.0, kv_usage=0.1) for n in "abc"]
    assert picks("balanced", *small, session="s") == {home: 200}
    assert home not in picks("balanced", *large, session="s")


def test_least_loaded_counts_our_own_requests() -> None:
    assert picks("least-loaded", state("a", in_flight=3), state("b", in_flight=2, waiting=99.0)) == {"b": 200}


def test_round_robin_and_random() -> None:
    rows = [state("a", in_flight=90), state("b"), state("c")]
    assert picks("round-robin", *rows, rounds=300) == {"a": 100, "b": 100, "c": 100}
    assert min(picks("random", *rows, rounds=900).values()) > 240


def test_a_profile_of_ones_own() -> None:
    spec = PolicySpec(
        filters=(PluginSpec("label", params={"labels": {"zone": "x"}}), PluginSpec("health")),
        scorers=(PluginSpec("queue-depth", 2.0, {"scale": 8}), PluginSpec("kv-usage")),
        picker=PluginSpec("weighted-random"),
    )
    profile = policies.build("mine", spec)

    names = [each.name for each in profile.filters]
    assert names[-2:] == ["label", "health"]
    assert sorted(names) == sorted([*filters.ALWAYS, "label"]), "a filter named by the user comes where they put it"
    assert [(each.name, weight) for each, weight in profile.scorers] == [("queue-depth", 2.0), ("kv-usage", 1.0)]
    assert profile.picker.name == "weighted-random"
    rows = [state("a", endpoint={"labels": {"zone": "x"}}), state("b")]
    verdict = Scheduler(profile).schedule(request(1), snapshot(*rows), 1.0, random.Random(1))
    assert isinstance(verdict, Decision)
    assert verdict.endpoint.id == "a"


PROBLEMS: dict[str, tuple[PolicySpec, str]] = {
    "scorer": (PolicySpec(scorers=(PluginSpec("nope"),)), "there is no scorer `nope`"),
    "filter": (PolicySpec(filters=(PluginSpec("nope"),)), "there is no filter `nope`"),
    "picker": (PolicySpec(picker=PluginSpec("nope")), "there is no picker `nope`"),
    "parameter": (PolicySpec(scorers=(PluginSpec("kv-usage", params={"x": 1}),)), "kv-usage.*x"),
    "picker parameter": (PolicySpec(picker=PluginSpec("random", params={"x": 1})), "picker `random`"),
    "type": (PolicySpec(scorers=(PluginSpec("queue-depth", params={"scale": "8"}),)), "float"),
    "zero": (PolicySpec(scorers=(PluginSpec("queue-depth", params={"scale": 0}),)), "> 0"),
    "infinite": (PolicySpec(scorers=(PluginSpec("in-flight-tokens", params={"scale": float("inf")}),)), "scale"),
    "not a number": (PolicySpec(scorers=(PluginSpec("queue-depth", params={"scale": float("nan")}),)), "scale"),
    "labels": (PolicySpec(filters=(PluginSpec("label", params={"labels": ["zone"]}),)), "labels"),
    "name": (PolicySpec(scorers=(PluginSpec("kv-usage", params={"name": "x"}),)), "`name` cannot be set"),
    "refusal": (PolicySpec(filters=(PluginSpec("health", params={"refusal": "x"}),)), "`refusal` cannot be set"),
    "twice": (PolicySpec(scorers=(PluginSpec("kv-usage"), PluginSpec("kv-usage", 2.0))), "there twice"),
    "weight zero": (PolicySpec(scorers=(PluginSpec("kv-usage", 0.0),)), "positive"),
    "weight nan": (PolicySpec(scorers=(PluginSpec("kv-usage", float("nan")),)), "positive"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_told_when_the_policy_is_built_not_when_a_request_comes(case: str) -> None:
    spec, text = PROBLEMS[case]
    with pytest.raises(PolicyProblem, match=text):
        policies.build("mine", spec)
