"""Which endpoint holds a stateful response of the Responses API: bounded, and forgotten after a while.

Engines keep these in their own memory, so a request that names one has exactly one place to go.
"""

from __future__ import annotations

from collections import OrderedDict


class ResponseHomes:
    """Response id -> endpoint id, least recently used out first, none older than `ttl_s`."""

    def __init__(self, *, limit: int, ttl_s: float) -> None:
        self._limit = limit
        self._ttl_s = ttl_s
        self._homes: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def remember(self, response_id: str, endpoint_id: str, now: float) -> None:
        """Notes who made a response."""
        self._homes[response_id] = (endpoint_id, now)
        self._homes.move_to_end(response_id)
        if len(self._homes) > self._limit:
            self._homes.popitem(last=False)

    def home(self, response_id: str, now: float) -> str | None:
        """The endpoint that holds a response; None when unknown or too old. Reading keeps it alive."""
        found = self._homes.get(response_id)
        if found is None:
            return None
        endpoint_id, at = found
        if now - at > self._ttl_s:
            del self._homes[response_id]
            return None
        self.remember(response_id, endpoint_id, now)
        return endpoint_id

    def forget(self, response_id: str) -> None:
        """The response was deleted."""
        self._homes.pop(response_id, None)
