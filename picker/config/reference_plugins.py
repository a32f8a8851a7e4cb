"""The plugins of the reference endpoint picker: which of ours does the same, by type.

To support one more, add a line. Facts of the types and their parameters: llm-d-router's plugin READMEs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Params = Mapping[str, Any]


class Slot(enum.Enum):
    """Where a plugin of ours stands in a profile."""

    FILTER = "filter"
    SCORER = "scorer"
    PICKER = "picker"
    ALWAYS = "always"
    """In no list: every profile of ours does it."""


@dataclass(frozen=True, slots=True)
class Counterpart:
    """Our plugin for one of theirs. `params` are ours for theirs, None where these ask for something else; without it
    theirs say nothing to us, but for those named in `honoured`.
    """

    slot: Slot
    name: str = ""
    params: Callable[[Params], Params | None] | None = None
    honoured: frozenset[str] = frozenset()


def _match_labels(params: Params) -> Params | None:
    labels = params.get("matchLabels")
    return {"labels": labels} if set(params) == {"matchLabels"} and isinstance(labels, dict) and labels else None


def _one_label(params: Params) -> Params | None:
    label, values = params.get("label"), params.get("validValues")
    if not isinstance(label, str) or not isinstance(values, list) or len(values) != 1 or params.get("allowsNoLabel"):
        return None
    return {"labels": {label: values[0]}}


def _scorer(name: str) -> Counterpart:
    return Counterpart(Slot.SCORER, name)


def _picker(name: str) -> Counterpart:
    return Counterpart(Slot.PICKER, name, honoured=frozenset({"maxNumOfEndpoints"}))


COUNTERPARTS: Mapping[str, Counterpart] = {
    "queue-scorer": _scorer("queue-depth"),
    "running-requests-size-scorer": _scorer("running-requests"),
    "kv-cache-utilization-scorer": _scorer("kv-usage"),
    "lora-affinity-scorer": _scorer("lora-affinity"),
    "session-affinity-scorer": _scorer("session-affinity"),
    "active-request-scorer": _scorer("in-flight-requests"),
    "max-score-picker": _picker("max-score"),
    "random-picker": _picker("random"),
    "weighted-random-picker": _picker("weighted-random"),
    "label-selector-filter": Counterpart(Slot.FILTER, "label", _match_labels),
    "by-label-selector": Counterpart(Slot.FILTER, "label", _match_labels),
    "by-label": Counterpart(Slot.FILTER, "label", _one_label),
    "decode-filter": Counterpart(Slot.ALWAYS),
    "single-profile-handler": Counterpart(Slot.ALWAYS),
}

# Not part of a profile, and done here without being asked.
BUILT_IN = frozenset(
    {
        "anthropic-parser",
        "core-metrics-extractor",
        "fcfs-ordering-policy",
        "global-strict-fairness-policy",
        "inflight-load-producer",
        "metrics-data-source",
        "models-data-extractor",
        "models-data-source",
        "openai-parser",
        "passthrough-parser",
        "static-usage-limit-policy",
        "utilization-detector",
        "vllmhttp-parser",
    }
)
