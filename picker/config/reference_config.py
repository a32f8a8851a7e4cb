"""The configuration file of the reference endpoint picker, an EndpointPickerConfig, as values of ours.

Its scheduling profile becomes a policy when we have a counterpart for every plugin in it; otherwise it is checked, told
and left alone. What the plugins are is `reference_plugins.py`'s matter. Facts: llm-d-router's
`endpointpickerconfig_types.go` and its loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from picker.config.fields import keys_at
from picker.config.flag_values import FlagValues
from picker.config.locate import Document
from picker.config.problems import KeyPath, Problem, in_reading_order, sentence, shown
from picker.config.reference_plugins import BUILT_IN, COUNTERPARTS, Slot
from picker.config.sections import Section

PROFILE = "endpoint-picker-config"
"""The name of the profile made from one."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=253)]


# The fields bear the names that stand in the file. Real files have a dozen plugins; the bounds keep a mistake from
# becoming a page of messages.
class _Plugin(Section):
    type: Text
    name: Text | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Reference(Section):
    pluginRef: Text
    weight: float | None = Field(default=None, ge=0, le=1_000_000, allow_inf_nan=False)


class _Profile(Section):
    name: Text
    plugins: tuple[_Reference, ...] = Field(default=(), max_length=100)


class _PickerConfig(Section):
    model_config = ConfigDict(extra="allow")

    apiVersion: Literal["llm-d.ai/v1alpha1", "inference.networking.x-k8s.io/v1alpha1"]
    kind: Literal["EndpointPickerConfig"]
    plugins: tuple[_Plugin, ...] = Field(default=(), max_length=200)
    schedulingProfiles: tuple[_Profile, ...] = Field(default=(), max_length=100)


@dataclass(frozen=True, slots=True)
class _Use:
    """One plugin in the profile: its type, its parameters and its weight."""

    type: str
    parameters: Mapping[str, Any]
    weight: float = 1.0


# The reference adds it by itself to a profile without a picker.
_IMPLIED_PICKER = _Plugin(type="max-score-picker")


def picker_config_values(document: Document, flag: str) -> FlagValues:
    """The policy an EndpointPickerConfig asks for, as values that came from `flag`; or everything wrong with it."""
    said = FlagValues()
    found: _PickerConfig | None = None
    problems = list(document.problems)
    if not document.broken:
        found, wrong = _parse(document)
        problems += wrong
    if found is None or problems:
        said.problems.extend(in_reading_order(problems))
        return said
    sections = [name for name, value in (found.model_extra or {}).items() if value]
    if sections:
        said.warn(f"{document.name}: without effect here: {', '.join(sections)}")
    uses, others = _used(found)
    missing = _missing(found, uses)
    unknown = list(dict.fromkeys((*missing, *(o for o in others if o not in BUILT_IN and o not in COUNTERPARTS))))
    if unknown:
        rest = "; its scheduling profile is not used, the policy is balanced unless configured" if missing else ""
        said.warn(f"{document.name}: not supported yet: {', '.join(unknown)}{rest}")
    if not missing:
        _put_policy(said, uses, flag)
        _tell_parameters(said, document.name, uses)
    return said


def _parse(document: Document) -> tuple[_PickerConfig | None, list[Problem]]:
    if not isinstance(document.data, dict):
        return None, [_problem(document, (), "must be an EndpointPickerConfig (lines of key: value)")]
    try:
        found = _PickerConfig.model_validate(document.data)
    except ValidationError as failure:
        return None, [_located(document, error) for error in failure.errors(include_url=False)]
    return found, [_problem(document, path, message) for path, message in _contradictions(found)]


def _located(document: Document, error: Any) -> Problem:
    path: KeyPath = error["loc"]
    quiet = error["type"] in ("extra_forbidden", "missing")
    message = sentence(error, keys_at(_PickerConfig, path[:-1]))
    return _problem(document, path, message, got="" if quiet else shown(error["input"]))


def _problem(document: Document, path: KeyPath, message: str, *, got: str = "") -> Problem:
    mark = document.keys.get(path) if got == "" else None
    place = mark or document.nearest(path)[1]
    dotted = ".".join(map(str, path))
    return Problem(document.name, message, path=dotted, line=place.line, column=place.column, got=got)


