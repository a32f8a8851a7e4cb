"""What a source is. Kubernetes, files and flags all look like this to the rest."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from picker.core.updates import SourceUpdate


class SourceStatus(msgspec.Struct, frozen=True):
    """How a source is. `problem` says why it cannot offer anything, empty when it can; `heard_at` is when whatever is
    behind it was last heard of, None where nothing is.
    """

    problem: str = ""
    heard_at: float | None = None


class Source(Protocol):
    """Knows which endpoints exist.

    The first update is always a `Replace`, so that readers know when they have the whole picture. A source that ends
    has nothing more to tell. Closing the iterator, or cancelling the task in it, releases everything the source holds.
    Trouble that may pass (a bad file, a lost watch) is the source's own business; an exception is a bug.
    """

    @property
    def name(self) -> str:
        """Unique in the process; updates carry it as `source`."""

    def status(self) -> SourceStatus:
        """How it is right now."""

    def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """What exists, and then every change."""
