"""What a cluster says about requests rather than endpoints: how important an objective is, which model a name means.

Holds the objectives and rewrites of all sources and answers questions about them. Pure: randomness comes in. It never
changes a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import msgspec

from picker.core.plugins import Rng


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """How important requests are: by the name a client sends along, or by the `model` it asks for.

    Exactly one of `name` and `model` is set. `priority` 0 is usual, higher goes first, below 0 may be shed.
    """

    pool: str
    name: str = ""
    model: str = ""
    priority: int = 0


class Target(msgspec.Struct, frozen=True):
    """A model name engines know; `weight` is its share among the targets of one rewrite, None when none was given."""

    model: str
    weight: int | None = None


class Rewrite(msgspec.Struct, frozen=True, kw_only=True):
    """Requests for one of `models` (for any model when empty) go to one of `targets`, at least one."""

    pool: str
    name: str
    models: frozenset[str] = frozenset()
    targets: tuple[Target, ...]


class Rulebook:
    """The objectives and rewrites of all sources. Single-threaded."""

    def __init__(self) -> None:
        self._objectives: dict[str, tuple[Objective, ...]] = {}
        self._rewrites: dict[str, tuple[Rewrite, ...]] = {}
        self._by_name: dict[str, tuple[Objective, ...]] = {}
        self._by_model: dict[str, tuple[Objective, ...]] = {}
        self._ordered: tuple[Rewrite, ...] = ()

    def __repr__(self) -> str:
        objectives = sum(map(len, self._objectives.values()))
        return f"<Rulebook [{objectives} objectives | {len(self._ordered)} rewrites]>"

    def __bool__(self) -> bool:
        return bool(self._by_name or self._by_model or self._ordered)

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """All rewrites, in order of precedence."""
        return self._ordered

    def replace(self, source: str, objectives: Sequence[Objective], rewrites: Sequence[Rewrite]) -> None:
        """Everything one source knows; what it said before is void."""
        self._objectives[source] = tuple(objectives)
        self._rewrites[source] = tuple(rewrites)
        known = [objective for listed in self._objectives.values() for objective in listed]
        self._by_name = _grouped([(objective.name, objective) for objective in known if objective.name])
        self._by_model = _grouped([(objective.model, objective) for objective in known if objective.model])
        every = [rewrite for listed in self._rewrites.values() for rewrite in listed]
        # The contract: a rewrite that names the model goes before one for any model.
        self._ordered = tuple(sorted(every, key=lambda rewrite: not rewrite.models))

    def priority(self, objective: str | None, model: str | None, pool: str | None) -> int:
        """The priority of a request; 0 when nothing is said. A pool of None matches all pools."""
        named = self._by_name.get(objective, ()) if objective else ()
        asked = self._by_model.get(model, ()) if model else ()
        return next((each.priority for each in (*named, *asked) if pool is None or each.pool == pool), 0)

    def target(self, model: str | None, pool: str | None, rng: Rng, *, generic: bool = True) -> str | None:
        """What engines call the model, drawn by weight; None when it keeps its name.

        Without `generic`, rewrites for any model do not count.
        """
        for rewrite in self._ordered:
            fits = model in rewrite.models if rewrite.models else generic
            if fits and (pool is None or rewrite.pool == pool):
                return _drawn(rewrite.targets, rng).model
        return None


def _grouped(pairs: Sequence[tuple[str, Objective]]) -> dict[str, tuple[Objective, ...]]:
    grouped: dict[str, tuple[Objective, ...]] = {}
    for key, objective in pairs:
        grouped[key] = (*grouped.get(key, ()), objective)
    return grouped


def _drawn(targets: Sequence[Target], rng: Rng) -> Target:
    """One target. Without any weight all are alike; beside weighted ones, a target without weight is never drawn."""
    weights = [target.weight or 0 for target in targets]
    if not any(weights):
        weights = [1] * len(targets)
    sums = list(accumulate(weights))
    at = rng.random() * sums[-1]
    return next((target for target, end in zip(targets, sums, strict=True) if at < end), targets[-1])
