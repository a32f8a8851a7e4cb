"""A stream in Redis that all replicas write and read: what one learns, all know.

The writer gathers, numbers and sends; the reader remembers where it was, skips what it has seen or said itself, and
counts what is missing. Neither knows what the entries mean.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import msgspec

from picker.signals.shared.formats import pack_entry, unpack_entry
from picker.signals.shared.link import Link, Trouble, trouble_in

Item = TypeVar("Item")

# Small items share an entry up to this size, which is what one node of a Redis stream holds.
ENTRY_BYTES = 4096
# Sent or asked for in one round trip: 256 KiB of entries of that size.
ENTRIES_AT_ONCE = 64
# Senders whose last number is remembered: more lives of replicas than a stream's past holds.
SENDERS_MAX = 1024
# The loop belongs to requests; what was read is applied in slices of this length.
SLICE_S = 0.001
# A reader that hears nothing for so long looks whether its stream is still the same.
DOUBT_S = 1.0
# A reader with nobody to hear looks this many times less often, and still soon enough for whoever comes.
ALONE_PAUSES = 4
_BEGINNING = "0-0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What both ends of one stream share. `sender` names this life of this replica.

    `tag` says which secret is in use, `ready` whether that is the shared one. The stream keeps about `entries_max`
    entries, the writer's buffer `buffer_bytes`; both ends work every `pause_s`, the reader less often when `alone`.
    Times in seconds.
    """

    link: Link
    key: str
    sender: str
    tag: Callable[[], bytes]
    ready: Callable[[], bool]
    alone: Callable[[], bool]
    clock: Callable[[], float]
    entries_max: int
    buffer_bytes: int
    pause_s: float
    warm_s: float


class _Entry(msgspec.Struct):
    sequence: int
    data: bytes
    items: int


class JournalWriter(Generic[Item]):
    """Gathers items in a bounded buffer and appends them to the stream, in order. `tell` never waits.

    `join` makes the body of an entry from items. When Redis does not take them, the oldest go first; the numbers they
    had are missing then, so that readers can count them.
    """

    def __init__(self, stream: Stream, *, join: Callable[[Sequence[Item]], bytes]) -> None:
        self._stream = stream
        self._join = join
        self._open: list[Item] = []
        self._open_bytes = 0
        self._closed: deque[_Entry] = deque()
        self._closed_bytes = 0
        self._sequence = 0
        self.dropped = 0
        """Items that were never sent."""

    def tell(self, item: Item, size: int) -> None:
        """Takes one item of about `size` bytes."""
        self._open.append(item)
        self._open_bytes += size
        if self._open_bytes >= ENTRY_BYTES:
            self.seal()

    def seal(self) -> None:
        """Makes an entry of what was gathered. Must be called before the secret, and so its tag, changes."""
        if not self._open:
            return
        self._sequence += 1
        data = pack_entry(self._stream.tag(), self._sequence, self._join(self._open))
        self._closed.append(_Entry(self._sequence, data, len(self._open)))
        self._closed_bytes += len(data)
        self._open, self._open_bytes = [], 0
        while self._closed_bytes > self._stream.buffer_bytes:
            self.dropped += self._pop().items

    def _pop(self) -> _Entry:
        entry = self._closed.popleft()
        self._closed_bytes -= len(entry.data)
        return entry

    async def step(self) -> float | Trouble:
        """Sends what there is; seconds until the next time. What was not taken is sent again."""
        self.seal()
        entries = list(islice(self._closed, ENTRIES_AT_ONCE))
        if not entries:
            return self._stream.pause_s
        add = ("XADD", self._stream.key, "MAXLEN", "~", self._stream.entries_max, "*", self._stream.sender)
        replies = await self._stream.link.ask(*[(*add, entry.data) for entry in entries])
        if isinstance(replies, Trouble):
            return replies
        trouble = trouble_in(replies)
        taken = next((n for n, reply in enumerate(replies) if isinstance(reply, Exception)), len(entries))
        # The buffer may have dropped some of them meanwhile.
        while taken and self._closed and self._closed[0].sequence <= entries[taken - 1].sequence:
            self._pop()
        return trouble or (0.0 if self._closed else self._stream.pause_s)


