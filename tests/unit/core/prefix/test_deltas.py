"""Packing and unpacking deltas, and bytes that are none."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
import pytest
from hypothesis import given

from picker.core.prefix.deltas import CHUNK_KEYS, BadDelta, Op, Record, Tier, pack, unpack

U64 = st.integers(0, 2**64 - 1)
KEYS = st.lists(U64).map(lambda keys: array("Q", keys))
RECORDS = st.lists(
    st.one_of(
        st.builds(Record, st.sampled_from((Op.ADD, Op.REMOVE)), U64, st.sampled_from(Tier), KEYS),
        st.builds(Record, st.sampled_from((Op.CLEAR, Op.ONLINE, Op.OFFLINE)), U64),
    ),
    max_size=8,
)


def packed(records: list[Record]) -> bytes:
    return b"".join(pack(record.op, record.publisher, record.tier, record.keys) for record in records)


@given(RECORDS)
def test_what_is_packed_is_unpacked(records: list[Record]) -> None:
    assert list(unpack(packed(records))) == records


def test_the_bytes_are_those_of_the_other_side() -> None:
    """The worker process may be of another version: the layout is fixed."""
    assert pack(Op.REMOVE, 7, Tier.DISK, [1, 2**64 - 1]).hex() == (
        "02020000020000000700000000000000" + "0100000000000000" + "ffffffffffffffff"
    )
    assert pack(Op.CLEAR, 2**64 - 1).hex() == "0300000000000000ffffffffffffffff"


def test_long_records_come_in_pieces() -> None:
    keys = list(range(2 * CHUNK_KEYS + 1))
    pieces = list(unpack(pack(Op.ADD, 1, Tier.CPU, keys)))
    assert [len(piece.keys) for piece in pieces] == [CHUNK_KEYS, CHUNK_KEYS, 1]
    assert [key for piece in pieces for key in piece.keys] == keys
    assert {(piece.op, piece.publisher, piece.tier) for piece in pieces} == {(Op.ADD, 1, Tier.CPU)}


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00",
        bytes(16),
        b"\x06" + bytes(15),
        b"\x01\x03" + bytes(14),
        b"\x01\x00\x01\x00" + bytes(12),
        b"\x03\x00\x00\x00\x01" + bytes(11) + bytes(8),
        b"\x01\x00\x00\x00\xff\xff\xff\xff" + bytes(8) + bytes(800),
        pack(Op.ADD, 1, Tier.GPU, [1])[:-1],
        b"[]",
    ],
)
def test_garbage_is_refused_where_it_is(garbage: bytes) -> None:
    good = pack(Op.ADD, 1, Tier.GPU, [5])
    records = unpack(good + garbage)
    assert next(records).keys[0] == 5
    with pytest.raises(BadDelta, match=r"at byte (24|40)"):
        next(records)


@given(st.binary(max_size=200))
def test_any_bytes_give_records_or_one_error(data: bytes) -> None:
    try:
        for record in unpack(data):
            assert len(record.keys) <= CHUNK_KEYS
    except BadDelta:
        pass
