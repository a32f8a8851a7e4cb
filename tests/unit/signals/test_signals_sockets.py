"""The scraper with the real upstream client against real sockets: what engines and networks do to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.scrape import Scraper
from picker.signals.settings import ScrapeSettings
from picker.upstream.client import Upstream
from tests.unit.signals.fakes import MODELS, Store
from tests.unit.sources.waiting import until

PAGE = (Path(__file__).parents[2] / "data" / "vllm-0.32" / "metrics.txt").read_bytes()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Engine:
    """A small engine: metrics by `handler`, a model list, and a plug to pull."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return await self.handler(request)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=MODELS, content_type="application/json")


async def page(request: web.Request) -> web.StreamResponse:
    return web.Response(body=PAGE)


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def stall(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(PAGE[:1000])
    await asyncio.sleep(60)
    return response


async def cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(PAGE))})
    await response.prepare(request)
    await response.write(PAGE[: len(PAGE) // 2])
    assert request.transport is not None
    request.transport.abort()
    return response


async def failing(request: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text="boom")


async def missing(request: web.Request) -> web.StreamResponse:
    return web.Response(status=404)


async def garbage(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"<html>" + bytes(range(256)) * 100)


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(PAGE)
    while True:
        await response.write(b"x_total 1\n" * 10_000)


@asynccontextmanager
async def scraped(handler: Handler, *, engine: str = "vllm") -> AsyncIterator[tuple[Engine, Store]]:
    server = Engine(handler)
    await server.start()
    upstream = Upstream({}, connect_timeout_s=1.0)
    await upstream.start()
    store = Store(load={"e": 1})
    store.set(Endpoint(id="e", url=f"http://127.0.0.1:{server.port}", engine=engine))
    settings = ScrapeSettings(timeout_s=0.3, page_bytes=2**20)
    try:
        async with Scraper(getter=upstream, store=store, clock=time.monotonic, settings=settings):
            yield server, store
    finally:
        await server.stop()
        await upstream.close()
        await asyncio.sleep(0)


async def test_a_real_page_arrives() -> None:
    async with scraped(page, engine="auto") as (_, store):
        await until(lambda: len(store.scraped) >= 3 and len(store.models) >= 1)
        assert store.scraped[0].signals.blocks == 32768
        assert store.models[0].models == frozenset({"base", "lora1"})
        assert store.failures == []


@pytest.mark.parametrize(
    ("handler", "kinds"),
    [
        (hang, {ProbeFailure.TIMEOUT}),
        (stall, {ProbeFailure.TIMEOUT}),
        (cut, {ProbeFailure.PARSE, ProbeFailure.REFUSED}),
        (failing, {ProbeFailure.HTTP}),
        (missing, {ProbeFailure.HTTP}),
        (garbage, {ProbeFailure.PARSE}),
    ],
)
async def test_failures_have_their_kinds(handler: Handler, kinds: set[ProbeFailure]) -> None:
    async with scraped(handler) as (_, store):
        await until(lambda: len(store.failures) >= 2)
        assert {failure.kind for failure in store.failures} <= kinds
        assert store.scraped == []


async def test_an_endless_page_is_cut_and_read_as_far_as_it_goes() -> None:
    async with scraped(endless) as (_, store):
        await until(lambda: len(store.scraped) >= 2)
        assert store.scraped[0].signals.progress_tokens == 40


async def test_an_engine_that_dies_is_noticed_within_a_second_and_comes_back() -> None:
    async with scraped(page) as (server, store):
        await until(lambda: len(store.scraped) >= 2)
        await server.stop()
        stopped = time.monotonic()
        await until(lambda: len(store.failures) >= 2)
        # One second is promised; five allow for other jobs on the machine.
        assert store.failures[1].at - stopped < 5
        assert {failure.kind for failure in store.failures[:2]} == {ProbeFailure.REFUSED}
        store.updates.clear()
        await server.start(server.port)
        await until(lambda: len(store.scraped) >= 1 and len(store.models) >= 1)


async def test_nobody_listening_at_all() -> None:
    async with scraped(page, engine="auto") as (server, store):
        await until(lambda: len(store.scraped) >= 1)
        await server.stop()
        store.set()
        await asyncio.sleep(0.15)
        store.updates.clear()
        store.set(Endpoint(id="e", url=f"http://127.0.0.1:{server.port}"))
        await until(lambda: len(store.failures) >= 2)
        assert store.failures[0].kind is ProbeFailure.REFUSED
