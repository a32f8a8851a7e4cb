"""From a source to the datastore, for as long as the process wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

from picker.core.rules import Objective, Rewrite
from picker.core.updates import EndpointUpdate, RulesChanged
from picker.sources.source import Source


class Store(Protocol):
    """The part of the datastore that sources use."""

    def apply(self, update: EndpointUpdate) -> None: ...


class Rules(Protocol):
    """The part of the rulebook that sources use."""

    def replace(self, source: str, objectives: Sequence[Objective], rewrites: Sequence[Rewrite]) -> None: ...


async def follow(source: Source, store: Store, rules: Rules) -> None:
    """Tells `store` and `rules` what `source` says, until cancelled; never returns by itself.

    Cancelling closes the source. An exception of the source comes out of here: it is a bug, and what it told before
    stays true in the store.
    """
    async with aclosing(source.updates()) as updates:
        async for update in updates:
            if isinstance(update, RulesChanged):
                rules.replace(update.source, update.objectives, update.rewrites)
            else:
                store.apply(update)
    # A source that ends has said all there is, which stays true.
    await asyncio.Event().wait()
