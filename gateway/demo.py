"""`waypost demo`: simulated engines, the real gateway on free loopback ports, the real OpenAI SDK, and what came of
it.

Everything runs in this process and stops by itself. It measures nothing worth quoting: it shows that the parts work
together.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from gateway.serve import VERSION, admin_server, bind, gateway_server
from picker.config import Config, HostPort, Loaded, load
from picker.runtime import Runtime
from picker.telemetry import logs
from sim.cluster import serve_engines, specs_for

ACCELERATORS = ("H100", "A100", "L40S")
REQUESTS = 90
CONCURRENCY = 24
MODEL = "sim-8b"
# Off a terminal nothing says how wide a line may be; the tables need this much.
WIDTH = 110
_TOPICS = ("routing", "caching", "batching", "prefill", "decoding", "queueing", "streaming", "sharding")


class Sample(msgspec.Struct, frozen=True):
    """One finished request of the workload."""

    endpoint: str
    request_id: str
    ttft_s: float


def run_demo() -> int:
    """Runs the demo; the exit code is 0 when every request was answered."""
    try:
        import openai  # noqa: F401
    except ImportError:
        print("waypost demo needs the OpenAI SDK: pip install openai", file=sys.stderr)
        return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_demo(Console(width=None if sys.stdout.isatty() else WIDTH)))


async def _demo(console: Console) -> int:
    specs = specs_for(len(ACCELERATORS), 0, model=MODEL, accelerator=ACCELERATORS, speed=4.0)
    async with await serve_engines(specs) as engines:
        console.print(f"{len(engines.urls)} simulated engines ({', '.join(ACCELERATORS)}): {', '.join(engines.urls)}")
        runtime = Runtime(_config(engines.urls), log=logs.configure("error", style="json"), version=VERSION)
        door, _ = gateway_server(runtime, bind(runtime.config.listen))
        pages = admin_server(runtime, bind(runtime.config.admin.listen))
        await runtime.start()
        await runtime.synced(5.0)
        await asyncio.gather(door.start(), pages.start())
        try:
            console.print(f"gateway: http://{door.address}   admin: http://{pages.address}\n")
            return await _show(console, runtime, f"http://{door.address}", f"http://{pages.address}")
        finally:
            await door.stop(1)
            await pages.stop(1)
            await runtime.close()


def _config(urls: list[str]) -> Config:
    """What `waypost run --to URL ...` would use, on free ports."""
    loaded = load(Path("/dev/null"), environ={}, flags={("endpoints", "static"): urls})
    assert isinstance(loaded, Loaded)
    free = HostPort("127.0.0.1", 0)
    config = loaded.config
    admin = config.admin.model_copy(update={"listen": free})
    return config.model_copy(update={"listen": free, "admin": admin})


async def _show(console: Console, runtime: Runtime, url: str, admin_url: str) -> int:
    started = time.monotonic()
    workload = asyncio.create_task(_workload(url))
    busiest: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=admin_url) as client:
        while not workload.done():
            rows = (await client.get("/debug/endpoints")).json()
            if sum(row["in_flight"] for row in rows) >= sum(row["in_flight"] for row in busiest):
                busiest = rows
            await asyncio.wait([workload], timeout=0.1)
        samples = await workload
        seconds = time.monotonic() - started
        console.print(_table(samples, busiest))
        console.print(
            f"{len(samples)} of {REQUESTS} requests answered in {seconds:.1f} s, half of them streamed.\n"
            "running, waiting and KV usage are as of the busiest moment seen.\n"
        )
        for sample in (samples[0], samples[-1]):
            decisions = (await client.get(f"/debug/decisions/{sample.request_id}")).json()
            console.print(_explained(decisions[-1]))
    in_flight = len(runtime.datastore.ledger)
    console.print(f"still in flight: {in_flight}")
    return 0 if len(samples) == REQUESTS and in_flight == 0 else 1


async def _workload(url: str) -> list[Sample]:
    """A short mix of short and long prompts, streamed and not, through the OpenAI SDK."""
    from openai import AsyncOpenAI

    rng = random.Random(7)
    places = asyncio.Semaphore(CONCURRENCY)
    shapes = [(index % 2 == 0, rng.choice((20, 60, 400)), rng.choice((8, 24, 64))) for index in range(REQUESTS)]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="demo") as client:

        async def one(stream: bool, words: int, tokens: int) -> Sample:
            prompt = " ".join(rng.choice(_TOPICS) for _ in range(words))
            async with places:
                return await _ask(client, prompt, stream=stream, tokens=tokens)

        return list(await asyncio.gather(*(one(*shape) for shape in shapes)))


async def _ask(client: Any, prompt: str, *, stream: bool, tokens: int) -> Sample:
    started = time.monotonic()
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, stream=stream
    )
    answer = raw.parse()
    ttft_s = time.monotonic() - started
    if stream:
        first = True
        async for _ in answer:
            if first:
                ttft_s, first = time.monotonic() - started, False
    return Sample(raw.headers["x-waypost-endpoint"], raw.headers["x-request-id"], ttft_s)


def _table(samples: list[Sample], busiest: list[dict[str, Any]]) -> Table:
    by_endpoint: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_endpoint[sample.endpoint].append(sample.ttft_s)
    table = Table("endpoint", "requests", "share", "running", "waiting", "KV usage", "mean TTFT")
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for row in busiest:
        seconds = by_endpoint.get(row["id"], [])
        table.add_row(
            row["id"],
            str(len(seconds)),
            f"{len(seconds) / max(1, len(samples)):.0%}",
            _figure(row["running"]),
            _figure(row["waiting"]),
            f"{row['kv_usage']:.1%}" if row["kv_usage"] is not None else "-",
            f"{1000 * sum(seconds) / len(seconds):.0f} ms" if seconds else "-",
        )
    return table


def _figure(value: float | None) -> str:
    return f"{value:.0f}" if value is not None else "-"


def _explained(decision: dict[str, Any]) -> Table:
    """One decision: a column per endpoint, a row per scorer."""
    title = f"request {decision['request_id'][:8]} went to {decision['endpoint']} (policy {decision['profile']})"
    rows = decision["endpoints"]
    table = Table("scorer", "weight", *(row["endpoint"] for row in rows), title=title)
    for name, weight in decision["weights"].items():
        table.add_row(name, f"{weight:g}", *(_score(row, name) for row in rows))
    table.add_section()
    table.add_row("total", "", *(row.get("filtered") or f"{row['total']:.3f}" for row in rows))
    return table


def _score(row: dict[str, Any], name: str) -> str:
    score = row.get("scores", {}).get(name)
    return "no data" if score is None else f"{score:.3f}"
