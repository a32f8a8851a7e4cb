"""Kubernetes label selectors as text, the full syntax of `kubectl -l`.

`a=b`, `a==b`, `a!=b`, `a in (x, y)`, `a notin (x, y)`, `a`, `!a`, joined by commas; all must hold. Facts of the syntax:
the Kubernetes documentation on labels and selectors.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

_KEY = r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
_REQUIREMENT = re.compile(
    rf"\s*(?:"
    rf"(?P<key>{_KEY})\s*(?P<equals>==?|!=)\s*(?P<value>{_VALUE})"
    rf"|(?P<set_key>{_KEY})\s+(?P<in>in|notin)\s*\((?P<values>[^()]*)\)"
    rf"|(?P<absent>!)?\s*(?P<bare>{_KEY})"
    rf")\s*(?:,|$)"
)
_WHOLE_VALUE = re.compile(_VALUE)


class Operator(enum.StrEnum):
    """What one requirement asks of a label."""

    IN = "in"
    NOT_IN = "notin"
    EXISTS = "exists"
    ABSENT = "!"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label. A label that is not there satisfies NOT_IN and ABSENT."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels satisfies it."""
        value = labels.get(self.key)
        match self.operator:
            case Operator.IN:
                return value is not None and value in self.values
            case Operator.NOT_IN:
                return value is None or value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.ABSENT:
                return value is None


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """All requirements must hold. One without requirements matches nothing: a pool of every pod is never meant."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is selected."""
        return bool(self.requirements) and all(requirement.matches(labels) for requirement in self.requirements)


def matching(labels: Mapping[str, str]) -> LabelSelector:
    """The selector of `matchLabels`."""
    return LabelSelector(tuple(Requirement(key, Operator.IN, frozenset((value,))) for key, value in labels.items()))


def parse_selector(text: str) -> LabelSelector:
    """The selector a text describes. Raises ValueError, with the place, for text that is none."""
    requirements: list[Requirement] = []
    at = 0
    while at < len(text) or not requirements:
        found = _REQUIREMENT.match(text, at)
        if found is None or found.end() == at:
            raise ValueError(f"not a label selector at `{text[at:][:40]}`")
        requirements.append(_requirement(found))
        if found.end() == len(text) and text.rstrip().endswith(","):
            raise ValueError("not a label selector: ends with a comma")
        at = found.end()
    return LabelSelector(tuple(requirements))


def _requirement(found: re.Match[str]) -> Requirement:
    if found["key"] is not None:
        operator = Operator.NOT_IN if found["equals"] == "!=" else Operator.IN
        return Requirement(found["key"], operator, frozenset((found["value"],)))
    if found["set_key"] is not None:
        values = frozenset(value.strip() for value in found["values"].split(","))
        wrong = sorted(value for value in values if not _WHOLE_VALUE.fullmatch(value))
        if wrong:
            raise ValueError(f"not a label value: `{wrong[0][:40]}`")
        return Requirement(found["set_key"], Operator(found["in"]), values)
    return Requirement(found["bare"], Operator.ABSENT if found["absent"] else Operator.EXISTS)
