"""Prefixes by when they were last used, for one endpoint.

Who uses a prompt uses all prefixes of it, so a prefix is never older than what continues it, and forgetting the oldest
leaves no continuation without its beginning. Engines evict in this order too. It also makes the depth of a prompt a
binary search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import inf


class Recent:
    """Keys and when each was last used. Times given must not run backwards."""

    __slots__ = ("_used_at",)

    def __init__(self) -> None:
        # Longest unused first. A plain dictionary would need half the memory, but passes the places of all that was
        # dropped from its front again and again.
        self._used_at: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used_at)

    def touch(self, keys: Sequence[int], now: float) -> None:
        """Notes that a prompt with these keys was used."""
        used_at = self._used_at
        to_end = used_at.move_to_end
        for key in reversed(keys):
            used_at[key] = now
            to_end(key)

    def used_at(self, key: int) -> float | None:
        """When a prefix was last used, None when it is not known."""
        return self._used_at.get(key)

    def oldest_at(self) -> float | None:
        """When the longest unused was used, None without any."""
        return next(iter(self._used_at.values()), None)

    def depth(self, keys: Sequence[int], after: float = -inf) -> int:
        """How many of a prompt's keys, from the beginning, were used after that time."""
        get = self._used_at.get
        if not keys or not get(keys[0], -inf) > after:
            return 0
        known, unknown = 1, len(keys) + 1
        while unknown - known > 1:
            middle = (known + unknown) // 2
            if get(keys[middle - 1], -inf) > after:
                known = middle
            else:
                unknown = middle
        return known

    def drop_oldest(self, count: int) -> None:
        """Forgets the `count` longest unused."""
        for _ in range(min(count, len(self._used_at))):
            self._used_at.popitem(last=False)

    def drop_until(self, time: float, most: int) -> bool:
        """Forgets up to `most` that were not used after that time. Returns whether none of them is left."""
        for _ in range(most):
            oldest_at = self.oldest_at()
            if oldest_at is None or oldest_at > time:
                return True
            self._used_at.popitem(last=False)
        return False

    def clear(self) -> None:
        """Forgets everything."""
        self._used_at = OrderedDict()
