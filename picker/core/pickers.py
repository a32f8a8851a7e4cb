"""The built-in pickers: from totals to an order of preference.

Only the head of the order matters: the choice, and the few alternates a failed attempt or a fallback list may need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, log1p
from typing import Any

from picker.core.plugins import Picker, Rng
from picker.core.values import EndpointState

# The choice and at most this many alternates are ranked; the gateway tries 3 endpoints by default, Envoy lists are
# shorter.
RANKED_MAX = 8
# Totals closer than this are equal: floating-point noise must not make the first pod of a list the favourite.
TIE = 1e-9


def _largest(keys: Sequence[float]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:RANKED_MAX]


class MaxScorePicker:
    """The highest total; ties are broken at random, so that equals share the load."""

    name = "max-score"

    def rank(self, states: Sequence[EndpointState], totals: Sequence[float], rng: Rng) -> Sequence[int]:
        """Best first, at most RANKED_MAX."""
        best = max(totals)
        ties = [index for index, total in enumerate(totals) if total >= best - TIE]
        first = ties[int(rng.random() * len(ties))] if len(ties) > 1 else ties[0]
        return [first, *(index for index in _largest(totals) if index != first)][:RANKED_MAX]


class WeightedRandomPicker:
    """Chances in proportion to the totals, by Efraimidis and Spirakis's keys `u ** (1/w)` (Information Processing
    Letters, 2006), as logarithms: the powers of small weights would all be 0.
    """

    name = "weighted-random"

    def rank(self, states: Sequence[EndpointState], totals: Sequence[float], rng: Rng) -> Sequence[int]:
        """A weighted shuffle; with no positive total, a uniform one."""
        if max(totals) <= 0:
            return RandomPicker().rank(states, totals, rng)
        return _largest([log1p(-rng.random()) / total if total > 0 else -inf for total in totals])


class RandomPicker:
    """Everybody alike."""

    name = "random"

    def rank(self, states: Sequence[EndpointState], totals: Sequence[float], rng: Rng) -> Sequence[int]:
        """A uniform shuffle."""
        return _largest([rng.random() for _ in states])


class RoundRobinPicker:
    """One after the other by endpoint id. Remembers the last choice: the only picker with state."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last = ""

    def rank(self, states: Sequence[EndpointState], totals: Sequence[float], rng: Rng) -> Sequence[int]:
        """The first id after the last chosen one, wrapping around, so that pods that come and go do not skew the
        turns.
        """
        order = sorted(range(len(states)), key=lambda index: states[index].endpoint.id)
        start = next((at for at, index in enumerate(order) if states[index].endpoint.id > self._last), 0)
        order = order[start:] + order[:start]
        self._last = states[order[0]].endpoint.id
        return order[:RANKED_MAX]


BUILTIN: Mapping[str, Callable[..., Picker]] = {
    "max-score": MaxScorePicker,
    "weighted-random": WeightedRandomPicker,
    "random": RandomPicker,
    "round-robin": RoundRobinPicker,
}


def build(name: str, params: Mapping[str, Any] | None = None) -> Picker:
    """The picker of that name. Raises KeyError for an unknown name, TypeError for unknown parameters."""
    return BUILTIN[name](**(params or {}))
