"""A publisher's blocks against the naive model, on a real vLLM's capture and on made-up histories."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.core.prefix.deltas import Tier
from picker.core.prefix.keys import Namespace, chain, token_root
from picker.signals.kv.decode import BlockStored
from picker.signals.kv.extras import apart, block_seed
from picker.signals.kv.publisher import MAX_GROUPS, Publisher, tier_of
from tests.unit.signals.kv.engine import Engine
from tests.unit.signals.kv.naive import SECRET, Naive, positional

CAPTURE = Path(__file__).resolve().parents[3] / "data" / "vllm-0.32" / "kv-events.bin"


def captured() -> Iterator[list[bytes]]:
    """The messages of the capture, as frames."""
    data, at = CAPTURE.read_bytes(), 0
    while at < len(data):
        (count,) = struct.unpack_from(">I", data, at)
        at += 4
        frames = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", data, at)
            frames.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        yield frames


class Mirror:
    """The index as the deltas describe it."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.held: tuple[set[int], set[int], set[int]] = (set(), set(), set())

    def follow(self) -> None:
        cleared, changes = self.publisher.take()
        if cleared:
            for keys in self.held:
                keys.clear()
        for change in changes:
            keys, told = self.held[change.tier], set(change.keys)
            assert len(told) == len(change.keys)
            assert told.isdisjoint(keys) if change.added else told <= keys, "told twice, or never told before"
            keys.symmetric_difference_update(told)


def stored(hashes: list[Any], tokens: list[Any], size: int = 2, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    } | fields


def removed(*hashes: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"} | fields


CLEARED = {"type": "AllBlocksCleared"}


def after(*events: Any, publisher: Publisher | None = None) -> Publisher:
    """A publisher that told these events in one batch."""
    publisher = publisher or Publisher(SECRET)
    assert publisher.apply(msgspec.msgpack.encode([1.0, events, 0]))
    return publisher


def gpu(publisher: Publisher) -> set[int]:
    return set(publisher.held(Tier.GPU))


def keys_of(tokens: list[int], size: int = 2, lora: str = "", salt: str = "") -> list[int]:
    return chain(token_root(SECRET, Namespace(lora, salt), size), array("I", tokens).tobytes(), 4 * size)


def test_capture_of_a_real_engine_equals_the_naive_model() -> None:
    publisher, naive = Publisher(SECRET), Naive()
    mirror = Mirror(publisher)

    for number, (_, seq, payload) in enumerate(captured()):
        assert int.from_bytes(seq, "big") == number
        assert publisher.apply(payload)
        naive.batch(payload)
        mirror.follow()
        assert mirror.held == naive.held()

    counts = publisher.counts
    assert (counts.batches, counts.orphans, counts.skipped, counts.malformed, counts.ignored) == (15, 0, 0, 0, 0)
    # 592 stores of 591 hashes: one block was cached twice, and dropped twice.
    assert (counts.stored, counts.removed) == (592, 294)
    assert len(mirror.held[0]) == 591 - 293
    assert publisher.block_tokens == (32,)
    assert publisher.loras == ("lora1",)


def test_capture_finds_the_prompts_that_were_sent() -> None:
    """What a request's keys would match: the first prompt, with its adapter and with its salt, three ways apart."""
    publisher = Publisher(SECRET)
    batches = [payload for _, _, payload in captured()]
    for payload in batches[:6]:
        publisher.apply(payload)
    first = msgspec.msgpack.decode(batches[0])[1][0]["token_ids"]

    for namespace in ({}, {"lora": "lora1"}, {"salt": "tenant-a"}):
        keys = keys_of(first, 32, **namespace)
        assert len(keys) == 9
        assert gpu(publisher).issuperset(keys)
    assert gpu(publisher).isdisjoint(keys_of(first, 32, lora="other"))


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60), arrays=st.booleans(), groups=st.integers(1, 2))
def test_histories_equal_the_naive_model(seed: int, steps: int, arrays: bool, groups: int) -> None:
    engine = Engine(Random(seed), arrays=arrays, groups=groups)
    publisher = Publisher(SECRET)
    mirror = Mirror(publisher)

    for _ in range(steps):
        assert publisher.apply(engine.step()[1])
        mirror.follow()
        assert mirror.held == engine.truth.held()
        assert tuple(set(publisher.held(tier)) for tier in Tier) == mirror.held
    assert publisher.counts.orphans == publisher.counts.skipped == 0


def test_copies_are_counted_and_never_below_zero() -> None:
    publisher = after(stored([1], [5, 6]), stored([1], [5, 6]), removed(1))
    assert gpu(publisher) == set(keys_of([5, 6]))

    after(removed(1), removed(1), removed(1), publisher=publisher)
    assert not gpu(publisher)
    assert publisher.counts.removed == 2

    after(stored([1], [5, 6]), removed(1), publisher=publisher)
    assert not gpu(publisher)


