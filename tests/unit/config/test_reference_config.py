"""EndpointPickerConfig documents: which become a policy, which are told and left alone, which are wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scorers
from picker.config.flag_values import FlagValues
from picker.config.locate import parse_document
from picker.config.reference_config import PROFILE, picker_config_values
from picker.config.reference_plugins import BUILT_IN, COUNTERPARTS, Slot
from picker.core import filters, pickers

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"


def read(text: str) -> FlagValues:
    return picker_config_values(parse_document(text, name="epp.yaml"), "--config-file")


def profile(text: str) -> dict[str, Any]:
    """The profile a document becomes, without a word said."""
    said = read(text)
    assert (said.problems, said.warnings) == ([], [])
    assert said.values["policy",] == PROFILE
    found = said.values["profiles", PROFILE]
    assert isinstance(found, dict)
    return found


def test_the_table_names_plugins_of_ours() -> None:
    ours = {Slot.SCORER: scorers.BUILTIN, Slot.FILTER: filters.BUILTIN, Slot.PICKER: pickers.BUILTIN}
    for theirs, counterpart in COUNTERPARTS.items():
        assert counterpart.slot is Slot.ALWAYS or counterpart.name in ours[counterpart.slot], theirs
    assert not BUILT_IN & set(COUNTERPARTS)


def test_everything_that_is_mapped() -> None:
    found = profile(
        HEAD
        + """
plugins:
- {type: single-profile-handler}
- {type: decode-filter}
- {name: zone, type: label-selector-filter, parameters: {matchLabels: {zone: x}}}
- {name: tier, type: by-label, parameters: {label: tier, validValues: [gold]}}
- {name: q, type: queue-scorer}
- {type: running-requests-size-scorer}
- {type: kv-cache-utilization-scorer}
- {type: lora-affinity-scorer}
- {type: session-affinity-scorer}
- {type: active-request-scorer}
- {type: weighted-random-picker}
- {type: metrics-data-source}
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: decode-filter
  - pluginRef: zone
  - pluginRef: tier
  - {pluginRef: q, weight: 2.5}
  - {pluginRef: running-requests-size-scorer, weight: 0}
  - {pluginRef: kv-cache-utilization-scorer}
  - {pluginRef: lora-affinity-scorer, weight: 3}
  - {pluginRef: session-affinity-scorer, weight: 4}
  - {pluginRef: active-request-scorer, weight: 5}
  - pluginRef: weighted-random-picker
