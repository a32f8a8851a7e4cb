"""Endpoints that already hold the adapter are better; loading one costs time and may evict another.

The steps are those of the reference endpoint picker's LoRA scorer: loaded 1.0, room for one more 0.8, queued to be
loaded 0.6, full 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from picker.core.values import EndpointState, InferenceRequest

LOADED, ROOM, QUEUED, FULL = 1.0, 0.8, 0.6, 0.0


class LoraAffinity(msgspec.Struct, frozen=True):
    """Scores by what the engine says of its adapters. No data for engines that serve no adapters."""

    name: str = "lora-affinity"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """One of the four steps. The adapter's name is the request's model."""
        model = request.target_model or request.model or ""
        return [_step(model, state) for state in states]


def _step(model: str, state: EndpointState) -> float | None:
    lora = state.signals.lora if state.signals is not None else None
    if lora is None:
        return None
    if model in lora.running:
        return LOADED
    if model in lora.waiting:
        return QUEUED
    held = len(lora.running | lora.waiting) if lora.waiting else len(lora.running)
    return ROOM if held < lora.slots else FULL
