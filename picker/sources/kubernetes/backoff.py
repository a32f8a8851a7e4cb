"""How long to wait before the next attempt. Pure: randomness comes in, nothing sleeps here."""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Exponential with full jitter: each delay is anywhere between `least_s` and a limit that doubles up to `most_s`.

    Without the jitter everybody who lost the API server comes back to it in the same moment. `uniform` gives a number
    between its two arguments.
    """

    def __init__(self, *, least_s: float, most_s: float, uniform: Callable[[float, float], float]) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._uniform = uniform
        self._limit_s = least_s

    def next(self) -> float:
        """Seconds to wait now; more the next time."""
        self._limit_s = min(self._most_s, self._limit_s * 2)
        return self._uniform(self._least_s, self._limit_s)

    def reset(self) -> None:
        """All is well again."""
        self._limit_s = self._least_s
