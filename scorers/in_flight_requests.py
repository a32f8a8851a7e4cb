"""Fewer of our own unfinished requests are better.

Exact and synchronous where scrapes are late: this is what keeps a burst from herding onto the pod that looked idle
200 ms ago.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from picker.core.plugins import Scale
from picker.core.values import EndpointState, InferenceRequest


class InFlightRequests(msgspec.Struct, frozen=True):
    """Scores our own count; `scale` is the number of requests that scores 0.5."""

    scale: Scale = 8.0
    name: str = "in-flight-requests"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 with nothing in flight, falling towards 0. There is always data."""
        scale = self.scale
        return [scale / (scale + state.all_in_flight) for state in states]
