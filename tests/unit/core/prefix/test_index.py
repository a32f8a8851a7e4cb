"""The prefix index: what it says of a prompt, and that no call is long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from picker.core.prefix import slots
from picker.core.prefix.blocks import SHARDS
from picker.core.prefix.deltas import BadDelta, Op, Record, Tier, pack
from picker.core.prefix.index import APPLY_KEYS, REPORTED_S, SENT_S, PrefixIndex
from picker.core.prefix.prompt import Match, PromptKeys


def prompt(blocks: int, *, block_tokens: int = 32, rest: int = 1, family: int = 0) -> PromptKeys:
    """A prompt of whole blocks and `rest` tokens more. Those of a family have the same beginning."""
    keys = [family << 32 | number << 8 | number & 255 for number in range(1, blocks + 1)]
    return PromptKeys(exact={block_tokens: keys}, tokens=blocks * block_tokens + rest)


def engine(index: PrefixIndex, name: str, keys: Sequence[int] = (), tier: Tier = Tier.GPU) -> int:
    """An engine that is heard and told of these keys."""
    number = index.bind(name)
    tell(index, Op.ONLINE, number)
    if keys:
        tell(index, Op.ADD, number, keys, tier)
    return number


def tell(index: PrefixIndex, op: Op, number: int, keys: Sequence[int] = (), tier: Tier = Tier.GPU) -> None:
    rest: bytes | Iterator[Record] | None = pack(op, number, tier, keys)
    while rest is not None:
        rest = index.apply(rest)


def keys_of(prompt_keys: PromptKeys) -> list[int]:
    (keys,) = prompt_keys.exact.values()
    return list(keys)


def swept(index: PrefixIndex) -> None:
    for _ in range(1000):
        if not index.statistics().retired_slots:
            return
        index.tick(0.0)
    raise AssertionError("the sweep does not end")


# -- what is there -----------------------------------------------------------------------------------


def test_the_block_that_ends_a_prompt_does_not_count() -> None:
    """A real vLLM: 288 tokens are 9 blocks of 32, and all of them cached gives 256 cached tokens."""
    index = PrefixIndex()
    full = prompt(9, rest=0)
    engine(index, "a", keys_of(full))
    assert full.tokens == 288
    assert index.lookup(full) == {"a": Match(256, 0, True)}
    assert index.lookup(prompt(9, rest=1)) == {"a": Match(288, 0, True)}
    assert index.lookup(prompt(1, rest=0)) == {}


def test_only_what_is_there_from_the_beginning_counts() -> None:
    index = PrefixIndex()
    keys = keys_of(prompt(6))
    engine(index, "a", keys)
    engine(index, "b", keys[:2] + keys[3:])
    engine(index, "c", keys[1:])
    engine(index, "d", [])
    found = index.lookup(prompt(6))
    assert {name: match.tokens for name, match in found.items()} == {"a": 192, "b": 64}


def test_tiers_count_together_and_slow_ones_are_told() -> None:
    index = PrefixIndex()
    keys = keys_of(prompt(8))
    number = engine(index, "a", keys[:3])
    engine(index, "b", keys)
    tell(index, Op.ADD, number, keys[2:6], Tier.CPU)
    tell(index, Op.ADD, number, keys[5:7], Tier.DISK)
    assert index.lookup(prompt(8)) == {"a": Match(7 * 32, 4 * 32, True), "b": Match(8 * 32, 0, True)}
    tell(index, Op.REMOVE, number, keys[:1])
    assert index.lookup(prompt(8)) == {"b": Match(8 * 32, 0, True)}


def test_slow_blocks_are_counted_for_each() -> None:
    index = PrefixIndex()
    keys = keys_of(prompt(40))
    for number in range(40):
        name = f"pod-{number}"
        engine(index, name, keys[: 40 - number])
        tell(index, Op.ADD, index.bind(name), keys[40 - number :], Tier.CPU)
    found = index.lookup(prompt(40))
    assert {name: (match.tokens // 32, match.slow // 32) for name, match in found.items()} == {
        f"pod-{number}": (40, number) for number in range(40)
    }


def test_several_block_sizes_at_once() -> None:
    index = PrefixIndex()
    small, large = prompt(8, block_tokens=16, family=1), prompt(2, block_tokens=64, family=2)
    engine(index, "small", keys_of(small)[:5])
    engine(index, "large", keys_of(large))
    both = PromptKeys(exact={**small.exact, **large.exact}, tokens=129)
    assert index.lookup(both) == {"small": Match(80, 0, True), "large": Match(128, 0, True)}


def test_an_engine_that_is_not_heard_any_more_is_a_guess() -> None:
    index = PrefixIndex()
    number = engine(index, "a", keys_of(prompt(3)))
    tell(index, Op.OFFLINE, number)
    assert index.lookup(prompt(3)) == {"a": Match(96, 0, False)}
    tell(index, Op.ONLINE, number)
    assert index.lookup(prompt(3)) == {"a": Match(96, 0, True)}


# -- who tells it ------------------------------------------------------------------------------------


def test_a_publisher_is_one_process() -> None:
    index = PrefixIndex()
    first = index.bind("a", "pod-uid-1/0")
    assert index.bind("a", "pod-uid-1/0") == first
    tell(index, Op.ADD, first, keys_of(prompt(3)))
    second = index.bind("a", "pod-uid-1/1")
    assert second != first
    assert index.lookup(prompt(3)) == {}
    tell(index, Op.ADD, first, keys_of(prompt(3)))
    assert index.lookup(prompt(3)) == {}
    assert index.statistics().stale == 3
    index.unbind("a")
    index.unbind("a")
    assert index.bind("a", "pod-uid-1/1") not in (first, second)
    assert index.statistics().publishers == 1


def test_clearing_is_at_once_and_the_slot_comes_back_clean() -> None:
    index = PrefixIndex()
    keys = keys_of(prompt(500))
    number = engine(index, "a", keys)
    engine(index, "b", keys[:100])
    tell(index, Op.CLEAR, number)
    assert index.lookup(prompt(500)) == {"b": Match(3200, 0, True)}
    figures = index.statistics()
    assert (figures.keys, figures.bits, figures.retired_slots) == (500, 600, 1)
    tell(index, Op.ADD, number, keys[:7])
    swept(index)
    figures = index.statistics()
    assert (figures.keys, figures.bits) == (100, 107)
    engine(index, "c", keys[:9])
    assert {name: match.tokens // 32 for name, match in index.lookup(prompt(500)).items()} == {"a": 7, "b": 100, "c": 9}


def test_clearing_again_and_again_uses_no_slots_up() -> None:
    index = PrefixIndex()
    number = engine(index, "a", [1])
    for _ in range(100):
        tell(index, Op.CLEAR, number)
    assert index.statistics().retired_slots == 1


def test_without_a_free_slot_nothing_is_noted_until_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SLOTS_MAX", 2)
    monkeypatch.setattr(slots.Slots.__init__, "__defaults__", (2,))
    index = PrefixIndex()
    for name in ("a", "b", "c"):
        engine(index, name, keys_of(prompt(2)))
    assert set(index.lookup(prompt(2))) == {"a", "b"}
    assert index.statistics().refused == 2
    index.forget("a")
    swept(index)
    engine(index, "c", keys_of(prompt(2)))
    assert set(index.lookup(prompt(2))) == {"b", "c"}


def test_a_message_is_taken_in_by_slices() -> None:
    index = PrefixIndex()
    number = engine(index, "a")
    count = 3 * APPLY_KEYS + 1
    rest: bytes | Iterator[Record] | None = pack(Op.ADD, number, Tier.GPU, range(1, count + 1))
    sizes = []
    while rest is not None:
        before = index.statistics().keys
        rest = index.apply(rest)
        sizes.append(index.statistics().keys - before)
    assert sizes == [APPLY_KEYS, APPLY_KEYS, APPLY_KEYS, 1]


def test_records_without_keys_cost_too() -> None:
    index = PrefixIndex()
    number = index.bind("a")
    rest = index.apply(pack(Op.ONLINE, number) * 10, budget=9)
    assert rest is not None
    assert index.apply(rest) is None


def test_what_comes_before_garbage_is_taken_in() -> None:
    index = PrefixIndex()
    number = engine(index, "a")
    with pytest.raises(BadDelta):
        index.apply(pack(Op.ADD, number, Tier.GPU, keys_of(prompt(2))) + b"garbage")
    assert index.lookup(prompt(2)) == {"a": Match(64, 0, True)}


# -- what was sent, and what responses say -----------------------------------------------------------


def test_what_was_just_sent_counts_until_the_engine_should_have_told() -> None:
    index = PrefixIndex()
    engine(index, "a", [1])
    index.routed("a", prompt(4), 10.0)
    index.tick(10.0)
    assert index.lookup(prompt(6)) == {"a": Match(128, 0, False)}
    tell(index, Op.ADD, index.bind("a"), keys_of(prompt(4)))
    assert index.lookup(prompt(6)) == {"a": Match(128, 0, True)}
    tell(index, Op.REMOVE, index.bind("a"), keys_of(prompt(4)))
    index.tick(10.0 + SENT_S - 0.01)
    assert index.lookup(prompt(6)) == {"a": Match(128, 0, False)}
    index.tick(10.0 + SENT_S)
    assert index.lookup(prompt(6)) == {}


def test_a_cleared_engine_does_not_have_what_was_just_sent() -> None:
    index = PrefixIndex()
    number = engine(index, "a", [1])
    index.routed("a", prompt(4), 10.0)
    tell(index, Op.CLEAR, number)
    assert index.lookup(prompt(4)) == {}


def test_blocks_from_before_we_listened_are_learnt_from_responses() -> None:
    """An engine tells nothing when it uses a block again, so a gateway that starts late never hears of the hottest."""
    index = PrefixIndex()
    engine(index, "a", [1])
    index.tick(100.0)
    index.observed("a", prompt(9), 289, 256, 100.0)
    assert index.lookup(prompt(9)) == {"a": Match(256, 0, False)}
    index.tick(100.0 + REPORTED_S)
    assert index.lookup(prompt(9)) == {}
    index.observed("a", prompt(9), 289, 0, 200.0)
    index.observed("a", prompt(9), 289, None, 200.0)
    index.observed("nobody", prompt(9), 289, 256, 200.0)
    assert index.lookup(prompt(9)) == {}


def test_a_response_adds_nothing_to_what_events_told() -> None:
    """Otherwise a block would stay that the engine says it dropped."""
    index = PrefixIndex()
    number = engine(index, "a", keys_of(prompt(9)))
    index.observed("a", prompt(9), 289, 288, 0.0)
    tell(index, Op.REMOVE, number, keys_of(prompt(9))[1:])
    assert index.lookup(prompt(9)) == {"a": Match(32, 0, True)}


# -- exact and learned -------------------------------------------------------------------------------

TEXT = PromptKeys(learned=(71, 72, 73), tokens=300, chunk_tokens=64.0)
BOTH = PromptKeys(exact={32: [81, 82, 83]}, learned=(71, 72, 73), tokens=300, chunk_tokens=64.0)


def test_who_tells_nothing_is_believed_to_hold_what_was_routed_there() -> None:
    index = PrefixIndex()
    index.routed("a", BOTH, 1.0)
    assert index.lookup(BOTH) == index.lookup(TEXT) == {"a": Match(192, 0, False)}


def test_who_tells_is_not_believed_to_hold_more() -> None:
    index = PrefixIndex()
    number = engine(index, "a")
    index.routed("a", BOTH, 1.0)
    index.tick(1.0 + SENT_S)
    assert index.lookup(BOTH) == {"a": Match(192, 0, False)}, "it told nothing yet"
    tell(index, Op.ADD, number, [81])
    assert index.lookup(BOTH) == {"a": Match(32, 0, True)}
    assert index.lookup(TEXT) == {"a": Match(192, 0, False)}, "the tokens of this one are not known"
    tell(index, Op.OFFLINE, number)
    assert index.lookup(BOTH) == {"a": Match(192, 0, False)}


def test_a_restart_voids_everything_but_what_is_heard() -> None:
    """The events of the new process may be here before anybody else notices that it is one."""
    index = PrefixIndex()
    number = engine(index, "a", [81, 82])
    index.routed("a", TEXT, 1.0)
    index.routed("b", BOTH, 1.0)
    index.restarted("a")
    index.restarted("nobody")
    assert index.lookup(BOTH) == {"a": Match(64, 0, True), "b": Match(192, 0, False)}
    assert set(index.lookup(TEXT)) == {"b"}
    tell(index, Op.OFFLINE, number)
    index.restarted("a")
    assert set(index.lookup(BOTH)) == {"b"}
    index.forget("b")
    assert index.lookup(BOTH) == {}


def test_statistics() -> None:
    index = PrefixIndex()
    engine(index, "a", [81, 82])
    index.bind("b")
    index.routed("c", BOTH, 1.0)
    index.lookup(BOTH)
    index.lookup(prompt(1))
    figures = index.statistics()
    assert (figures.publishers, figures.online, figures.keys, figures.bits, figures.chunks) == (2, 1, 2, 2, 3)
    assert (figures.lookups, figures.hits) == (2, 1)
    assert 0 < figures.bytes_estimate < 1000
    assert repr(index) == "<PrefixIndex [2 publishers | 2 keys]>"


# -- bounds ------------------------------------------------------------------------------------------


def test_a_full_index_keeps_what_is_looked_up() -> None:
    index = PrefixIndex(max_keys=2000)
    hot = prompt(100, family=1)
    engine(index, "a", keys_of(hot))
    engine(index, "b", keys_of(hot))
    for turn in range(60):
        engine(index, "a", keys_of(prompt(100, family=2 + turn)))
        assert index.statistics().keys <= 2000
        assert index.lookup(hot).keys() == {"a", "b"}
    assert index.lookup(hot) == {"a": Match(3200, 0, True), "b": Match(3200, 0, True)}
    figures = index.statistics()
    assert figures.evicted >= 60 * 100 - 2000
    assert figures.refused == 0


def test_an_index_full_of_hot_keys_refuses_more() -> None:
    """It gives every key a second chance, but looks at a bounded number for each one it needs room for."""
    index = PrefixIndex(max_keys=1 << 14)
    hot = prompt(1 << 14, family=1)
    engine(index, "a", keys_of(hot))
    index.lookup(hot)
    engine(index, "a", keys_of(prompt(10, family=2)))
    figures = index.statistics()
    assert figures.keys <= 1 << 14
    assert figures.refused == 10
    assert figures.evicted <= SHARDS
