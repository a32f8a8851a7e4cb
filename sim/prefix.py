"""The prefix cache of one engine: physical KV blocks, who holds them, and which content they keep.

A block is *held* (by one or more sequences), *idle* (its content is cached, nobody holds it, it may be evicted, least
recently used first) or *blank*. A cached block has a key: a chained hash over its tokens, everything before them and
the namespace. As in vLLM two physical blocks may keep the same content, and each comes and goes by itself; with
``copies=False`` a second copy gives way to the first one, as in SGLang's radix tree. Pure: no clock, no randomness.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from sim.tokens import BYTES_PER_TOKEN, Tokens

_KEY_BYTES: Final = 8


class Stored(msgspec.Struct, frozen=True):
    """Blocks became findable: consecutive ones of one sequence, behind ``parent`` (None: the prompt begins here)."""

    keys: list[int]
    parent: int | None
    tokens: Tokens[int]
    lora: str | None
    cache_salt: str | None


class Removed(msgspec.Struct, frozen=True):
    """One physical block lost its content."""

    key: int


class Cleared(msgspec.Struct, frozen=True):
    """All content is gone."""


CacheChange = Stored | Removed | Cleared


def _digest(parent: bytes, content: bytes) -> bytes:
    return blake2b(parent + content, digest_size=_KEY_BYTES).digest()


def root_key(lora: str | None, cache_salt: str | None) -> int:
    """Where the chains of a namespace begin; different for every pair of adapter and salt."""
    name, salt = (lora or "").encode(), (cache_salt or "").encode()
    return int.from_bytes(_digest(len(name).to_bytes(_KEY_BYTES, "big"), name + salt), "big")


def chain_keys(tokens: Tokens[int], *, block_size: int, parent: int) -> list[int]:
    """Content keys of the full blocks of ``tokens`` behind the block ``parent``: unsigned 64-bit integers.

    BLAKE2b over the parent's key (big endian) and the block's token ids (32 bit, as in memory), so equal in every
    process of one machine. Deliberately no engine's formula: a reader of events must not depend on one.
    """
    raw = tokens.tobytes()
    size = block_size * BYTES_PER_TOKEN
    keys: list[int] = []
    digest = parent.to_bytes(_KEY_BYTES, "big")
    for start in range(0, len(raw) - size + 1, size):
        digest = _digest(digest, raw[start : start + size])
        keys.append(int.from_bytes(digest, "big"))
    return keys


class BlockPool:
    """The KV blocks of one engine. Blocks are numbered from 0; ``evictions`` counts cached contents given up for room.

    With ``record`` every change of the cached content is appended to ``changes``, which the owner empties.
    Invariant: held, idle and blank blocks add up to ``capacity``.
    """

    __slots__ = (
        "_blank",
        "_blocks",
        "_copies",
        "_holders",
        "_idle",
        "_keys",
        "_spares",
        "capacity",
        "changes",
        "evictions",
        "record",
    )

    def __init__(self, capacity: int, *, copies: bool = True, record: bool = False) -> None:
        self.capacity = capacity
        self.record = record
        self.changes: list[CacheChange] = []
        self.evictions = 0
        self._copies = copies
        # Grow as blocks are used for the first time: some profiles have a million.
        self._keys: list[int | None] = []
        self._holders: list[int] = []
        self._blank: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        # The block that a lookup finds, and further copies of the same content, which are rare.
        self._blocks: dict[int, int] = {}
        self._spares: dict[int, list[int]] = {}

    @property
    def in_use(self) -> int:
        """Blocks held by at least one sequence."""
        return len(self._keys) - len(self._blank) - len(self._idle)

    @property
    def idle(self) -> int:
        """Blocks whose content is cached and that nobody holds."""
        return len(self._idle)

    @property
    def usage(self) -> float:
        """Held blocks as a share of the capacity, 0 to 1."""
        return self.in_use / self.capacity

    def cached(self) -> Counter[int]:
        """The cached contents: key to number of physical blocks that keep it."""
        return Counter(key for key in self._keys if key is not None)

    def match(self, keys: Sequence[int], *, limit: int) -> list[int]:
        """The blocks of the first ``limit`` keys, up to the first key that is not cached."""
        blocks = self._blocks
        found: list[int] = []
        for key in keys[:limit]:
            block = blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, cached: Collection[int], *, fresh: int) -> list[int] | None:
        """Hold the ``cached`` blocks and ``fresh`` ones, which are returned, or change nothing and return None."""
        idle = self._idle
        revived = [block for block in cached if block in idle]
        if self.in_use + len(revived) + fresh > self.capacity:
            return None
        for block in revived:
            del idle[block]
        for block in cached:
            self._holders[block] += 1
        return [self._fresh() for _ in range(fresh)]

    def publish(self, block: int, key: int) -> int:
        """Let lookups find the content of a held ``block``. Returns the block to hold from now on.

        That is another one when the content is there already and copies are not kept.
        """
        known = self._blocks.get(key)
        if known is None:
            self._blocks[key] = block
        elif self._copies:
            self._spares.setdefault(key, []).append(block)
        else:
            self.take([known], fresh=0)
            self.release([block])
            return known
        self._keys[block] = key
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Give up blocks, in the order in which they should be evicted."""
        holders, keys = self._holders, self._keys
        for block in blocks:
            left = holders[block] - 1
            holders[block] = left
            if left:
                continue
            if keys[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def clear(self) -> None:
        """Forget all content. Only for a pool of which no block is held."""
        assert not self.in_use
        self._keys = []
        self._holders = []
        self._blank = []
        self._idle.clear()
        self._blocks = {}
        self._spares = {}
        if self.record:
            self.changes.append(Cleared())

    def _fresh(self) -> int:
        if self._blank:
            block = self._blank.pop()
        elif len(self._keys) < self.capacity:
            block = len(self._keys)
            self._keys.append(None)
            self._holders.append(0)
        else:
            block, _ = self._idle.popitem(last=False)
            self._evict(block)
        self._holders[block] = 1
        return block

    def _evict(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        self.evictions += 1
        spares = self._spares.get(key)
        if spares is None:
            del self._blocks[key]
        else:
            if self._blocks[key] == block:
                self._blocks[key] = spares.pop(0)
            else:
                spares.remove(block)
            if not spares:
                del self._spares[key]
        if self.record:
            self.changes.append(Removed(key))
