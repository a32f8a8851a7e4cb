"""Objectives, rewrites and inference models of a cluster as rules."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest

from picker.core.rules import Objective, Rulebook
from picker.core.updates import RulesChanged
from picker.sources.kubernetes.objects import (
    Changed,
    Gone,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    Listed,
)
from picker.sources.kubernetes.rules import LLM_D, OLD, RuleObjects

POOL = "ns/llama"
KINDS: dict[str, type[Any]] = {
    "inferenceobjectives": InferenceObjective,
    "inferencemodelrewrites": InferenceModelRewrite,
    "inferencemodels": InferenceModel,
}


def made(
    plural: str, name: str, spec: dict[str, Any], *, pool: str = "llama", born: str = "2026-01-01T00:00:00Z"
) -> Any:
    """An object as the API server gives it, decoded."""
    raw = {
        "apiVersion": "x/v1",
        "kind": "X",
        "metadata": {"name": name, "namespace": "ns", "uid": name, "creationTimestamp": born, "managedFields": [{}]},
        "spec": {"poolRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool}, **spec},
        "status": {"conditions": []},
    }
    return msgspec.json.decode(msgspec.json.encode(raw), type=KINDS[plural])


def told(*listed: tuple[str, str, list[Any]]) -> RulesChanged:
    objects = RuleObjects()
    for group, plural, found in listed:
        objects.apply(("ns", group, plural), Listed(tuple(found)), installed=True)
    return objects.changed("k", frozenset({POOL}))


def book(changed: RulesChanged) -> Rulebook:
    rules = Rulebook()
    rules.replace(changed.source, changed.objectives, changed.rewrites)
    return rules


def test_objectives_name_priorities() -> None:
    objects = [
        made("inferenceobjectives", "chat", {"priority": 5}),
        made("inferenceobjectives", "batch", {"priority": -2}),
        made("inferenceobjectives", "plain", {}),
        made("inferenceobjectives", "foreign", {"priority": 9}, pool="other"),
    ]
    rules = book(told((LLM_D, "inferenceobjectives", objects)))
    assert [rules.priority(name, None, POOL) for name in ("chat", "batch", "plain", "foreign")] == [5, -2, 0, 0]


def test_the_old_group_counts_only_where_the_current_is_not_installed() -> None:
    objects = RuleObjects()
    old = made("inferenceobjectives", "chat", {"priority": 1})
    objects.apply(("ns", OLD, "inferenceobjectives"), Listed((old,)), installed=True)
    objects.apply(("ns", LLM_D, "inferenceobjectives"), Listed(()), installed=False)
    assert objects.changed("k", frozenset({POOL})).objectives == (Objective(pool=POOL, name="chat", priority=1),)
    objects.apply(("ns", LLM_D, "inferenceobjectives"), Listed(()), installed=True)
    assert objects.changed("k", frozenset({POOL})).objectives == ()
    objects.apply(("ns", LLM_D, "inferenceobjectives"), Listed(()), installed=False)
    assert len(objects.changed("k", frozenset({POOL})).objectives) == 1


def exact(model: str, *targets: dict[str, Any]) -> dict[str, Any]:
    return {"matches": [{"model": {"type": "Exact", "value": model}}], "targets": list(targets)}


def test_rewrites_by_age_then_order() -> None:
    younger = made(
        "inferencemodelrewrites",
        "a-younger",
        {"rules": [exact("m", {"modelRewrite": "new"})]},
        born="2026-02-01T00:00:00Z",
    )
    older = made(
        "inferencemodelrewrites",
        "z-older",
        {
            "rules": [
                {"targets": [{"modelRewrite": "fallback"}]},
                exact("m", {"modelRewrite": "first"}),
                exact("m", {"modelRewrite": "second"}),
            ]
        },
    )
    rules = book(told((LLM_D, "inferencemodelrewrites", [younger, older])))
    assert rules.target("m", POOL, Random(0)) == "first"
    assert rules.target("anything", POOL, Random(0)) == "fallback"


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"matches": None, "targets": None},
        {"matches": [], "targets": []},
        {"targets": [{"modelRewrite": ""}]},
    ],
)
def test_rules_without_a_target_say_nothing(rule: dict[str, Any]) -> None:
    rewrite = made("inferencemodelrewrites", "r", {"rules": [rule]})
    assert told((LLM_D, "inferencemodelrewrites", [rewrite])).rewrites == ()


def test_a_match_without_a_model_is_for_any_model() -> None:
    rewrite = made("inferencemodelrewrites", "r", {"rules": [{"matches": [{}], "targets": [{"modelRewrite": "n"}]}]})
    assert book(told((LLM_D, "inferencemodelrewrites", [rewrite]))).target("x", POOL, Random(0)) == "n"


def test_inference_models_name_criticality_and_targets() -> None:
    models = [
        made(
            "inferencemodels",
            "chat",
            {
                "modelName": "chat",
                "criticality": "Critical",
                "targetModels": [{"name": "chat-v1", "weight": 0}, {"name": "chat-v2", "weight": 100}],
            },
        ),
        made("inferencemodels", "batch", {"modelName": "batch", "criticality": "Sheddable"}),
        made("inferencemodels", "odd", {"modelName": "odd", "criticality": "Whatever"}),
        made("inferencemodels", "nameless", {"criticality": "Critical"}),
    ]
    rules = book(told((OLD, "inferencemodels", models)))
    assert [rules.priority(None, model, POOL) for model in ("chat", "batch", "odd", "other")] == [1, -1, 0, 0]
    assert rules.target("chat", POOL, Random(0)) == "chat-v2"
    assert rules.target("batch", POOL, Random(0)) is None


def test_changes_and_deletions_are_followed() -> None:
    objects = RuleObjects()
    key = ("ns", LLM_D, "inferenceobjectives")
    objects.apply(key, Listed(()), installed=True)
    objects.apply(key, Changed(made("inferenceobjectives", "chat", {"priority": 1})), installed=True)
    objects.apply(key, Changed(made("inferenceobjectives", "chat", {"priority": 7})), installed=True)
    assert [each.priority for each in objects.changed("k", frozenset({POOL})).objectives] == [7]
    objects.apply(key, Gone(made("inferenceobjectives", "chat", {})), installed=True)
    assert objects.changed("k", frozenset({POOL})).objectives == ()
