"""Smaller running batches are better: every request in the batch makes each decode step a little longer.

`s / (s + running)` with s = 32, a typical batch at which step time has grown noticeably.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from picker.core.plugins import Scale
from picker.core.values import EndpointState, InferenceRequest


class RunningRequests(msgspec.Struct, frozen=True):
    """Scores the estimated batch; `scale` is the batch size that scores 0.5."""

    scale: Scale = 32.0
    name: str = "running-requests"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 for an idle engine, falling towards 0."""
        scale = self.scale
        return [None if state.running is None else scale / (scale + state.running) for state in states]
