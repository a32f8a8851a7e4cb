"""KV-cache events of the simulated engines over real sockets, and the HTTP routes that tell about them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio

from sim.cluster import serve_engines, specs_for
from sim.frontend import EngineSpec
from sim.kv_events import KvEvents
from sim.profiles import INSTANT, PACED
from sim.server import EngineServer
from tests.integration.sim_rig import ENDLESS, HELLO, PATIENCE_S, QUIET_S, spawned, state_where, switch
from tests.unit.sim.kv_reader import Reader

SMALL = INSTANT.with_block_size(16)
END = b"\xff" * 8


class Rig:
    """One engine, a client of it, and a subscriber that surely hears everything from now on."""

    def __init__(self, server: EngineServer, client: httpx.AsyncClient, context: zmq.asyncio.Context) -> None:
        self.server = server
        self.client = client
        self.context = context
        self.live = context.socket(zmq.SUB)
        self.live.subscribe(b"")
        self.reader = Reader()
        self.seqs: list[int] = []
        self.payloads: dict[int, bytes] = {}
        self.topics: set[bytes] = set()

    async def joined(self, endpoint: str) -> None:
        """Subscribe, and make the engine speak until the subscription is there."""
        self.live.connect(endpoint)
        while not await self.live.poll(20):
            await self.client.post("/reset_prefix_cache" if self.server.spec.engine == "vllm" else "/flush_cache")

    async def hear(self, batches: int | None = None) -> None:
        """Read so many batches, or up to the last one that was published."""
        publisher = self.server.publisher
        assert publisher is not None
        until = None if batches is None else len(self.seqs) + batches
        while len(self.seqs) != until and not (until is None and self.seqs[-1:] == [publisher.next_seq - 1]):
            topic, seq, payload = await asyncio.wait_for(self.live.recv_multipart(), PATIENCE_S)
            self.topics.add(topic)
            self.seqs.append(int.from_bytes(seq, "big"))
            self.payloads[self.seqs[-1]] = payload
            self.reader.read(payload)

    async def complete(self, tokens: list[int] | str, limit: int = 4, **more: Any) -> dict[str, Any]:
        body = {"prompt": tokens, "max_tokens": limit, "ignore_eos": True, **more}
        answer = await self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        usage: dict[str, Any] = answer.json()["usage"]
        return usage

    def agrees(self) -> bool:
        assert self.server.engine is not None
        return self.reader.copies == self.server.engine.pool.cached()


def cached_of(usage: dict[str, Any]) -> int:
    count: int = usage["prompt_tokens_details"]["cached_tokens"]
    return count


@contextlib.asynccontextmanager
async def rig(**fields: Any) -> AsyncIterator[Rig]:
    spec = EngineSpec(**{"profile": SMALL, "model": "tiny", "kv_events": KvEvents(), **fields})
    context = zmq.asyncio.Context()
    try:
        async with (
            await serve_engines([spec]) as running,
            httpx.AsyncClient(base_url=running.urls[0], timeout=PATIENCE_S, trust_env=False) as client,
        ):
            made = Rig(running.servers[0], client, context)
            await made.joined((await source(client))["endpoint"])
            yield made
    finally:
        context.destroy(linger=0)


async def source(client: httpx.AsyncClient) -> dict[str, Any]:
    """Where the events are, by the engine's own account."""
    answer = await client.get("/kv_event_sources")
    if answer.status_code == 200:
        (told,) = answer.json().values()
        return dict(told)
    return dict(json.loads((await client.get("/server_info")).json()["kv_events_config"]))


async def replayed(context: zmq.asyncio.Context, endpoint: str, start: int) -> list[list[bytes]]:
    """The frames of every answer to a replay request, the end marker included."""
    dealer = context.socket(zmq.DEALER)
    dealer.connect(endpoint)
    await dealer.send_multipart([b"", start.to_bytes(8, "big")])
    answers: list[list[bytes]] = []
    while not answers or answers[-1][-2] != END:
        answers.append(await asyncio.wait_for(dealer.recv_multipart(), PATIENCE_S))
    dealer.close(linger=0)
    return answers


