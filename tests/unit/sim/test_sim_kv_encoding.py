"""Payloads of the simulated engines against byte vectors built from the engines' own class definitions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sim.kv_encoding import Encoding, EngineName, KvEncoder
from sim.kv_events import KvEvents
from sim.prefix import CacheChange, Cleared, Removed, Stored
from sim.tokens import as_tokens

FIRST, SECOND = 0x1122334455667788, 0x99AABBCCDDEEFF00
# Batches of timestamp 1.5 and rank 0; blocks of 2 tokens. From vLLM 0.22, 0.24 to 0.33, SGLang 0.5.10 and 0.5.23.
VLLM_ARRAY_STORED = bytes.fromhex(
    "93cb3ff8000000000000919cab426c6f636b53746f72656492cf1122334455667788cf99aabbccddeeff00c0940102cd012cce00011170"
    "02c0a3475055c0c000ae66756c6c5f617474656e74696f6ec000"
)
VLLM_ARRAY_REMOVED = bytes.fromhex(
    "93cb3ff80000000000009294ac426c6f636b52656d6f76656491cf1122334455667788a34750550091b0416c6c426c6f636b73436c6561"
    "72656400"
)
VLLM_MAP_STORED = bytes.fromhex(
    "93cb3ff800000000000091de000aa474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392cf1122334455667788cf"
    "99aabbccddeeff00b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473940102cd012cce00011170aa626c6f636b5f"
    "73697a6502a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0a967726f75705f69647800b26b765f63616368"
    "655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00"
)
VLLM_MAP_REMOVED = bytes.fromhex(
    "93cb3ff80000000000009284a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391cf1122334455667788a66d"
    "656469756da3475055a967726f75705f6964780081a474797065b0416c6c426c6f636b73436c656172656400"
)
SGLANG_ARRAY = bytes.fromhex(
    "93cb3ff80000000000009297ab426c6f636b53746f72656491fbc092010202c0a347505591b0416c6c426c6f636b73436c656172656400"
)
SGLANG_MAP = bytes.fromhex(
    "93cb3ff80000000000009287a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391fbb1706172656e745f626c6f"
    "636b5f68617368c0a9746f6b656e5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da347505581a4"
    "74797065b0416c6c426c6f636b73436c656172656400"
)


def stored(
    *keys: int, tokens: list[int], parent: int | None = None, lora: str | None = None, salt: str | None = None
) -> Stored:
    return Stored(keys=list(keys), parent=parent, tokens=as_tokens(tokens), lora=lora, cache_salt=salt)


def payload(engine: EngineName, encoding: Encoding, *changes: CacheChange, rank: int = 0) -> bytes:
    encoder = KvEncoder(engine, encoding, block_size=2, rank=rank, lora_ids={"sql": 1})
    return encoder.batch(changes, unix_s=1.5)


def events(engine: EngineName, encoding: Encoding, *changes: CacheChange) -> list[Any]:
    batch: list[Any] = msgspec.msgpack.decode(payload(engine, encoding, *changes))
    assert batch[0] == 1.5
    assert batch[2] == 0
    listed: list[Any] = batch[1]
    return listed


TWO = stored(FIRST, SECOND, tokens=[1, 2, 300, 70000])
MINUS_FIVE = stored(2**64 - 5, tokens=[1, 2])


@pytest.mark.parametrize(
    ("engine", "encoding", "changes", "expected"),
    [
        ("vllm", "array", [Removed(FIRST), Cleared()], VLLM_ARRAY_REMOVED),
        ("vllm", "map", [Removed(FIRST), Cleared()], VLLM_MAP_REMOVED),
        ("sglang", "array", [MINUS_FIVE, Cleared()], SGLANG_ARRAY),
        ("sglang", "map", [MINUS_FIVE, Cleared()], SGLANG_MAP),
    ],
)
def test_payloads_are_the_engines_byte_for_byte(
    engine: EngineName, encoding: Encoding, changes: list[CacheChange], expected: bytes
) -> None:
    assert payload(engine, encoding, *changes) == expected


@pytest.mark.parametrize(("encoding", "vector"), [("array", VLLM_ARRAY_STORED), ("map", VLLM_MAP_STORED)])
def test_stored_blocks_have_the_vectors_fields_and_extra_keys(encoding: Encoding, vector: bytes) -> None:
    (expected,) = msgspec.msgpack.decode(vector)[1]
    (event,) = events("vllm", encoding, TWO)
    # The vectors leave the field at its default; a running vLLM 0.32 was seen to list one entry per block.
    if encoding == "array":
        assert (event[8], expected[8]) == ([None, None], None)
        event[8] = None
    else:
        assert event.pop("extra_keys") == [None, None]
    assert event == expected


def test_adapters_are_in_every_block_and_the_salt_in_the_first() -> None:
    first = stored(1, 2, tokens=[1, 2, 3, 4], lora="sql", salt="tenant-a")
    later = stored(3, tokens=[5, 6], parent=2, lora="sql", salt="tenant-a")
    salted = stored(4, 5, tokens=[1, 2, 3, 4], salt="tenant-a")
    told = events("vllm", "map", first, later, salted)
    assert [event["extra_keys"] for event in told] == [[["sql", "tenant-a"], ["sql"]], [["sql"]], [["tenant-a"], None]]
    assert [(event["lora_id"], event["lora_name"]) for event in told] == [(1, "sql"), (1, "sql"), (None, None)]
    assert [event["parent_block_hash"] for event in told] == [None, 2, None]
    listed = events("vllm", "array", first)[0]
    assert (listed[5], listed[7], listed[8]) == (1, "sql", [["sql", "tenant-a"], ["sql"]])
    assert len(listed) == 12
    sglang = events("sglang", "map", first, salted)
    assert [event.get("lora_name") for event in sglang] == ["sql", None]
    assert [event["cache_salt"] for event in sglang] == ["tenant-a", "tenant-a"]


def test_sglang_signs_hashes_joins_removals_and_once_sent_page_by_page() -> None:
    changes: list[CacheChange] = [Removed(SECOND), Removed(FIRST), TWO, Removed(FIRST)]
    signed = SECOND - 2**64
    joined = events("sglang", "map", *changes)
    assert [event["block_hashes"] for event in joined] == [[signed, FIRST], [FIRST, signed], [FIRST]]
    pages = events("sglang", "array", *changes)
    assert [event[:2] for event in pages] == [
        ["BlockRemoved", [signed]],
        ["BlockRemoved", [FIRST]],
        ["BlockStored", [FIRST]],
        ["BlockStored", [signed]],
        ["BlockRemoved", [FIRST]],
    ]
    assert pages[2][2:] == [None, [1, 2], 2, None, "GPU"]
    assert pages[3][2:] == [FIRST, [300, 70000], 2, None, "GPU"]


def test_vllm_removes_one_block_per_event_and_tells_its_rank() -> None:
    assert [event["block_hashes"] for event in events("vllm", "map", Removed(1), Removed(2))] == [[1], [2]]
    assert msgspec.msgpack.decode(payload("vllm", "map", Cleared(), rank=3))[2] == 3


def test_ports_move_with_the_rank_unless_they_are_free_ones() -> None:
    fixed = KvEvents(port=5557, replay_port=6557).moved(2)
    assert (fixed.port, fixed.replay_port) == (5559, 6559)
    free = KvEvents(port=0, replay_port=0).moved(2)
    assert (free.port, free.replay_port) == (0, 0)
    assert KvEvents(port=5557).moved(1).replay_port is None
