"""Real Envoy, the real picker and engines on sockets: what the ext-proc integration tests share.

The picker runs in this process with the whole runtime behind it (sources, scraping, books). Engines are simulated, or
echo what they get so that bytes can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from aiohttp import web

from picker.config import Config
from picker.extproc.server import ExtProcServer
from picker.extproc.settings import ExtProcSettings, SessionSettings, TlsSettings
from picker.runtime import Runtime
from tests.integration.envoy import RealEnvoy
from tests.integration.envoy_config import EnvoyListener

PATIENCE_S = 10.0
COMPLETIONS = "/v1/completions"


class Site:
    """Envoy in front of a picker in front of engines. `get` and `post` go through a listener by its name."""

    def __init__(
        self, envoy: RealEnvoy, runtime: Runtime, server: ExtProcServer, client: aiohttp.ClientSession
    ) -> None:
        self.envoy = envoy
        self.runtime = runtime
        self.server = server
        self.client = client

    @property
    def in_flight(self) -> int:
        """Requests in the books."""
        return len(self.runtime.datastore.ledger)

    def post(self, listener: str, path: str = COMPLETIONS, **kwargs: Any) -> Any:
        """An HTTP request through a listener, as an aiohttp context manager."""
        return self.client.post(self.envoy.url(listener) + path, **kwargs)

    async def ask(self, listener: str, path: str = COMPLETIONS, **kwargs: Any) -> tuple[int, Any, bytes]:
        """Status, headers and body of a request. A body in `data` is sent with its length."""
        if "data" in kwargs:
            kwargs = {**kwargs, "data": io.BytesIO(kwargs["data"])}
        async with self.post(listener, path, **kwargs) as response:
            return response.status, response.headers, await response.read()

    async def settled(self) -> None:
        """Waits until nothing is in flight: ends are seen on streams, or learnt from scrapes."""
        async with asyncio.timeout(PATIENCE_S):
            while self.in_flight or self.server.open_streams:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def site(
    directory: Path,
    endpoints: Sequence[str | Mapping[str, Any]],
    listeners: Sequence[EnvoyListener],
    *,
    session: SessionSettings | None = None,
    tls: TlsSettings | None = None,
    credentials: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Site]:
    """Everything up, and down again with empty books. `endpoints` are URLs, or entries as in the configuration."""
    config = Config.model_validate(
        {
            "endpoints": {"static": list(endpoints)},
            "credentials": dict(credentials or {}),
            "scrape": {"idle_interval": "200ms"},
            "policy": "balanced",
        }
    )
    runtime = Runtime(config, log=structlog.wrap_logger(structlog.ReturnLogger()), version="test")
    made = ExtProcSettings(
        **{"host": "127.0.0.1", "port": 0, "health_port": 0, "drain_settle_s": 0.0, "tls": tls, **settings},
        session=session or SessionSettings(),
    )
    server = ExtProcServer(
        runtime.director,
        made,
        clock=runtime.director.clock,
        ready=runtime.ready,
        authorization=runtime.upstream.authorization,
    )
    await runtime.start()
    try:
        await runtime.synced(PATIENCE_S)
        await server.start()
        address = f"127.0.0.1:{server.port}"
        async with (
            RealEnvoy(directory, listeners, picker_address=address, picker_tls=tls is not None) as envoy,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3 * PATIENCE_S)) as client,
        ):
            made_site = Site(envoy, runtime, server, client)
            yield made_site
            await made_site.settled()
        assert await server.drain(1.0) == 0
    finally:
        await server.drain(0.0)
        await runtime.close()


class EchoEngine:
    """Answers with the body it got, after `delay_s`; `/events?n=..` streams events 50 ms apart instead.

    It has vLLM's gauges, so that what nobody saw the end of is learnt from them. `seen` and `paths` are the headers and
    the targets of requests. What `x-echo-set-header` names becomes a header of the answer, as in the echo server of the
    Gateway API's conformance tests.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.delay_s = 0.0
        self.status = 200
        self.running = 0
        self.seen: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.aborted = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            text = f'vllm:num_requests_running{{model_name="m"}} {self.running}\nvllm:num_requests_waiting{{}} 0\n'
            return web.Response(text=text)
        if request.method == "GET" and request.path.removeprefix("/openai") in {"/health", "/v1/models", "/version"}:
            return web.json_response({"data": [{"id": "m", "object": "model"}], "object": "list"})
        if request.path in ("/kv_event_sources", "/server_info", "/get_server_info"):
            # Asked of engines to find their KV-cache events; this one has none.
            return web.Response(status=404)
        self.seen.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(request.raw_path)
        self.running += 1
        try:
            body = await request.read()
            await asyncio.sleep(self.delay_s)
            if "n" in request.query:
                return await self.events(request)
            headers = self.marks(request)
            return web.Response(body=body, status=self.status, headers=headers, content_type="application/json")
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.set()
            raise
        finally:
            self.running -= 1

    async def events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**self.marks(request), "content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(int(request.query["n"])):
            await response.write(b"data: %d %.6f\n\n" % (number, time.monotonic()))
            await asyncio.sleep(0.05)
        await response.write(b"data: [DONE]\n\n")
        return response

    def marks(self, request: web.Request) -> dict[str, str]:
        echo = request.headers.get("x-echo-set-header", "").partition(":")
        return {"x-served-by": self.name} | ({echo[0]: echo[2]} if echo[0] else {})


@contextlib.asynccontextmanager
async def echo_engines(*names: str) -> AsyncIterator[list[EchoEngine]]:
    """Echo engines that listen; each cancels its work when the client leaves."""
    engines = [EchoEngine(name) for name in names]
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            app = web.Application(client_max_size=16 << 20)
            app.router.add_route("*", "/{path:.*}", engine.answer)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            engine.address = "{}:{}".format(*runner.addresses[0][:2])
        yield engines
