"""The scorer of cached prefixes."""

from __future__ import annotations

import pytest

from picker.core.prefix.prompt import Match, PromptKeys
from scorers.prefix_cache import PrefixCache
from tests.unit.core.builders import request, state

KEYS = PromptKeys(exact={16: [1, 2, 3]}, tokens=1000)
ROWS = [state("a"), state("b"), state("c")]


def test_the_share_of_the_prompt_that_is_there() -> None:
    asked = request(1, keys=KEYS, matches={"a": Match(250, exact=True), "c": Match(999)})
    assert list(PrefixCache().score(asked, ROWS)) == [0.25, 0.0, 0.999]


def test_what_is_in_slow_memory_counts_less() -> None:
    asked = request(1, keys=KEYS, matches={"a": Match(500), "b": Match(500, slow=500), "c": Match(500, slow=100)})
    assert list(PrefixCache().score(asked, ROWS)) == pytest.approx([0.5, 0.4, 0.48])
    assert list(PrefixCache(slow=0.0).score(asked, ROWS)) == pytest.approx([0.5, 0.0, 0.4])
    assert list(PrefixCache(slow=1.0).score(asked, ROWS)) == pytest.approx([0.5, 0.5, 0.5])


def test_nobody_holds_anything_is_data() -> None:
    assert list(PrefixCache().score(request(1, keys=KEYS), ROWS)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "keys",
    [
        None,
        PromptKeys(),
        PromptKeys(tokens=9),
        PromptKeys(exact={16: []}, tokens=9),
        PromptKeys(learned=(1,), tokens=0),
    ],
)
def test_no_keys_no_data(keys: PromptKeys | None) -> None:
    assert list(PrefixCache().score(request(1, keys=keys), ROWS)) == [None, None, None]


def test_a_match_that_cannot_be_stays_within_bounds() -> None:
    asked = request(1, keys=KEYS, matches={"a": Match(5000), "b": Match(10, slow=9000), "c": Match(-1)})
    assert list(PrefixCache().score(asked, ROWS)) == [1.0, 0.0, 0.0]
