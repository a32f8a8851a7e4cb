"""What waits for the loop: order, piece sizes and the bound."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest

from picker.core.prefix.deltas import Op, Record, Tier, unpack
from picker.signals.kv.messages import DELTA, FACTS, FRAME, Start
from picker.signals.kv.outbox import MAX_KEYS_PER_DELTA, Outbox
from picker.signals.kv.publisher import Change


def frames(outbox: Outbox) -> Iterator[tuple[int, bytes]]:
    data, at = outbox.next_bytes(2**30), 0
    while at < len(data):
        length, kind = FRAME.unpack_from(data, at)
        at += FRAME.size + length
        yield kind, data[at - length : at]
    assert at == len(data)


def test_order_is_kept_across_kinds() -> None:
    outbox = Outbox()
    outbox.changes(7, True, [Change(True, Tier.GPU, array("Q", [1, 2])), Change(False, Tier.CPU, array("Q", [3]))])
    outbox.message(FACTS, b"f")
    outbox.state(7, True)
    outbox.state(8, False)

    first, second, third = frames(outbox)
    assert list(unpack(first[1])) == [
        Record(Op.CLEAR, 7),
        Record(Op.ADD, 7, Tier.GPU, array("Q", [1, 2])),
        Record(Op.REMOVE, 7, Tier.CPU, array("Q", [3])),
    ]
    assert second == (FACTS, b"f")
    assert list(unpack(third[1])) == [Record(Op.ONLINE, 7), Record(Op.OFFLINE, 8)]
    assert outbox.empty


@pytest.mark.parametrize("sizes", [[2000], [511, 1, 1], [100] * 30])
def test_pieces_are_small_and_lose_nothing(sizes: list[int]) -> None:
    outbox = Outbox()
    for number, size in enumerate(sizes):
        outbox.keys(number, Op.ADD, Tier.GPU, array("Q", range(size)))
    got: dict[int, list[int]] = {}
    for kind, body in frames(outbox):
        assert kind == DELTA
        records = list(unpack(body))
        assert sum(len(record.keys) for record in records) <= MAX_KEYS_PER_DELTA
        for record in records:
            got.setdefault(record.publisher, []).extend(record.keys)
    assert got == {number: list(range(size)) for number, size in enumerate(sizes)}


def test_full_and_drained() -> None:
    outbox = Outbox(max_bytes=1000)
    assert outbox.drained
    outbox.message(FACTS, bytes(1000))
    assert outbox.full
    outbox.next_bytes(10)
    assert outbox.drained
    assert not outbox.full


def test_secret_is_not_shown() -> None:
    assert "s3cret" not in repr(Start(b"s3cret"))
