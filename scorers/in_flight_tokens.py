"""Fewer tokens of our own in flight are better: one 100,000-token prompt weighs more than ten questions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from picker.core.plugins import Scale
from picker.core.values import EndpointState, InferenceRequest


class InFlightTokens(msgspec.Struct, frozen=True):
    """Scores the prompt and expected output tokens in flight; `scale` is the number of tokens that scores 0.5."""

    scale: Scale = 16384.0
    name: str = "in-flight-tokens"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 with nothing in flight, falling towards 0. There is always data."""
        scale = self.scale
        return [scale / (scale + state.all_in_flight_tokens) for state in states]
