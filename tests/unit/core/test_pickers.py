"""The built-in pickers: shares, turns and ties, with seeded randomness."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from picker.core import pickers
from picker.core.pickers import RANKED_MAX
from tests.unit.core.builders import state

ROUNDS = 20_000


def shares(name: str, totals: list[float], *, seed: int = 7) -> list[float]:
    """How often each row comes first."""
    picker, rng = pickers.build(name), random.Random(seed)
    states = [state(f"pod-{index}") for index in range(len(totals))]
    firsts = Counter(picker.rank(states, totals, rng)[0] for _ in range(ROUNDS))
    return [firsts[index] / ROUNDS for index in range(len(totals))]


def turns(picker: pickers.RoundRobinPicker, names: str) -> str:
    """Which of the endpoints, each named by a letter, is first."""
    states = [state(name) for name in names]
    return states[picker.rank(states, [0.0] * len(states), random.Random(1))[0]].endpoint.id


def test_max_score_takes_the_best_and_ranks_the_rest() -> None:
    states = [state(name) for name in "abcd"]
    ranking = pickers.build("max-score").rank(states, [0.1, 0.9, 0.5, 0.7], random.Random(1))
    assert list(ranking) == [1, 3, 2, 0]


def test_max_score_shares_between_equals_and_noise_counts_as_equal() -> None:
    third = shares("max-score", [1.0, 1.0 + 1e-12, 0.5, 1.0 - 1e-12])
    assert third[2] == 0.0
    assert all(abs(third[index] - 1 / 3) < 0.02 for index in (0, 1, 3))


def test_max_score_of_one() -> None:
    assert list(pickers.build("max-score").rank([state()], [0.0], random.Random(1))) == [0]


def test_weighted_random_follows_the_weights() -> None:
    assert shares("weighted-random", [1.0, 2.0, 7.0, 0.0]) == pytest.approx([0.1, 0.2, 0.7, 0.0], abs=0.02)


def test_weighted_random_follows_tiny_and_huge_weights_alike() -> None:
    """Powers of small weights would all be 0 and make the first of the list the favourite."""
    assert shares("weighted-random", [1e-9, 1e-9, 2e-9]) == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    assert shares("weighted-random", [1e9, 3e9]) == pytest.approx([0.25, 0.75], abs=0.02)


@pytest.mark.parametrize("totals", [[0.0, 0.0], [-1.0, -2.0]])
def test_weighted_random_without_weights_is_uniform(totals: list[float]) -> None:
    assert shares("weighted-random", totals) == pytest.approx([0.5, 0.5], abs=0.02)


def test_random_is_uniform() -> None:
    assert shares("random", [0.0, 1.0, 5.0, 5.0]) == pytest.approx([0.25] * 4, abs=0.02)


def test_round_robin_takes_turns_by_id() -> None:
    picker = pickers.RoundRobinPicker()
    assert [turns(picker, "cab") for _ in range(7)] == ["a", "b", "c", "a", "b", "c", "a"]


def test_round_robin_goes_on_when_members_come_and_go() -> None:
    picker = pickers.RoundRobinPicker()
    assert [turns(picker, "abc"), turns(picker, "abc")] == ["a", "b"]
    assert turns(picker, "ac") == "c", "b left after its turn"
    assert turns(picker, "bcd") == "d", "d joined after c, whose turn it was"
    assert turns(picker, "bcd") == "b"
    assert turns(picker, "a") == "a"
    assert turns(picker, "a") == "a"
    assert turns(picker, "ab") == "b"


def test_round_robin_stays_even_while_one_member_flaps() -> None:
    picker, counts = pickers.RoundRobinPicker(), Counter[str]()
    for turn in range(3000):
        counts[turns(picker, "abcd" if turn % 3 else "acd")] += 1
    steady = [counts[name] for name in "acd"]
    assert max(steady) / min(steady) < 1.6


@pytest.mark.parametrize("name", sorted(pickers.BUILTIN))
def test_rankings_are_bounded(name: str) -> None:
    states = [state(f"pod-{index:02}") for index in range(30)]
    ranking = pickers.build(name).rank(states, [float(index) for index in range(30)], random.Random(3))
    assert len(ranking) == RANKED_MAX == len(set(ranking))


def test_pickers_have_no_parameters() -> None:
    with pytest.raises(TypeError):
        pickers.build("max-score", {"x": 1})
    with pytest.raises(KeyError):
        pickers.build("nope")


def test_each_round_robin_keeps_its_own_turn() -> None:
    first, second = pickers.RoundRobinPicker(), pickers.RoundRobinPicker()
    assert turns(first, "ab") == "a"
    assert turns(second, "ab") == "a"
