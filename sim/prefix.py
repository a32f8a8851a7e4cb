"""KV blocks of one engine: who holds them, and which content is still cached.

Blocks are counted, not numbered. A block is *shared* (it has a content key and a number of holders), *private* (held
by one sequence, no key), *idle* (content cached, nobody holds it, may be evicted, oldest first) or *blank*.
Pure: no clock, no randomness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from zlib import adler32, crc32

from sim.tokens import BYTES_PER_TOKEN, Tokens


def block_key(parent: int, content: bytes) -> int:
    """The content key of a block behind ``parent``; equal in every process. Not safe against a malicious prompt."""
    return hash((parent, crc32(content), adler32(content)))


def chain_keys(tokens: Tokens[int], *, block_size: int, root: int) -> list[int]:
    """Content keys of the full blocks of ``tokens``: each key covers its block and everything before it.

    ``root`` separates namespaces (adapter, cache salt).
    """
    raw = tokens.tobytes()
    size = block_size * BYTES_PER_TOKEN
    keys: list[int] = []
    parent = root
    for start in range(0, len(raw) - size + 1, size):
        parent = block_key(parent, raw[start : start + size])
        keys.append(parent)
    return keys


class BlockPool:
    """The KV blocks of one engine, with a prefix cache over the blocks nobody holds (least recently used goes first).

    Invariant: ``0 <= in_use <= capacity`` and ``in_use + len(idle) <= capacity``.
    """

    __slots__ = ("_holders", "_idle", "_private", "capacity", "evictions")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evictions = 0
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    @property
    def in_use(self) -> int:
        """Blocks held by at least one sequence."""
        return len(self._holders) + self._private

    @property
    def idle(self) -> int:
        """Blocks whose content is cached and that nobody holds."""
        return len(self._idle)

    @property
    def usage(self) -> float:
        """Held blocks as a share of the capacity, 0 to 1."""
        return self.in_use / self.capacity

    def match(self, keys: Sequence[int], *, limit: int) -> int:
        """How many of the first ``limit`` keys are cached without a gap."""
        holders, idle = self._holders, self._idle
        hits = 0
        for key in keys[:limit]:
            if key not in holders and key not in idle:
                break
            hits += 1
        return hits

    def take(self, cached: Sequence[int], *, fresh: int) -> bool:
        """Hold the ``cached`` keys and ``fresh`` private blocks, or change nothing and return False."""
        revived = sum(1 for key in cached if key in self._idle)
        if self.in_use + revived + fresh > self.capacity:
            return False
        for key in cached:
            if key in self._idle:
                del self._idle[key]
                self._holders[key] = 1
            else:
                self._holders[key] += 1
        self._private += fresh
        while self.in_use + len(self._idle) > self.capacity:
            self._idle.popitem(last=False)
            self.evictions += 1
        return True

    def publish(self, key: int) -> bool:
        """Turn one private block into the shared block of ``key``.

        False when that content is there already: two sequences computed it at once, and the copy stays private.
        """
        if key in self._holders or key in self._idle:
            return False
        self._private -= 1
        self._holders[key] = 1
        return True

    def release(self, held: Iterable[int | None]) -> None:
        """Give up blocks, in the order in which they should be evicted; ``None`` is a private block."""
        for key in held:
            if key is None:
                self._private -= 1
                continue
            holders = self._holders[key] - 1
            if holders:
                self._holders[key] = holders
            else:
                del self._holders[key]
                self._idle[key] = None
