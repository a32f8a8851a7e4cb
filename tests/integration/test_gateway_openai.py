"""The real `openai` SDK against the gateway and simulated engines: answers, typed errors, retries, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from sim.cluster import RunningEngines, serve_engines
from sim.frontend import EngineSpec
from sim.profiles import PACED
from tests.integration.gateway_rig import (
    ABORT_S,
    JSON,
    MODEL,
    Gateway,
    Script,
    backend,
    gateway,
    until,
)
from tests.integration.sim_rig import state_where, switch
from tests.unit.upstream.hostile import Hostile, Peer, Received, answer

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
ENDLESS: dict[str, Any] = {**CHAT, "max_tokens": 100_000, "extra_body": {"ignore_eos": True}}


@contextlib.asynccontextmanager
async def fleet(count: int = 2, **config: Any) -> AsyncIterator[tuple[AsyncOpenAI, Gateway, RunningEngines]]:
    """Simulated engines behind a gateway that knows their model lists, and an SDK client without retries."""
    specs = [EngineSpec(profile=PACED, model=MODEL, index=index) for index in range(count)]
    async with await serve_engines(specs) as engines:
        entries = [{"url": url, "engine": "vllm", "models": []} for url in engines.urls]
        async with gateway(*entries, **config) as door:
            await until(lambda: all(models is not None for _, models in door.runtime.datastore.models()))
            async with sdk(door) as client:
                yield client, door, engines


def sdk(door: Gateway, *, retries: int = 0, key: str = "client-key") -> AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=10)
    return AsyncOpenAI(base_url=f"{door.url}/v1", api_key=key, max_retries=retries, http_client=http)


@contextlib.asynccontextmanager
async def scripted(script: Script, *, retries: int = 0, **config: Any) -> AsyncIterator[tuple[AsyncOpenAI, Hostile]]:
    async with backend(script) as engine, gateway(engine.url, **config) as door, sdk(door, retries=retries) as client:
        yield client, engine


# -- answers ----------------------------------------------------------------------------------------------------------


async def test_chat_and_completions_whole_and_streamed() -> None:
    async with fleet() as (client, door, _):
        whole = await client.chat.completions.create(**CHAT)
        text = whole.choices[0].message.content
        assert text
        assert whole.usage
        assert whole.usage.completion_tokens == 8
        stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage
        assert chunks[-1].usage.completion_tokens == 8
        completion = await client.completions.create(model=MODEL, prompt="once", max_tokens=5)
        parts = [
            part.choices[0].text
            async for part in await client.completions.create(model=MODEL, prompt="once", max_tokens=5, stream=True)
        ]
        assert "".join(parts) == completion.choices[0].text
        await door.settled()
        assert {line["outcome"] for line in door.lines()} == {"completed"}


async def test_embeddings_models_and_responses() -> None:
    async with fleet(models={"gpt-4o": MODEL}) as (client, _, _engines):
        vectors = await client.embeddings.create(model=MODEL, input=["a", "b"])
        assert len(vectors.data) == 2
        assert isinstance(vectors.data[0].embedding[0], float)
        assert [model.id async for model in client.models.list()] == ["gpt-4o", MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        renamed = await client.chat.completions.create(**{**CHAT, "model": "gpt-4o"})
        assert renamed.model == "gpt-4o"
        async for chunk in await client.chat.completions.create(**{**CHAT, "model": "gpt-4o"}, stream=True):
            assert chunk.model == "gpt-4o"
        response = await client.responses.create(model=MODEL, input="hello", max_output_tokens=5)
        assert response.output_text
        async for event in await client.responses.create(model=MODEL, input="x", max_output_tokens=5, stream=True):
            last = event
        assert last.type in ("response.completed", "response.incomplete")


async def test_raw_answers_tell_where_they_came_from() -> None:
    async with fleet() as (client, _, engines):
        raw = await client.chat.completions.with_raw_response.create(**CHAT)
        assert raw.headers["x-waypost-endpoint"] in [url.removeprefix("http://") for url in engines.urls]
        assert float(raw.headers["x-waypost-decision-ms"]) >= 0
        assert raw.request_id == raw.headers["x-request-id"]


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_an_unknown_model_is_not_found() -> None:
    async with fleet() as (client, _, _engines):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(**{**CHAT, "model": "gpt-9"})
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id
        assert caught.value.request_id == caught.value.response.headers["x-request-id"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-9")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/gpt-9")


async def test_an_unknown_model_goes_to_an_engine_while_lists_are_unknown() -> None:
    """Its own 404 passes; ours would be a guess."""
    async with (
        await serve_engines([EngineSpec(profile=PACED, model=MODEL)]) as engines,
        gateway({"url": engines.urls[0], "engine": "none", "models": []}, scrape={"models_interval": "1h"}) as door,
        sdk(door) as client,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(**{**CHAT, "model": "gpt-9"})
        assert caught.value.type == "NotFoundError"


async def test_bad_requests_are_typed() -> None:
    async with fleet() as (client, _, _engines):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/chat/completions", cast_to=object, content=b"{nope", options={"headers": _JSON})
        assert caught.value.code == "invalid_json"
        assert caught.value.request_id
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=[])
        assert (caught.value.code, caught.value.param) == ("invalid_value", "messages")
        # The engine's own refusal, as it is.
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{**CHAT, "max_tokens": 0})
        assert caught.value.type == "BadRequestError"


_JSON = {"content-type": "application/json"}


async def test_limits_are_typed() -> None:
    async with fleet(1, limits={"body": "2KiB"}) as (client, _, _engines):
        with pytest.raises(openai.APIStatusError) as too_large:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 3_000_000}])
        assert (too_large.value.status_code, too_large.value.code) == (413, "request_too_large")
        assert too_large.value.request_id
    async with fleet(1, limits={"bodies_in_memory": "1KiB"}) as (client, _, _engines):
        with pytest.raises(openai.RateLimitError) as memory:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 3_000}])
        assert memory.value.code == "memory_limit"
        assert memory.value.response.headers["retry-after-ms"] == "500"


async def test_nobody_there_is_503_with_a_time_to_come_back() -> None:
    async with gateway() as door, sdk(door) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**CHAT)
        assert (caught.value.status_code, caught.value.code) == (503, "no_endpoints")
        assert caught.value.response.headers["retry-after-ms"] == "500"
        assert caught.value.request_id


# -- retries ----------------------------------------------------------------------------------------------------------


async def test_the_sdk_waits_as_long_as_it_is_told_and_tries_again() -> None:
    async with gateway() as door, sdk(door, retries=1) as client:
        begun = time.monotonic()
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**CHAT)
        assert 0.5 <= time.monotonic() - begun < 2.5
        assert len(door.lines()) == 2


async def test_the_sdk_does_not_repeat_what_was_tried_everywhere() -> None:
    async def reset(peer: Peer, request: Received) -> None:
        peer.reset()

    async with (
        backend(reset) as one,
        backend(reset) as two,
        gateway(one.url, two.url) as door,
        sdk(door, retries=3) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**CHAT)
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_reset")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert len(door.lines()) == 1


async def test_an_overloaded_engine_is_tried_again_by_the_sdk() -> None:
    answers = [answer(b'{"error":{"message":"busy","code":503}}', JSON, b"Retry-After-Ms: 50", status=b"503 Busy")]
    answers.append(answer(b'{"id":"x","object":"chat.completion","created":1,"model":"tiny","choices":[]}', JSON))

    async def busy_once(peer: Peer, request: Received) -> None:
        await peer.send(answers[min(1, len(engine.received) - 1)])

    async with scripted(busy_once, retries=2) as (client, engine):
        assert (await client.chat.completions.create(**CHAT)).id == "x"
        assert len(engine.received) == 2


async def test_a_503_of_one_engine_is_nobodys_business_while_others_answer() -> None:
    async with fleet(2, policy="round-robin") as (client, door, engines):
        async with httpx.AsyncClient(base_url=engines.urls[0], trust_env=False) as control:
            await switch(control, error_rate={"503": 1.0})
            for _ in range(6):
                assert (await client.chat.completions.create(**CHAT)).choices
        await door.settled()
        assert {line["status"] for line in door.lines()} == {200}


# -- death and cancellation -------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_in_a_stream_raises_in_the_sdk() -> None:
    async with fleet(1) as (client, door, engines):
        async with httpx.AsyncClient(base_url=engines.urls[0], trust_env=False) as control:
            await switch(control, reset_after_chunks=4)
            chunks: list[Any] = []
            stream = await client.chat.completions.create(**ENDLESS, stream=True)
            with pytest.raises(openai.APIError) as caught:
                await _collect(stream, chunks)
            assert 1 <= len(chunks) <= 4
            assert caught.value.code == "upstream_reset"
            assert "died" in caught.value.message
            await switch(control, reset=True)
        await door.settled()
        assert door.lines()[0]["outcome"] == "failed"


async def _collect(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for chunk in stream:
        into.append(chunk)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_request_ends_on_the_engine(stream: bool) -> None:
    async with fleet(1) as (client, door, engines):
        async with httpx.AsyncClient(base_url=engines.urls[0], trust_env=False) as control:
            if stream:
                answer_stream = await client.chat.completions.create(**ENDLESS, stream=True)
                assert await anext(aiter(answer_stream))
                await state_where(control, running=1)
                left = time.monotonic()
                await answer_stream.close()
            else:
                task = asyncio.create_task(client.chat.completions.create(**ENDLESS))
                await state_where(control, running=1)
                left = time.monotonic()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await state_where(control, running=0, aborted=1)
            assert time.monotonic() - left < ABORT_S
        await door.settled()
        assert door.lines()[0]["outcome"] == "client_gone"


async def test_the_clients_key_reaches_the_engine() -> None:
    async with await serve_engines([EngineSpec(profile=PACED, model=MODEL, api_key="engine-key")]) as engines:
        entry = {"url": engines.urls[0], "engine": "vllm"}
        async with gateway(entry) as door:
            async with sdk(door, key="engine-key") as client:
                assert (await client.chat.completions.create(**CHAT)).choices
            async with sdk(door, key="wrong") as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    await client.chat.completions.create(**CHAT)
                assert caught.value.request_id
        entry = {**entry, "credentials": "main"}
        async with gateway(entry, credentials={"main": {"api_key": "engine-key"}}) as door, sdk(door) as client:
            assert (await client.chat.completions.create(**CHAT)).choices
