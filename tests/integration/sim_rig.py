"""What the tests of the simulated engines share: starting one, switching its faults, raw sockets, polling."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sim.cluster import serve_engines
from sim.frontend import EngineSpec
from sim.profiles import PACED

# Five times what anything here needs.
PATIENCE_S = 5.0
QUIET_S = 0.2
HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8, "ignore_eos": True}
ENDLESS = {**HELLO, "max_tokens": 100_000}


@contextlib.asynccontextmanager
async def engine(**fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    """One engine (``paced``, model ``tiny``, unless told otherwise) and a client of it."""
    spec = EngineSpec(**{"profile": PACED, "model": "tiny", **fields})
    async with (
        await serve_engines([spec]) as running,
        httpx.AsyncClient(base_url=running.urls[0], timeout=PATIENCE_S, trust_env=False) as client,
    ):
        yield client


async def switch(client: httpx.AsyncClient, **faults: Any) -> dict[str, Any]:
    answer = await client.post("/sim", json=faults)
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    return state


async def state_where(client: httpx.AsyncClient, **wanted: Any) -> dict[str, Any]:
    """Poll ``/sim`` until it shows the wanted values."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        state: dict[str, Any] = (await client.get("/sim")).json()
        if all(state[name] == value for name, value in wanted.items()):
            return state
        assert time.monotonic() < deadline, state
        await asyncio.sleep(0.01)


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: sample.value for sample in samples}


async def send_raw(client: httpx.AsyncClient, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(text)
    return reader, writer


def raw_post(path: str, body: Any, *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


async def stays_silent(reader: asyncio.StreamReader) -> bool:
    try:
        data = await asyncio.wait_for(reader.read(1), QUIET_S)
    except TimeoutError:
        return True
    raise AssertionError(f"got {data!r}")


async def events_of(lines: AsyncIterator[str]) -> list[str]:
    return [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]


async def ready_urls(process: asyncio.subprocess.Process, count: int) -> list[str]:
    assert process.stdout is not None
    lines = [await asyncio.wait_for(process.stdout.readline(), 4 * PATIENCE_S) for _ in range(count)]
    assert all(line.startswith(b"ready http://127.0.0.1:") for line in lines), lines
    return [line.decode().split()[1] for line in lines]


@contextlib.asynccontextmanager
async def spawned(count: int, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    """A process that serves ``count`` engines, and their URLs."""
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        yield process, await ready_urls(process, count)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
