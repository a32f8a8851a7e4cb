"""Beliefs about endpoints that tell nothing: a least-recently-used cache whose size is learnt from responses."""

from __future__ import annotations

import random
from collections import OrderedDict, deque

import hypothesis.strategies as st
import pytest
from hypothesis import given

from picker.core.prefix.learned import CAPACITY_TOKENS, SETTLED_S, Learned
from picker.core.prefix.prompt import Match, PromptKeys
from tests.unit.core.prefix.test_recent import PROMPTS

CHUNK = 100.0


def prompt(*keys: int) -> PromptKeys:
    """A prompt whose last chunk is whole and followed by half a one."""
    return PromptKeys(learned=keys, tokens=int((len(keys) + 0.5) * CHUNK), chunk_tokens=CHUNK)


def family(name: int, chunks: int) -> PromptKeys:
    return prompt(*[name * 1000 + number for number in range(chunks)])


def depth(learned: Learned, name: str, keys: PromptKeys) -> int:
    found = learned.lookup(keys, ())
    return round(found[name].tokens / CHUNK) if name in found else 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(PROMPTS)), max_size=40), st.integers(1, 12))
def test_it_forgets_as_a_naive_lru_does(history: list[tuple[str, list[int]]], capacity: int) -> None:
    learned = Learned(max_chunks=1000)
    naive: dict[str, list[int]] = {"a": [], "b": []}
    for name in naive:
        learned.declare(name, 4096)
    chunk_tokens = 4096 / capacity
    for now, (name, keys) in enumerate(history):
        asked = PromptKeys(learned=keys, tokens=10**6, chunk_tokens=chunk_tokens)
        learned.routed(name, asked, float(now))
        naive[name] = ([key for key in naive[name] if key not in keys] + keys[::-1])[-capacity:]
        for each in PROMPTS:
            found = learned.lookup(PromptKeys(learned=each, tokens=10**6, chunk_tokens=chunk_tokens), ())
            for other, held in naive.items():
                run = next((place for place, key in enumerate(each) if key not in held), len(each))
                assert found.get(other, Match(0)).tokens == int(run * chunk_tokens)
        assert len(learned) == sum(len(held) for held in naive.values())


def test_a_match_is_less_than_the_prompt() -> None:
    learned = Learned(1000)
    keys = PromptKeys(learned=(1, 2), tokens=200, chunk_tokens=100.0)
    learned.routed("a", keys, 1.0)
    assert learned.lookup(keys, ()) == {"a": Match(199)}
    assert learned.lookup(keys, {"a"}) == {}
    learned.routed("a", PromptKeys(), 1.0)
    assert learned.lookup(PromptKeys(), ()) == {}


def test_a_declared_size_is_taken_once() -> None:
    learned = Learned(10**6)
    learned.routed("a", family(1, 10), 0.0)
    belief = learned.belief("a")
    assert belief is not None
    assert belief.capacity_tokens == CAPACITY_TOKENS
    learned.declare("a", 50_000)
    assert belief.capacity_tokens == 50_000
    learned.routed("a", family(1, 10), 10.0)
    learned.observed("a", family(1, 10), 1050, 0, 11.0)
    learned.tick(1000)
    shrunk = belief.capacity_tokens
    assert shrunk < 50_000
    learned.declare("a", 50_000)
    assert belief.capacity_tokens == shrunk
    assert learned.belief("b") is None


def test_a_prefix_that_was_lost_takes_all_that_is_older_with_it() -> None:
    learned = Learned(1000)
    for now in range(5):
        learned.routed("a", family(now, 100), 10.0 * now)
    learned.routed("a", family(2, 100), 100.0)
    learned.observed("a", family(2, 100), 10_050, 0, 101.0)
    learned.tick(1000)
    assert [depth(learned, "a", family(number, 100)) for number in range(5)] == [0, 0, 100, 100, 100]
    belief = learned.belief("a")
    assert belief is not None
    assert belief.capacity_tokens == 300 * CHUNK


def test_losses_are_forgotten_in_slices() -> None:
    learned = Learned(1000)
    for now in range(9):
        learned.routed("a", family(now, 10), 10.0 * now)
    learned.routed("a", family(7, 10), 100.0)
    learned.observed("a", family(7, 10), 1050, 0, 101.0)
    for left in (75, 60, 45, 30, 20, 20):
        learned.tick(15)
        assert len(learned) == left


@pytest.mark.parametrize("cached", [None, 1000, 850, 1040])
def test_right_predictions_and_silence_change_nothing(cached: int | None) -> None:
    learned = Learned(1000)
    learned.routed("a", family(1, 10), 0.0)
    learned.routed("a", family(1, 10), 10.0)
    learned.observed("a", family(1, 10), 1050, cached, 11.0)
    learned.tick(1000)
    belief = learned.belief("a")
    assert belief is not None
    assert belief.capacity_tokens == CAPACITY_TOKENS
    assert depth(learned, "a", family(1, 10)) == 10


