"""Shared prefixes over several engines: how much of what could be reused is reused. Simulated physics and clock."""

from __future__ import annotations

import random

import msgspec
import pytest

from sim.profiles import PROFILES, Profile
from tests.sim.fleet import Ask, Fleet, Result, best_hit_rate

ENGINES = 4
GROUPS, PROMPTS = 150, 5
PREFIX_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 6000, 1200, 100
BLOCK_TOKENS = 60
# The caches together hold the working set and 30 % more; clients bring 60 % of what the engines can do.
CACHE_RATIO, LOAD = 1.3, 0.6


def profile() -> Profile:
    working_set = GROUPS * (PREFIX_TOKENS + PROMPTS * (OWN_TOKENS + OUTPUT_TOKENS))
    blocks = round(CACHE_RATIO * working_set / ENGINES / BLOCK_TOKENS)
    return msgspec.structs.replace(PROFILES["8B", "H100"], block_size=BLOCK_TOKENS, kv_blocks=blocks)


def workload(seed: int) -> list[Ask]:
    """Every prompt of every group once, in random order, with random gaps."""
    rng, made = random.Random(seed), profile()
    order = [group for group in range(GROUPS) for _ in range(PROMPTS)]
    rng.shuffle(order)
    prefixes = [[rng.getrandbits(63) for _ in range(PREFIX_TOKENS // BLOCK_TOKENS)] for _ in range(GROUPS)]
    tokens = PREFIX_TOKENS + OWN_TOKENS
    # What one request costs an engine when its prefix is there in four of five cases.
    new = tokens - PREFIX_TOKENS * (PROMPTS - 1) / PROMPTS
    cost_s = new * made.prefill_token_s + OUTPUT_TOKENS * (made.sequence_s + tokens * made.resident_token_s)
    rate = LOAD * ENGINES / cost_s
    at, asks = 0.0, []
    for group in order:
        at += rng.expovariate(rate)
        own = [rng.getrandbits(63) for _ in range(OWN_TOKENS // BLOCK_TOKENS)]
        asks.append(Ask(at, [*prefixes[group], *own], tokens, OUTPUT_TOKENS))
    return asks


def ran(seed: int, **options: object) -> tuple[Result, float]:
    asks = workload(seed)
    result = Fleet(profile(), ENGINES, seed=seed, **options).run(asks)  # type: ignore[arg-type]
    return result, result.hit_rate / best_hit_rate(profile(), ENGINES, asks)


@pytest.mark.parametrize("seed", range(3))
def test_shared_prefixes_are_reused(seed: int) -> None:
    result, of_best = ran(seed)
    blind, blind_of_best = ran(seed, policy="least-loaded")
    print(f"\nseed {seed}: {of_best:.3f} of the best possible; blind {blind_of_best:.3f}")
    print(f"median TTFT {sorted(result.ttft_s)[375]:.3f} s, blind {sorted(blind.ttft_s)[375]:.3f} s; {result.chosen}")
    assert of_best >= 0.95
    assert of_best > blind_of_best + 0.2
