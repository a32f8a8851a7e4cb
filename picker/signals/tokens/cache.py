"""Token ids of texts seen before, bounded in bytes. Safe to use from several threads; keeps digests, never texts."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

# What an entry costs beside its ids: digest, bytes object, links of the dictionary (measured, CPython 3.11).
ENTRY_BYTES = 250
# One prompt must not push everything else out.
_LARGEST_SHARE = 4


class IdCache:
    """Digest of a text -> its ids (u32, little-endian), least recently used out first."""

    __slots__ = ("_entries", "_limit_bytes", "_lock", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[int, bytes] = OrderedDict()
        self._lock = Lock()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<IdCache [{len(self)} texts | {self.used_bytes} bytes]>"

    def get(self, digest: int) -> bytes | None:
        """The ids of that text, if they are here."""
        with self._lock:
            ids = self._entries.get(digest)
            if ids is not None:
                self._entries.move_to_end(digest)
            return ids

    def put(self, digest: int, ids: bytes) -> None:
        """Keeps the ids of a text; not if they alone would take a good part of the room."""
        size_bytes = len(ids) + ENTRY_BYTES
        if size_bytes > self._limit_bytes // _LARGEST_SHARE:
            return
        with self._lock:
            old = self._entries.pop(digest, None)
            if old is not None:
                self.used_bytes -= len(old) + ENTRY_BYTES
            self._entries[digest] = ids
            self.used_bytes += size_bytes
            while self.used_bytes > self._limit_bytes:
                _, gone = self._entries.popitem(last=False)
                self.used_bytes -= len(gone) + ENTRY_BYTES