def _contradictions(found: _PickerConfig) -> Iterable[tuple[KeyPath, str]]:
    """What is well formed and yet wrong: names that are there twice or not at all, two pickers in a profile."""
    declared: dict[str, str] = {}
    for index, plugin in enumerate(found.plugins):
        if _name(plugin) in declared:
            yield ("plugins", index), f"an earlier plugin is called {_name(plugin)} too"
        declared[_name(plugin)] = plugin.type
    known = {**declared, _name(_IMPLIED_PICKER): _IMPLIED_PICKER.type}
    names: set[str] = set()
    for index, profile in enumerate(found.schedulingProfiles):
        if profile.name in names:
            yield ("schedulingProfiles", index, "name"), f"an earlier profile is called {profile.name} too"
        names.add(profile.name)
        for at, use in enumerate(profile.plugins):
            if use.pluginRef not in known:
                there = ", ".join(sorted(declared)) or "none"
                path = ("schedulingProfiles", index, "plugins", at, "pluginRef")
                yield path, f"there is no plugin {use.pluginRef} under plugins: (there: {there})"
        pickers = [use.pluginRef for use in profile.plugins if _slot(known.get(use.pluginRef, "")) is Slot.PICKER]
        if len(pickers) > 1:
            yield ("schedulingProfiles", index, "plugins"), f"more than one picker: {', '.join(pickers)}"


def _name(plugin: _Plugin) -> str:
    return plugin.name or plugin.type


def _slot(plugin_type: str) -> Slot | None:
    return COUNTERPARTS[plugin_type].slot if plugin_type in COUNTERPARTS else None


def _used(found: _PickerConfig) -> tuple[list[_Use], list[str]]:
    """The plugins of the profile, and the types of the others. Without a profile all that may be in one are in it."""
    by_name = {_name(plugin): plugin for plugin in (_IMPLIED_PICKER, *found.plugins)}
    if found.schedulingProfiles:
        references = found.schedulingProfiles[0].plugins
        uses = [(by_name[reference.pluginRef], reference.weight) for reference in references]
    else:
        uses = [(plugin, None) for plugin in found.plugins if plugin.type not in BUILT_IN]
    chosen = {id(plugin) for plugin, _ in uses}
    others = [plugin for plugin in found.plugins if id(plugin) not in chosen]
    if not any(_slot(plugin.type) is Slot.PICKER for plugin, _ in uses):
        # A picker that no profile names is used by all of them.
        uses += [(plugin, None) for plugin in others if _slot(plugin.type) is Slot.PICKER][:1]
    taken = [_Use(plugin.type, plugin.parameters, 1.0 if weight is None else weight) for plugin, weight in uses]
    return taken, [plugin.type for plugin in others]


def _missing(found: _PickerConfig, uses: Sequence[_Use]) -> list[str]:
    """What keeps the profile from becoming ours, by name."""
    missing = [
        use.type
        for use in uses
        if (ours := COUNTERPARTS.get(use.type)) is None or (ours.params and ours.params(use.parameters) is None)
    ]
    # Their profile handlers decide which profiles run; we have the one that runs the only one.
    missing += [
        plugin.type
        for plugin in found.plugins
        if plugin.type.endswith("-profile-handler") and plugin.type not in COUNTERPARTS
    ]
    if len(found.schedulingProfiles) > 1:
        missing.append(f"{len(found.schedulingProfiles)} scheduling profiles")
    return list(dict.fromkeys(missing))


def _put_policy(said: FlagValues, uses: Sequence[_Use], flag: str) -> None:
    filters: list[dict[str, Any]] = []
    weights: dict[str, float] = {}
    picker: _Use | None = None
    for use in uses:
        ours = COUNTERPARTS[use.type]
        if ours.slot is Slot.FILTER and ours.params is not None:
            filters.append({"name": ours.name, "params": ours.params(use.parameters)})
        elif ours.slot is Slot.SCORER and use.weight > 0:
            weights[ours.name] = weights.get(ours.name, 0.0) + use.weight
        elif ours.slot is Slot.PICKER:
            picker = use
    if picker is None and not weights and not filters:
        return  # It says nothing about scheduling.
    profile: dict[str, Any] = {
        "filters": filters,
        "scorers": [{"name": name, "weight": weight} for name, weight in weights.items()],
    }
    if picker is not None:
        profile["picker"] = {"name": COUNTERPARTS[picker.type].name}
        most = picker.parameters.get("maxNumOfEndpoints")
        if most is not None:
            said.put("picker.fallbacks", most - 1 if type(most) is int else most, flag)
    said.put("policy", PROFILE, flag)
    said.put(("profiles", PROFILE), profile, flag)


def _tell_parameters(said: FlagValues, name: str, uses: Sequence[_Use]) -> None:
    idle = [
        f"{use.type}.{parameter}"
        for use in uses
        if COUNTERPARTS[use.type].params is None
        for parameter in use.parameters
        if parameter not in COUNTERPARTS[use.type].honoured
    ]
    if idle:
        said.warn(f"{name}: parameters without effect here: {', '.join(idle)}")
