"""Bytes to events: the published test vectors, both encodings, and bytes that are none."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.signals.kv.decode import (
    MAX_PAYLOAD_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventError,
    decode_batch,
    extra_keys,
    folded,
    token_bytes,
)
from picker.signals.kv.extras import apart
from picker.signals.kv.publisher import Publisher
from tests.unit.signals.kv.engine import Engine
from tests.unit.signals.kv.naive import LATER_FIELDS
from tests.unit.signals.kv.test_kv_publisher import captured

# Made with msgspec from the engines' own class definitions.
VECTORS: dict[str, str] = json.loads(Path(__file__).with_name("vectors.json").read_text())
CAPTURED = [payload for _, _, payload in captured()]


def batch(name: str) -> list[Any]:
    return list(decode_batch(bytes.fromhex(VECTORS[name])).events)


def tokens(event: BlockStored) -> list[int]:
    return list(memoryview(token_bytes(event.token_ids)).cast("I"))


@pytest.mark.parametrize(
    ("name", "medium", "group", "kind"),
    [
        ("vllm 0.9.2 stored", None, None, None),
        ("vllm 0.22.1 stored", "GPU", 0, "full_attention"),
        ("vllm 0.33.0 stored", "GPU", 0, "full_attention"),
    ],
)
def test_stored_by_vllm(name: str, medium: str | None, group: int | None, kind: str | None) -> None:
    decoded = decode_batch(bytes.fromhex(VECTORS[name]))
    (event,) = decoded.events

    assert isinstance(event, BlockStored)
    assert (decoded.rank, decoded.unknown) == (0, 0)
    assert event.block_hashes == [0x1122334455667788, 0x99AABBCCDDEEFF00]
    assert event.parent_block_hash is None
    assert tokens(event) == [1, 2, 300, 70000]
    assert (event.block_size, event.lora_id, event.lora_name) == (2, None, None)
    assert (event.medium, event.group_idx, event.spec_kind, event.spec_window) == (medium, group, kind, None)
    assert extra_keys(event.extra_keys) == []


@pytest.mark.parametrize("name", ["vllm 0.22.1 removed", "vllm 0.24 removed"])
def test_removed_and_cleared(name: str) -> None:
    removed, cleared = batch(name)

    assert isinstance(removed, BlockRemoved)
    assert (removed.block_hashes, removed.medium, removed.group_idx) == ([0x1122334455667788], "GPU", 0)
    assert isinstance(cleared, AllBlocksCleared)


def test_all_fields_of_vllm() -> None:
    decoded = decode_batch(bytes.fromhex(VECTORS["vllm 0.33.0 all fields"]))
    (event,) = decoded.events

    assert isinstance(event, BlockStored)
    assert decoded.rank == 3
    assert event.block_hashes == [bytes(range(32))]
    assert [folded(name) for name in event.block_hashes] == [0x18191A1B1C1D1E1F]
    assert event.parent_block_hash == b"\xff" * 32
    assert folded(b"\xff" * 32) == 2**64 - 1
    assert tokens(event) == [5, 6]
    assert (event.lora_id, event.lora_name, event.medium, event.session_id) == (1, "sql", "CPU", "s1")
    assert extra_keys(event.extra_keys) == [["sql", "tenant-a"]]
    assert (event.group_idx, event.spec_kind, event.spec_window) == (1, "sliding_window", 1024)
    assert apart(event).namespace.lora == "sql"


@pytest.mark.parametrize("name", ["sglang 0.5.19", "sglang 0.5.23"])
def test_stored_by_sglang(name: str) -> None:
    stored, cleared = batch(name)

    assert isinstance(stored, BlockStored)
    assert [folded(block) for block in stored.block_hashes] == [2**64 - 5]
    assert (tokens(stored), stored.block_size, stored.medium) == ([1, 2], 2, "GPU")
    assert isinstance(cleared, AllBlocksCleared)


def test_socket_capture_of_a_publisher_decodes() -> None:
    payload = bytes.fromhex("93cb00000000000000009181a474797065b0416c6c426c6f636b73436c656172656400")
    assert [type(event).__mro__[1] for event in decode_batch(payload).events] == [AllBlocksCleared]


@pytest.mark.parametrize("event", [{"type": "BlockMoved", "from": 1}, ["BlockMoved", 1], []])
def test_unknown_kinds_are_counted_and_the_rest_decoded(event: Any) -> None:
    payload = msgspec.msgpack.encode([1, [event, {"type": "AllBlocksCleared"}, ["AllBlocksCleared"]], None, "more"])
    decoded = decode_batch(payload)

    assert (len(decoded.events), decoded.unknown) == (2, 1)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        [1.0],
        [1.0, {}],
        [1.0, [1]],
        [1.0, [{}]],
        [1.0, [{"type": 1}]],
        [1.0, [{"type": "BlockStored"}]],
        [1.0, [{"type": "BlockRemoved", "block_hashes": ["a"]}]],
        [1.0, [{"type": "BlockMoved"}, {"type": "BlockRemoved", "block_hashes": 3}]],
        [1.0, [["BlockRemoved"]]],
        [1.0, [], "rank"],
    ],
)
def test_no_batch(value: Any) -> None:
    with pytest.raises(EventError):
        decode_batch(msgspec.msgpack.encode(value))


def test_sizes_are_bounded() -> None:
    with pytest.raises(EventError, match="bytes, at most"):
        decode_batch(bytes(MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(EventError):
        decode_batch(b"\x92\x01" + b"\x91" * 100_000)
    with pytest.raises(EventError):
        decode_batch(b"\x92\x01\xdd\xff\xff\xff\xff")


def test_error_text_holds_no_tokens() -> None:
    payload = msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": ["secret prompt"]}]])
    with pytest.raises(EventError) as caught:
        decode_batch(payload)
    assert "secret" not in str(caught.value)


def read_everything(payload: bytes) -> None:
    """All that may be asked of a payload; only EventError may come of it."""
    try:
        events = decode_batch(payload).events
    except EventError:
        return
    for event in events:
        if isinstance(event, BlockStored):
            for read in (lambda e: token_bytes(e.token_ids), apart):
                with contextlib.suppress(EventError):
                    read(event)
    publisher = Publisher(b"s")
    assert publisher.apply(payload)
    publisher.take()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_an_event_error(payload: bytes) -> None:
    read_everything(payload)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from((*LATER_FIELDS, "locality", "cache_salt", "lookahead_token_ids", "type"))


@given(st.lists(st.dictionaries(FIELDS, JUNK), max_size=3), st.sampled_from(["BlockStored", "BlockRemoved", "Other"]))
def test_maps_of_junk(events: list[dict[str, Any]], kind: str) -> None:
    whole = {"type": kind, "block_hashes": [1], "block_size": 1, "token_ids": [1]}
    read_everything(msgspec.msgpack.encode([0, [whole | event for event in events], 0]))


@given(st.lists(JUNK, max_size=17), st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]))
def test_arrays_of_junk(fields: list[Any], kind: str) -> None:
    read_everything(msgspec.msgpack.encode([0, [[kind, *fields]], 0]))


@given(seed=st.integers(0, 2**32))
def test_flipped_cut_and_doubled_bytes_of_real_batches(seed: int) -> None:
    rng = Random(seed)
    sources = [bytes.fromhex(text) for text in VECTORS.values()] + [Engine(rng).step()[1], CAPTURED[1]]
    data = bytearray(rng.choice(sources))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(3):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case _:
                data[at:at] = data[at : at + rng.randrange(1, 9)]
    read_everything(bytes(data))
