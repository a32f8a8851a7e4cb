"""What waits to be sent from the worker to the request loop, bounded. Pure."""

from __future__ import annotations

from array import array
from collections import deque

from picker.core.prefix.deltas import Op, Tier, pack
from picker.signals.kv.messages import DELTA, frame
from picker.signals.kv.publisher import Change

# The loop applies one message in one go, in less than a millisecond.
MAX_KEYS_PER_DELTA = 512
# Two million keys: seconds of a large fleet's events while the loop is busy elsewhere.
MAX_BYTES = 16 * 2**20


class Outbox:
    """Frames in order. `full` and `drained` are for the caller, who decides what is dropped."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._records: list[bytes] = []
        self._keys = 0

    @property
    def full(self) -> bool:
        return self._bytes >= self._max_bytes

    @property
    def drained(self) -> bool:
        """Half empty: what was dropped can be sent again."""
        return self._bytes <= self._max_bytes // 2

    @property
    def empty(self) -> bool:
        return not self._frames and not self._records

    def changes(self, publisher: int, cleared: bool, changes: list[Change]) -> None:
        """Deltas of one publisher."""
        if cleared:
            self._record(pack(Op.CLEAR, publisher), 0)
        for change in changes:
            self.keys(publisher, Op.ADD if change.added else Op.REMOVE, change.tier, change.keys)

    def keys(self, publisher: int, op: Op, tier: Tier, keys: array[int]) -> None:
        """Keys that came or went."""
        start = 0
        while start < len(keys):
            part = keys[start : start + MAX_KEYS_PER_DELTA - self._keys]
            self._record(pack(op, publisher, tier, part), len(part))
            start += len(part)

    def state(self, publisher: int, online: bool) -> None:
        """Whether what is said of the publisher is current."""
        self._record(pack(Op.ONLINE if online else Op.OFFLINE, publisher), 0)

    def message(self, kind: int, body: bytes) -> None:
        """Anything else, in order with the deltas."""
        self._close_delta()
        self._put(frame(kind, body))

    def next_bytes(self, limit: int) -> bytes:
        """The next frames, up to about `limit` bytes; they leave the outbox."""
        self._close_delta()
        taken: list[bytes] = []
        size = 0
        while self._frames and size < limit:
            taken.append(self._frames.popleft())
            size += len(taken[-1])
        self._bytes -= size
        return b"".join(taken)

    def _record(self, record: bytes, keys: int) -> None:
        self._records.append(record)
        self._keys += keys
        # Records without keys count as well: clearing a publisher is work too.
        if self._keys >= MAX_KEYS_PER_DELTA or len(self._records) >= MAX_KEYS_PER_DELTA // 8:
            self._close_delta()

    def _close_delta(self) -> None:
        if self._records:
            self._put(frame(DELTA, b"".join(self._records)))
            self._records, self._keys = [], 0

    def _put(self, data: bytes) -> None:
        self._frames.append(data)
        self._bytes += len(data)