class JournalReader:
    """Follows the stream and hands every entry's body to `apply`, once.

    It begins `warm_s` before the end, as soon as the secret is the shared one. Entries of another secret are skipped.
    `on_missed` gets the number of entries that were trimmed or dropped before they were read.
    """

    def __init__(self, stream: Stream, *, apply: Callable[[bytes], None], on_missed: Callable[[int], None]) -> None:
        self._stream = stream
        self._warm_ms = int(stream.warm_s * 1000)
        self._apply = apply
        self._on_missed = on_missed
        # The id of the last entry read; empty before the first look. A rewind begins another life.
        self._position = ""
        self._life = 0
        self._doubtful = True
        self._heard_at = -math.inf
        self._last: OrderedDict[str, int] = OrderedDict()
        self.caught_up_at = -math.inf
        """When we last knew everything."""
        self.missed = 0

    def rewind(self) -> None:
        """Begins again, as if nothing had been read: the secret changed."""
        self._life += 1
        self._position = ""
        self._doubtful = True
        self._last.clear()

    async def step(self) -> float | Trouble:
        """Reads and applies once; seconds until the next time."""
        if not self._stream.ready():
            return self._stream.pause_s
        asked_at, life = self._stream.clock(), self._life
        if self._doubtful or asked_at - self._heard_at > DOUBT_S:
            trouble = await self._locate()
            if trouble:
                return trouble
        if life != self._life:
            return 0.0
        replies = await self._stream.link.all_of(
            ("XREAD", "COUNT", ENTRIES_AT_ONCE, "STREAMS", self._stream.key, self._position)
        )
        if life != self._life:
            return 0.0
        if isinstance(replies, Trouble):
            self._doubtful = True
            return replies
        entries = _entries_of(replies[0])
        await self._take(entries)
        if len(entries) == ENTRIES_AT_ONCE:
            return 0.0
        self.caught_up_at = asked_at
        return self._stream.pause_s * (ALONE_PAUSES if self._stream.alone() else 1)

    async def _locate(self) -> Trouble | None:
        """Finds where to begin, or to begin again: a stream that ends before our place is not the one we read."""
        life = self._life
        replies = await self._stream.link.all_of(("XREVRANGE", self._stream.key, "+", "-", "COUNT", 1))
        if isinstance(replies, Trouble):
            return replies
        if life == self._life:
            last = _id_of(replies[0][0][0]) if replies[0] else (0, 0)
            if not self._position:
                self._position = f"{max(0, last[0] - self._warm_ms)}-0"
            elif last < _id_of(self._position):
                self._position = _BEGINNING
            self._doubtful = False
            self._heard_at = self._stream.clock()
        return None

    async def _take(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
        life, slice_at = self._life, self._stream.clock()
        for entry_id, fields in entries:
            self._position = entry_id.decode()
            self._heard_at = self._stream.clock()
            for sender, data in fields.items():
                self._one(sender.decode(errors="replace"), data)
            if self._stream.clock() - slice_at > SLICE_S:
                await asyncio.sleep(0)
                if life != self._life:
                    return
                slice_at = self._stream.clock()

    def _one(self, sender: str, data: object) -> None:
        entry = unpack_entry(data)
        if sender == self._stream.sender or entry is None:
            return
        tag, sequence, body = entry
        last = self._last.get(sender)
        if last is not None and sequence <= last:
            return
        self._last[sender] = sequence
        self._last.move_to_end(sender)
        if len(self._last) > SENDERS_MAX:
            self._last.popitem(last=False)
        if last is not None and sequence > last + 1:
            self.missed += sequence - last - 1
            self._on_missed(sequence - last - 1)
        if tag == self._stream.tag():
            self._apply(body)


def _entries_of(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries of the one stream that was asked for. The library's reply is `[[key, [(id, fields)]]]`."""
    return [(entry_id, fields) for entry_id, fields in reply[0][1] if fields] if reply else []


def _id_of(text: bytes | str) -> tuple[int, int]:
    """Milliseconds and number of an entry's id."""
    milliseconds, _, number = (text.decode() if isinstance(text, bytes) else text).partition("-")
    return int(milliseconds), int(number)
