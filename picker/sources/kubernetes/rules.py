"""From the cluster's objectives, rewrites and inference models to rules. Pure.

Precedence of rewrites, as the extension defines it: exact before generic (the rulebook's part), then the oldest object,
then the order inside it. InferenceModels come from before both kinds and go last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from picker.core.rules import Objective, Rewrite, Target
from picker.core.updates import RulesChanged
from picker.sources.kubernetes.objects import (
    Changed,
    Gone,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    Listed,
    Meta,
    RewriteRule,
)

OLD = "inference.networking.x-k8s.io"
LLM_D = "llm-d.ai"

T = TypeVar("T", InferenceModel, InferenceModelRewrite, InferenceObjective)

RULE_KINDS: tuple[tuple[str, str, str, type[Any]], ...] = (
    (LLM_D, "v1alpha2", "inferenceobjectives", InferenceObjective),
    (OLD, "v1alpha2", "inferenceobjectives", InferenceObjective),
    (LLM_D, "v1alpha2", "inferencemodelrewrites", InferenceModelRewrite),
    (OLD, "v1alpha2", "inferencemodelrewrites", InferenceModelRewrite),
    (OLD, "v1alpha2", "inferencemodels", InferenceModel),
)
"""Group, version, plural and struct of each kind of object that makes rules."""

# InferenceModel knew three words. The extension replaced them by numbers: above, at and below the usual.
_CRITICALITY = {"Critical": 1, "Standard": 0, "Sheddable": -1}
# Rules of one object; clusters have a handful.
RULES_MAX = 1000


class RuleObjects:
    """The mirrored objects that make rules, by namespace and kind."""

    def __init__(self) -> None:
        self._mirrors: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._installed: set[tuple[str, str]] = set()

    def apply(
        self, key: tuple[str, str, str], event: Listed[Any] | Changed[Any] | Gone[Any], *, installed: bool
    ) -> None:
        """One event of the kind `key` (namespace, group, plural), and whether the cluster has that kind at all."""
        if installed:
            self._installed.add(key[1:])
        else:
            self._installed.discard(key[1:])
        mirror = self._mirrors.setdefault(key, {})
        if isinstance(event, Listed):
            mirror.clear()
            mirror.update({each.metadata.name: each for each in event.objects})
        elif isinstance(event, Changed):
            mirror[event.object.metadata.name] = event.object
        else:
            mirror.pop(event.object.metadata.name, None)

    def changed(self, source: str, pools: frozenset[str]) -> RulesChanged:
        """All rules for these pools now."""
        models = self._all(OLD, "inferencemodels")
        objectives = [*objectives_of(self._current("inferenceobjectives")), *model_objectives_of(models)]
        rewrites = [*rewrites_of(self._current("inferencemodelrewrites")), *model_rewrites_of(models)]
        return RulesChanged(
            source,
            tuple(each for each in objectives if each.pool in pools),
            tuple(each for each in rewrites if each.pool in pools),
        )

    def _current(self, plural: str) -> list[Any]:
        """Objects of the current group; those of the old one only where the current is not installed: a cluster that
        migrates has both, and the old ones are leftovers.
        """
        return self._all(LLM_D if (LLM_D, plural) in self._installed else OLD, plural)

    def _all(self, group: str, plural: str) -> list[Any]:
        return [each for key, mirror in self._mirrors.items() if key[1:] == (group, plural) for each in mirror.values()]


def objectives_of(objects: Iterable[InferenceObjective]) -> list[Objective]:
    """One objective each. A priority that is not given is 0."""
    return [
        Objective(
            pool=_pool(each.metadata, each.spec.pool_ref.name),
            name=each.metadata.name,
            priority=each.spec.priority or 0,
        )
        for each in _oldest_first(objects)
    ]


def model_objectives_of(objects: Iterable[InferenceModel]) -> list[Objective]:
    """The criticality of models, by what clients call them. An unknown word says nothing."""
    return [
        Objective(
            pool=_pool(each.metadata, each.spec.pool_ref.name),
            model=each.spec.model_name,
            priority=_CRITICALITY[each.spec.criticality],
        )
        for each in _oldest_first(objects)
        if each.spec.criticality in _CRITICALITY and each.spec.model_name
    ]


def rewrites_of(objects: Iterable[InferenceModelRewrite]) -> list[Rewrite]:
    """One rewrite per rule that has a target; matches without a model make it one for any model."""
    return [
        Rewrite(
            pool=_pool(each.metadata, each.spec.pool_ref.name),
            name=each.metadata.name,
            models=_models(rule),
            targets=targets,
        )
        for each in _oldest_first(objects)
        for rule in (each.spec.rules or ())[:RULES_MAX]
        if (targets := _targets(rule))
    ]


def model_rewrites_of(objects: Iterable[InferenceModel]) -> list[Rewrite]:
    """The targets of models that have any."""
    return [
        Rewrite(
            pool=_pool(each.metadata, each.spec.pool_ref.name),
            name=each.metadata.name,
            models=frozenset((each.spec.model_name,)),
            targets=targets,
        )
        for each in _oldest_first(objects)
        if each.spec.model_name
        and (targets := tuple(Target(t.name, t.weight) for t in each.spec.target_models or () if t.name))
    ]


def _models(rule: RewriteRule) -> frozenset[str]:
    named = [match.model.value if match.model is not None else "" for match in rule.matches or ()]
    return frozenset() if "" in named else frozenset(named)


def _targets(rule: RewriteRule) -> tuple[Target, ...]:
    return tuple(Target(each.model_rewrite, each.weight) for each in rule.targets or () if each.model_rewrite)


def _pool(meta: Meta, name: str) -> str:
    return f"{meta.namespace}/{name}"


def _oldest_first(objects: Iterable[T]) -> list[T]:
    return sorted(objects, key=lambda each: (each.metadata.creation_timestamp or "", each.metadata.name))