def test_a_prompt_that_was_still_being_computed_proves_nothing() -> None:
    learned = Learned(1000)
    learned.routed("a", family(1, 10), 0.0)
    learned.routed("a", family(1, 10), SETTLED_S - 0.1)
    learned.observed("a", family(1, 10), 1050, 0, 11.0)
    learned.tick(1000)
    belief = learned.belief("a")
    assert belief is not None
    assert belief.capacity_tokens == CAPACITY_TOKENS


def test_tokens_per_chunk_are_learnt() -> None:
    learned = Learned(1000)
    for _ in range(60):
        learned.routed("a", family(1, 20), 0.0)
        learned.observed("a", family(1, 20), int(20.5 * 150), None, 1.0)
        learned.observed("b", family(1, 20), 10**6, None, 1.0)
    belief = learned.belief("a")
    assert belief is not None
    assert belief.chunk_tokens == pytest.approx(150, rel=0.02)
    learned.observed("a", family(1, 2), 10**6, None, 1.0)
    learned.observed("a", family(1, 20), 0, None, 1.0)
    assert belief.chunk_tokens == pytest.approx(150, rel=0.02), "too short to tell, and no prompt at all"


def test_a_restart_forgets_the_prefixes_and_keeps_the_size() -> None:
    learned = Learned(1000)
    learned.declare("a", 9000)
    learned.routed("a", family(1, 10), 0.0)
    learned.restarted("a")
    learned.restarted("b")
    belief = learned.belief("a")
    assert belief is not None
    assert (len(learned), belief.capacity_tokens) == (0, 9000)
    learned.observed("a", family(1, 10), 1050, 0, 11.0)
    learned.forget("a")
    learned.forget("a")
    assert learned.belief("a") is None


def test_all_together_stay_within_the_bound() -> None:
    learned = Learned(max_chunks=200)
    for number in range(20):
        for name in range(10):
            learned.routed(str(name), family(number, 10), float(number))
            learned.tick(100)
            assert len(learned) <= 200
    assert [depth(learned, str(name), family(19, 10)) for name in range(10)] == [10] * 10


class Engine:
    """A simulated engine's prefix cache: whole chunks, answers too, the least recently used evicted first."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._used: OrderedDict[int, None] = OrderedDict()
        self._answers = 10**9

    def serve(self, keys: PromptKeys) -> int:
        """Returns the cached tokens."""
        cached = next((place for place, key in enumerate(keys.learned) if key not in self._used), len(keys.learned))
        self._answers += 3
        for key in (*range(self._answers, self._answers + 3), *reversed(keys.learned)):
            self._used[key] = None
            self._used.move_to_end(key)
        while len(self._used) > self._chunks:
            self._used.popitem(last=False)
        return int(cached * CHUNK)


@pytest.mark.parametrize("declared_chunks", [700, 2000, 6000])
def test_beliefs_come_to_fit_the_engine(declared_chunks: int) -> None:
    """Conversations that grow by two chunks a turn and have a system prompt of ten, before a cache of 2,000 chunks;
    responses tell twenty requests later.
    """
    rng = random.Random(5)
    learned, engine = Learned(10**6), Engine(2000)
    learned.declare("a", int(declared_chunks * CHUNK))
    lengths = [0] * 250
    under_way: deque[tuple[PromptKeys, int]] = deque()
    wrong = missed = hits = 0
    for turn in range(12_000):
        now = turn * 0.5
        # Some are active and most come back late, so that reuse distances lie on both sides of the cache.
        who = int(rng.random() ** 3 * len(lengths))
        lengths[who] = lengths[who] % 40 + 2
        own = [who * 10**6 + lengths[who] // 42 * 10**5 + number for number in range(lengths[who])]
        keys = prompt(*range(1, 11), *own)
        predicted = depth(learned, "a", keys) * CHUNK
        cached = engine.serve(keys)
        if turn >= 8000:
            hits += cached > 10 * CHUNK
            wrong += predicted > cached + 2 * CHUNK
            missed += predicted < cached - 2 * CHUNK
        learned.routed("a", keys, now)
        learned.tick(256)
        under_way.append((keys, cached))
        if len(under_way) > 20:
            done, had = under_way.popleft()
            learned.observed("a", done, done.tokens, had, now)
    belief = learned.belief("a")
    assert belief is not None
    assert 1300 < belief.capacity_tokens / CHUNK < 2100, "at most twice what was declared, and answers take room too"
    assert wrong < 0.06 * 4000
    assert missed < 0.1 * hits
