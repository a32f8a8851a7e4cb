"""Batches of KV-cache events as vLLM and SGLang publish them: msgpack bytes in, typed events out.

Both encodings: events as positional arrays (vLLM up to 0.23, SGLang up to 0.5.19) and as maps with a `type` (later).
Unknown fields and unknown kinds of events are ignored. It knows nothing of sockets, order or meaning.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import msgspec
from msgspec import Raw

MASK = 2**64 - 1
# 10,000 times a usual batch. A prompt of a million tokens in one batch needs 5 MB.
MAX_PAYLOAD_BYTES = 16 * 2**20
_HASH_BYTES = 8
_NIL = Raw(b"\xc0")
_EMPTY = Raw(b"\x90")

BlockHash = int | bytes


class EventError(ValueError):
    """A payload that is no batch of events. The only exception of this module; its text holds no tokens."""


class BlockStored(msgspec.Struct, gc=False):
    """Blocks were cached. The field order is that of the positional encoding; fields after `spec_window` exist only
    in maps. `token_ids`, `extra_keys` and `lookahead` stay undecoded until somebody needs them. `cache_salt` is
    SGLang's, the others are vLLM's.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None = None
    token_ids: Raw = _EMPTY
    block_size: int = 0
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Raw = _NIL
    group_idx: int | None = None
    spec_kind: str | None = msgspec.field(default=None, name="kv_cache_spec_kind")
    spec_window: int | None = msgspec.field(default=None, name="kv_cache_spec_sliding_window")
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead: Raw = msgspec.field(default=_NIL, name="lookahead_token_ids")
    cache_salt: str | None = None


class BlockRemoved(msgspec.Struct, gc=False):
    """Blocks were dropped, one message per copy that is gone."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, gc=False):
    """Everything was dropped, in all tiers and groups."""


class _StoredMap(BlockStored, tag_field="type", tag="BlockStored", gc=False):
    pass


class _RemovedMap(BlockRemoved, tag_field="type", tag="BlockRemoved", gc=False):
    pass


class _ClearedMap(AllBlocksCleared, tag_field="type", tag="AllBlocksCleared", gc=False):
    pass


class _StoredArray(BlockStored, tag_field="type", tag="BlockStored", array_like=True, gc=False):
    pass


class _RemovedArray(BlockRemoved, tag_field="type", tag="BlockRemoved", array_like=True, gc=False):
    pass


class _ClearedArray(AllBlocksCleared, tag_field="type", tag="AllBlocksCleared", array_like=True, gc=False):
    pass


Event = BlockStored | BlockRemoved | AllBlocksCleared
_MapEvent = _StoredMap | _RemovedMap | _ClearedMap
_ArrayEvent = _StoredArray | _RemovedArray | _ClearedArray


class _MapBatch(msgspec.Struct, array_like=True, gc=False):
    ts: object
    events: list[_MapEvent]
    rank: int | None = None


class _ArrayBatch(msgspec.Struct, array_like=True, gc=False):
    ts: object
    events: list[_ArrayEvent]
    rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True, gc=False):
    ts: object
    events: list[Raw]
    rank: int | None = None


class _TypeOfMap(msgspec.Struct, gc=False):
    type: str


class Batch(msgspec.Struct, frozen=True, gc=False):
    """One batch in its order. `rank` is the data-parallel rank the engine claims; `unknown` counts events of kinds
    that did not exist when this was written.
    """

    events: Sequence[Event]
    rank: int | None = None
    unknown: int = 0


_BATCHES: tuple[msgspec.msgpack.Decoder[_MapBatch] | msgspec.msgpack.Decoder[_ArrayBatch], ...] = (
    msgspec.msgpack.Decoder(_MapBatch),
    msgspec.msgpack.Decoder(_ArrayBatch),
)
_RAW_BATCH = msgspec.msgpack.Decoder(_RawBatch)
_MAP_EVENT = msgspec.msgpack.Decoder[_MapEvent](_MapEvent)
_ARRAY_EVENT = msgspec.msgpack.Decoder[_ArrayEvent](_ArrayEvent)
_TYPE_OF_MAP = msgspec.msgpack.Decoder(_TypeOfMap)
_TYPE_OF_ARRAY = msgspec.msgpack.Decoder(list[Raw])
_TEXT = msgspec.msgpack.Decoder(str)
_KINDS = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})
_TOKENS = msgspec.msgpack.Decoder(list[int])
_PAIRS = msgspec.msgpack.Decoder(list[int | list[int]])
_EXTRAS = msgspec.msgpack.Decoder(list[list[object] | None] | None)
# What msgspec raises for bytes that are not what they should be.
_MALFORMED = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def decode_batch(payload: bytes | memoryview) -> Batch:
    """The events of one payload. Raises EventError if it is no batch, or one of its known events is malformed."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise EventError(f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}")
    for decoder in _BATCHES:
        try:
            batch = decoder.decode(payload)
        except _MALFORMED:
            continue
        return Batch(batch.events, batch.rank)
    return _one_by_one(payload)


def _one_by_one(payload: bytes | memoryview) -> Batch:
    """For batches with events of unknown kinds, or of both encodings."""
    try:
        raw = _RAW_BATCH.decode(payload)
        events: list[Event] = []
        for item in raw.events:
            # The bytes that open msgpack's arrays; everything else is a map or wrong.
            is_map = not (0x90 <= memoryview(item)[0] <= 0x9F or memoryview(item)[0] in (0xDC, 0xDD))
            if _kind(item, is_map) in _KINDS:
                events.append(_MAP_EVENT.decode(item) if is_map else _ARRAY_EVENT.decode(item))
    except _MALFORMED as error:
        raise EventError(type(error).__name__) from None
    return Batch(events, raw.rank, len(raw.events) - len(events))


def _kind(item: Raw, is_map: bool) -> str:
    if is_map:
        return _TYPE_OF_MAP.decode(item).type
    fields = _TYPE_OF_ARRAY.decode(item)
    return _TEXT.decode(fields[0]) if fields else ""


def folded(block_hash: BlockHash) -> int:
    """An engine's block hash as u64: integers modulo 2**64 (SGLang's are signed), bytes by their last eight, which is
    how vLLM itself makes integers of them.
    """
    if isinstance(block_hash, int):
        return block_hash & MASK
    return int.from_bytes(block_hash[-_HASH_BYTES:], "big")


def token_bytes(token_ids: Raw) -> bytes:
    """Token ids as u32, little-endian. Of the pairs that SGLang publishes under EAGLE, the first ones.

    Raises EventError for what are no token ids.
    """
    try:
        return _u32(_TOKENS.decode(token_ids))
    except msgspec.ValidationError:
        pass
    except _MALFORMED as error:
        raise EventError(type(error).__name__) from None
    try:
        return _u32([item if isinstance(item, int) else item[0] for item in _PAIRS.decode(token_ids)])
    except (*_MALFORMED, IndexError) as error:
        raise EventError(type(error).__name__) from None


def extra_keys(raw: Raw) -> list[list[object] | None]:
    """What else went into each block's hash, block by block; empty when there is nothing. Raises EventError."""
    if raw is _NIL:
        return []
    try:
        return _EXTRAS.decode(raw) or []
    except _MALFORMED as error:
        raise EventError(type(error).__name__) from None


def _u32(tokens: list[int]) -> bytes:
    try:
        packed = array("I", tokens)
    except OverflowError:
        raise EventError("token ids beyond 32 bits") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
