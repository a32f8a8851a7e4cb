"""Two gateways that share a Redis, before engines with shared prefixes: they route as one, and Redis may die.

Real processes: two `waypost run`, a redis-server. The engines are simulated ones in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from sim.cluster import RunningEngines, serve_engines
from sim.frontend import EngineSpec
from tests.integration.fault_rig import fetch
from tests.integration.redis_rig import redis_server
from tests.integration.rolling_rig import Door, free_port_on
from tests.sim.test_prefix_routing import (
    BLOCK_TOKENS,
    ENGINES,
    GROUPS,
    LOAD,
    OUTPUT_TOKENS,
    OWN_TOKENS,
    PREFIX_TOKENS,
    PROMPTS,
    profile,
)

MODEL = "sim-8b"
# Simulated time passes this much faster, which is what the two cores here can drive.
SPEED = 2.0
REPLICAS = 2
TOGETHER_OF_BEST = 0.93
# Ids that the simulated tokenizer has.
VOCABULARY = 1000
PATIENCE_S = 60.0


@dataclass
class Tally:
    """What clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


def best_hit_rate() -> float:
    """The caches together hold the whole working set, so one of their size loses nothing: all but the first prompt of a
    group find its prefix.
    """
    whole = PREFIX_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    return (PROMPTS - 1) / PROMPTS * whole / (PREFIX_TOKENS + OWN_TOKENS)


def prompts(seed: int) -> list[list[int]]:
    """Every prompt of every group once, in random order, as token ids."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(10, VOCABULARY), k=PREFIX_TOKENS) for _ in range(GROUPS)]
    order = [group for group in range(GROUPS) for _ in range(PROMPTS)]
    rng.shuffle(order)
    return [[*prefixes[group], *rng.choices(range(10, VOCABULARY), k=OWN_TOKENS)] for group in order]


@contextlib.asynccontextmanager
async def gateways(directory: Path, engines: RunningEngines, redis_url: str) -> AsyncIterator[list[tuple[str, str]]]:
    """URL and admin URL of each replica."""
    doors: list[tuple[str, str]] = []
    async with contextlib.AsyncExitStack() as stack:
        for number in range(REPLICAS):
            home = directory / f"replica-{number}"
            home.mkdir()
            listen, admin = (f"127.0.0.1:{free_port_on(['127.0.0.1'])}" for _ in range(2))
            file = home / "waypost.yaml"
            file.write_text(
                json.dumps({"index": {"backend": "redis", "redis_url": redis_url}, "log": {"format": "json"}})
            )
            targets = [part for url in engines.urls for part in ("--to", url)]
            door = Door(home, "run", "--config", str(file), *targets, "--listen", listen, "--admin", admin)
            await door.start()
            stack.push_async_callback(door.close)
            doors.append((f"http://{listen}", f"http://{admin}"))
        yield doors


async def see_each_other(doors: Sequence[tuple[str, str]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for _, admin in doors:
            while f"{REPLICAS} replicas" not in (await fetch(admin, "/readyz")).decode():
                await asyncio.sleep(0.05)


async def drive(doors: Sequence[tuple[str, str]], asks: Sequence[list[int]], *, rate: float, seed: int) -> Tally:
    """Sends them at random times, in turn to each gateway."""
    tally, rng = Tally(), random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)

    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:

        async def ask(url: str, prompt: list[int]) -> None:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
            async with client.post(f"{url}/v1/completions", json=body) as response:
                answer = await response.json()
            tally.statuses[response.status] += 1
            usage = answer.get("usage") or {}
            tally.prompt_tokens += usage.get("prompt_tokens", 0)
            tally.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(asks):
                await asyncio.sleep(rng.expovariate(rate))
                group.create_task(ask(doors[number % len(doors)][0], prompt))
    return tally


@pytest.mark.long
async def test_two_replicas_reuse_prefixes_as_one_and_outlive_their_redis(tmp_path: Path) -> None:
    made = profile().sped_up(SPEED)
    tokens = PREFIX_TOKENS + OWN_TOKENS
    new = tokens - PREFIX_TOKENS * (PROMPTS - 1) / PROMPTS
    cost_s = new * made.prefill_token_s + OUTPUT_TOKENS * (made.sequence_s + tokens * made.resident_token_s)
    rate = LOAD * ENGINES / cost_s
    specs = [EngineSpec(profile=made, model=MODEL, index=number) for number in range(ENGINES)]
    asks, others = prompts(seed=1), prompts(seed=2)[: GROUPS * 2]
    half = len(others) // 2
    with redis_server() as redis:
        async with await serve_engines(specs) as engines, gateways(tmp_path, engines, redis.url) as doors:
            await see_each_other(doors)
            together = await drive(doors, asks, rate=rate, seed=1)
            of_best = together.hit_rate / best_hit_rate()
            print(f"\ntwo replicas: {of_best:.3f} of the best possible at {rate:.0f} requests a second")
            first = await drive(doors, others[:half], rate=rate, seed=2)
            redis.kill()
            second = await drive(doors, others[half:], rate=rate, seed=3)
    assert together.statuses == Counter({200: len(asks)})
    assert first.statuses + second.statuses == Counter({200: len(others)})
    assert of_best >= TOGETHER_OF_BEST
