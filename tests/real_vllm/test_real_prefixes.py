"""What the index predicts against what a real vLLM says it found in its cache: the KV events, the tokens, the keys.

Two servers that publish their events; `waypost run` finds the sockets itself. `cached_tokens` of every answer is held
against what was believed of the chosen server before the request.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.fault_rig import Gateway, fetch, until
from tests.real_vllm.conftest import Tell, installation
from tests.real_vllm.load import CALL_WITHIN_S
from tests.real_vllm.server import MODEL, Vllm

pytestmark = pytest.mark.real_vllm

EVENTS = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:0"}
# A cache of 300 blocks holds less than two conversations at their end beside the rest, so much is evicted.
FLAGS = (
    *("--kv-events-config", json.dumps(EVENTS), "--enable-prompt-tokens-details"),
    *("--enable-lora", "--max-lora-rank", "8"),
)
SMALL_CACHE = ("--num-gpu-blocks-override", "300")
ADAPTER = "tiny-lora"
MAKE_ADAPTER = Path(__file__).with_name("make_adapter.py")
CONVERSATIONS, TURNS = 8, 7
EQUAL_SHARE, EXACT_SHARE = 0.99, 0.95
WORDS = ("time", "house", "people", "water", "light", "number", "place", "answer", "paper", "river", "story", "music")
# An event comes at the end of the step that made the block; a turn a moment later finds it told.
EVENTS_WITHIN_S = 0.3
FOUND_AGAIN_S = 8.0


@dataclass(frozen=True)
class Turn:
    """One request: what was believed of the chosen server, and what it said."""

    endpoint: str
    keys: str | None
    predicted: int
    cached: int
    prompt: int


@pytest.fixture(scope="module")
def publishers(tmp_path_factory: pytest.TempPathFactory, tell: Tell) -> Iterator[list[Vllm]]:
    """Two servers that tell what they cache."""
    directory, logs = installation(), tmp_path_factory.mktemp("vllm-events")
    adapter = logs / "adapter"
    subprocess.run(
        [directory / "venv" / "bin" / "python", MAKE_ADAPTER, directory / "models" / MODEL, adapter], check=True
    )
    flags = (*FLAGS, "--lora-modules", f"{ADAPTER}={adapter}")
    made = [
        Vllm(directory, logs / f"vllm-{index}.log", (*flags, *cache)) for index, cache in enumerate(((), SMALL_CACHE))
    ]
    try:
        for server in made:
            server.start()
        for server in made:
            server.wait()
        tell("vLLM with events started", seconds=max(server.started_in_s for server in made))
        yield made
    finally:
        for server in made:
            server.close()


@pytest.fixture
def gateway(publishers: list[Vllm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """`waypost run` before them. The engines are asked for tokens: this one splits digits where its file does not."""
    monkeypatch.delenv("WAYPOST_VLLM_DIR", raising=False)
    monkeypatch.delenv("WAYPOST_REQUIRE_VLLM", raising=False)
    started = Gateway(tmp_path, [server.url for server in publishers], {})
    started.ready()
    asyncio.run(until(lambda: _known(started)))
    yield started
    assert started.close() == 0


async def _known(gateway: Gateway) -> bool:
    rows: list[dict[str, Any]] = list((await gateway.endpoints()).values())
    return all(row["models"] and row["signal_age_s"] is not None and row["engine"] == "vllm" for row in rows)


async def ask(client: httpx.AsyncClient, gateway: Gateway, ident: str, **body: Any) -> tuple[Turn, str]:
    """One request, and the text of its answer."""
    response = await client.post(
        "/v1/chat/completions",
        json={"model": MODEL, "max_tokens": 24, "temperature": 0} | body,
        headers={"x-request-id": ident},
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    decision = json.loads(await fetch(gateway.admin, f"/debug/decisions/{ident}"))[-1]
    held = decision["held"].get(decision["endpoint"], {"tokens": 0})
    usage = answer["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    turn = Turn(decision["endpoint"], decision["prefix_keys"], held["tokens"], cached, usage["prompt_tokens"])
    return turn, answer["choices"][0]["message"]["content"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


async def conversations(gateway: Gateway, seed: int, **body: Any) -> list[Turn]:
    """Some conversations of several turns, one request at a time, in turns."""
    rng = random.Random(seed)
    talks: list[list[dict[str, str]]] = [
        [{"role": "system", "content": f"Conversation {seed}-{number}. {sentence(rng, 120)}"}]
        for number in range(CONVERSATIONS)
    ]
    turns: list[Turn] = []
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=CALL_WITHIN_S) as client:
        for number in range(TURNS):
            for index, talk in enumerate(talks):
                talk.append({"role": "user", "content": sentence(rng, 40)})
                turn, text = await ask(client, gateway, f"t-{seed}-{number}-{index}", messages=talk, **body)
                talk.append({"role": "assistant", "content": text})
                turns.append(turn)
                await asyncio.sleep(EVENTS_WITHIN_S / 3)
    return turns


async def warmed(gateway: Gateway) -> None:
    """Both servers have told their block size: exact keys can be made from now on."""
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=CALL_WITHIN_S) as client:
        served: set[str] = set()
        for number in range(40):
            talk = [{"role": "user", "content": f"Warm up {number}. " + sentence(random.Random(number), 60)}]
            turn, _ = await ask(client, gateway, f"w-{number}", messages=talk)
            served.add(turn.endpoint)
            if len(served) == 2 and turn.keys == "tokens":
                return
            await asyncio.sleep(EVENTS_WITHIN_S)
    raise AssertionError(f"exact keys were never made; served by {served}")


def described(turns: Sequence[Turn]) -> Counter[str]:
    return Counter(
        f"{turn.keys} {'=' if turn.predicted == turn.cached else f'{turn.predicted}!={turn.cached}'}" for turn in turns
    )


def test_what_was_predicted_is_what_vllm_found(gateway: Gateway, tell: Tell) -> None:
    asyncio.run(warmed(gateway))
    turns = asyncio.run(conversations(gateway, seed=1))
    exact = [turn for turn in turns if turn.keys == "tokens"]
    equal = [turn for turn in exact if turn.predicted == turn.cached]
    hit = sum(turn.cached for turn in turns) / sum(turn.prompt for turn in turns)
    tell("prefixes", requests=len(turns), exact=len(exact), equal=len(equal), hit_rate=hit)
    assert len(exact) >= EXACT_SHARE * len(turns), described(turns)
    assert len(equal) >= EQUAL_SHARE * len(exact), described(turns)
    assert hit > 0.5


def test_a_cache_salt_keeps_prompts_apart(gateway: Gateway) -> None:
    asyncio.run(warmed(gateway))
    first = asyncio.run(conversations(gateway, seed=2, cache_salt="one"))
    again = asyncio.run(conversations(gateway, seed=2, cache_salt="two"))
    for turns in (first, again):
        assert turns[0].cached == turns[0].predicted == 0
        exact = [turn for turn in turns if turn.keys == "tokens"]
        assert all(turn.predicted == turn.cached for turn in exact), described(turns)


def test_an_adapter_keeps_prompts_apart(gateway: Gateway) -> None:
    asyncio.run(warmed(gateway))
    base = asyncio.run(conversations(gateway, seed=4))
    adapted = asyncio.run(conversations(gateway, seed=4, model=ADAPTER))
    assert adapted[0].cached == adapted[0].predicted == 0, "the same words, but another adapter"
    for turns in (base, adapted):
        exact = [turn for turn in turns if turn.keys == "tokens"]
        wrong = [turn for turn in exact if turn.predicted != turn.cached]
        assert len(wrong) <= (1 - EQUAL_SHARE) * len(turns) + 1, described(turns)


def test_what_a_full_cache_evicts_is_followed(gateway: Gateway, publishers: list[Vllm], tell: Tell) -> None:
    """The second server has room for 9,600 tokens; several sets of conversations push one another out."""
    asyncio.run(warmed(gateway))
    turns = [turn for seed in (5, 6, 5, 6) for turn in asyncio.run(conversations(gateway, seed=seed))]
    small = [turn for turn in turns if turn.endpoint == publishers[1].id and turn.keys == "tokens"]
    equal = [turn for turn in small if turn.predicted == turn.cached]
    tell("small cache", requests=len(small), equal=len(equal))
    assert small, Counter(turn.endpoint for turn in turns)
    assert len(equal) >= EXACT_SHARE * len(small), described(small)


def test_a_restarted_server_is_cleared_and_learnt_again(gateway: Gateway, publishers: list[Vllm]) -> None:
    asyncio.run(warmed(gateway))
    asyncio.run(conversations(gateway, seed=3))
    victim = publishers[0]
    victim.stop()
    victim.start()
    victim.wait()
    asyncio.run(until(lambda: _known(gateway)))
    # It publishes on another port now, which is asked for every few seconds.
    asyncio.run(asyncio.sleep(FOUND_AGAIN_S))
    turns = asyncio.run(conversations(gateway, seed=3))
    on_victim = [turn for turn in turns if turn.endpoint == victim.id]
    assert on_victim, Counter(turn.endpoint for turn in turns)
    assert on_victim[0].cached == 0
    wrong = [turn for turn in turns if turn.keys == "tokens" and turn.predicted != turn.cached]
    assert len(wrong) <= 2, described(turns)
