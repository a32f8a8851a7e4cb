"""A model server announces itself over a real socket, gets requests, and stops getting them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn

from gateway.serve import HttpServer, bind
from picker.admin import app as admin
from picker.config import HostPort, RegistrationSection
from picker.sources.follow import follow
from picker.sources.registered import RegisteredSource
from picker.sources.resolve import Resolving
from tests.integration.gateway_rig import JSON, MODEL, Gateway, backend, gateway, says, until
from tests.unit.upstream.hostile import answer

TOKEN = "a-secret-token"
OK = answer(b'{"ok":true}', JSON)


class Door:
    """A gateway without configured endpoints, and the admin port beside it."""

    def __init__(self, served: Gateway, address: str, client: httpx.AsyncClient) -> None:
        self.gateway = served
        self.address = address
        self.client = client

    async def register(self, url: str, **fields: object) -> httpx.Response:
        return await self.client.post("/endpoints", json={"url": url, "engine": "none", "model": MODEL, **fields})

    async def status(self) -> int:
        """What a chat request gets now."""
        return (await self.gateway.post()).status

    async def raw(self, *pieces: bytes) -> bytes:
        """The first bytes of the answer to bytes written by hand; the connection ends then."""
        host, port = self.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(b"".join(pieces))
            async with asyncio.timeout(5):
                return await reader.read(4096)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def door() -> AsyncIterator[Door]:
    async with gateway() as served:
        runtime = served.runtime
        source = RegisteredSource(
            RegistrationSection(enabled=True),
            on_change=lambda endpoint_id, what: runtime.log.info("registration", endpoint=endpoint_id, what=what),
        )
        app = admin.build(
            runtime.director,
            runtime.metrics,
            checks=runtime.checks,
            engines=runtime.engines,
            token=TOKEN,
            version="test",
            registered=source,
            credentials=frozenset(),
        )
        config = uvicorn.Config(app, ws="none", lifespan="off", access_log=False, log_config=None)
        server = HttpServer(config, bind(HostPort("127.0.0.1", 0)))
        following = asyncio.create_task(follow(Resolving(source), runtime.datastore, runtime.director.rules))
        await server.start()
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=f"http://{server.address}", headers=headers, timeout=10) as client:
            yield Door(served, server.address, client)
        await server.stop(1)
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def serves(own: Door, wanted: int) -> None:
    """Waits until chat requests get this status."""
    deadline = time.monotonic() + 10
    while await own.status() != wanted:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_server_comes_serves_and_goes() -> None:
    async with backend(says(OK)) as engine, door() as own:
        assert await own.status() == 503
        url = engine.url.replace("127.0.0.1", "localhost")
        got = await own.register(url, name="job-1/rank-0")
        assert (got.status_code, got.json()) == (201, {"id": "job-1/rank-0", "expires_in_s": 30.0})
        await serves(own, 200)
        (known,) = own.gateway.runtime.datastore.endpoints()
        assert known.address.startswith("127.0.0.1:"), "names are looked up"

        assert (await own.client.delete("/endpoints/job-1/rank-0")).status_code == 204
        await serves(own, 503)
        assert [line["what"] for line in own.gateway.lines("registration")] == ["registered", "deregistered"]
        assert TOKEN not in own.gateway._log.getvalue()


async def test_a_server_that_stops_renewing_is_forgotten() -> None:
    async with backend(says(OK)) as engine, door() as own:
        await own.register(engine.url, ttl="2s")
        await serves(own, 200)
        for _ in range(6):
            await asyncio.sleep(0.4)
            assert (await own.register(engine.url, ttl="2s")).status_code == 200
        assert await own.status() == 200, "renewed for longer than it lives"
        renewed_at = time.monotonic()
        await until(lambda: not own.gateway.runtime.datastore.endpoints())
        assert 1 < time.monotonic() - renewed_at < 2 + 5 * 1
        assert await own.status() == 503


async def test_strangers_are_refused_before_they_have_said_anything() -> None:
    async with door() as own:
        head = b"POST /endpoints HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n"
        assert b" 401 " in await own.raw(head, b"\r\n")
        assert b" 401 " in await own.raw(head, b"Authorization: Bearer \xff\xfe\r\n\r\n")
        allowed = head + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
        assert b" 413 " in await own.raw(allowed, b" " * 70_000)
        assert own.gateway.runtime.datastore.endpoints() == ()


async def test_a_client_that_leaves_in_the_middle_changes_nothing() -> None:
    async with door() as own:
        host, port = own.address.rsplit(":", 1)
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /endpoints HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n"
        writer.write(head.encode() + b'{"url": "http://10.0.0.1:8000"}')
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        assert (await own.client.get("/endpoints")).json() == []
        assert (await own.client.get("/healthz")).status_code == 200
