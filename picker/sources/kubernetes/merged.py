"""Endpoints of several pools under one roof. Pure."""

from __future__ import annotations

from picker.core.updates import EndpointUpdate, Remove, SourceUpdate, Upsert
from picker.core.values import Endpoint


class Merged:
    """What all views say, as one source. A pod's port that two pools select belongs to the first of them: its load is
    one load. `shared` counts those.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._owners: dict[str, dict[int, Endpoint]] = {}
        self.shared = 0

    def apply(self, rank: int, update: EndpointUpdate) -> SourceUpdate | None:
        """An update of the pool at `rank` in the order of the configuration, as one for all; None: no change."""
        if isinstance(update, Upsert):
            owners = self._owners.setdefault(update.endpoint.id, {})
            self.shared += len(owners) == 1 and rank not in owners
            owners[rank] = update.endpoint
            return Upsert(self._source, update.endpoint) if min(owners) == rank else None
        if isinstance(update, Remove):
            owners = self._owners.get(update.endpoint_id, {})
            if owners.pop(rank, None) is None:
                return None
            self.shared -= len(owners) == 1
            if owners:
                heir = min(owners)
                return Upsert(self._source, owners[heir]) if rank < heir else None
            del self._owners[update.endpoint_id]
            return Remove(self._source, update.endpoint_id)
        raise TypeError(f"a view tells changes, not {type(update).__name__}")

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Every endpoint once."""
        return tuple(owners[min(owners)] for owners in self._owners.values())
