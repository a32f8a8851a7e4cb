"""Simulated engines over real sockets: the API as clients see it, clients that leave, clusters and processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sim.cluster import RunningEngines, serve_engines, specs_for
from sim.frontend import EngineSpec
from sim.profiles import INSTANT, PACED
from tests.integration.sim_rig import (
    ENDLESS,
    HELLO,
    PATIENCE_S,
    engine,
    events_of,
    metrics,
    raw_post,
    send_raw,
    spawned,
    state_where,
    switch,
)


async def test_chat_whole() -> None:
    async with engine(index=7) as client:
        answer = await client.post("/v1/chat/completions", json=HELLO, headers={"X-Request-Id": "r-1"})
        assert answer.status_code == 200
        assert (answer.headers["x-request-id"], answer.headers["x-sim-engine"]) == ("r-1", "7")
        body = answer.json()
        assert body["id"] == "chatcmpl-r-1"
        assert body["choices"][0]["finish_reason"] == "length"
        assert len(body["choices"][0]["message"]["content"]) == 8 * 4
        assert body["usage"] == {
            "prompt_tokens": 8,
            "completion_tokens": 8,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


async def test_chat_stream_comes_token_by_token() -> None:
    async with engine() as client:
        body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
        whole = (await client.post("/v1/chat/completions", json=HELLO)).json()["choices"][0]["message"]["content"]
        times: list[float] = []
        events: list[str] = []
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                    times.append(time.monotonic())
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len(chunks) == 1 + 8 + 1
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]) == whole
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 8 + ["length"]
        assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 8)
        # Seven more tokens of 5 ms after the first one.
        assert times[-1] - times[0] > 0.02


async def test_completions_and_chunked_request_bodies() -> None:
    async with engine(profile=INSTANT) as client:

        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b'{"prompt": [1, 2, 3', b'], "max_tokens": 4,', b' "ignore_eos": true}'):
                yield piece

        answer = await client.post("/v1/completions", content=pieces())
        assert answer.json()["usage"]["prompt_tokens"] == 3
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        async with client.stream("POST", "/v1/completions", json={"prompt": "hi", "stream": True}) as stream:
            events = await events_of(stream.aiter_lines())
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["object"] == "text_completion"


async def test_prefix_cache_shows_in_usage_and_metrics() -> None:
    async with engine(profile=PACED.with_block_size(16)) as client:
        body = {"prompt": list(range(100)), "max_tokens": 2}
        first = (await client.post("/v1/completions", json=body)).json()["usage"]
        second = (await client.post("/v1/completions", json=body)).json()["usage"]
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["prompt_tokens_details"]["cached_tokens"] == 96
        page = await metrics(client)
        assert page["vllm:prefix_cache_queries_total"] == 200
        assert page["vllm:prefix_cache_hits_total"] == 96
        assert page["vllm:generation_tokens_total"] == 4
        assert page["vllm:time_to_first_token_seconds_count"] == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        ("/v1/chat/completions", {**HELLO, "model": "nope"}, 404, {"type": "NotFoundError", "param": "model"}),
        ("/v1/chat/completions", {"max_tokens": 1}, 400, {"type": "Bad Request"}),
        ("/v1/chat/completions", {**HELLO, "n": 2}, 400, {"type": "BadRequestError", "param": "n"}),
        ("/v1/chat/completions", {**HELLO, "max_tokens": 0}, 400, {"type": "BadRequestError"}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1_000_000}, 400, {"type": "BadRequestError"}),
        ("/v1/completions", {"prompt": [["a"]]}, 400, {"type": "BadRequestError", "param": "prompt"}),
        ("/v1/completions", {"prompt": ""}, 400, {"type": "BadRequestError"}),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, 404, {"param": "response_id"}),
    ],
)
async def test_errors_look_like_vllm(path: str, body: dict[str, Any], status: int, expected: dict[str, Any]) -> None:
    async with engine() as client:
        answer = await client.post(path, json=body)
        error = answer.json()["error"]
        assert answer.status_code == error["code"] == status
        assert expected.items() <= error.items()


async def test_bad_json_unknown_paths_and_bad_http() -> None:
    async with engine() as client:
        answer = await client.post("/v1/completions", content=b'{"prompt": ')
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "Bad Request")
        assert (await client.get("/nope")).status_code == 404
        assert (await client.get("/v1/completions")).status_code == 405
        reader, writer = await send_raw(client, b"NONSENSE\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        await reader.read()
        writer.close()


async def test_pipelined_requests_are_answered_in_order_and_close_is_obeyed() -> None:
    async with engine() as client:
        slow = raw_post("/v1/completions", {"prompt": "x", "max_tokens": 2}, "X-Request-Id: one")
        quick = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Request-Id: two\r\nConnection: close\r\n\r\n"
        reader, writer = await send_raw(client, slow + quick)
        text = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert text.index(b"x-request-id: one") < text.index(b"x-request-id: two")
        writer.close()


async def test_small_routes() -> None:
    async with engine(loras=("lora1", "lora2")) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/version")).json() == {"version": "0.32.0"}
        models = (await client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in models] == [
            ("tiny", None),
            ("lora1", "tiny"),
            ("lora2", "tiny"),
        ]
        tokens = (await client.post("/tokenize", json={"prompt": "hello cat"})).json()
        assert tokens["count"] == len(tokens["tokens"]) == 3
        text = (await client.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        assert text == {"prompt": "hello cat"}
        assert (await client.post("/detokenize", json={"tokens": [-1]})).status_code == 400
        chat = (await client.post("/tokenize", json={"messages": HELLO["messages"]})).json()
        assert chat["count"] == 8
        message = await client.post("/v1/messages", json={**HELLO, "max_tokens": 3})
        assert message.json()["usage"] == {"input_tokens": 8, "output_tokens": 3}
        wrong = await client.post("/v1/messages", json={**HELLO, "model": "nope"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "not_found_error")


async def test_lora_series_follow_the_requests() -> None:
    async with engine(loras=("lora1",)) as client:
        await client.post("/v1/chat/completions", json={**HELLO, "model": "lora1"})
        text = (await client.get("/metrics")).text
        assert 'vllm:lora_requests_info{max_lora="4",running_lora_adapters="lora1",waiting_lora_adapters=""} 1.' in text


async def test_openai_sdk() -> None:
    async with (
        engine(profile=INSTANT) as client,
        openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as sdk,
    ):
        assert [model.id async for model in sdk.models.list()] == ["tiny"]
        messages: Any = HELLO["messages"]
        chat = await sdk.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5)
        assert chat.choices[0].finish_reason == "length"
        stream = await sdk.chat.completions.create(model="tiny", messages=messages, stream=True)
        said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(said).startswith(chat.choices[0].message.content or "?")
        vectors = await sdk.embeddings.create(model="tiny", input=["one", "two", "one"])
        assert vectors.data[0].embedding == vectors.data[2].embedding != vectors.data[1].embedding
        response = await sdk.responses.create(model="tiny", input="hi")
        again = await sdk.responses.create(model="tiny", input="more", previous_response_id=response.id)
        assert again.usage is not None
        assert response.usage is not None
        assert again.usage.input_tokens > response.usage.input_tokens + response.usage.output_tokens
        assert (await sdk.responses.retrieve(again.id)).output_text == again.output_text
        events = [event.type async for event in await sdk.responses.create(model="tiny", input="hi", stream=True)]
        assert events[0] == "response.created"
        assert events[-1] == "response.completed"
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve("resp_unknown")
        with pytest.raises(openai.NotFoundError):
            await sdk.chat.completions.create(model="nope", messages=messages)


async def test_background_response_can_be_cancelled() -> None:
    async with engine() as client:
        body = {"input": "x", "max_output_tokens": 100_000, "ignore_eos": True, "background": True}
        made = (await client.post("/v1/responses", json=body)).json()
        assert made["status"] == "queued"
        await state_where(client, running=1)
        gone = await client.post(f"/v1/responses/{made['id']}/cancel")
        assert gone.json()["status"] == "cancelled"
        await state_where(client, running=0, aborted=1)
        assert (await client.post("/v1/responses/resp_x/cancel")).status_code == 404


async def test_full_queue_and_api_key() -> None:
    async with engine(max_num_queued_reqs=1, api_key="secret") as client:
        assert (await client.get("/v1/models")).json() == {"error": "Unauthorized"}
        assert (await client.get("/health")).status_code == 200
        client.headers["Authorization"] = "Bearer secret"
        async with client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}):
            refused = await client.post("/v1/chat/completions", json=HELLO)
        assert refused.status_code == 503
        assert "retry-after" not in refused.headers
        error = refused.json()["error"]
        assert (set(error), error["type"]) == ({"message", "type", "code"}, "Service Unavailable")


async def test_requests_are_kept_for_inspection() -> None:
    async with engine(recorded_requests=2, profile=INSTANT) as client:
        for name in "abc":
            await client.post("/v1/completions", json={"prompt": name}, headers={"X-Name": name})
        await client.get("/health")
        state = (await client.get("/sim")).json()
        assert [json.loads(entry["body"])["prompt"] for entry in state["requests"]] == ["b", "c"]
        assert ["x-name", "c"] in state["requests"][-1]["headers"]
        assert [entry["path"] for entry in state["probes"]] == ["/health"]
        assert (state["received"], state["finished"]) == (3, 3)
        await switch(client, forget=True)
        assert (await client.get("/sim")).json()["requests"] == []


# Clients that leave


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_aborts_the_request(stream: bool) -> None:
    async with engine() as client:
        reader, writer = await send_raw(client, raw_post("/v1/chat/completions", {**ENDLESS, "stream": stream}))
        await state_where(client, running=1)
        if stream:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        state = await state_where(client, running=0, aborted=1)
        assert state["kv_usage"] == 0


# Several engines


async def test_engines_of_one_cluster_answer_alike_and_tell_who_they_are() -> None:
    specs = specs_for(3, 0, accelerator=["instant", "paced"])
    assert [spec.profile.name for spec in specs] == ["instant", "paced", "instant"]
    async with await serve_engines(specs) as running, httpx.AsyncClient(trust_env=False) as client:
        answers = [await client.post(f"{url}/v1/chat/completions", json=HELLO) for url in running.urls]
        assert [answer.headers["x-sim-engine"] for answer in answers] == ["0", "1", "2"]
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def self_signed(directory: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "engine.pem").write_bytes(certificate + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "engine.pem")
    return context


async def test_engine_speaks_tls(tmp_path: Path) -> None:
    spec = EngineSpec(profile=INSTANT, tls=self_signed(tmp_path))
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.load_verify_locations(tmp_path / "engine.pem")
    async with await serve_engines([spec]) as running, httpx.AsyncClient(verify=trusting, trust_env=False) as client:
        assert running.urls[0].startswith("https://")
        answer = await client.post(f"{running.urls[0]}/v1/chat/completions", json=HELLO)
        assert answer.json()["usage"]["completion_tokens"] == 8


async def test_taken_port_leaves_nothing_open() -> None:
    async with await serve_engines(specs_for(1, 0, accelerator="instant")) as running:
        port = running.servers[0].port
        with pytest.raises(OSError, match="in use"):
            await serve_engines([EngineSpec(profile=INSTANT), EngineSpec(profile=INSTANT, port=port)])
    await RunningEngines([]).close()


async def test_module_serves_until_a_signal() -> None:
    arguments = ("-m", "sim", "--engines", "2", "--accelerator", "instant", "--lora", "l1", "--index", "4")
    async with spawned(2, *arguments) as (process, urls), httpx.AsyncClient(trust_env=False) as client:
        answers = [await client.get(f"{url}/v1/models") for url in urls]
        assert [answer.headers["x-sim-engine"] for answer in answers] == ["4", "5"]
        assert answers[0].json()["data"][1]["id"] == "l1"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


async def test_processes_die_alone_and_stop_together() -> None:
    program = "from sim.cluster import run_cluster; run_cluster(2, 0, accelerator='instant', processes=True)"
    async with spawned(2, "-c", program) as (process, urls), httpx.AsyncClient(trust_env=False) as client:
        states = [(await client.get(f"{url}/sim")).json() for url in urls]
        assert {state["engine"] for state in states} == {0, 1}
        os.kill(states[0]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                await client.get(f"{urls[0]}/health")
            except httpx.TransportError:
                break
            assert time.monotonic() < deadline
        assert (await client.get(f"{urls[1]}/health")).status_code == 200
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        with pytest.raises(httpx.TransportError):
            await client.get(f"{urls[1]}/health")


async def test_a_draining_engine_answers_what_it_has_and_takes_nothing_new() -> None:
    async with await serve_engines([EngineSpec(profile=PACED, model="tiny")]) as running:
        server = running.servers[0]
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, trust_env=False) as client:
            await client.get("/health")
            asked = asyncio.create_task(client.post("/v1/chat/completions", json={**HELLO, "model": "tiny"}))
            await state_where(client, running=1)
            await server.drain(PATIENCE_S)
            answer = await asked
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == HELLO["max_tokens"]
            assert not server.connections
            with pytest.raises(httpx.ConnectError):
                await client.get("/health")
