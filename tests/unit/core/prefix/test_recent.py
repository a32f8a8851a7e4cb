"""Prefixes by last use: depths by binary search are those of a walk, whatever was forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given

from picker.core.prefix.recent import Recent

# Prompts as paths in a tree: equal beginnings are equal keys.
PROMPTS: list[list[int]] = [
    [1, 2, 3, 4, 5, 6, 7, 8],
    [1, 2, 3, 4, 15, 16],
    [1, 2, 23, 24, 25, 26, 27],
    [1],
    [41, 42, 43],
]


def walked(used_at: dict[int, float], keys: Sequence[int], after: float) -> int:
    for depth, key in enumerate(keys):
        if used_at.get(key, float("-inf")) <= after:
            return depth
    return len(keys)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), st.sampled_from(PROMPTS)),
        st.tuples(st.just("oldest"), st.integers(-1, 9)),
        st.tuples(st.just("until"), st.tuples(st.integers(-3, 30), st.integers(1, 9))),
    ),
    max_size=30,
)


@given(STEPS)
def test_it_does_as_a_list_would(steps: list[tuple[str, object]]) -> None:
    recent = Recent()
    order: list[int] = []
    used_at: dict[int, float] = {}
    for now, (what, value) in enumerate(steps):
        match what, value:
            case "touch", list(keys):
                recent.touch(keys, float(now))
                order = [key for key in order if key not in keys] + keys[::-1]
                used_at |= dict.fromkeys(keys, float(now))
            case "oldest", int(count):
                recent.drop_oldest(count)
                order = order[max(0, count) :]
            case "until", (int(time), int(most)):
                old = [key for key in order if used_at[key] <= time]
                assert recent.drop_until(time, most) == (len(old) < most)
                order = [key for key in order if key not in old[:most]]
        used_at = {key: used_at[key] for key in order}
        assert len(recent) == len(order)
        assert recent.oldest_at() == (used_at[order[0]] if order else None)
        for prompt in PROMPTS:
            for after in (float("-inf"), now - 2.0, now - 7.0):
                assert recent.depth(prompt, after) == walked(used_at, prompt, after)


def test_nothing_is_as_deep_as_nothing() -> None:
    assert Recent().depth([]) == Recent().depth([1]) == 0
    recent = Recent()
    recent.touch([], 1.0)
    recent.touch([1, 2], 1.0)
    assert recent.depth([]) == 0
    assert (recent.used_at(2), recent.used_at(3)) == (1.0, None)
    recent.clear()
    assert len(recent) == recent.depth([1]) == 0