@pytest.mark.parametrize(
    ("engine", "encoding"), [("vllm", "map"), ("vllm", "array"), ("sglang", "map"), ("sglang", "array")]
)
async def test_a_subscriber_knows_the_cache_after_concurrent_load_with_eviction(engine: Any, encoding: Any) -> None:
    profile = msgspec.structs.replace(SMALL, kv_blocks=120, max_model_len=1_000, max_num_batched_tokens=256)
    namespaces = [{}] if (engine, encoding) == ("sglang", "array") else [{}, {"model": "l1"}, {"cache_salt": "s"}]
    events = KvEvents(encoding=encoding)
    async with rig(engine=engine, profile=profile, loras=("l1",), kv_events=events) as made:
        rng = random.Random(5)
        common = list(range(200))

        async def one() -> None:
            tokens = common[: rng.randrange(1, 200)] + [rng.randrange(1 << 32) for _ in range(rng.randrange(150))]
            await made.complete(tokens, rng.randrange(1, 60), **rng.choice(namespaces))

        for _ in range(12):
            await asyncio.gather(*(one() for _ in range(6)))
        await made.hear()
        assert made.agrees()
        assert made.server.engine is not None
        assert made.server.engine.pool.evictions > 0
        assert made.seqs == list(range(made.seqs[0], made.seqs[0] + len(made.seqs)))
        assert made.topics == {f"kv@127.0.0.1:{made.server.port}@tiny".encode()}
        tokens = common[:180]
        foretold = made.reader.cached_tokens(tokens)
        assert cached_of(await made.complete(tokens)) == foretold


async def test_cached_tokens_follow_the_last_block_rule() -> None:
    async with rig() as made:
        tokens = list(range(64))
        cached = []
        await made.hear()
        for prompt in (tokens, tokens, tokens[:63], [*tokens, 9]):
            foretold = made.reader.cached_tokens(prompt)
            cached.append(cached_of(await made.complete(prompt)))
            assert cached[-1] == foretold
            await made.hear()
        assert cached == [0, 48, 48, 64]


async def test_usage_can_leave_cached_tokens_out() -> None:
    async with rig(prompt_tokens_details=False) as made:
        assert (await made.complete([1, 2, 3]))["prompt_tokens_details"] is None


async def test_what_tokenize_and_render_tell_is_what_is_cached() -> None:
    async with rig() as made:
        chat: dict[str, Any] = {
            "messages": [{"role": "system", "content": "be brief " * 20}, {"role": "user", "content": "why? " * 20}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False},
        }
        told = (await made.client.post("/tokenize", json=chat)).json()
        rendered = (await made.client.post("/v1/chat/completions/render", json=chat)).json()
        assert told["tokens"] == rendered["token_ids"]
        assert told["count"] == len(told["tokens"]) > 48
        plain = (await made.client.post("/tokenize", json={"messages": chat["messages"]})).json()["tokens"]
        assert plain != told["tokens"], "tools are part of the prompt"
        usage = (await made.client.post("/v1/chat/completions", json={**chat, "max_tokens": 1})).json()["usage"]
        assert usage["prompt_tokens"] == told["count"]
        await made.hear()
        longest = max((content.tokens for content in made.reader.contents.values()), key=len)
        assert list(longest) == told["tokens"][: len(longest)]
        assert len(longest) == told["count"] // 16 * 16
        # The same ids as a completion prompt are taken as they are.
        assert cached_of(await made.complete(told["tokens"])) == made.reader.cached_tokens(told["tokens"]) > 0

        text = "some words " * 30
        ids = (await made.client.post("/tokenize", json={"prompt": text, "messages": None})).json()["tokens"]
        (prepared,) = (await made.client.post("/v1/completions/render", json={"prompt": text})).json()
        assert prepared["token_ids"] == ids
        assert (prepared["model"], prepared["kv_transfer_params"]) == ("tiny", None)
        await made.complete(text)
        await made.hear()
        assert made.reader.cached_tokens(ids) == (len(ids) - 1) // 16 * 16


