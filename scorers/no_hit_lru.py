"""Prompts that nobody holds anything of go where such a prompt went longest ago.

New prefixes are what fills caches and evicts old ones. Spread by load alone, a burst of them meets the same idle
endpoint and empties its cache; taking turns spreads what is evicted. The reference endpoint picker's no-hit-lru scorer
does the same; it puts endpoints that never had a turn in the order of its list, here they are equal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import msgspec

from picker.core.values import EndpointState, InferenceRequest


class NoHitLru(msgspec.Struct, frozen=True):
    """Scores the order of the last turns. It has its say only when nothing of a prompt is anywhere."""

    name: str = "no-hit-lru"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 for the longest without a turn, 0 for the last one that had it, evenly between; no data when an endpoint
        holds some of the prompt, or its prefixes are not known.
        """
        keys, matches = request.keys, request.matches
        if keys is None or not keys.known or any(state.endpoint.id in matches for state in states):
            return [None] * len(states)
        turns = sorted([state.cold_at for state in states])
        last = max(1, len(turns) - 1)
        return [1.0 - bisect_left(turns, state.cold_at) / last for state in states]
