"""More free KV cache is better: a full cache preempts running requests and evicts prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from picker.core.values import EndpointState, InferenceRequest


class KvUsage(msgspec.Struct, frozen=True):
    """Scores the free share of the KV cache."""

    name: str = "kv-usage"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 minus the usage the engine reported."""
        return [
            None if state.signals is None or state.signals.kv_usage is None else 1.0 - state.signals.kv_usage
            for state in states
        ]
