"""What a pod does with a request, from the labels that deployers write. Values are words, spelled in many ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from picker.config import RoleLabel
from picker.core.values import Role


class Duty(msgspec.Struct, frozen=True):
    """`front_end`: routes to others itself. `ignored`: takes no inference requests at all."""

    role: Role = Role.BOTH
    front_end: bool = False
    ignored: bool = False


SERVES = Duty()
_PREFILLS = Duty(Role.PREFILL)
_DECODES = Duty(Role.DECODE)
_ENCODES = Duty(Role.ENCODE)
_FRONT_END = Duty(front_end=True)
_IGNORED = Duty(ignored=True)

_ROLES = {Role.BOTH: SERVES, Role.PREFILL: _PREFILLS, Role.DECODE: _DECODES, Role.ENCODE: _ENCODES}
_WORDS = {
    **dict.fromkeys(("prefill", "prefiller", "context", "ctx", "encode-prefill"), _PREFILLS),
    **dict.fromkeys(("decode", "decoder", "generation", "gen", "encode-decode"), _DECODES),
    **dict.fromkeys(("both", "all", "prefill-decode", "encode-prefill-decode", "flexible-decoder"), SERVES),
    **dict.fromkeys(("encode", "encoder"), _ENCODES),
    **dict.fromkeys(("processor", "router", "scheduler", "frontend", "gateway"), _FRONT_END),
    # Parts of Dynamo that a wide selector may catch.
    **dict.fromkeys(("planner", "epp"), _IGNORED),
}

# KServe's component label is a general one: only its own values mean something.
_KSERVE = "llminferenceservice-"
_KSERVE_COMPONENTS = {
    _KSERVE + "workload": SERVES,
    _KSERVE + "workload-leader": SERVES,
    _KSERVE + "workload-worker": SERVES,
    _KSERVE + "workload-prefill": _PREFILLS,
    _KSERVE + "workload-leader-prefill": _PREFILLS,
    _KSERVE + "workload-worker-prefill": _PREFILLS,
    _KSERVE + "router-scheduler": _IGNORED,
}

_KNOWN: tuple[tuple[str, Mapping[str, Duty]], ...] = (
    ("llm-d.ai/role", _WORDS),
    ("rbg.workloads.x-k8s.io/role-name", _WORDS),
    ("rolebasedgroup.workloads.x-k8s.io/role", _WORDS),
    ("disaggregatedset.x-k8s.io/role", _WORDS),
    # AIBrix, without a prefix.
    ("role-name", _WORDS),
    ("app.kubernetes.io/component", _KSERVE_COMPONENTS),
    # Dynamo: the component is a mere `worker` where the sub-component says which.
    ("nvidia.com/dynamo-sub-component-type", _WORDS),
    ("nvidia.com/dynamo-component-type", _WORDS),
)


class RoleReader:
    """Reads roles off labels: the user's labels first, then the known ones. The first value that is understood counts;
    a pod without one does everything.
    """

    def __init__(self, user_labels: Sequence[RoleLabel]) -> None:
        own = tuple((entry.label, _WORDS | _table(entry)) for entry in user_labels)
        self._labels = own + _KNOWN

    def __call__(self, labels: Mapping[str, str]) -> Duty:
        """What a pod with these labels does."""
        for label, words in self._labels:
            value = labels.get(label)
            if value:
                duty = words.get(_word(value))
                if duty is not None:
                    return duty
        return SERVES


def _table(entry: RoleLabel) -> dict[str, Duty]:
    return {
        _word(value): _IGNORED if meaning == "ignore" else _ROLES[Role(meaning)]
        for value, meaning in entry.values.items()
    }


def _word(value: str) -> str:
    return value.strip().lower().replace("_", "-")
