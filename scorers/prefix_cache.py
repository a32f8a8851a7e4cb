"""Endpoints that hold more of the prompt in their KV cache are better: what is there need not be computed again.

The share of the prompt, in tokens from its beginning: with m blocks of B tokens matched of a prompt of T blocks the
reference endpoint picker's prefix scorer says m / T as well, with its `matchLengthWeight` at its default of 0. That
weight mixes in the square of the matched length, to keep long matches from being outweighed by load; a larger weight
of this scorer does so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from picker.core.values import EndpointState, InferenceRequest


class PrefixCache(msgspec.Struct, frozen=True):
    """Scores the share of the prompt an endpoint holds; `slow` is what a token in the host's memory or on disk counts,
    0.8 being what the reference picker gives the host's memory.
    """

    slow: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8
    name: str = "prefix-cache"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 for all of the prompt, 0 for nothing of it; no data where its prefixes are not known."""
        keys = request.keys
        if keys is None or not keys.known or keys.tokens <= 0:
            return [None] * len(states)
        scores: list[float | None] = []
        for state in states:
            match = request.matches.get(state.endpoint.id)
            held = 0.0 if match is None else match.tokens - (1.0 - self.slow) * match.slow
            scores.append(min(1.0, max(0.0, held / keys.tokens)))
        return scores
