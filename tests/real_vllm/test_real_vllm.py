"""`waypost run` before two real vLLM servers: what simulated engines cannot prove.

Deadlines are those of the design with five times the time, since vLLM shares this machine with everything else; the
times measured are shown at the end of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from picker.core.values import Signals
from picker.signals.engine import read
from picker.signals.engines import vllm
from tests.integration.fault_rig import Gateway, Watch, standings
from tests.real_vllm.conftest import QUEUE_LIMIT, Door, Tell
from tests.real_vllm.load import CALL_WITHIN_S, CHAT, COMPLETIONS, Load, chat, prefills
from tests.real_vllm.server import BLOCK_TOKENS, MAX_MODEL_TOKENS, MODEL, Vllm

pytestmark = pytest.mark.real_vllm

ALLOWANCE = 5
ABORTED_WITHIN_S = 2.0 * ALLOWANCE
# Measured at 2.7 s: `hung_after` of 2 s, the scrape before it and the tick after it.
FROZEN_OUT_WITHIN_S = 10.0
FROZEN_BACK_WITHIN_S = 30.0
DEAD_OUT_WITHIN_S = 2.0 * ALLOWANCE
PATIENCE_S = 60.0
LONG_PROMPT = 8000
# Fewer than the first server takes at once.
PROMPTS = QUEUE_LIMIT - 2
OUTPUT = 100
SOURCES = (vllm.ENGINE.waiting, vllm.ENGINE.running, vllm.ENGINE.kv_usage, vllm.ENGINE.block_tokens, vllm.ENGINE.blocks)


@contextlib.asynccontextmanager
async def sdk(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=CALL_WITHIN_S)
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, http_client=http) as client:
        yield client


def plain(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=CALL_WITHIN_S)


async def when(condition: Any, what: str, within_s: float = PATIENCE_S, describe: Any = None) -> float:
    """Polls an async condition. Returns the seconds it took to hold; fails with what `describe` says."""
    begun = time.monotonic()
    while not await condition():
        if time.monotonic() - begun > within_s:
            raise AssertionError(f"not within {within_s} s: {what}: {await describe() if describe else ''}")
        await asyncio.sleep(0.05)
    return time.monotonic() - begun


async def running(pods: list[Vllm]) -> float:
    """Requests that the engines say they work on."""
    return sum([await pod.figure("vllm:num_requests_running") for pod in pods])


async def generated(pods: list[Vllm]) -> float:
    """Output tokens that the engines made so far."""
    return sum([await pod.figure("vllm:generation_tokens_total") for pod in pods])


async def nothing_in_flight(gateway: Gateway) -> bool:
    rows = (await gateway.endpoints()).values()
    return not any(row["in_flight"] or row["in_flight_tokens"] for row in rows)


async def total(gateway: Gateway, name: str, **labels: str) -> float:
    """The sum of a metric of the gateway over all series with these labels."""
    parts = [f'{label}="{value}"' for label, value in labels.items()]
    page = await gateway.metrics()
    return sum(
        value
        for sample, value in page.items()
        if sample.partition("{")[0] == name and all(part in sample for part in parts)
    )


# -- what the gateway knows -------------------------------------------------------------------------------------------


async def test_live_pages_read_as_by_the_official_parser(pods: list[Vllm]) -> None:
    wanted = {figure.name for places in (*SOURCES, vllm.ENGINE.progress) for figure in places}
    for pod in pods:
        async with plain(pod.url) as client:
            assert (await client.post(CHAT, json=chat("a few words", 40))).status_code == 200
        page = await pod.page()
        families = text_string_to_metric_families(page.decode())
        official = [sample for family in families for sample in family.samples if sample.name in wanted]
        ours = vllm.ENGINE.lines.read(page)
        assert {(s.name, tuple(sorted(s.labels.items())), s.value) for s in ours if s.name in wanted} == {
            (s.name, tuple(sorted(s.labels.items())), s.value) for s in official
        }
        # Today's names of all figures are there, so nothing is read from a fallback or missing.
        assert {places[0].name for places in SOURCES} <= {sample.name for sample in official}
        signals = read(vllm.ENGINE, page, at=0.0)
        assert isinstance(signals, Signals)
        assert (signals.waiting, signals.running, signals.block_tokens) == (0, 0, BLOCK_TOKENS)
        assert signals.kv_usage is not None
        assert 0 <= signals.kv_usage < 0.01
        assert signals.blocks
        assert signals.progress_tokens == sum(
            sample.value for sample in official if sample.name in {figure.name for figure in vllm.ENGINE.progress}
        )
        assert signals.progress_tokens >= 40


async def test_engines_and_models_are_recognised(door: Door, pods: list[Vllm]) -> None:
    gateway = await asyncio.to_thread(door)
    rows = await gateway.endpoints()
    assert sorted(rows) == sorted(pod.id for pod in pods)
    assert [(row["engine"], row["models"]) for row in rows.values()] == [("vllm", [MODEL])] * 2
    assert all(row["waiting"] == row["running"] == 0 and row["kv_usage"] is not None for row in rows.values())
    async with sdk(gateway) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]


# -- what clients get -------------------------------------------------------------------------------------------------


async def test_every_api_through_the_sdk_and_its_tokens_are_counted(door: Door) -> None:
    gateway = await asyncio.to_thread(door)
    messages: Any = [{"role": "user", "content": "say something"}]
    exactly: Any = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    prompt = output = 0
    async with sdk(gateway) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=messages, **exactly)
        assert whole.usage
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **exactly
        )
        chunks = [chunk async for chunk in stream]
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
        assert chunks[-1].usage == whole.usage
        completion = await client.completions.create(model=MODEL, prompt="import", **exactly)
        assert completion.usage
        parts = [p async for p in await client.completions.create(model=MODEL, prompt="import", stream=True, **exactly)]
        assert "".join(part.choices[0].text for part in parts) == completion.choices[0].text
        response = await client.responses.create(model=MODEL, input="hello", max_output_tokens=12)
        assert response.output_text
        assert response.usage
        events = [
            e async for e in await client.responses.create(model=MODEL, input="hi", max_output_tokens=5, stream=True)
        ]
        last = events[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert last.response.usage
        body = {"model": MODEL, "messages": messages, "max_tokens": 12}
        answer = (await client.post("/messages", body=body, cast_to=httpx.Response)).json()
        assert (answer["type"], answer["content"][0]["type"]) == ("message", "text")
    for usage in (whole.usage, whole.usage, completion.usage):
        prompt, output = prompt + usage.prompt_tokens, output + usage.completion_tokens
    for told in (response.usage, last.response.usage):
        prompt, output = prompt + told.input_tokens, output + told.output_tokens
    prompt, output = prompt + answer["usage"]["input_tokens"], output + answer["usage"]["output_tokens"]
    assert whole.usage.completion_tokens == completion.usage.completion_tokens == 12
    await when(lambda: nothing_in_flight(gateway), "nothing in flight")
    # A stream whose client does not ask for usage, such as that of completions above, adds nothing.
    assert await total(gateway, "waypost_tokens_total", model=MODEL, kind="prompt") == prompt
    assert await total(gateway, "waypost_tokens_total", model=MODEL, kind="output") == output
    assert await total(gateway, "waypost_requests_total", model=MODEL, code="200") == 7


async def test_both_servers_get_a_share(door: Door, pods: list[Vllm], tell: Tell) -> None:
    gateway = await asyncio.to_thread(door)
    begun = time.monotonic()
    async with Load(gateway.url) as load:
        await asyncio.sleep(4)
    took_s = time.monotonic() - begun
    served = load.served()
    assert set(load.fates()) == {"ok"}, load.early_failures()
    # Two servers on two cores are seldom equally fast, and the faster one is given more.
    assert min(served[pod.id] for pod in pods) > 0.1 * len(load.calls)
    for pod in pods:
        assert served[pod.id] == await total(gateway, "waypost_endpoint_selected_total", endpoint=pod.id)
    await when(lambda: nothing_in_flight(gateway), "nothing in flight")
    tell("load of 8", requests=len(load.calls), per_s=len(load.calls) / took_s, shares=sorted(served.values()))


async def test_an_unknown_model_is_ours_to_refuse(door: Door, pods: list[Vllm]) -> None:
    gateway = await asyncio.to_thread(door)
    async with sdk(gateway) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert await total(gateway, "waypost_endpoint_selected_total") == 0


async def test_the_engines_refusal_passes_byte_for_byte(door: Door, pods: list[Vllm]) -> None:
    gateway = await asyncio.to_thread(door)
    body = chat("name " * (MAX_MODEL_TOKENS + 100), 4)
    async with plain(gateway.url) as through, plain(pods[0].url) as direct:
        ours, theirs = await through.post(CHAT, json=body), await direct.post(CHAT, json=body)
    assert (ours.status_code, theirs.status_code) == (400, 400)
    assert ours.content == theirs.content
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert ours.headers["x-waypost-endpoint"] in {pod.id for pod in pods}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_request(door: Door, pods: list[Vllm], tell: Tell, stream: bool) -> None:
    gateway = await asyncio.to_thread(door)
    bodies = [prefills(PROMPTS, LONG_PROMPT, 2 * seed + stream, output=OUTPUT, stream=stream) for seed in range(3)]
    took_s = [await _leave(gateway, pods, body) for body in bodies]
    await when(lambda: nothing_in_flight(gateway), "nothing in flight")
    assert await total(gateway, "waypost_client_disconnects_total") == 3
    tell(f"client left a {'stream' if stream else 'whole answer'}", engine_idle_after_s=[round(s, 2) for s in took_s])


async def _leave(gateway: Gateway, pods: list[Vllm], body: dict[str, Any]) -> float:
    """Sends a request and leaves when an engine works on it, a stream after its first piece. Returns the seconds until
    no engine works.
    """
    before = await generated(pods)
    async with plain(gateway.url) as client:
        pieces: list[bytes] = []
        call = asyncio.create_task(_read(client, COMPLETIONS, body, pieces))

        async def started() -> bool:
            assert not call.done(), (call.result(), pieces)
            return bool(pieces) if body["stream"] else await running(pods) > 0

        async def ended() -> bool:
            return await running(pods) == 0

        await when(started, "the request runs")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        took_s = await when(ended, "the engine drops the request", ABORTED_WITHIN_S)
    assert await generated(pods) - before < PROMPTS * OUTPUT
    return took_s


async def _read(client: httpx.AsyncClient, path: str, body: dict[str, Any], pieces: list[bytes]) -> int:
    """Reads an answer to its end. Returns the status."""
    async with client.stream("POST", path, json=body) as answer:
        async for piece in answer.aiter_raw():
            pieces.append(piece)
    return answer.status_code


# -- engines in trouble -----------------------------------------------------------------------------------------------


async def test_a_frozen_engine_fails_nobody(door: Door, pods: list[Vllm], tell: Tell) -> None:
    """Its front end still answers probes with an idle page, and streams with their headers.

    Most answers are whole ones: silence after the first byte of a stream is not held against an engine, and one that
    has nothing but begun streams when it freezes may get no request that would show it.
    """
    gateway = await asyncio.to_thread(door)
    victim = pods[1]
    async with Watch(gateway) as watch, Load(gateway.url, streams=0.25) as load:
        await asyncio.sleep(3)
        frozen_at = victim.signal_engine(signal.SIGSTOP)
        try:

            async def out() -> bool:
                row = (await gateway.endpoints())[victim.id]
                return (row["standing"], row["reason"]) == ("out", "hung")

            await when(out, "the frozen engine is out", 2 * FROZEN_OUT_WITHIN_S, gateway.endpoints)
            assert await victim.figure("vllm:num_requests_waiting") == 0
            await asyncio.sleep(3)
        finally:
            thawed_at = victim.signal_engine(signal.SIGCONT)

        async def back() -> bool:
            row = (await gateway.endpoints())[victim.id]
            return row["standing"] == "ready" and load.served(thawed_at)[victim.id] > 10

        await when(back, "the engine is back")
    await when(lambda: nothing_in_flight(gateway), "nothing in flight")

    changes = [change for change in standings(gateway.log(), victim.id) if change[0] > frozen_at]
    out_s = next(at - frozen_at for at, standing, reason in changes if (standing, reason) == ("out", "hung"))
    back_s = next(at - thawed_at for at, standing, _ in changes if standing == "ready" and at > thawed_at)
    rescued = [
        c for c in load.calls if c.sent_at < frozen_at + out_s < c.ended_at < thawed_at and c.ended_at - c.sent_at > 1
    ]
    tell(
        "frozen engine",
        out_s=out_s,
        last_decision_s=watch.out_after_s(victim.id, frozen_at),
        back_s=back_s,
        served_again_s=watch.back_after_s(victim.id, thawed_at),
        rescued=len(rescued),
        slowest_s=max(call.ended_at - call.sent_at for call in load.calls),
        fates=dict(load.fates()),
    )
    assert out_s < FROZEN_OUT_WITHIN_S
    assert back_s < FROZEN_BACK_WITHIN_S
    assert set(load.fates()) == {"ok"}, load.early_failures()
    assert all(call.endpoint != victim.id for call in rescued)


async def test_a_full_engine_is_covered_by_the_other(door: Door, pods: list[Vllm], tell: Tell) -> None:
    """Somebody else fills the first server to its limit. It refuses with 503 and does not say when to come back."""
    gateway = await asyncio.to_thread(door, policy="round-robin")
    full = pods[0]
    refusals: list[float] = []
    async with plain(full.url) as stranger:
        strangers = [asyncio.create_task(_fill(stranger, seed, refusals)) for seed in range(QUEUE_LIMIT + 4)]
        try:

            async def refuses() -> bool:
                return len(refusals) > 10

            await when(refuses, "the engine is full")
            async with Load(gateway.url, concurrency=4) as load:
                await asyncio.sleep(4)
            retried = await total(gateway, "waypost_attempts_failed_total", endpoint=full.id)
            refused = await full.figure("vllm:admission_rejections_total")
        finally:
            for task in strangers:
                task.cancel()
            await asyncio.gather(*strangers, return_exceptions=True)
    served = [load.served()[pod.id] for pod in pods]
    tell("full engine", retried=int(retried), served_by_full_and_other=served, fates=dict(load.fates()))
    assert 0 < retried <= refused
    await when(lambda: nothing_in_flight(gateway), "nothing in flight")

    async def served_again() -> bool:
        async with plain(gateway.url) as client:
            answer = await client.post(CHAT, json=chat("hi", 4))
        return bool(answer.headers["x-waypost-endpoint"] == full.id)

    await when(served_again, "the engine gets requests again")
    # Sometimes vLLM notices only after the headers of a stream, and refuses in an event.
    assert not load.early_failures()


async def _fill(stranger: httpx.AsyncClient, seed: int, refusals: list[float]) -> None:
    """Has always one request at a server, or tries to; notes when it refuses."""
    while True:
        status = await _read(stranger, COMPLETIONS, prefills(1, LONG_PROMPT, seed), [])
        seed += 1000
        if status == 503:
            refusals.append(time.time())
            await asyncio.sleep(0.1)


async def test_a_killed_worker_fails_nobody_early(door: Door, pods: list[Vllm], tell: Tell) -> None:
    """The front end tells its clients and then goes too. Streams that had begun get an error event."""
    gateway = await asyncio.to_thread(door)
    victim = pods[1]
    async with Watch(gateway) as watch, Load(gateway.url) as load:
        await asyncio.sleep(3)
        killed_at = victim.kill_worker()

        async def out() -> bool:
            return bool((await gateway.endpoints())[victim.id]["standing"] == "out")

        await when(out, "the dead engine is out")
        await asyncio.sleep(3)
    await when(lambda: nothing_in_flight(gateway), "nothing in flight")
    changes = standings(gateway.log(), victim.id)
    out_s = next(at - killed_at for at, standing, _ in changes if standing == "out" and at > killed_at)
    tell(
        "killed worker",
        out_s=out_s,
        last_decision_s=watch.out_after_s(victim.id, killed_at),
        fates=dict(load.fates()),
        retried={key: value for key, value in (await gateway.metrics()).items() if "attempts_failed_total" in key},
    )
    assert out_s < DEAD_OUT_WITHIN_S
    assert all(call.stream for call in load.calls if call.broken_off)
    assert load.served(killed_at + out_s).keys() == {pods[0].id}
    assert not load.early_failures()
