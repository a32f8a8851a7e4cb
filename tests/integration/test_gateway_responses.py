"""Stored responses live on one engine: what names them goes there or nowhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from picker.core.updates import Remove
from sim.cluster import RunningEngines, serve_engines
from sim.frontend import EngineSpec
from sim.profiles import PACED
from tests.integration.gateway_rig import JSON, MODEL, Gateway, backend, gateway, get, post, request_bytes, until
from tests.integration.sim_rig import state_where
from tests.unit.upstream.hostile import Peer, Received, answer, chunked


@contextlib.asynccontextmanager
async def fleet() -> AsyncIterator[tuple[AsyncOpenAI, Gateway, RunningEngines]]:
    """Three engines in turn, so that chance does not bring anything home."""
    specs = [EngineSpec(profile=PACED, model=MODEL, index=index) for index in range(3)]
    async with await serve_engines(specs) as engines:
        entries = [{"url": url, "engine": "vllm"} for url in engines.urls]
        http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=10)
        async with (
            gateway(*entries, policy="round-robin") as door,
            AsyncOpenAI(base_url=f"{door.url}/v1", api_key="k", max_retries=0, http_client=http) as client,
        ):
            yield client, door, engines


@pytest.mark.parametrize("stream", [False, True])
async def test_what_builds_on_a_response_goes_where_it_is(stream: bool) -> None:
    async with fleet() as (client, door, _):
        previous = None
        for _ in range(4):
            if stream:
                events = await client.responses.create(
                    model=MODEL, input="x", max_output_tokens=3, previous_response_id=previous, stream=True
                )
                created = await anext(aiter(events))
                assert created.type == "response.created"
                previous = created.response.id
                async for _ in events:
                    pass
            else:
                made = await client.responses.create(
                    model=MODEL, input="x", max_output_tokens=3, previous_response_id=previous
                )
                previous = made.id
            assert (await client.responses.retrieve(previous)).id == previous
        await door.settled()
        assert len({line["endpoint"] for line in door.lines()}) == 1


async def test_a_response_can_be_cancelled_while_it_streams() -> None:
    async with fleet() as (client, door, engines):
        stream = await client.responses.create(
            model=MODEL, input="x", stream=True, extra_body={"ignore_eos": True}, max_output_tokens=100_000
        )
        first = await anext(aiter(stream))
        assert first.type == "response.created"
        assert (await client.responses.cancel(first.response.id)).status == "cancelled"
        async for _ in stream:
            pass
        await door.settled()
        home = next(url for url in engines.urls if url.endswith(str(door.lines()[0]["endpoint"])))
        async with httpx.AsyncClient(base_url=home, trust_env=False) as control:
            await state_where(control, running=0, aborted=1)


async def test_a_response_nobody_is_known_to_hold_is_gone() -> None:
    async with fleet() as (client, door, _):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.create(model=MODEL, input="x", previous_response_id="resp_nobody")
        assert (caught.value.code, caught.value.param) == ("response_gone", "previous_response_id")
        assert caught.value.response.headers["x-should-retry"] == "false"
        for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                await call("resp_nobody")
            assert caught.value.code == "response_gone"
        assert {line["endpoint"] for line in door.lines()} == {None}


async def test_a_response_whose_engine_left_is_gone_and_one_whose_engine_is_down_fails_without_a_second_try() -> None:
    ident = b"resp_1"

    async def makes(peer: Peer, request: Received) -> None:
        if request.method == "POST" and request.target == "/v1/responses":
            if b"previous" in request.body:
                peer.reset()
            else:
                await peer.send(answer(b'{"id":"%b","object":"response"}' % ident, JSON))
        else:
            await peer.send(answer(b"{}", JSON))

    new = b'{"model":"tiny","input":"x"}'
    more = b'{"model":"tiny","input":"x","previous_response_id":"resp_1"}'
    async with backend(makes) as one, backend(makes) as two, gateway(one.url, two.url) as door:
        assert (await door.post(new, path="/v1/responses")).status == 200
        home, other = (one, two) if one.received else (two, one)
        got = await door.post(more, path="/v1/responses")
        assert (got.status, got.error["code"]) == (502, "upstream_reset")
        assert (len(home.received), len(other.received)) == (2, 0)
        # A deleted response is forgotten, so a later look is answered here.
        assert (await door.ask(request_bytes("DELETE", "/v1/responses/resp_1"))).status == 200
        got = await door.ask(get("/v1/responses/resp_1"))
        assert (got.status, got.error["code"]) == (404, "response_gone")
        assert (len(home.received), len(other.received)) == (3, 0)


async def test_ids_of_streams_are_known_although_the_client_left() -> None:
    created = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_7"}}\n\n'
    begun = asyncio.Event()

    async def makes(peer: Peer, request: Received) -> None:
        if request.method == "GET":
            await peer.send(answer(b"{}", JSON))
            return
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(*chunked(created, end=False))
        begun.set()
        await peer.gone()

    async with backend(makes) as one, backend(makes) as two, gateway(one.url, two.url) as door:
        async with door.client() as client:
            await client.send(post(b'{"model":"tiny","input":"x","stream":true}', path="/v1/responses"))
            await client.head()
            assert await client.chunk() == created
        await door.settled()
        home = one if one.received else two
        for _ in range(4):
            assert (await door.ask(get("/v1/responses/resp_7"))).status == 200
        assert len(home.received) == 5


async def test_with_one_endpoint_there_is_no_doubt() -> None:
    async def holds(peer: Peer, request: Received) -> None:
        await peer.send(answer(b'{"id":"resp_old"}', JSON))

    async with backend(holds) as engine, gateway(engine.url) as door:
        assert (await door.ask(get("/v1/responses/resp_old"))).status == 200


async def test_an_endpoint_that_leaves_takes_its_responses_along() -> None:
    async with fleet() as (client, door, _):
        made = await client.responses.create(model=MODEL, input="x", max_output_tokens=3)
        await door.settled()
        home = door.lines()[0]["endpoint"]
        door.runtime.datastore.apply(Remove("static", home))
        await until(lambda: len(door.runtime.datastore.endpoints()) == 2)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.retrieve(made.id)
        assert caught.value.code == "response_gone"
