"""The scorer of turns for prompts that nobody holds."""

from __future__ import annotations

import pytest

from picker.core.prefix.prompt import Match, PromptKeys
from scorers.no_hit_lru import NoHitLru
from tests.unit.core.builders import request, state

KEYS = PromptKeys(learned=(1, 2, 3), tokens=200, chunk_tokens=64.0)
ROWS = [state("a", cold_at=30.0), state("b", cold_at=10.0), state("c", cold_at=20.0)]


def test_the_longest_without_a_turn_comes_first() -> None:
    assert list(NoHitLru().score(request(1, keys=KEYS), ROWS)) == [0.0, 1.0, 0.5]


def test_those_that_never_had_one_are_equal() -> None:
    rows = [state("a"), state("b", cold_at=5.0), state("c"), state("d", cold_at=5.0)]
    assert list(NoHitLru().score(request(1, keys=KEYS), rows)) == pytest.approx([1.0, 1 / 3, 1.0, 1 / 3])


def test_alone_and_nobody() -> None:
    assert list(NoHitLru().score(request(1, keys=KEYS), ROWS[:1])) == [1.0]
    assert list(NoHitLru().score(request(1, keys=KEYS), [])) == []


def test_no_say_when_somebody_holds_some_of_it() -> None:
    asked = request(1, keys=KEYS, matches={"c": Match(1)})
    assert list(NoHitLru().score(asked, ROWS)) == [None, None, None]


def test_who_cannot_serve_the_request_does_not_count() -> None:
    """The model next door may have the same system prompt."""
    asked = request(1, keys=KEYS, matches={"elsewhere": Match(64)})
    assert list(NoHitLru().score(asked, ROWS)) == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("keys", [None, PromptKeys(), PromptKeys(exact={16: []}, tokens=9)])
def test_no_say_where_nothing_can_be_cached(keys: PromptKeys | None) -> None:
    assert list(NoHitLru().score(request(1, keys=keys), ROWS)) == [None, None, None]
