"""Deltas: what the process that hears the engines tells the event loop, packed.

A message is one or more records of `op u8, tier u8, 0 u16, count u32, publisher u64` and `count` own keys of 8 bytes,
all little-endian. It only packs and unpacks; what a record does to the index is the index's matter.
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator

import msgspec

_HEAD = struct.Struct("<BBHIQ")
_KEY_BYTES = 8
# Keys in one unpacked record at most, so that a reader can stop in the middle of a long one: about 0.1 ms of work.
CHUNK_KEYS = 256
_SWAPPED = sys.byteorder == "big"


class Op(enum.IntEnum):
    """What happened at a publisher. Only ADD and REMOVE have keys; ONLINE and OFFLINE are about hearing it at all."""

    ADD = 1
    REMOVE = 2
    CLEAR = 3
    ONLINE = 4
    OFFLINE = 5


class Tier(enum.IntEnum):
    """Where a block is, fastest first."""

    GPU = 0
    CPU = 1
    DISK = 2


class BadDelta(ValueError):
    """Bytes that are no delta; the text says what is wrong and where."""


class Record(msgspec.Struct, frozen=True):
    """One change at one publisher."""

    op: Op
    publisher: int
    tier: Tier = Tier.GPU
    keys: array[int] = array("Q")


def pack(op: Op, publisher: int, tier: Tier = Tier.GPU, keys: Iterable[int] = ()) -> bytes:
    """One record; a message is any number of them, one after the other."""
    packed = array("Q", keys)
    count = len(packed)
    if _SWAPPED:
        packed.byteswap()
    return _HEAD.pack(op, tier, 0, count, publisher) + packed.tobytes()


def unpack(data: bytes | memoryview) -> Iterator[Record]:
    """The records of a message, long ones in pieces of CHUNK_KEYS. The bytes must not change meanwhile.

    Raises BadDelta at the record that is none; those before it have been given out.
    """
    view = memoryview(data)
    at = 0
    while at < len(view):
        record, count = _head(view, at)
        at += _HEAD.size
        end = at + count * _KEY_BYTES
        if end > len(view):
            raise BadDelta(f"{count} keys at byte {at}, but only {len(view) - at} bytes are left")
        if not count:
            yield record
        while at < end:
            after = min(end, at + CHUNK_KEYS * _KEY_BYTES)
            keys = array("Q", bytes(view[at:after]))
            if _SWAPPED:
                keys.byteswap()
            yield Record(record.op, record.publisher, record.tier, keys)
            at = after


def _head(view: memoryview, at: int) -> tuple[Record, int]:
    """The record whose head is there, still without its keys, and how many it has."""
    if len(view) - at < _HEAD.size:
        raise BadDelta(f"{len(view) - at} bytes at byte {at} are no head")
    op, tier, reserved, count, publisher = _HEAD.unpack_from(view, at)
    if reserved or not Op.ADD <= op <= Op.OFFLINE or tier > Tier.DISK or (count and op > Op.REMOVE):
        raise BadDelta(f"op {op}, tier {tier}, reserved {reserved}, {count} keys at byte {at} are no record")
    return Record(Op(op), publisher, Tier(tier)), count
