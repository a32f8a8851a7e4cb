"""Blocks: which publishers hold which key, as one bit mask per key and tier.

It knows bits, not publishers. Keys are spread over many dictionaries, because one of millions stops everything when it
grows. A hand goes round over all keys in bounded steps, as in the clock algorithm for pages: it takes the bits of
retired slots out, and evicts when the index is full.

Eviction: keys that no lookup met since the hand came by last. Oldest first would evict the prefixes that everybody
shares, which engines tell once and keep for ever; and turning newcomers away would tear every chain after a few
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from picker.core.prefix.deltas import Tier

# With 4 million keys a dictionary has 4,000, which takes 0.1 ms to grow. Keys are hashes, so all dictionaries grow at
# about the same time: the smaller they are, the farther apart.
SHARDS = 1024
_LOW = SHARDS - 1
_TURN = SHARDS * len(Tier)
# The lowest bit of a mask says that a lookup met the key; slots begin above it.
MET = 1
FIRST_SLOT = 1
# Lookups note what they met only when the index is as full as this: before, nothing is evicted.
_CROWDED = 7 / 8
# Keys the hand looks at for each one it has to evict, at most: most were not met by a lookup.
_TRIES = 4


class Blocks:
    """Masks of holders by key. `keys` counts those in all tiers, `bits` their holders, retired ones too until they are
    swept; `refused` are keys that found no room.
    """

    __slots__ = (
        "_dead",
        "_rest",
        "_shards",
        "_sweep_until",
        "_tiers",
        "_turned",
        "bits",
        "evicted",
        "keys",
        "max_keys",
        "refused",
        "tier_keys",
    )

    def __init__(self, max_keys: int) -> None:
        self.max_keys = max_keys
        self.keys = 0
        self.bits = 0
        self.evicted = 0
        self.refused = 0
        self.tier_keys = [0] * len(Tier)
        self._tiers: list[list[dict[int, int]]] = [[{} for _ in range(SHARDS)] for _ in Tier]
        self._shards = [(tier, shard) for tier in Tier for shard in self._tiers[tier]]
        self._dead = 0
        self._turned = 0
        self._rest: list[int] = []  # of the keys of the shard the hand is in
        self._sweep_until = 0

    # -- changing ----------------------------------------------------------------------------------

    def add(self, tier: Tier, bit: int, keys: Sequence[int]) -> None:
        """Notes that the publisher of `bit` holds these keys in that tier."""
        if self.keys + len(keys) > self.max_keys:
            self._visit(_TRIES * len(keys) + _TURN, keys_wanted=max(0, self.max_keys - len(keys)))
        room = self.max_keys - self.keys
        shards = self._tiers[tier]
        fresh = joined = refused = 0
        # Blocks that follow one another mostly have the same holders: one integer for all of them.
        before = after = 0
        for key in keys:
            shard = shards[key & _LOW]
            held = shard.get(key)
            if held is None:
                if fresh < room:
                    shard[key] = bit
                    fresh += 1
                else:
                    refused += 1
            elif not held & bit:
                if held != before:
                    before, after = held, held | bit
                shard[key] = after
                joined += 1
        self.tier_keys[tier] += fresh
        self.keys += fresh
        self.bits += fresh + joined
        self.refused += refused

    def remove(self, tier: Tier, bit: int, keys: Sequence[int]) -> None:
        """Notes that the publisher of `bit` does not hold these keys in that tier any more."""
        shards = self._tiers[tier]
        gone = left = 0
        before = after = 0
        for key in keys:
            shard = shards[key & _LOW]
            held = shard.get(key, 0)
            if not held & bit:
                continue
            if held != before:
                before, after = held, held ^ bit
            if after > MET:
                shard[key] = after
            else:
                del shard[key]
                gone += 1
            left += 1
        self.tier_keys[tier] -= gone
        self.keys -= gone
        self.bits -= left

    # -- reading -----------------------------------------------------------------------------------

    def holds(self, bit: int, key: int) -> bool:
        """Whether the publisher of `bit` holds the key in any tier."""
        return any(shards[key & _LOW].get(key, 0) & bit for shards in self._tiers)

    def match(self, keys: Sequence[int], alive: int) -> tuple[list[tuple[int, int]], list[int]]:
        """How far from the beginning each of the `alive` publishers holds these keys, in any tier.

        Returns pairs of a depth and the bits of who gets exactly that far, shallow ones first and without depth 0; and
        for the blocks on the way that are in slow tiers only, their number per publisher in binary, lowest digit
        first: digit d of a publisher is its bit in mask d.
        """
        fast = self._tiers[Tier.GPU]
        slow = [self._tiers[tier] for tier in Tier if tier is not Tier.GPU and self.tier_keys[tier]]
        steps: list[tuple[int, int]] = []
        digits: list[int] = []
        reached = len(keys)
        for depth, key in enumerate(keys):
            held = fast[key & _LOW].get(key, 0)
            if slow:
                near = held
                for shards in slow:
                    held |= shards[key & _LOW].get(key, 0)
                if alive & held & ~near:
                    _count(digits, alive & held & ~near)
            still = alive & held
            if still != alive:
                if depth:
                    steps.append((depth, alive ^ still))
                alive = still
                if not alive:
                    reached = depth
                    break
        if alive and keys:
            steps.append((reached, alive))
        if self.keys > self.max_keys * _CROWDED:
            self._meet(keys[:reached])
        return steps, digits

    def _meet(self, keys: Sequence[int]) -> None:
        before = after = 0
        for tier in Tier:
            shards = self._tiers[tier]
            for key in keys if self.tier_keys[tier] else ():
                shard = shards[key & _LOW]
                held = shard.get(key, MET)
                if not held & MET:
                    if held != before:
                        before, after = held, held | MET
                    shard[key] = after

    # -- the hand ----------------------------------------------------------------------------------

    def begin_sweep(self, dead: int) -> None:
        """From now on the hand takes these bits out of every mask it meets; until `sweep` says it is through."""
        self._dead = dead
        # The shard it is in has been visited in part: it comes last.
        self._sweep_until = self._turned + _TURN

    def sweep(self, budget: int) -> bool:
        """Moves the hand over up to `budget` keys. Returns whether the dead bits are in no mask any more."""
        if not self._is_swept():
            self._visit(budget)
        if self._is_swept():
            self._dead = 0
            return True
        return False

    def _is_swept(self) -> bool:
        return self._turned > self._sweep_until or (self._turned == self._sweep_until and not self._rest)

    def _visit(self, budget: int, keys_wanted: int | None = None) -> None:
        """Moves the hand over up to `budget` keys, or until not more than `keys_wanted` are left; without that it
        evicts nothing.
        """
        keep = ~self._dead
        evicts = keys_wanted is not None
        masks: dict[int, int] = {}  # one integer for all keys with the same holders
        tier, shard = self._shards[self._turned % _TURN]
        for _ in range(budget):
            if keys_wanted is not None and self.keys <= keys_wanted:
                break
            if not self._rest:
                self._turned += 1
                tier, shard = self._shards[self._turned % _TURN]
                self._rest = list(shard)
                continue
            key = self._rest.pop()
            held = shard.get(key)
            if held is None:
                continue
            left = held & keep
            if evicts and left > MET:
                if left & MET:
                    left ^= MET
                else:
                    left = 0
                    self.evicted += 1
            if left <= MET:
                del shard[key]
                self.keys -= 1
                self.tier_keys[tier] -= 1
            elif left != held:
                shard[key] = masks.setdefault(left, left)
            if left != held:
                self.bits -= (held >> FIRST_SLOT).bit_count() - (left >> FIRST_SLOT).bit_count()


def _count(digits: list[int], bits: int) -> None:
    """Adds one to the counters of these bits; the digits of all counters are masks, so it does all at once."""
    for place, mask in enumerate(digits):
        digits[place] = mask ^ bits
        bits &= mask
        if not bits:
            return
    digits.append(bits)
