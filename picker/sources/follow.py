"""From a source to the datastore, for as long as the process wants it."""

from __future__ import annotations

from contextlib import aclosing
from typing import Protocol

from picker.core.updates import SourceUpdate
from picker.sources.resolve import Lookup, Resolving, look_up
from picker.sources.source import Source


class Applies(Protocol):
    """The part of the datastore that sources use."""

    def apply(self, update: SourceUpdate) -> None: ...


async def follow(source: Source, store: Applies, *, lookup: Lookup = look_up) -> None:
    """Tells `store` what `source` says, with host names resolved, until cancelled; never returns by itself.

    Cancelling closes the source. An exception of the source comes out of here: it is a bug, and what it told before
    stays true in the store.
    """
    async with aclosing(Resolving(source, lookup=lookup).updates()) as updates:
        async for update in updates:
            store.apply(update)
