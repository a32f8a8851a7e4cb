"""Random histories of the exact index against a naive one: no divergence, and nothing is left behind."""

from __future__ import annotations

from array import array
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from picker.core.prefix import blocks, deltas, index
from picker.core.prefix.deltas import Op, Tier, pack, unpack
from picker.core.prefix.index import PrefixIndex
from picker.core.prefix.keys import Namespace, chain, token_root
from picker.core.prefix.prompt import PromptKeys
from tests.unit.core.prefix.naive import NaiveIndex

NAMES = ("a", "b", "c", "d")
# Prompts of tokens 0..9 with equal beginnings, in two block sizes; whole numbers of blocks and not.
TEXTS = ["0123456789012", "012345678901234", "012345999999999999", "0123", "01", "77777777", "0"]


def prompt(text: str) -> PromptKeys:
    tokens = array("I", [int(letter) for letter in text]).tobytes()
    exact = {size: chain(token_root(b"s", Namespace(), size), tokens, 4 * size) for size in (2, 3)}
    return PromptKeys(exact=exact, tokens=len(text))


PROMPTS = [prompt(text) for text in TEXTS]
KEYS = sorted({key for each in PROMPTS for keys in each.exact.values() for key in keys})

names = st.sampled_from(NAMES)
tiers = st.sampled_from((Tier.GPU, Tier.GPU, Tier.CPU, Tier.DISK))
runs = st.tuples(st.sampled_from(PROMPTS), st.sampled_from((2, 2, 3))).map(lambda pair: list(pair[0].exact[pair[1]]))
some_keys = st.one_of(runs, st.lists(st.sampled_from(KEYS), max_size=8))
records: st.SearchStrategy[tuple[Op, str, Tier, list[int]]] = st.one_of(
    st.tuples(st.sampled_from((Op.ADD, Op.ADD, Op.REMOVE)), names, tiers, some_keys),
    st.tuples(st.sampled_from((Op.ONLINE, Op.ONLINE, Op.CLEAR, Op.OFFLINE)), names, st.just(Tier.GPU), st.just([])),
)
steps = st.one_of(
    st.tuples(st.just("apply"), st.lists(records, max_size=4)),
    st.tuples(st.just("apply"), st.lists(records, max_size=4)),
    st.tuples(st.just("bind"), names, st.sampled_from("xy")),
    st.tuples(st.just("unbind"), names),
    st.tuples(st.just("routed"), names, st.sampled_from(PROMPTS)),
    st.tuples(st.just("observed"), names, st.sampled_from(PROMPTS), st.sampled_from((None, 0, 2, 3, 6, 12))),
    st.tuples(st.just("tick"), st.sampled_from((0.1, 0.9, 2.0, 30.0))),
)


class Pair:
    """Both indexes, told the same."""

    def __init__(self) -> None:
        self.real = PrefixIndex()
        self.naive = NaiveIndex()
        self.last_id = dict.fromkeys(NAMES, 999)
        self.now = 0.0
        for name in NAMES[:2]:
            self.step("bind", name, "x")
            self.step("apply", [(Op.ONLINE, name, Tier.GPU, [])])

    def step(self, what: str, *given: Any) -> None:
        match what, given:
            case "apply", (told,):
                self.apply(b"".join(pack(op, self.last_id[name], tier, keys) for op, name, tier, keys in told))
            case "bind", (name, instance):
                number = self.real.bind(name, instance)
                self.last_id[name] = number
                self.naive.bound(number, name)
            case "unbind", (name,):
                self.real.unbind(name)
                self.naive.unbind(name)
            case "routed", (name, keys):
                self.real.routed(name, keys, self.now)
                self.naive.routed(name, keys, self.now)
            case "observed", (name, keys, cached):
                self.real.observed(name, keys, keys.tokens, cached, self.now)
                self.naive.observed(name, keys, cached, self.now)
            case "tick", (by,):
                self.now += by
                self.naive.now = self.now
                self.real.tick(self.now)
        self.compare()

    def apply(self, message: bytes) -> None:
        """Record by record, with lookups in between."""
        pieces = unpack(message)
        rest = self.real.apply(message, 1) if message else None
        while rest is not None:
            self.naive.take_in(next(pieces))
            self.compare()
            rest = self.real.apply(rest, 1)
        assert list(pieces) == []

    def compare(self) -> None:
        for keys in PROMPTS:
            assert self.real.lookup(keys) == self.naive.lookup(keys)

    def settle(self) -> None:
        """Sweeps everything out, and counts what is left."""
        for _ in range(200):
            self.real.tick(self.now)
        self.compare()
        figures = self.real.statistics()
        engines = self.naive.engines.values()
        held = [(tier, key) for engine in engines for tier in Tier for key in engine.held[tier]]
        assert (figures.keys, figures.bits, figures.retired_slots) == (len(set(held)), len(held), 0)
        assert figures.evicted == figures.refused == 0


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with millions of keys: dictionaries have several, sweeps take several ticks, records come in pieces."""
    monkeypatch.setattr(deltas, "CHUNK_KEYS", 3)
    monkeypatch.setattr(blocks, "SHARDS", 2)
    monkeypatch.setattr(blocks, "_LOW", 1)
    monkeypatch.setattr(blocks, "_TURN", 2 * len(Tier))
    monkeypatch.setattr(index, "SWEEP_KEYS", 3)


# Each step compares every prompt, and the fixture changes nothing between examples.
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=40))
def test_no_history_tells_it_from_a_naive_index(history: list[tuple[Any, ...]]) -> None:
    pair = Pair()
    for step in history:
        pair.step(*step)
    pair.settle()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(names, st.sampled_from((Op.ADD, Op.ADD, Op.REMOVE)), some_keys), max_size=60), st.integers(1, 12)
)
def test_a_full_index_stays_within_its_bound_and_claims_nothing_false(
    told: list[tuple[str, Op, list[int]]], max_keys: int
) -> None:
    real, naive = PrefixIndex(max_keys=max_keys), NaiveIndex()
    for name, op, keys in told:
        number = real.bind(name)
        naive.bound(number, name)
        message = pack(op, number, Tier.GPU, keys)
        for record in unpack(message):
            naive.take_in(record)
        assert real.apply(message) is None
        assert real.statistics().keys <= max_keys
        for prompt_keys in PROMPTS:
            true = naive.lookup(prompt_keys)
            for endpoint_id, match in real.lookup(prompt_keys).items():
                assert match.tokens <= true[endpoint_id].tokens
    figures = real.statistics()
    assert figures.bits >= figures.keys
