"""Named policies: each a documented preset of plugins, and the way to build one from a configured profile.

It only assembles; what a plugin does is its own file's matter. `balanced` is the default until a policy in milliseconds
beats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import msgspec

import scorers
from picker.core import filters, pickers
from picker.core.scheduler import Profile


class PluginSpec(msgspec.Struct, frozen=True):
    """One plugin as configured: its name, its weight (scorers only) and its parameters."""

    name: str
    weight: float = 1.0
    params: Mapping[str, Any] = {}


class PolicySpec(msgspec.Struct, frozen=True):
    """A policy before its plugins are built. The filters that no policy may switch off are added in front."""

    filters: Sequence[PluginSpec] = ()
    scorers: Sequence[PluginSpec] = ()
    picker: PluginSpec = PluginSpec("max-score")


# The weights of `balanced`: what the engine says (queue, batch, KV) and what we know ourselves (in flight) count alike;
# a loaded adapter outweighs any one of them, since loading one costs more than a short queue; a prefix that is there
# outweighs them all until the holder has a queue; a session's home outweighs small differences of load, not large ones.
BUILTIN: Mapping[str, PolicySpec] = {
    "balanced": PolicySpec(
        scorers=(
            PluginSpec("queue-depth", 2.0),
            PluginSpec("running-requests", 1.0),
            PluginSpec("kv-usage", 2.0),
            PluginSpec("in-flight-requests", 2.0),
            PluginSpec("in-flight-tokens", 1.0),
            PluginSpec("lora-affinity", 3.0),
            PluginSpec("prefix-cache", 4.0),
            PluginSpec("no-hit-lru", 1.0),
            PluginSpec("session-affinity", 1.0),
        ),
    ),
    "least-loaded": PolicySpec(scorers=(PluginSpec("in-flight-requests", 1.0),)),
    "round-robin": PolicySpec(picker=PluginSpec("round-robin")),
    "random": PolicySpec(picker=PluginSpec("random")),
}


# What a plugin is, not how it is set: no parameters.
_FIXED = frozenset({"name", "refusal"})


class PolicyProblem(ValueError):
    """A policy cannot be built; the text says which plugin and why."""


def build(name: str, spec: PolicySpec) -> Profile:
    """The profile of a policy. Raises PolicyProblem for an unknown plugin, for parameters it does not take, and for
    a scorer that is named twice or has no positive weight.
    """
    names = [plugin.name for plugin in spec.scorers]
    for plugin in spec.scorers:
        if names.count(plugin.name) > 1:
            raise PolicyProblem(f"scorer `{plugin.name}` is there twice")
        if not 0 < plugin.weight < inf:
            raise PolicyProblem(f"scorer `{plugin.name}`: the weight must be a positive number")
    given = {plugin.name for plugin in spec.filters}
    specs = [PluginSpec(always) for always in filters.ALWAYS if always not in given] + list(spec.filters)
    return Profile(
        name=name,
        filters=tuple(_build("filter", filters.build, plugin) for plugin in specs),
        scorers=tuple((_build("scorer", scorers.build, plugin), plugin.weight) for plugin in spec.scorers),
        picker=_build("picker", pickers.build, spec.picker),
    )


def _build(kind: str, factory: Any, plugin: PluginSpec) -> Any:
    fixed = _FIXED.intersection(plugin.params)
    if fixed:
        raise PolicyProblem(f"{kind} `{plugin.name}`: `{min(fixed)}` cannot be set")
    try:
        built = factory(plugin.name, plugin.params)
    except KeyError:
        raise PolicyProblem(f"there is no {kind} `{plugin.name}`") from None
    except TypeError as error:
        raise PolicyProblem(f"{kind} `{plugin.name}`: {error}") from None
    if not isinstance(built, msgspec.Struct):
        return built
    try:
        # Building a struct checks no types: a scale of 0 or "8" would fail at every request.
        return msgspec.convert(msgspec.to_builtins(built), type(built))
    except msgspec.ValidationError as error:
        raise PolicyProblem(f"{kind} `{plugin.name}`: {error}") from None
