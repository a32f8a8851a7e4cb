"""Masks of holders: counts, second chances and the hand that goes round."""

from __future__ import annotations

from picker.core.prefix.blocks import Blocks
from picker.core.prefix.deltas import Tier

A, B = 2, 4
ROUND = 10**5


def depths(blocks: Blocks, keys: list[int], alive: int = A | B) -> dict[int, int]:
    steps, _ = blocks.match(keys, alive)
    return {bit: depth for depth, bits in steps for bit in (A, B) if bits & bit}


def test_keys_of_different_holders_in_one_go() -> None:
    blocks = Blocks(100)
    blocks.add(Tier.GPU, A, [1, 2, 3])
    blocks.add(Tier.GPU, B, [2, 3, 4])
    blocks.add(Tier.CPU, B, [1, 2])
    assert (blocks.keys, blocks.bits, blocks.tier_keys) == (6, 8, [4, 2, 0])
    assert depths(blocks, [1, 2, 3, 4]) == {A: 3, B: 4}
    blocks.remove(Tier.GPU, A, [1, 2, 4, 9])
    assert (blocks.keys, blocks.bits, blocks.tier_keys) == (5, 6, [3, 2, 0])
    assert [blocks.holds(A, key) for key in (1, 2, 3, 4)] == [False, False, True, False]
    assert [blocks.holds(B, key) for key in (1, 2, 3, 4)] == [True, True, True, True]


def test_a_key_that_was_met_goes_with_its_last_holder() -> None:
    blocks = Blocks(4)
    blocks.add(Tier.GPU, A, [1, 2, 3, 4])
    assert depths(blocks, [1, 2, 3, 4]) == {A: 4}
    blocks.remove(Tier.GPU, A, [1, 2, 3])
    assert (blocks.keys, blocks.bits) == (1, 1)
    assert depths(blocks, [4]) == {A: 4 - 3}


def test_what_was_met_stays_and_the_other_goes() -> None:
    blocks = Blocks(8)
    blocks.add(Tier.GPU, A, list(range(8)))
    depths(blocks, [0, 1, 2, 3])
    blocks.add(Tier.DISK, B, list(range(100, 104)))
    assert (blocks.keys, blocks.bits, blocks.evicted, blocks.refused) == (8, 8, 4, 0)
    assert blocks.tier_keys == [4, 0, 4]
    assert depths(blocks, [0, 1, 2, 3]) == {A: 4}
    assert depths(blocks, [100, 101, 102, 103]) == {B: 4}


def test_more_than_there_is_room_for() -> None:
    blocks = Blocks(3)
    blocks.add(Tier.GPU, A, list(range(8)))
    assert (blocks.keys, blocks.refused) == (3, 5)
    assert depths(blocks, list(range(8))) == {A: 3}
    blocks.add(Tier.GPU, A, list(range(8)))
    assert blocks.keys == 3


def test_a_sweep_in_the_middle_of_a_round_misses_nothing() -> None:
    """Wherever the hand is, also in the middle of a dictionary: these keys are all in one."""
    keys = [number << 20 for number in range(10)]
    for before in range(4000):
        if before % 500 > 15:
            continue
        blocks = Blocks(100)
        blocks.add(Tier.GPU, A, keys)
        blocks.begin_sweep(8)
        blocks.sweep(before)
        blocks.begin_sweep(A)
        for _ in range(ROUND):
            if blocks.sweep(7):
                break
        assert (blocks.keys, blocks.bits) == (0, 0), before


def test_a_swept_bit_may_be_used_again() -> None:
    blocks = Blocks(8)
    blocks.add(Tier.GPU, A, [1, 2])
    blocks.begin_sweep(A)
    assert blocks.sweep(ROUND)
    blocks.add(Tier.GPU, A, list(range(8)))
    depths(blocks, list(range(8)))
    blocks.add(Tier.GPU, B, [100])
    assert depths(blocks, list(range(8))) == {A: 8}
    assert blocks.refused == 1