async def test_tokenising_refuses_like_a_generation() -> None:
    async with rig(scale_out=False) as made:
        wrong = await made.client.post("/tokenize", json={"prompt": "x", "model": "nope"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "NotFoundError")
        bodies: list[dict[str, Any]] = [{}, {"messages": 3}, {"messages": [{"content": "x"}]}, {"prompt": 5}]
        for body in bodies:
            assert (await made.client.post("/tokenize", json=body)).status_code == 400
        forbidden = await made.client.post("/v1/chat/completions/render", json={"messages": HELLO["messages"]})
        assert forbidden.status_code == 403
    async with rig() as made:
        for path, prompt in (("/v1/chat/completions", HELLO), ("/v1/completions", {"prompt": "x"})):
            unknown = await made.client.post(f"{path}/render", json={**prompt, "model": "nope"})
            assert unknown.status_code == 404
        assert (await made.client.post("/v1/completions/render", json={"prompt": [["a"]]})).status_code == 400


@pytest.mark.parametrize(
    ("encoding", "replay_topic", "frames"),
    [("map", None, 4), ("array", None, 3), ("map", False, 3), ("array", True, 4)],
)
async def test_replay_has_both_forms(encoding: Any, replay_topic: bool | None, frames: int) -> None:
    events = KvEvents(encoding=encoding, replay_port=0, replay_topic=replay_topic)
    async with rig(kv_events=events) as made:
        for start in range(4):
            await made.complete(list(range(start * 100, start * 100 + 40)))
        await made.hear()
        endpoint = (await source(made.client))["replay_endpoint"]
        wanted = made.seqs[-3]
        answers = await replayed(made.context, endpoint, wanted)
        assert {len(answer) for answer in answers} == {frames}
        assert [int.from_bytes(answer[-2], "big") for answer in answers[:-1]] == made.seqs[-3:]
        assert all(answer[-1] == made.payloads[int.from_bytes(answer[-2], "big")] for answer in answers[:-1])
        if frames == 4:
            assert {answer[1] for answer in answers[:-1]} == made.topics
        assert answers[-1] == [b""] * (frames - 2) + [END, b""]
        again = await replayed(made.context, endpoint, made.seqs[-1] + 1)
        assert len(again) == 1, "only the end"


async def test_a_gap_is_seen_live_and_healed_by_replay() -> None:
    async with rig(kv_events=KvEvents(replay_port=0)) as made:
        await made.complete(list(range(40)))
        await made.hear()
        await switch(made.client, drop_kv_batches=2)
        for start in (100, 200, 300):
            await made.complete(list(range(start, start + 40)))
        before = made.seqs[-1]
        await made.hear()
        assert made.seqs[-1] == before + 3
        assert before + 1 not in made.seqs
        assert not made.agrees()
        for answer in (await replayed(made.context, (await source(made.client))["replay_endpoint"], before + 1))[:-1]:
            if int.from_bytes(answer[-2], "big") not in made.payloads:
                made.reader.read(answer[-1])
        assert made.agrees()


async def test_replay_forgets_stays_silent_and_ignores_nonsense() -> None:
    async with rig(kv_events=KvEvents(replay_port=0, buffer_steps=2)) as made:
        for start in range(5):
            await made.complete(list(range(start * 100, start * 100 + 40)))
        await made.hear()
        endpoint = (await source(made.client))["replay_endpoint"]
        answers = await replayed(made.context, endpoint, 0)
        assert [int.from_bytes(answer[-2], "big") for answer in answers[:-1]] == made.seqs[-2:]
        dealer = made.context.socket(zmq.DEALER)
        dealer.connect(endpoint)
        for nonsense in ([b""], [b"", b"short"], [b"", bytes(8), b"more"], [bytes(8)]):
            await dealer.send_multipart(nonsense)
        await switch(made.client, kv_replay="off")
        await dealer.send_multipart([b"", bytes(8)])
        assert not await dealer.poll(int(QUIET_S * 1000))
        dealer.close(linger=0)
        await switch(made.client, kv_replay="on")
        assert len(await replayed(made.context, endpoint, 0)) == 3


async def test_a_restart_begins_again_at_zero_with_an_empty_cache_on_the_same_ports() -> None:
    async with rig(kv_events=KvEvents(replay_port=0)) as made:
        await made.complete(list(range(40)))
        await made.hear()
        told = await source(made.client)
        await switch(made.client, restart=0.0)
        while made.server.restarts == 0 or made.server.engine is None:
            await asyncio.sleep(0.01)
        assert await source(made.client) == told
        made.reader = Reader()
        made.seqs.clear()
        # The subscriber comes back by itself; until then it misses what is said.
        await made.joined(told["endpoint"])
        assert cached_of(await made.complete(list(range(40)))) == 0
        await made.hear()
        assert made.seqs[0] < 50
        assert made.agrees()
        (first, *_) = await replayed(made.context, told["replay_endpoint"], 0)
        assert first[-2] == bytes(8)


async def test_reset_is_told_at_once_and_refused_while_requests_run() -> None:
    async with rig(profile=PACED.with_block_size(16)) as made:
        await made.complete(list(range(40)))
        await made.hear()
        assert made.reader.copies
        assert (await made.client.post("/reset_prefix_cache")).status_code == 200
        await made.hear()
        assert not made.reader.copies
        async with made.client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}):
            await state_where(made.client, running=1)
            clears = made.reader.clears
            assert (await made.client.post("/reset_prefix_cache")).status_code == 200
            # The stream fills a block every 80 ms.
            await made.hear(batches=2)
            assert made.reader.clears == clears


