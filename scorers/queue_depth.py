"""Fewer waiting requests are better.

`s / (s + waiting)` with s = 4: the first few waiting requests matter most, and unlike min-max scaling the score does
not depend on who else is in the pool (0 against 1 must not weigh as much as 0 against 500). No data where the engine
tells none.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from picker.core.plugins import Scale
from picker.core.values import EndpointState, InferenceRequest


class QueueDepth(msgspec.Struct, frozen=True):
    """Scores the estimated queue; `scale` is the queue length that scores 0.5."""

    scale: Scale = 4.0
    name: str = "queue-depth"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 for an empty queue, falling towards 0."""
        scale = self.scale
        return [None if state.waiting is None else scale / (scale + state.waiting) for state in states]
