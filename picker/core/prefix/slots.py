"""Slots: which bit of the index's masks stands for which publisher, and what becomes of the bit afterwards.

A publisher that leaves, or says that its cache is empty, loses its slot at once: the bit is masked out of every
lookup. Its bits in the masks are swept out later, and only then does somebody else get the slot. So forgetting all of
one publisher costs nothing at the moment it happens, and no list of its blocks has to be kept for it.
"""

from __future__ import annotations

import heapq

from picker.core.prefix.recent import Recent

# Slots at once, those that wait for a sweep too. Masks are as wide as the highest slot in use, so this bounds one to
# 0.5 kB; a fleet of 2,000 engines may lose all its caches in one sweep.
SLOTS_MAX = 4096


class Publisher:
    """One engine process that tells what its cache holds.

    `bit` is its slot's, 0 while there is none for it. `told` says that events came: until then its silence means
    nothing. `sent` has the prefixes of what was routed there and `reported` those it said in a response to have had,
    which its events need not show. `block_tokens` are its sizes of blocks, empty while they are not known.
    """

    __slots__ = ("bit", "block_tokens", "endpoint_id", "id", "instance", "online", "reported", "sent", "told")

    def __init__(self, number: int, endpoint_id: str, instance: str) -> None:
        self.id = number
        self.endpoint_id = endpoint_id
        self.instance = instance
        self.bit = 0
        self.block_tokens: tuple[int, ...] = ()
        self.online = False
        self.told = False
        self.sent = Recent()
        self.reported = Recent()

    def has(self, block_tokens: int) -> bool:
        """Whether it may have blocks of this size."""
        return not self.block_tokens or block_tokens in self.block_tokens

    @property
    def trusted(self) -> bool:
        """Whether what it has not told is not there."""
        return self.online and self.told


class Slots:
    """`alive` are the bits of publishers, `retired` those not yet swept out, `swept` those a sweep is taking out."""

    __slots__ = ("_free", "_last", "_next", "_owners", "alive", "retired", "swept")

    def __init__(self, first: int, most: int = SLOTS_MAX) -> None:
        self.alive = 0
        self.retired = 0
        self.swept = 0
        self._owners: dict[int, Publisher] = {}
        self._free: list[int] = []
        self._next = 1 << first
        self._last = self._next << most

    def give(self, publisher: Publisher) -> None:
        """Gives it the lowest slot that is free: narrow masks are cheap. None is left, and its bit stays 0, when
        publishers come and go faster than slots are swept.
        """
        if self._free:
            publisher.bit = heapq.heappop(self._free)
        elif self._next < self._last:
            publisher.bit = self._next
            self._next <<= 1
        else:
            return
        self._owners[publisher.bit] = publisher
        self.alive |= publisher.bit

    def retire(self, publisher: Publisher) -> None:
        """Takes its slot from it."""
        if publisher.bit:
            del self._owners[publisher.bit]
            self.alive ^= publisher.bit
            self.retired |= publisher.bit
            publisher.bit = 0

    def begin_sweep(self) -> int:
        """The bits to take out of all masks."""
        self.swept = self.retired
        return self.swept

    def end_sweep(self) -> None:
        """They are in no mask any more: their slots are free."""
        for bit in _bits(self.swept):
            heapq.heappush(self._free, bit)
        self.retired ^= self.swept
        self.swept = 0

    def owners(self, mask: int) -> list[Publisher]:
        """The publishers of these living bits."""
        sole = self._owners.get(mask)
        return [sole] if sole is not None else [self._owners[bit] for bit in _bits(mask)]


def _bits(mask: int) -> list[int]:
    bits = []
    while mask:
        low = mask & -mask
        bits.append(low)
        mask ^= low
    return bits
