"""Requests of one session go to one home, without anybody remembering where that was.

Rendezvous hashing (Thaler and Ravishankar, 1998): every replica finds the same home for a session, and when a pod
leaves only its own sessions move. No session, no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import msgspec

from picker.core.values import EndpointState, InferenceRequest

_MASK = (1 << 64) - 1


class SessionAffinity(msgspec.Struct, frozen=True):
    """Scores the session's home 1 and everybody else 0."""

    name: str = "session-affinity"

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """1 for the home among the given rows, 0 for the others; no data without a session."""
        if not request.session or not states:
            return [None] * len(states)
        session = crc32(request.session.encode(errors="surrogatepass"))
        weights = [_mix(session << 32 | crc32(state.endpoint.id.encode())) for state in states]
        home = weights.index(max(weights))
        return [1.0 if index == home else 0.0 for index in range(len(states))]


def _mix(value: int) -> int:
    """Steele, Lea and Flood's SplitMix64 finaliser (OOPSLA 2014): CRCs alone are linear and would rank pods alike for
    many sessions.
    """
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