"""
    )
    assert found == {
        "filters": [
            {"name": "label", "params": {"labels": {"zone": "x"}}},
            {"name": "label", "params": {"labels": {"tier": "gold"}}},
        ],
        "scorers": [
            {"name": "queue-depth", "weight": 2.5},
            {"name": "kv-usage", "weight": 1.0},
            {"name": "lora-affinity", "weight": 3.0},
            {"name": "session-affinity", "weight": 4.0},
            {"name": "in-flight-requests", "weight": 5.0},
        ],
        "picker": {"name": "weighted-random"},
    }


def test_the_older_group_json_and_no_profile() -> None:
    text = (
        '{"apiVersion": "inference.networking.x-k8s.io/v1alpha1", "kind": "EndpointPickerConfig",'
        ' "plugins": [{"type": "queue-scorer"}, {"type": "max-score-picker"}, {"type": "openai-parser"}]}'
    )
    assert profile(text) == {
        "filters": [],
        "scorers": [{"name": "queue-depth", "weight": 1.0}],
        "picker": {"name": "max-score"},
    }


def test_a_picker_may_be_implied() -> None:
    refers = "schedulingProfiles: [{name: d, plugins: [{pluginRef: queue-scorer}, {pluginRef: max-score-picker}]}]\n"
    assert profile(HEAD + "plugins: [{type: queue-scorer}]\n" + refers)["picker"] == {"name": "max-score"}
    silent = "schedulingProfiles: [{name: d, plugins: [{pluginRef: queue-scorer}]}]\n"
    assert "picker" not in profile(HEAD + "plugins: [{type: queue-scorer}]\n" + silent)
    declared = HEAD + "plugins: [{type: queue-scorer}, {type: random-picker}]\n" + silent
    assert profile(declared)["picker"] == {"name": "random"}


def test_two_of_a_kind_add_up() -> None:
    plugins = "plugins: [{name: a, type: queue-scorer}, {name: b, type: queue-scorer}]\n"
    refers = "schedulingProfiles: [{name: d, plugins: [{pluginRef: a, weight: 2}, {pluginRef: b}]}]\n"
    assert profile(HEAD + plugins + refers)["scorers"] == [{"name": "queue-depth", "weight": 3.0}]


def test_how_many_endpoints_to_name() -> None:
    text = HEAD + "plugins: [{type: max-score-picker, parameters: {maxNumOfEndpoints: 3}}]\n"
    said = read(text)
    assert (said.values["picker", "fallbacks"], said.warnings) == (2, [])
    assert read(text.replace("3", "'x'")).values["picker", "fallbacks"] == "x"


@pytest.mark.parametrize(
    "text",
    [
        HEAD,
        HEAD + "plugins: []\nschedulingProfiles: []\n",
        HEAD + "plugins: [{type: single-profile-handler}]\nschedulingProfiles: [{name: default, plugins: []}]\n",
    ],
)
def test_what_says_nothing_about_scheduling_leaves_the_policy(text: str) -> None:
    said = read(text)
    assert (said.values, said.warnings, said.problems) == ({}, [], [])


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        (
            "plugins: [{type: prefix-cache-scorer}, {type: queue-scorer}, {type: load-aware-scorer}]\n",
            ["not supported yet: prefix-cache-scorer, load-aware-scorer; "],
        ),
        (
            "plugins: [{type: queue-scorer}, {type: disagg-profile-handler}, {type: prefill-filter}]\n"
            "schedulingProfiles: [{name: p, plugins: [{pluginRef: prefill-filter}]}, {name: d}]\n",
            ["not supported yet: prefill-filter, disagg-profile-handler, 2 scheduling profiles; "],
        ),
        (
            "plugins: [{type: label-selector-filter, parameters: {matchExpressions: []}}]\n",
            ["not supported yet: label-selector-filter; "],
        ),
        (
            "plugins: [{type: by-label, parameters: {label: a, validValues: [x], allowsNoLabel: true}}]\n"
            "featureGates: [flowControl]\ndataLayer: {sources: []}\nflowControl: {maxBytes: 1Gi}\n"
            "requestHandler: {}\nnewSection: 1\n",
            ["without effect here: featureGates, dataLayer, flowControl, newSection", "not supported yet: by-label; "],
        ),
    ],
)
def test_what_is_not_mapped_is_told_and_not_used(text: str, warnings: list[str]) -> None:
    said = read(HEAD + text)
    assert (said.values, said.problems) == ({}, [])
    rest = "its scheduling profile is not used, the policy is balanced unless configured"
    assert said.warnings == [f"epp.yaml: {w}{rest if w.endswith('; ') else ''}" for w in warnings]


def test_what_stands_beside_the_profile_does_not_cost_it() -> None:
    plugins = (
        "plugins: [{type: queue-scorer, parameters: {a: 1}}, {type: latency-slo-admitter}, {type: random-picker}]\n"
    )
    said = read(HEAD + plugins + "schedulingProfiles: [{name: d, plugins: [{pluginRef: queue-scorer}]}]\n")
    assert said.values["policy",] == PROFILE
    assert said.warnings == [
        "epp.yaml: not supported yet: latency-slo-admitter",
        "epp.yaml: parameters without effect here: queue-scorer.a",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: [", ["epp.yaml:1:5: not valid YAML: "]),
        ("just words", ["epp.yaml:1:1: must be an EndpointPickerConfig (lines of key: value)"]),
        ("", ["epp.yaml:1:1: must be an EndpointPickerConfig (lines of key: value)"]),
        ("kind: ConfigMap\n", ["epp.yaml:1:1: apiVersion: is required", "epp.yaml:1:7: kind: must be one of Endpoint"]),
        (HEAD.replace("llm-d.ai/", ""), ["epp.yaml:1:13: apiVersion: must be one of llm-d.ai/v1alpha1, inference"]),
        (HEAD + "plugins: {}\n", ["epp.yaml:3:10: plugins: must be a list (got a mapping)"]),
        (
            HEAD + "plugins:\n- {typ: a}\n",
            ["epp.yaml:4:3: plugins.0.type: is required", "epp.yaml:4:4: plugins.0.typ: "],
        ),
        (HEAD + "plugins: [{type: a}, {type: a}]\n", ["epp.yaml:3:22: plugins.1: an earlier plugin is called a too"]),
        (
            HEAD + "plugins: [{type: a}]\nschedulingProfiles:\n- name: d\n  plugins:\n  - pluginRef: b\n",
            ["epp.yaml:7:5: schedulingProfiles.0.plugins.0.pluginRef: there is no plugin b under plugins: (there: a)"],
        ),
        (
            HEAD + "plugins: [{type: a}]\nschedulingProfiles: [{name: d, plugins: [{pluginRef: a, weight: -1}]}]\n",
            ["epp.yaml:4:65: schedulingProfiles.0.plugins.0.weight: must be at least 0.0 (got -1)"],
        ),
        (
            HEAD + "schedulingProfiles: [{name: d}, {name: d}]\n",
            ["epp.yaml:3:34: schedulingProfiles.1.name: an earlier profile is called d too"],
        ),
        (
            HEAD + "plugins: [{type: random-picker}]\n"
            "schedulingProfiles: [{name: d, plugins: [{pluginRef: random-picker}, {pluginRef: max-score-picker}]}]\n",
            ["epp.yaml:4:32: schedulingProfiles.0.plugins: more than one picker: random-picker, max-score-picker"],
        ),
        (HEAD + "kind: EndpointPickerConfig\n", ["epp.yaml:3:1: kind: duplicate key"]),
    ],
)
def test_what_is_wrong_is_located(text: str, lines: list[str]) -> None:
    said = read(text)
    assert said.values == {}
    got = [str(problem) for problem in said.problems]
    assert len(got) == len(lines), got
    assert all(line.startswith(start) for line, start in zip(got, lines, strict=True)), got


def test_names_of_a_file_start_no_lines() -> None:
    said = read(HEAD + 'plugins: [{type: "a\\n\\e[31mb"}]\n"x\\ny": 1\n')
    assert said.warnings
    assert all(warning.isprintable() for warning in said.warnings)


KEYS = st.sampled_from(
    ["apiVersion", "kind", "plugins", "schedulingProfiles", "type", "name", "pluginRef", "weight", "parameters", "x"]
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([*COUNTERPARTS, "x"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), VALUES, VALUES)
def test_no_document_is_a_crash(extra: dict[str, Any], plugins: Any, profiles: Any) -> None:
    head = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig"}
    read(json.dumps(extra))
    read(json.dumps({**extra, **head, "plugins": [{"type": "queue-scorer", "parameters": plugins}]}))
    read(json.dumps({**head, "plugins": plugins, "schedulingProfiles": profiles}))