def test_two_hashes_of_one_prefix_are_one_key() -> None:
    """A hash that looks ahead differs by the tokens that follow; the cached block is the same."""
    publisher = after(
        stored([1], [5, 6], lookahead_token_ids=[[7]]), stored([2], [5, 6], lookahead_token_ids=[[8]]), removed(1)
    )
    assert gpu(publisher) == set(keys_of([5, 6]))

    assert not gpu(after(removed(2), publisher=publisher))


def test_the_same_hash_for_another_prefix_replaces_it() -> None:
    """Old SGLang hashed pages without what is before them."""
    publisher = after(stored([1], [5, 6]), stored([2, 1], [7, 8, 5, 6]))

    assert gpu(publisher) == set(keys_of([7, 8, 5, 6]))
    assert len(gpu(after(removed(1), publisher=publisher))) == 1


def test_unknown_parents_are_skipped_and_counted() -> None:
    publisher = after(stored([2, 3], [1, 2, 3, 4], parent_block_hash=99), stored([4], [5, 6], parent_block_hash=3))

    assert not gpu(publisher)
    assert publisher.counts.orphans == 3
    assert publisher.take() == (False, [])


def test_parent_may_be_in_another_tier() -> None:
    publisher = after(
        stored([1], [1, 2]),
        stored([1], [], 0, medium="CPU"),
        removed(1),
        stored([2], [3, 4], parent_block_hash=1),
    )
    first, second = keys_of([1, 2, 3, 4])
    assert (gpu(publisher), set(publisher.held(Tier.CPU))) == ({second}, {first})


def test_offloaded_block_without_tokens_that_is_not_known_is_an_orphan() -> None:
    publisher = after(stored([1], [], 0, medium="CPU"))

    assert publisher.counts.orphans == 1
    assert not set(publisher.held(Tier.CPU))


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_cache_spec_kind": "sliding_window", "group_idx": 1},
        {"kv_cache_spec_kind": "mamba", "group_idx": 1},
        {"kv_cache_spec_kind": "chunked_local_attention"},
        {"kv_cache_spec_kind": "unknown", "kv_cache_spec_sliding_window": 64},
        {"block_size": 3},
        {"token_ids": [1]},
        {"token_ids": [1, 2, 3, 4]},
    ],
)
def test_what_is_no_whole_prefix_is_skipped(fields: dict[str, Any]) -> None:
    publisher = after(stored([1], [1, 2], **fields))

    assert not gpu(publisher)
    assert publisher.counts.skipped == 1


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", "sink_full_attention", "unknown", None])
def test_dense_groups_are_kept(kind: str | None) -> None:
    assert len(gpu(after(stored([1], [1, 2], kv_cache_spec_kind=kind)))) == 1


def test_a_window_inside_a_dense_group_does_not_matter() -> None:
    """vLLM caches windowed layers as full attention when its hybrid cache is off."""
    event = stored([1], [1, 2], kv_cache_spec_kind="full_attention", kv_cache_spec_sliding_window=64)
    assert len(gpu(after(event))) == 1


def test_partial_blocks_are_ignored_and_those_taken_for_whole_are_dropped() -> None:
    publisher = after(stored([1], [1, 2, 3], 3, group_idx=0))
    assert publisher.block_tokens == (3,)

    after(stored([2], [1, 2, 3, 4], 4, group_idx=0), stored([3], [9, 9], 2, group_idx=0), publisher=publisher)
    assert gpu(publisher) == set(keys_of([1, 2, 3, 4], 4))
    assert publisher.block_tokens == (4,)
    assert publisher.counts.skipped == 1


def test_groups_of_different_block_size_live_side_by_side() -> None:
    """With and without numbers. A coarse block may have the hash of its last fine one."""
    publisher = after(
        stored([1, 2], [1, 2, 3, 4], 2, group_idx=0),
        stored([2], [1, 2, 3, 4], 4, group_idx=1),
        removed(2, group_idx=0),
    )
    assert gpu(publisher) == {*keys_of([1, 2]), *keys_of([1, 2, 3, 4], 4)}
    assert publisher.block_tokens == (2, 4)

    older = after(stored([1, 2], [1, 2, 3, 4], 2), stored([7], [1, 2, 3, 4], 4), removed(7), removed(2))
    assert gpu(older) == set(keys_of([1, 2]))


def test_groups_are_bounded() -> None:
    publisher = after(*(stored([n], [1, 2], group_idx=n) for n in range(MAX_GROUPS + 5)))
    assert publisher.counts.skipped == 5


def test_blocks_are_bounded() -> None:
    publisher = Publisher(SECRET, max_blocks=3)
    after(stored([1, 2], [1, 2, 3, 4]), stored([3, 4], [5, 6, 7, 8]), publisher=publisher)
    assert (len(gpu(publisher)), publisher.counts.refused) == (2, 2)

    after(removed(2), stored([5], [9, 9]), publisher=publisher)
    assert len(gpu(publisher)) == 2


def test_clear_voids_what_was_not_told_yet() -> None:
    publisher = after(stored([1], [1, 2]))
    publisher.take()
    after(stored([2], [3, 4]), CLEARED, stored([3], [5, 6]), publisher=publisher)

    cleared, changes = publisher.take()
    assert cleared
    assert [(change.added, list(change.keys)) for change in changes] == [(True, keys_of([5, 6]))]
    assert publisher.complete