async def test_sglang_tells_where_its_events_are_and_has_its_own_page() -> None:
    async with rig(engine="sglang", kv_events=KvEvents(replay_port=0)) as made:
        info = (await made.client.get("/get_server_info")).json()
        told = info["kv_events"]
        config = json.loads(info["kv_events_config"])
        assert (info["page_size"], told["block_size"], told["dp_size"], told["publisher"]) == (16, 16, 1, "zmq")
        assert f"tcp://{told['endpoint_host']}:{told['endpoint_port_base']}" == config["endpoint"]
        assert config["replay_endpoint"].startswith("tcp://127.0.0.1:")
        await made.complete(list(range(40)))
        assert (await made.client.post("/flush_cache")).status_code == 200
        assert "sglang:num_requests_total" in (await made.client.get("/metrics")).text
        assert (await made.client.get("/get_model_info")).json()["model_path"] == "tiny"
        assert (await made.client.get("/v1/models")).json()["data"][0]["owned_by"] == "sglang"
        for path in ("/version", "/kv_event_sources"):
            assert (await made.client.get(path)).status_code == 404


async def test_engines_without_events_say_so() -> None:
    for engine, path in (("vllm", "/kv_event_sources"), ("sglang", "/server_info")):
        async with (
            await serve_engines(specs_for(1, 0, accelerator="instant", engine=engine)) as running,  # type: ignore[arg-type]
            httpx.AsyncClient(base_url=running.urls[0], trust_env=False) as client,
        ):
            told = (await client.get(path)).json()
            assert told == {} if engine == "vllm" else told["kv_events"] is None


