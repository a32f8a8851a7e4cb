"""The gateway knows what engines hold: what it believed at a decision is what the engine's answer then says."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from picker.core.values import InferenceRequest
from tests.integration.gateway_rig import JSON, backend, events, post, says
from tests.integration.gateway_rig import MODEL as TINY
from tests.integration.gateway_rig import gateway as in_process
from tests.integration.prefix_rig import (
    MODEL,
    ONLINE,
    PATIENCE_S,
    Sim,
    Told,
    check_exact,
    converse,
    gateway,
    heard,
    ids,
    lines,
    ready,
    running,
    settled,
    worker_of,
)
from tests.unit.signals.tokens import rig as tokenizers
from tests.unit.upstream.hostile import answer

BLOCKS = "waypost_prefix_blocks"
ENCODINGS = ("vllm", "vllm-array", "sglang", "sglang-array")
# What was sent somewhere is believed to be there for so long even if no event says so.
SENT_S = 2.0


async def test_chats_are_decided_by_what_the_engines_hold_in_every_encoding(tmp_path: Path) -> None:
    sims = [
        Sim("--model", encoding, "--kv-events", encoding, "--block-size", str(size), engines=2)
        for encoding, size in zip(ENCODINGS, (16, 32, 16, 64), strict=True)
    ]
    async with running(*sims) as urls, gateway(tmp_path, urls) as (site, _):
        await heard(site, 8, *ENCODINGS)
        for encoding, size in zip(ENCODINGS, (16, 32, 16, 64), strict=True):
            # How engines can be asked for tokens is learnt by asking each.
            await asyncio.gather(*(converse(site, encoding, number=n, turns=1) for n in range(100, 108)))
            chats = await asyncio.gather(*(converse(site, encoding, number=n, turns=13) for n in range(8)))
            told = [turn for chat in chats for turn in chat]
            check_exact(told)
            assert {each.estimate - each.tokens for each in told if each.keys == "tokens"} == {0}
            # Each later turn found its beginning, and stayed where it is.
            for before, turn in (pair for chat in chats for pair in itertools.pairwise(chat)):
                assert turn.endpoint == before.endpoint
                assert turn.cached >= before.tokens // size * size
        found = await site.metrics()
        assert (found["waypost_prefix_publishers"], found[ONLINE]) == (8.0, 8.0)
        assert sum(found[f"waypost_kv_events_total/{kind}"] for kind in ("malformed", "losses", "orphans", "gaps")) == 0


async def test_the_last_block_of_a_prompt_never_counts(tmp_path: Path) -> None:
    sim = Sim("--kv-events", "vllm", "--block-size", "16")
    async with running(sim) as urls, gateway(tmp_path, urls) as (site, _):
        await heard(site)
        for count in (15, 16, 17, 31, 32, 33, 160, 161):
            prompt = ids(count, count)
            await site.ask({"prompt": prompt})
            again = await site.ask({"prompt": prompt})
            assert again.held_tokens == again.cached == (count - 1) // 16 * 16


async def test_what_an_engine_loses_is_not_believed(tmp_path: Path) -> None:
    sim = Sim("--kv-events", "vllm", "--block-size", "16", fixed=True)
    body = {"prompt": ids(1, 500)}
    async with running(sim) as urls, gateway(tmp_path, urls) as (site, door):
        await heard(site)
        assert (await settled(site, body)).cached == 496

        await site.client.post(f"{sim.url}/reset_prefix_cache")
        await site.until(BLOCKS, lambda blocks: blocks == 0)
        empty = await site.ask(body)
        assert (empty.keys, empty.held_tokens, empty.cached) == ("tokens", 0, 0)
        assert (await settled(site, body)).cached == 496

        pid = worker_of(door)
        os.kill(pid, signal.SIGKILL)
        await site.until(ONLINE, lambda online: online == 0)
        blind = await site.ask({"prompt": ids(2, 100)})
        assert blind.cached == 0
        await site.until(ONLINE, lambda online: online == 1)
        assert worker_of(door) != pid
        # The engine was asked for what it told before.
        replayed = await site.ask(body)
        assert replayed.exact
        assert replayed.held_tokens == replayed.cached == 496
        assert [line["message"] for line in lines(door, "prefixes")] == ["ended with -9"]

        await sim.kill()
        await site.until(ONLINE, lambda online: online == 0)
        await sim.start()
        await site.until(BLOCKS, lambda blocks: blocks == 0)
        await ready(site)
        fresh = await site.ask(body)
        assert (fresh.held_tokens, fresh.cached) == (0, 0)
        again = await settled(site, body)
        assert again.held_tokens == again.cached == 496


async def test_an_engine_that_comes_back_at_another_port_for_its_events_is_heard_there(tmp_path: Path) -> None:
    sim = Sim("--kv-events", "vllm", "--block-size", "16")
    async with running(sim) as urls, gateway(tmp_path, urls) as (site, _):
        await heard(site)
        moved = Sim("--kv-events", "vllm", "--block-size", "16", "--port", sim.url.rpartition(":")[2])
        await sim.kill()
        await site.until(ONLINE, lambda online: online == 0)
        async with running(moved):
            await ready(site)
            await heard(site)
            assert (await settled(site, {"prompt": ids(1, 100)})).cached == 96


async def test_eviction_is_followed(tmp_path: Path) -> None:
    """62,000 tokens fit; ten prompts have 80,000."""
    small = ("--model", "sim-32b", "--accelerator", "L40S", "--speed", "2000", "--block-size", "16")
    sim = Sim(*small, "--kv-events", "vllm")
    async with running(sim) as urls, gateway(tmp_path, urls) as (site, _):

        async def ask(number: int) -> Told:
            return await site.ask({"model": "sim-32b", "prompt": ids(number, 8000), "max_tokens": 1})

        await heard(site, 1, "sim-32b")
        for number in range(10):
            await ask(number)
        await site.until("waypost_kv_events_total/removed", lambda removed: removed > 1000)
        await asyncio.sleep(SENT_S)
        told = []
        for number in (9, 8, 0, 7, 1, 2):
            told.append(await ask(number))
            # What it took the place of is told a moment later.
            await asyncio.sleep(0.2)
        assert all(each.exact for each in told), told
        assert [each.held_tokens for each in told] == [each.cached for each in told]
        assert [each.cached > 0 for each in told] == [True, True, False, True, False, False]


async def test_adapters_and_salts_are_kept_apart(tmp_path: Path) -> None:
    sims = [
        Sim("--model", f"{encoding}-8b", "--kv-events", encoding, "--block-size", "16", "--lora", f"{encoding}-sql")
        for encoding in ("vllm", "sglang")
    ]
    async with running(*sims) as urls, gateway(tmp_path, urls) as (site, _):
        await heard(site, 2, "vllm-8b", "sglang-8b")
        for name in ("vllm", "sglang"):
            worlds: list[dict[str, str]] = [
                {"model": f"{name}-8b"},
                {"model": f"{name}-8b", "cache_salt": "one"},
                {"model": f"{name}-8b", "cache_salt": "two"},
                {"model": f"{name}-sql"},
                {"model": f"{name}-sql", "cache_salt": "one"},
            ]
            prompt = ids(1, 200)
            for world in worlds:
                first = await site.ask({"prompt": prompt, **world})
                assert (first.keys, first.held_tokens, first.cached) == ("tokens", 0, 0), world
                second = await settled(site, {"prompt": prompt, **world})
                assert second.held_tokens == second.cached == 192, world


async def test_an_engine_that_tells_nothing_is_learnt_of_beside_one_that_does(tmp_path: Path) -> None:
    tells, silent = Sim("--kv-events", "vllm", "--block-size", "16"), Sim("--block-size", "16")
    async with running(tells, silent) as urls, gateway(tmp_path, urls) as (site, _):
        names = [url.removeprefix("http://") for url in urls]
        await heard(site)
        async with asyncio.timeout(PATIENCE_S):
            # New prompts take turns, so both are met.
            seen: dict[str, list[int]] = {}
            while len(seen) < 2:
                seed = random.getrandbits(30)
                seen.setdefault((await site.ask({"prompt": ids(seed, 600)})).endpoint, []).append(seed)
        for name, exact in zip(names, (True, False), strict=True):
            again = await site.ask({"prompt": ids(seen[name][-1], 600)})
            assert again.endpoint == name
            assert again.held[name]["exact"] is exact
            assert again.cached == 592
            assert abs(again.held_tokens - 592) <= (0 if exact else 80)


async def test_a_tokenizer_that_is_not_the_engines_is_told_and_not_used(tmp_path: Path) -> None:
    wrong = tokenizers.save(tmp_path / "model", tokenizers.byte_level(vocab=600))
    sim = Sim("--kv-events", "vllm", "--block-size", "16")
    body = {"prompt": "All happy families are alike. " * 50}
    async with running(sim) as urls, gateway(tmp_path, urls, tokenizers={MODEL: str(wrong)}) as (site, door):
        await heard(site)
        async with asyncio.timeout(PATIENCE_S):
            while not lines(door, "prefixes"):
                await asyncio.sleep(0.05)
        [line] = lines(door, "prefixes")
        assert line["what"] == MODEL
        assert "makes other tokens of samples" in line["message"]
        # The engine is asked instead.
        again = await settled(site, body)
        assert again.held_tokens == again.cached > 300
        assert len(lines(door, "prefixes")) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_answer_says_of_the_cache_is_learnt(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = b'"usage":{"prompt_tokens":900,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":512}}'
    whole = answer(b'{"id":"x","object":"text_completion","choices":[],%b}' % usage, JSON)
    pieces = events(b'data: {"id":"x","choices":[],%b}\n\n' % usage, b"data: [DONE]\n\n")
    body = json.dumps({"model": TINY, "stream": stream, "prompt": "All happy families are alike. " * 100}).encode()
    told: list[tuple[Any, ...]] = []
    async with backend(says(pieces if stream else whole)) as engine, in_process(engine.url) as served:
        monkeypatch.setattr(served.runtime.datastore.prefixes, "observed", lambda *what: told.append(what))
        assert (await served.post(body, path="/v1/completions")).status == 200
        await served.settled()
        [(endpoint, keys, *tokens, _)] = told
        assert endpoint == served.runtime.datastore.endpoints()[0].id
        assert len(keys.learned) == 3000 // 256
        assert tokens == [900, 512]


async def test_a_client_that_leaves_while_keys_are_awaited_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with backend(says(b"")) as engine, in_process(engine.url) as served:
        asked = asyncio.Event()

        async def keyed(*what: object) -> InferenceRequest:
            asked.set()
            await asyncio.sleep(PATIENCE_S)
            raise AssertionError("nobody interrupted it")

        monkeypatch.setattr(served.runtime.prompts, "keyed", keyed)
        async with served.client() as client:
            await client.send(post())
            await asked.wait()
            assert served.relay.active == 1
        await served.settled()
        [line] = served.lines()
        assert (line["outcome"], line["attempts"]) == ("client_gone", 0)
        assert not served.runtime.director.decisions
        assert engine.received == []


async def test_switched_off_nothing_is_asked_or_known(tmp_path: Path) -> None:
    sim = Sim("--kv-events", "vllm", "--block-size", "16")
    async with running(sim) as urls, gateway(tmp_path, urls, enabled=False) as (site, _):
        for _ in range(2):
            told = await site.ask({"prompt": ids(0, 100)})
        assert (told.keys, told.held, told.cached) == (None, {}, 96)
        found = await site.metrics()
        assert found["waypost_prefix_publishers"] == found["waypost_prefix_chunks"] == 0.0
