"""What is packed is unpacked; what nobody packed is nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.signals.shared.formats import (
    RoutedPrompt,
    Vector,
    endpoint_hash,
    pack_entry,
    pack_keys,
    pack_routed,
    pack_rows,
    pack_snapshot,
    pack_tiers,
    pack_vector,
    secret_tag,
    sum_rows,
    unpack_entry,
    unpack_keys,
    unpack_routed,
    unpack_snapshot,
    unpack_vector,
)
from picker.signals.shared.settings import EndpointLoad, PodSnapshot

U32 = 2**32 - 1
KEYS = st.lists(st.integers(0, 2**64 - 1), max_size=50)
FIGURES = st.integers(0, U32)
LOADS = st.dictionaries(st.text(max_size=20), st.builds(EndpointLoad, FIGURES, FIGURES, FIGURES), max_size=20)
TAG = secret_tag(bytes(32))


def unpacked(data: bytes) -> Vector:
    vector = unpack_vector(data)
    assert vector is not None
    return vector


@given(LOADS, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_loads_come_back(loads: dict[str, EndpointLoad], epoch: int, sequence: int) -> None:
    vector = unpacked(pack_vector(epoch, sequence, pack_rows(loads)))
    assert (vector.epoch, vector.sequence) == (epoch, sequence)
    names = {endpoint_hash(name): name for name in loads}
    assert sum_rows([vector], names) == {name: load for name, load in loads.items() if any(load)}


@given(st.lists(LOADS, max_size=5))
def test_the_sum_is_the_sum(several: list[dict[str, EndpointLoad]]) -> None:
    names = {endpoint_hash(name): name for loads in several for name in loads}
    vectors = [unpacked(pack_vector(1, 1, pack_rows(loads))) for loads in several]
    total = sum_rows(vectors, names)
    for position in range(3):
        assert sum(load[position] for load in total.values()) == sum(
            load[position] for loads in several for load in loads.values()
        )


@pytest.mark.parametrize(("given_figure", "packed"), [(-1, 0), (U32, U32), (U32 + 1, U32), (2**70, U32)])
def test_figures_that_do_not_fit_are_cut(given_figure: int, packed: int) -> None:
    vector = unpacked(pack_vector(1, 1, pack_rows({"a": EndpointLoad(given_figure, 1, given_figure)})))
    assert vector.rows == [(endpoint_hash("a"), packed, 1, packed)]


def test_a_hundred_endpoints_take_two_kilobytes() -> None:
    loads = {f"default/decode-7c9f8b6d5-{number:05}:8000": EndpointLoad(30, 60_000, 9_000) for number in range(100)}
    assert len(pack_vector(1, 1, pack_rows(loads))) == 2024


@pytest.mark.parametrize("data", [None, "text", 7, b"", b"\x01", b"\x02" + bytes(43), bytes(24), b"\x01" + bytes(24)])
def test_what_is_no_vector_is_none(data: object) -> None:
    assert unpack_vector(data) is None


@given(st.binary(max_size=200))
def test_no_bytes_break_the_readers(data: bytes) -> None:
    unpack_vector(data)
    unpack_vector(b"\x01" + data)
    unpack_entry(data)
    for prompt in unpack_routed(data) or ():
        unpack_keys(prompt.keys)
    unpack_snapshot(data, TAG, "")


@given(KEYS)
def test_keys_come_back(keys: list[int]) -> None:
    assert unpack_keys(pack_keys(keys)) == tuple(keys)


@given(st.binary(min_size=8, max_size=8), st.integers(0, 2**64 - 1), st.binary(max_size=50))
def test_entries_come_back(tag: bytes, sequence: int, body: bytes) -> None:
    assert unpack_entry(pack_entry(tag, sequence, body)) == (tag, sequence, body)


@given(st.lists(st.tuples(st.text(max_size=10), st.text(max_size=10), KEYS), max_size=10))
def test_prompts_come_back(prompts: list[tuple[str, str, list[int]]]) -> None:
    packed = [RoutedPrompt(endpoint, instance, pack_keys(keys)) for endpoint, instance, keys in prompts]
    assert unpack_routed(pack_routed(packed)) == packed


@given(
    st.text(max_size=10),
    st.integers(0, 2**16),
    st.dictionaries(st.integers(0, 5), KEYS, max_size=4),
    st.floats(0, 1e11),
)
def test_snapshots_come_back(instance: str, block_tokens: int, tiers: dict[int, list[int]], at: float) -> None:
    snapshot = PodSnapshot(instance, block_tokens, tiers)
    data = pack_snapshot(TAG, at, snapshot, pack_tiers(snapshot, 1000))
    read = unpack_snapshot(data, TAG, instance)
    assert read is not None
    assert read[0] == PodSnapshot(instance, block_tokens, {tier: tuple(keys) for tier, keys in tiers.items() if keys})
    assert abs(read[1] - at) < 0.01
    assert unpack_snapshot(data, TAG, instance + "x") is None
    assert unpack_snapshot(data, secret_tag(b"other"), instance) is None
    assert unpack_snapshot(data[:-1], TAG, instance) is None


def test_a_snapshot_is_cut_at_the_slow_end() -> None:
    snapshot = PodSnapshot("uid", 16, {2: [7, 8], 0: [1, 2], 1: [3, 4, 5]})
    assert pack_tiers(snapshot, 4) == {0: pack_keys([1, 2]), 1: pack_keys([3, 4])}


def test_a_snapshot_with_half_a_key_is_none() -> None:
    snapshot = PodSnapshot("uid", 16, {0: [1]})
    assert unpack_snapshot(pack_snapshot(TAG, 1.0, snapshot, {0: b"1234567"}), TAG, "uid") is None


def test_a_tag_says_nothing_of_its_secret() -> None:
    secret = bytes(range(32))
    assert secret_tag(secret) == secret_tag(bytes(range(32)))
    assert secret_tag(secret) != secret_tag(bytes(32))
    assert secret_tag(secret) not in secret
