"""The physics of one simulated engine: invariants under random load, and the shape of time and cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.physics import Engine
from sim.profiles import INSTANT, PROFILES, Profile, profile_for
from sim.requests import Emission, Request

SMALL = Profile(
    name="small",
    step_s=0.010,
    prefill_token_s=0.001,
    context_token_s=1e-6,
    sequence_s=0.0005,
    resident_token_s=1e-5,
    kv_blocks=12,
    block_size=4,
    max_model_len=48,
    max_num_batched_tokens=10,
    max_num_seqs=4,
    natural_tokens=6,
)
ROOMY = msgspec.structs.replace(
    SMALL, kv_blocks=4_096, max_model_len=8_192, max_num_batched_tokens=512, max_num_seqs=64
)


def tokens(length: int, first: int = 1) -> list[int]:
    return list(range(first, first + length))


def drain(engine: Engine) -> list[Emission]:
    emissions: list[Emission] = []
    while (due := engine.next_step_at()) is not None:
        emissions += engine.step(due)
        assert len(emissions) < 100_000
    return emissions


def ask(name: str, token_ids: list[int], max_tokens: int = 4, at: float = 0.0, **more: Any) -> Request:
    fields: dict[str, Any] = {
        "id": name,
        "token_ids": token_ids,
        "max_tokens": max_tokens,
        "arrived_at_s": at,
        "ignore_eos": True,
    }
    return Request(**{**fields, **more})


def run_one(engine: Engine, request: Request) -> Emission:
    assert engine.submit(request, request.arrived_at_s) is None
    return drain(engine)[-1]


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), prompts, st.integers(0, 18), st.sampled_from([None, "a", "b", "c"])),
        st.tuples(st.just("hashes"), st.integers(1, 30), st.integers(0, 18), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 40), st.just(0), st.none()),
        st.tuples(st.just("step"), st.integers(1, 5), st.just(0), st.none()),
    ),
    max_size=40,
)


def request_of(index: int, kind: str, what: object, limit: int, lora: str | None, now: float) -> Request:
    if kind == "submit":
        assert isinstance(what, list)
        # Some share a beginning, some do not: the token values are few.
        return ask(str(index), what, limit, now, lora=lora, ignore_eos=index % 2 == 0, every_token=index % 3 != 0)
    assert isinstance(what, int)
    hashes = list(range(100, 100 + -(-what // SMALL.block_size)))
    return Request(
        id=str(index), arrived_at_s=now, max_tokens=limit, block_hashes=hashes, prompt_tokens=what, ignore_eos=True
    )


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(1, 3), st.sampled_from([1, 3, 1 << 20]))
def test_random_load_keeps_every_invariant(operations: list[tuple[Any, ...]], max_loras: int, burst: int) -> None:
    profile = msgspec.structs.replace(SMALL, tokens_per_step=burst)
    engine = Engine(profile, seed=3, max_loras=max_loras)
    taken: dict[str, Request] = {}
    aborted: set[str] = set()
    emissions: list[Emission] = []
    now = 0.0

    def check() -> None:
        assert 0 <= engine.pool.in_use <= profile.kv_blocks
        assert engine.pool.in_use + engine.pool.idle <= profile.kv_blocks
        assert engine.running <= profile.max_num_seqs
        assert len(engine.running_loras) <= max_loras
        assert 0 <= engine.deferred <= engine.waiting

    for index, (kind, what, limit, lora) in enumerate(operations):
        if kind == "abort":
            if engine.abort(str(what), now):
                aborted.add(str(what))
        elif kind == "step":
            for _ in range(what):
                due = engine.next_step_at()
                if due is None:
                    break
                now = due
                emissions += engine.step(now)
                check()
        else:
            request = request_of(index, kind, what, limit, lora, now)
            refused = engine.submit(request, now)
            assert (refused is None) == (request.prompt_length + limit <= 48)
            if refused is None:
                taken[request.id] = request
        check()
    emissions += drain(engine)

    ends = Counter(emission.request_id for emission in emissions if emission.finish_reason is not None)
    assert set(ends) == set(taken) - aborted
    assert set(ends.values()) <= {1}
    made = Counter[str]()
    for emission in emissions:
        made[emission.request_id] += emission.count
        if emission.summary is not None:
            request = taken[emission.request_id]
            assert made[request.id] == emission.summary.generated_tokens <= request.max_tokens
            assert emission.summary.cached_tokens < request.prompt_length
            assert 0 <= emission.summary.queue_s <= emission.summary.first_token_s <= emission.summary.total_s
    assert (engine.running, engine.waiting, engine.pool.in_use) == (0, 0, 0)
    assert sum(engine.finished_total.values()) == len(ends)
    assert engine.aborted_total == len(aborted)


def test_kv_pressure_preempts_and_everybody_still_ends() -> None:
    engine = Engine(SMALL)
    for index in range(4):
        assert engine.submit(ask(str(index), tokens(8, first=index * 100), 30), 0.0) is None
    done = [emission for emission in drain(engine) if emission.summary]
    assert engine.preemptions_total > 0
    assert sorted(emission.request_id for emission in done) == ["0", "1", "2", "3"]
    assert all(emission.summary.generated_tokens == 30 for emission in done if emission.summary)
    assert done[0].request_id == "0", "the oldest is never preempted"


def test_preemption_does_not_change_the_answer() -> None:
    crowded, alone = Engine(SMALL), Engine(SMALL)
    for index in range(4):
        crowded.submit(ask(str(index), tokens(8, first=index * 100), 30), 0.0)
    alone.submit(ask("3", tokens(8, first=300), 30), 0.0)

    def said(engine: Engine) -> list[int]:
        return [token for emission in drain(engine) if emission.request_id == "3" for token in emission.token_ids]

    assert said(crowded) == said(alone)
    assert crowded.preemptions_total > 0


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    def said(seed: int, **more: Any) -> list[int]:
        engine = Engine(ROOMY, seed=seed)
        engine.submit(ask("x", tokens(9), 40, **more), 0.0)
        return [token for emission in drain(engine) for token in emission.token_ids]

    assert len(said(1)) == 40
    assert said(1) == said(1) == said(1, every_token=False)
    assert said(1) != said(2)
    assert said(1) != said(1, lora="a")


def test_prefix_hits_shorten_the_prefill() -> None:
    engine = Engine(ROOMY)
    cold = run_one(engine, ask("cold", tokens(401)))
    warm = run_one(engine, ask("warm", tokens(401), at=100.0))
    assert cold.summary is not None
    assert warm.summary is not None
    assert (cold.summary.cached_tokens, warm.summary.cached_tokens) == (0, 400)
    assert warm.summary.first_token_s < cold.summary.first_token_s / 10
    assert engine.prefix_queries_total == 802
    assert engine.prefix_hits_total == 400


def test_a_fully_cached_prompt_still_computes_its_last_block() -> None:
    engine = Engine(ROOMY)
    run_one(engine, ask("cold", tokens(36)))
    warm = run_one(engine, ask("warm", tokens(36), at=100.0))
    assert warm.summary is not None
    assert warm.summary.cached_tokens == 32


def test_the_answer_is_cached_for_the_next_turn() -> None:
    engine = Engine(ROOMY)
    engine.submit(ask("one", tokens(8), 21), 0.0)
    answer = [token for emission in drain(engine) for token in emission.token_ids]
    turn = run_one(engine, ask("two", [*tokens(8), *answer, 7], at=100.0))
    assert turn.summary is not None
    # 8 + 21 tokens, of which the last was never computed: 28, seven blocks.
    assert turn.summary.cached_tokens == 28


@pytest.mark.parametrize("other", [{"lora": "a"}, {"cache_salt": "tenant"}])
def test_adapters_and_salts_do_not_share_blocks(other: dict[str, Any]) -> None:
    engine = Engine(ROOMY)
    run_one(engine, ask("plain", tokens(40)))
    foreign = run_one(engine, ask("foreign", tokens(40), at=100.0, **other))
    again = run_one(engine, ask("again", tokens(40), at=200.0, **other))
    assert foreign.summary is not None
    assert again.summary is not None
    assert (foreign.summary.cached_tokens, again.summary.cached_tokens) == (0, 36)


def test_least_recently_used_blocks_are_evicted_first() -> None:
    profile = msgspec.structs.replace(SMALL, kv_blocks=10, max_model_len=40, max_num_batched_tokens=64)
    engine = Engine(profile)

    def cached(name: str, first: int) -> int:
        emission = run_one(engine, ask(name, tokens(17, first=first), 1, at=float(int(name))))
        assert emission.summary is not None
        return emission.summary.cached_tokens

    assert [cached("1", 100), cached("2", 200)] == [0, 0]
    assert cached("3", 100) == 16
    cached("4", 300)  # takes blank blocks and evicts from 200
    assert cached("5", 100) == 16
    assert cached("6", 200) < 16
    assert engine.pool.evictions > 0


def test_block_hashes_stand_for_token_ids() -> None:
    profile = profile_for("sim-8b", "H100").with_block_size(512)
    engine = Engine(profile)

    def run(name: str, hashes: list[int], length: int, at: float) -> Emission:
        request = Request(id=name, arrived_at_s=at, max_tokens=5, block_hashes=hashes, prompt_tokens=length)
        return run_one(engine, request)

    cold = run("1", [1, 2, 3], 1_400, 0.0)
    warm = run("2", [1, 2, 9], 1_400, 10.0)
    assert cold.summary is not None
    assert warm.summary is not None
    assert (cold.summary.cached_tokens, warm.summary.cached_tokens) == (0, 1_024)
    assert warm.summary.generated_tokens == 5
    assert len(warm.token_ids) == 0
    assert warm.summary.first_token_s < cold.summary.first_token_s


def test_abort_frees_blocks_at_once_running_or_waiting() -> None:
    engine = Engine(msgspec.structs.replace(ROOMY, max_num_seqs=1))
    engine.submit(ask("run", tokens(100), 100), 0.0)
    engine.submit(ask("wait", tokens(100), 100), 0.0)
    engine.step(0.0)
    assert (engine.running, engine.waiting) == (1, 1)
    assert engine.kv_usage > 0
    assert engine.abort("run", 0.001)
    assert engine.pool.in_use == 0
    assert engine.abort("wait", 0.001)
    assert not engine.abort("wait", 0.001)
    assert drain(engine) == []
    assert engine.next_step_at() is None


def step_length(engine: Engine) -> float:
    """The length of the step in progress once everything decodes."""
    now = 0.0
    for _ in range(12):
        due = engine.next_step_at()
        assert due is not None
        now = due
        engine.step(now)
    due = engine.next_step_at()
    assert due is not None
    return due - now


def decode_step(batch: int, context: int) -> float:
    engine = Engine(msgspec.structs.replace(ROOMY, max_num_batched_tokens=8_192))
    for index in range(batch):
        engine.submit(ask(str(index), tokens(context, first=index * 10_000), 200), 0.0)
    return step_length(engine)


def test_step_time_grows_with_batch_and_with_resident_tokens() -> None:
    assert decode_step(1, 50) < decode_step(4, 50) < decode_step(16, 50)
    assert decode_step(4, 50) < decode_step(4, 400)
    # 12 tokens were made, so 50 + 12 are resident while the next one is computed.
    expected = SMALL.step_s + 4 * SMALL.sequence_s + 4 * 62 * SMALL.resident_token_s
    assert decode_step(4, 50) == pytest.approx(expected, rel=0.01)


def test_long_prompts_are_prefilled_in_chunks_while_others_decode() -> None:
    engine = Engine(msgspec.structs.replace(ROOMY, max_num_batched_tokens=64))
    engine.submit(ask("old", tokens(10), 50), 0.0)
    engine.step(0.0)
    engine.submit(ask("long", tokens(640, first=1_000), 2), 0.0)
    order = [emission.request_id for emission in drain(engine)]
    assert order.index("long") >= 10, "ten chunks, and the old one gets a token beside each"
    assert order[: order.index("long")] == ["old"] * order.index("long")


def test_waiting_is_first_come_first_served() -> None:
    engine = Engine(msgspec.structs.replace(ROOMY, max_num_seqs=1))
    for name in "abc":
        engine.submit(ask(name, tokens(5), 3), 0.0)
    ends = [emission.request_id for emission in drain(engine) if emission.finish_reason]
    assert ends == ["a", "b", "c"]


def test_adapters_beyond_the_limit_wait_as_deferred_and_do_not_block_others() -> None:
    engine = Engine(ROOMY, max_loras=1)
    engine.submit(ask("a", tokens(5), 5, lora="x"), 0.0)
    engine.submit(ask("b", tokens(5), 5, lora="y"), 0.0)
    engine.submit(ask("c", tokens(5), 5), 0.0)
    engine.step(0.0)
    assert (engine.running, engine.waiting, engine.deferred) == (2, 1, 1)
    assert (engine.running_loras, engine.waiting_loras) == (["x"], ["y"])
    assert len([emission for emission in drain(engine) if emission.finish_reason]) == 3


def test_queue_limit_counts_running_and_waiting() -> None:
    engine = Engine(msgspec.structs.replace(ROOMY, max_num_seqs=2), max_num_queued_reqs=4)
    results = [engine.submit(ask(str(index), tokens(5)), 0.0) for index in range(6)]
    assert [refused.reason if refused else None for refused in results] == [None] * 4 + ["overloaded"] * 2
    assert engine.rejected_total == 2


def test_refusals_are_values() -> None:
    engine = Engine(SMALL)
    too_long = engine.submit(ask("long", tokens(40), 9), 0.0)
    assert too_long is not None
    assert too_long.reason == "too_long"
    assert engine.submit(ask("x", tokens(4)), 0.0) is None
    twice = engine.submit(ask("x", tokens(4)), 0.0)
    assert twice is not None
    assert twice.reason == "duplicate"


def test_a_stall_moves_everything_to_the_late_clock() -> None:
    engine = Engine(ROOMY)
    engine.submit(ask("x", tokens(8), 2), 0.0)
    engine.step(0.0)
    first = engine.step(50.0)
    assert [emission.at_s for emission in first] == [50.0]
    due = engine.next_step_at()
    assert due is not None
    assert due == pytest.approx(50.0 + ROOMY.step_s, abs=0.005)


def test_slowdown_and_speed_scale_time() -> None:
    def total(profile: Profile, slowdown: float) -> float:
        engine = Engine(profile)
        engine.slowdown = slowdown
        emission = run_one(engine, ask("x", tokens(100), 20))
        assert emission.summary is not None
        return emission.summary.total_s

    assert total(ROOMY, 3.0) == pytest.approx(3 * total(ROOMY, 1.0))
    assert total(ROOMY.sped_up(4.0), 1.0) == pytest.approx(total(ROOMY, 1.0) / 4)
    with pytest.raises(ValueError, match="speed"):
        ROOMY.sped_up(0.0)


def test_answers_end_by_themselves_unless_told_to_go_on() -> None:
    engine = Engine(ROOMY)
    natural = run_one(engine, ask("a", tokens(9), 500, ignore_eos=False))
    forced = run_one(engine, ask("b", tokens(9), 500, at=100.0))
    assert natural.summary is not None
    assert forced.summary is not None
    assert natural.finish_reason == "stop"
    assert ROOMY.natural_tokens // 2 < natural.summary.generated_tokens <= ROOMY.natural_tokens * 3 // 2
    assert (forced.finish_reason, forced.summary.generated_tokens) == ("length", 500)


def test_instant_profile_ends_in_one_step_without_time() -> None:
    engine = Engine(INSTANT)
    engine.submit(ask("x", tokens(50), 64, at=5.0), 5.0)
    engine.step(5.0)
    (emission,) = engine.step(5.0)
    assert (emission.count, len(emission.token_ids), emission.finish_reason) == (64, 64, "length")
    assert emission.summary is not None
    assert emission.summary.total_s == 0.0
    assert engine.next_step_at() is None


def test_jitter_is_seeded_apart_from_the_answers() -> None:
    profile = msgspec.structs.replace(ROOMY, jitter=0.3)

    def total(noise: int) -> tuple[float, list[int]]:
        engine = Engine(profile, seed=1, noise_seed=noise)
        engine.submit(ask("x", tokens(9), 30), 0.0)
        emissions = drain(engine)
        return emissions[-1].at_s, [token for emission in emissions for token in emission.token_ids]

    assert total(1) == total(1)
    assert total(1)[0] != total(2)[0]
    assert total(1)[1] == total(2)[1]


def test_profiles_differ_as_their_accelerators_do() -> None:
    for size in ("8B", "32B"):
        slow, middle, fast = (PROFILES[size, name] for name in ("L40S", "A100", "H100"))
        assert slow.step_s > middle.step_s > fast.step_s
        assert slow.prefill_token_s > middle.prefill_token_s > fast.prefill_token_s
    for profile in PROFILES.values():
        assert profile.max_model_len <= profile.kv_tokens
        assert profile.with_block_size(512).kv_tokens <= profile.kv_tokens
    assert profile_for("my-32b-model", "a100").name == "32B-2xA100"
    with pytest.raises(ValueError, match="H100"):
        profile_for("sim-8b", "abacus")
