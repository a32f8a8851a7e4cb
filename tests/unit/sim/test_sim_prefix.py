"""The prefix cache of a simulated engine, and that its events tell exactly what it holds."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.kv_encoding import Encoding, EngineName, KvEncoder
from sim.physics import Engine
from sim.prefix import BlockPool, CacheChange, Cleared, Removed, Stored, chain_keys, root_key
from sim.profiles import Profile
from sim.requests import Request
from sim.tokens import as_tokens
from tests.unit.sim.kv_reader import Reader

SMALL = Profile(
    name="small",
    step_s=0.01,
    prefill_token_s=0.0,
    context_token_s=0.0,
    sequence_s=0.0,
    resident_token_s=0.0,
    kv_blocks=12,
    block_size=4,
    max_model_len=48,
    max_num_batched_tokens=10,
    max_num_seqs=4,
    natural_tokens=6,
)
FORMATS = [(engine, encoding) for engine in get_args(EngineName) for encoding in get_args(Encoding)]


class Watched:
    """An engine and a reader of the payloads of its changes."""

    def __init__(self, engine: EngineName = "vllm", encoding: Encoding = "map", **profile: Any) -> None:
        shape = msgspec.structs.replace(SMALL, **profile)
        self.encoder = KvEncoder(engine, encoding, block_size=shape.block_size, rank=0, lora_ids={"a": 1, "b": 2})
        self.reader = Reader()
        self.changes: list[CacheChange] = []
        self.engine = Engine(shape, seed=3, max_loras=2, block_copies=engine == "vllm", on_cache_changes=self.note)

    def note(self, changes: list[CacheChange]) -> None:
        assert changes
        self.changes += changes
        self.reader.read(self.encoder.batch(changes, unix_s=1.5))

    def drain(self) -> None:
        while (due := self.engine.next_step_at()) is not None:
            self.engine.step(due)

    def ask(self, name: str, tokens: list[int], limit: int = 4, **more: Any) -> None:
        request = Request(id=name, arrived_at_s=0.0, max_tokens=limit, token_ids=tokens, ignore_eos=True, **more)
        assert self.engine.submit(request, 0.0) is None

    def run(self, name: str, tokens: list[int], limit: int = 4, **more: Any) -> tuple[int, list[int]]:
        """Cached tokens and the answer of a request that is alone."""
        self.ask(name, tokens, limit, **more)
        answer: list[int] = []
        while (due := self.engine.next_step_at()) is not None:
            for emission in self.engine.step(due):
                answer += emission.token_ids
                summary = emission.summary
        assert summary is not None
        return summary.cached_tokens, answer


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)
names = st.sampled_from([None, None, "a", "b"])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), prompts, st.integers(0, 18), names, names),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0), st.none(), st.none()),
        st.tuples(st.just("step"), st.integers(1, 5), st.just(0), st.none(), st.none()),
        st.tuples(st.just("reset"), st.just(0), st.just(0), st.none(), st.none()),
    ),
    max_size=50,
)


@pytest.mark.parametrize(("engine", "encoding"), FORMATS)
@settings(max_examples=150, deadline=None)
@given(operations, st.sampled_from([1, 3, 1 << 20]), st.sampled_from([12, 40]))
def test_events_tell_the_cache_at_any_time(
    engine: EngineName, encoding: Encoding, operations: list[tuple[Any, ...]], burst: int, blocks: int
) -> None:
    watched = Watched(engine, encoding, tokens_per_step=burst, kv_blocks=blocks)
    pool = watched.engine.pool
    # The oldest form has neither adapter nor salt: a reader cannot tell those contents apart.
    tells_namespaces = (engine, encoding) != ("sglang", "array")

    def check() -> None:
        # A step in progress has changed the cache, and its changes are told when it ends.
        told = Reader()
        told.copies, told.contents = watched.reader.copies.copy(), dict(watched.reader.contents)
        if pool.changes:
            told.read(watched.encoder.batch(pool.changes, unix_s=2.0))
        assert told.copies == pool.cached()
        assert pool.cached().total() <= pool.capacity
        assert 0 <= pool.in_use <= pool.capacity
        assert pool.in_use + pool.idle <= pool.capacity
        if engine == "sglang":
            assert max(pool.cached().values(), default=0) <= 1

    for index, (kind, what, limit, lora, salt) in enumerate(operations):
        if kind == "submit":
            if not tells_namespaces:
                lora = salt = None
            if len(what) + limit <= SMALL.max_model_len:
                watched.ask(str(index), what, limit, lora=lora, cache_salt=salt)
        elif kind == "abort":
            watched.engine.abort(str(what), 0.0)
        elif kind == "reset":
            held = pool.in_use
            assert watched.engine.reset_prefix_cache() is (held == 0)
            assert held or not watched.reader.copies
        else:
            for _ in range(what):
                due = watched.engine.next_step_at()
                if due is not None:
                    watched.engine.step(due)
                check()
        check()
    watched.drain()
    assert not pool.changes
    assert pool.in_use == 0
    check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(1, 10), names, names), max_size=25), st.sampled_from(FORMATS[:3]))
def test_cached_tokens_are_what_the_events_foretold(
    requests: list[tuple[list[int], int, str | None, str | None]], form: tuple[EngineName, Encoding]
) -> None:
    watched = Watched(*form)
    for index, (tokens, limit, lora, salt) in enumerate(requests):
        foretold = watched.reader.cached_tokens(tokens, lora=lora, salt=salt)
        cached, _ = watched.run(str(index), tokens, limit, lora=lora, cache_salt=salt)
        assert cached == foretold
        assert cached < len(tokens)


@pytest.mark.parametrize(("engine", "copies"), [("vllm", 2), ("sglang", 1)])
def test_the_recomputed_last_block_of_a_cached_prompt_is_a_second_copy(engine: EngineName, copies: int) -> None:
    watched = Watched(engine)
    tokens = list(range(8))
    assert watched.run("cold", tokens, 1)[0] == 0
    assert watched.run("warm", tokens, 1)[0] == 4
    last = chain_keys(as_tokens(tokens), block_size=4, parent=root_key(None, None))[-1]
    assert watched.reader.stored_hashes.count(last) == copies
    assert watched.reader.copies[last] == copies
    # Something else takes every block, one at a time.
    watched.run("other", list(range(100, 144)), 1)
    assert sum(isinstance(change, Removed) and change.key == last for change in watched.changes) == copies
    assert not watched.reader.copies[last]


def test_generated_tokens_fill_blocks_and_are_told() -> None:
    watched = Watched(max_num_batched_tokens=64)
    prompt = list(range(6))
    _, answer = watched.run("one", prompt, 11)
    contents = {content.tokens for content in watched.reader.contents.values()}
    whole = (*prompt, *answer)
    # The last token is never computed: 16 of 17 tokens, four blocks.
    assert contents == {whole[:4], whole[:8], whole[:12], whole[:16]}


def test_long_prompts_are_told_in_chained_chunks_and_evictions_before_what_took_their_place() -> None:
    watched = Watched()
    watched.run("long", list(range(26)), 1)
    stored = [change for change in watched.changes if isinstance(change, Stored)]
    # 10, 20 and 26 of 26 tokens: two, three and one more full blocks.
    assert [len(change.keys) for change in stored] == [2, 3, 1]
    assert [change.parent for change in stored] == [None, stored[0].keys[-1], stored[1].keys[-1]]
    watched.changes.clear()
    watched.run("next", list(range(100, 130)), 1)
    kinds = [type(change) for change in watched.changes]
    assert kinds.index(Removed) < len(kinds) - 1 - kinds[::-1].index(Stored)
    evicted = [change.key for change in watched.changes if isinstance(change, Removed)]
    keys = [key for change in stored for key in change.keys]
    assert evicted == keys[::-1][: len(evicted)], "leaves first"


def test_namespaces_do_not_share_and_the_salt_is_told_once() -> None:
    watched = Watched(kv_blocks=64)
    tokens = list(range(9))
    for index, (lora, salt) in enumerate([(None, None), ("a", None), (None, "a"), ("a", "s"), ("b", "s")]):
        assert watched.run(str(index), tokens, 1, lora=lora, cache_salt=salt)[0] == 0
        assert watched.run(f"{index} again", tokens, 1, lora=lora, cache_salt=salt)[0] == 8
    assert len({root_key(*pair) for pair in [("ab", "c"), ("a", "bc"), ("", "abc"), (None, None)]}) == 4


def test_reset_is_refused_while_blocks_are_held() -> None:
    watched = Watched()
    watched.ask("x", list(range(8)))
    watched.engine.step(0.0)
    assert not watched.engine.reset_prefix_cache()
    watched.drain()
    assert watched.engine.reset_prefix_cache()
    assert watched.changes[-1] == Cleared()
    assert not watched.engine.pool.cached()
    assert watched.run("x", list(range(8)))[0] == 0


def test_prompts_of_hashes_cannot_be_told() -> None:
    request = Request(id="x", arrived_at_s=0.0, max_tokens=1, block_hashes=[1], prompt_tokens=4)
    with pytest.raises(ValueError, match="token ids"):
        Watched().engine.submit(request, 0.0)


def test_pool_takes_all_or_nothing() -> None:
    pool = BlockPool(4)
    taken = pool.take([], fresh=3)
    assert taken is not None
    assert pool.take([], fresh=2) is None
    assert pool.in_use == 3
    assert pool.publish(taken[0], 7) == taken[0]
    assert pool.publish(taken[1], 7) == taken[1], "a second copy"
    assert pool.match([7, 8], limit=2) == [taken[0]]
    pool.release([taken[2], taken[1], taken[0]])
    assert (pool.in_use, pool.idle) == (0, 2)
    assert pool.take([taken[0]], fresh=3) is not None, "the copy is evicted"
    assert pool.take([taken[0]], fresh=0) == [], "shared"
    assert (pool.in_use, pool.idle, pool.usage, pool.evictions) == (4, 0, 1.0, 1)
    assert pool.cached() == {7: 1}


def test_evicting_the_first_copy_leaves_the_other_findable() -> None:
    pool = BlockPool(2, record=True)
    first, second = pool.take([], fresh=2) or []
    pool.publish(first, 7)
    pool.publish(second, 7)
    pool.release([first, second])
    assert pool.take([], fresh=1) == [first]
    assert pool.match([7], limit=1) == [second]
    pool.release([first])
    assert pool.take([], fresh=2) is not None
    assert pool.match([7], limit=1) == []
    assert pool.changes == [Removed(7), Removed(7)]


def test_without_copies_the_second_block_gives_way() -> None:
    pool = BlockPool(3, copies=False)
    first, second, third = pool.take([], fresh=3) or []
    assert pool.publish(first, 7) == first
    pool.release([first])
    assert pool.publish(second, 7) == first, "revived"
    assert (pool.in_use, pool.idle) == (2, 0)
    pool.release([first, third])
    assert (pool.in_use, pool.idle) == (0, 1)


def test_chain_keys_cover_everything_before() -> None:
    def keys(*token_ids: int, parent: int = 0) -> list[int]:
        return chain_keys(as_tokens(token_ids), block_size=2, parent=parent)

    one = keys(1, 2, 3, 4, 5)
    assert len(one) == 2
    assert not set(one) & set(keys(9, 2, 3, 4, 5))
    assert keys(1, 2, 3) == one[:1]
    assert keys(3, 4, parent=one[0]) == one[1:]
    assert keys(1, 2, parent=1) != one[:1]


def test_chain_keys_are_equal_in_every_process() -> None:
    assert chain_keys(as_tokens(range(16)), block_size=16, parent=1) == [16475769662090716527]