async def test_ranks_have_their_own_ports_caches_and_numbers() -> None:
    specs = specs_for(2, 0, accelerator="instant", data_parallel_size=2, block_size=16, kv_events=KvEvents())
    assert [(spec.index, spec.data_parallel_rank) for spec in specs] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    context = zmq.asyncio.Context()
    try:
        async with await serve_engines(specs[:2]) as running:
            for rank, server in enumerate(running.servers):
                async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, trust_env=False) as client:
                    told = (await client.get("/kv_event_sources")).json()
                    assert list(told) == [str(rank)]
                    made = Rig(server, client, context)
                    await made.joined(told[str(rank)]["endpoint"])
                    assert cached_of(await made.complete(list(range(40)))) == 0
                    await made.hear()
                    assert made.agrees()
                    assert made.reader.ranks == {rank}
                    assert f'engine="{rank}"' in (await client.get("/metrics")).text
    finally:
        context.destroy(linger=0)


async def test_fixed_ports_count_up_and_a_taken_one_leaves_nothing_open() -> None:
    async with rig() as made:
        taken = int((await source(made.client))["endpoint"].rpartition(":")[2])
        spec = EngineSpec(profile=SMALL, kv_events=KvEvents(port=taken, replay_port=0))
        with pytest.raises(OSError, match="in use"):
            await serve_engines([EngineSpec(profile=SMALL), spec])
    specs = specs_for(2, 9000, accelerator="instant", kv_events=KvEvents(port=5557, replay_port=6557))
    assert [(spec.port, spec.kv_events) for spec in specs] == [
        (9000, KvEvents(port=5557, replay_port=6557)),
        (9001, KvEvents(port=5558, replay_port=6558)),
    ]


async def test_module_publishes_as_told() -> None:
    arguments = ("--accelerator", "instant", "--block-size", "32", "--data-parallel-size", "2")
    events = ("--kv-events", "sglang-array", "--kv-replay-port", "0", "--kv-replay-frames", "4")
    context = zmq.asyncio.Context()
    try:
        async with spawned(2, "-m", "sim", *arguments, *events) as (process, urls):
            async with httpx.AsyncClient(base_url=urls[1], timeout=PATIENCE_S, trust_env=False) as client:
                info = (await client.get("/server_info")).json()
                assert info["page_size"] == 32
                await client.post("/v1/completions", json={"prompt": list(range(40)), "max_tokens": 1})
                answers = await replayed(context, json.loads(info["kv_events_config"])["replay_endpoint"], 0)
                assert [len(answer) for answer in answers] == [4, 4]
                reader = Reader()
                reader.read(answers[0][-1])
                assert (reader.ranks, reader.block_size, len(reader.copies)) == ({1}, 32, 1)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
    finally:
        context.destroy(linger=0)


async def test_processes_publish_as_told() -> None:
    program = (
        "from sim.cluster import run_cluster; from sim.kv_events import KvEvents; "
        "events = KvEvents(encoding='array', replay_port=0, buffer_steps=5, replay_topic=True); "
        "run_cluster(1, 0, accelerator='instant', processes=True, "
        "data_parallel_size=2, block_size=16, kv_events=events)"
    )
    context = zmq.asyncio.Context()
    try:
        async with (
            spawned(2, "-c", program) as (_, urls),
            httpx.AsyncClient(base_url=urls[1], timeout=PATIENCE_S, trust_env=False) as client,
        ):
            assert (await client.get("/sim")).json()["kv_next_seq"] == 0
            await client.post("/v1/completions", json={"prompt": list(range(40)), "max_tokens": 1})
            assert (await client.get("/sim")).json()["kv_next_seq"] == 1
            first, end = await replayed(context, (await source(client))["replay_endpoint"], 0)
            assert (len(first), len(end)) == (4, 4)
            reader = Reader()
            reader.read(first[-1])
            assert (reader.ranks, reader.block_size, len(reader.copies)) == ({1}, 16, 2)
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("wrong", [("--engine", "vllm", "--kv-events", "sglang"), ("--data-parallel-size", "0")])
async def test_module_refuses_what_does_not_fit(wrong: tuple[str, ...]) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sim", *wrong, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    _, error = await asyncio.wait_for(process.communicate(), 4 * PATIENCE_S)
    assert process.returncode == 2
    assert wrong[0].encode() in error
