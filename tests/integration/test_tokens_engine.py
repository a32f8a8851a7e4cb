"""Token ids asked of an engine over real sockets: in time, late, and cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from picker.core.prefix.prompt import PromptKeys
from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.openai.routes import RouteKind
from picker.signals.tokens.reader import PromptReader
from picker.signals.tokens.remote import EngineTokens
from tests.unit.signals.fakes import Answer
from tests.unit.signals.tokens import rig


class Engine:
    """The tokenising end points of a vLLM, with a gate. Which of them exist is the test's choice."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.asked: list[str] = []
        self.left = 0
        self.url = ""

    async def tokenize(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        body: dict[str, Any] = await request.json()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        ids = list(range(len(str(body["messages"])) // 4))
        return web.json_response({"count": len(ids), "max_model_len": 8192, "tokens": ids, "token_strs": None})

    async def render(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.json_response({"error": {"message": "not enabled"}}, status=403)


class AiohttpPoster:
    """POSTs as an upstream client would."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def post(
        self, endpoint: Endpoint, url: str, body: bytes, *, timeout_s: float, limit_bytes: int = 1 << 20
    ) -> Answer | ProbeFailure:
        try:
            async with asyncio.timeout(timeout_s), self.session.post(url, data=body) as answer:
                return Answer(answer.status, await answer.content.read(limit_bytes))
        except (TimeoutError, aiohttp.ClientError):
            return ProbeFailure.TIMEOUT


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    app = web.Application()
    app.router.add_post("/tokenize", engine.tokenize)
    app.router.add_post("/v1/chat/completions/render", engine.render)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    engine.url = f"http://{host}:{port}"
    yield engine
    engine.open.set()
    await runner.cleanup()


@pytest.fixture
async def reader(engine: Engine) -> AsyncIterator[PromptReader]:
    endpoints = (Endpoint(id="e", url=engine.url),)
    async with aiohttp.ClientSession() as session:
        engines = EngineTokens(
            AiohttpPoster(session), lambda model: endpoints, clock=time.monotonic, cache_bytes=1 << 20
        )
        reader = PromptReader(b"fleet", engines=engines)
        yield reader
        await reader.close()


async def read(reader: PromptReader, text: str, budget_s: float) -> PromptKeys:
    body, parsed = rig.request(RouteKind.CHAT, messages=[rig.user(text)])
    keys = await reader.read(
        body, parsed, target_model="tiny", lora=False, block_sizes=frozenset((16,)), budget_s=budget_s
    )
    assert keys is not None
    return keys


async def test_an_engine_without_rendering_is_asked_to_tokenise(engine: Engine, reader: PromptReader) -> None:
    assert not (await read(reader, "hello " * 50, 5.0)).exact
    assert (await read(reader, "hello " * 50, 5.0)).exact[16]
    assert (await read(reader, "others " * 50, 5.0)).exact[16]
    assert engine.asked == ["/v1/chat/completions/render", "/tokenize", "/tokenize"]


async def test_a_late_answer_is_there_for_the_next_time(engine: Engine, reader: PromptReader) -> None:
    await read(reader, "warm up", 5.0)
    engine.open.clear()
    began = time.monotonic()
    assert not (await read(reader, "hello " * 50, 0.02)).exact
    assert time.monotonic() - began < 1.0
    engine.open.set()
    async with asyncio.timeout(5):
        while not (await read(reader, "hello " * 50, 0.0)).exact:
            await asyncio.sleep(0.005)


async def test_closing_leaves_no_question_behind(engine: Engine, reader: PromptReader) -> None:
    await read(reader, "warm up", 5.0)
    engine.open.clear()
    await read(reader, "hello " * 50, 0.05)
    await reader.close()
    async with asyncio.timeout(5):
        while engine.left == 0:
            await asyncio.sleep(0.005)


async def test_a_dead_engine_costs_nobody_his_request() -> None:
    endpoints = (Endpoint(id="e", url="http://127.0.0.1:1"),)
    async with aiohttp.ClientSession() as session:
        engines = EngineTokens(
            AiohttpPoster(session), lambda model: endpoints, clock=time.monotonic, cache_bytes=1 << 20
        )
        lonely = PromptReader(b"fleet", engines=engines)
        keys = await read(lonely, "hello " * 100, 5.0)
        assert keys.learned
        assert not keys.exact
        await lonely.close()