def test_clearing_what_is_empty_tells_nothing() -> None:
    assert after(CLEARED).take() == (False, [])


def test_order_inside_a_batch_is_kept() -> None:
    publisher = after(stored([1], [1, 2]), removed(1), stored([1], [1, 2]))

    assert [(change.added, len(change.keys)) for change in publisher.take()[1]] == [(True, 1), (False, 1), (True, 1)]


def test_adapters_by_name_or_number() -> None:
    assert gpu(after(stored([1], [1, 2], lora_name="sql", lora_id=3))) == set(keys_of([1, 2], lora="sql"))
    assert gpu(after(stored([1], [1, 2], lora_id=3))) == set(keys_of([1, 2], lora="3"))


def test_salts_of_both_engines() -> None:
    vllm = stored([1, 2], [1, 2, 3, 4], lora_name="sql", extra_keys=[["sql", "tenant-a"], ["sql"]])
    sglang = stored([1, 2], [1, 2, 3, 4], lora_name="sql", cache_salt="tenant-a")

    assert gpu(after(vllm)) == gpu(after(sglang)) == set(keys_of([1, 2, 3, 4], lora="sql", salt="tenant-a"))


def test_salt_belongs_to_the_first_block_of_the_prompt_only() -> None:
    publisher = after(
        stored([1], [1, 2], extra_keys=[["tenant-a"]]),
        stored([2], [3, 4], parent_block_hash=1, extra_keys=[None]),
    )
    assert gpu(publisher) == set(keys_of([1, 2, 3, 4], salt="tenant-a"))


def test_images_enter_the_key_of_their_block_and_so_all_after_it() -> None:
    image = ["image-1", -3]
    publisher = after(stored([1, 2, 3], [1, 2, 3, 4, 5, 6], extra_keys=[["s"], [image], None]))
    first = keys_of([1, 2], salt="s")[0]
    second = chain(block_seed(first, [image]), array("I", [3, 4]).tobytes(), 8)[0]
    third = chain(second, array("I", [5, 6]).tobytes(), 8)[0]

    assert gpu(publisher) == {first, second, third}
    assert block_seed(first, [image]) != block_seed(first, [["image-1", -2]])


def test_hash_forms_mean_the_same_block() -> None:
    publisher = after(stored([-5], [1, 2]), stored([b"\x11" * 24 + (2**64 - 5).to_bytes(8, "big")], [1, 2]))
    assert gpu(after(removed(2**64 - 5), publisher=publisher)) == set(keys_of([1, 2]))
    assert not gpu(after(removed(-5), publisher=publisher))


def test_pairs_of_tokens_count_by_their_first() -> None:
    assert gpu(after(stored([1], [[1, 2], [2, 3]]))) == set(keys_of([1, 2]))


@pytest.mark.parametrize("tokens", [["a", "b"], [-1, 2], [2**32, 1], [[], []], {"a": 1}, [1.5, 2]])
def test_a_malformed_store_is_counted_and_the_rest_applied(tokens: Any) -> None:
    publisher = after(stored([1], tokens), stored([2], [1, 2]))

    assert gpu(publisher) == set(keys_of([1, 2]))
    assert publisher.counts.malformed == 1


def test_a_malformed_batch_changes_nothing() -> None:
    publisher = after(stored([1], [1, 2]))

    assert not publisher.apply(b"\x93\x01\x91\x82")
    assert (len(gpu(publisher)), publisher.counts.malformed) == (1, 1)


@pytest.mark.parametrize(
    ("medium", "locality", "tier"),
    [
        (None, None, 0),
        ("GPU", "LOCAL", 0),
        ("gpu", None, 0),
        ("CPU", None, 1),
        ("CPU_PINNED", None, 1),
        ("DISK", None, 2),
        ("STORAGE", None, 2),
        ("EXTERNAL", None, 2),
        ("NEW", None, 2),
        ("CPU", "REMOTE", 2),
    ],
)
def test_tiers(medium: str | None, locality: str | None, tier: int) -> None:
    assert tier_of(medium, locality) == tier


def test_old_positional_events_apply() -> None:
    publisher = after(positional(stored([1, 2], [1, 2, 3, 4])), positional(removed(2)))
    assert gpu(publisher) == set(keys_of([1, 2]))


def test_a_salt_may_be_spelled_like_the_adapter() -> None:
    def namespaces(extras: list[object]) -> Namespace:
        event = BlockStored(
            block_hashes=[1],
            parent_block_hash=None,
            token_ids=msgspec.Raw(msgspec.msgpack.encode([1, 2])),
            block_size=2,
            lora_name="a",
            extra_keys=msgspec.Raw(msgspec.msgpack.encode([extras])),
        )
        return apart(event).namespace

    assert namespaces(["a"]) == Namespace("a", "")
    assert namespaces(["a", "a"]) == Namespace("a", "a")
    assert namespaces(["a", "b"]) == Namespace("a", "b")
