"""Who is measured: every contender started as a user would start it, in front of the same three backends.

Each is an async context manager that gives a `Running` and raises `StartFailed`. Flags beyond addresses and the policy
of the peers are left at their defaults; logs go to files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.load import run
from bench.processes import Program, StartFailed, free_port, program
from bench.shapes import CHUNK_INTERVAL_MS, CHUNKS, SMALL, Burst
from tests.integration.envoy import BINARY as ENVOY
from tests.integration.envoy import EnvoyFailed, RealEnvoy
from tests.integration.envoy_config import DESTINATION, EnvoyListener

ROOT = Path(__file__).resolve().parents[1]
WAYPOST = Path(sys.executable).parent / "waypost"
BACKENDS = 3
READY_WITHIN_S = 30.0
_LISTENER = "bench"
_PROBE = Burst(shape=SMALL, purpose="latency", connections=1, requests=1, warmup=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The model servers, three ports of one process."""

    pid: int
    addresses: tuple[str, ...]

    @property
    def urls(self) -> tuple[str, ...]:
        """`http://host:port` of each."""
        return tuple(f"http://{address}" for address in self.addresses)

    @property
    def to(self) -> tuple[str, ...]:
        """As flags of ours."""
        return tuple(part for url in self.urls for part in ("--to", url))


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A contender that answers. `pids` are its processes by role: their trees are what it costs.

    `program` is whose `version` that is, where it is not ours.
    """

    name: str
    url: str
    pids: Mapping[str, int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    program: str = ""
    version: str = ""


Start = Callable[[Backend, Path], AbstractAsyncContextManager[Running]]


@contextlib.asynccontextmanager
async def backend(directory: Path) -> AsyncIterator[Backend]:
    """The backends everybody is measured in front of."""
    flags = ("--listeners", str(BACKENDS), "--chunks", str(CHUNKS), "--interval-ms", str(CHUNK_INTERVAL_MS))
    command = (sys.executable, "-m", "bench.backend", *flags)
    async with program("backend", command, directory=directory) as process:
        line = await process.until(lambda: _first_line(process), within_s=READY_WITHIN_S)
        yield Backend(pid=process.pid, addresses=tuple(f"127.0.0.1:{port}" for port in line.split()))


@contextlib.asynccontextmanager
async def direct(backend: Backend, directory: Path) -> AsyncIterator[Running]:
    """Nothing in front of the first backend."""
    yield Running(name="direct", url=_chat(backend.urls[0]))


@contextlib.asynccontextmanager
async def waypost_run(backend: Backend, directory: Path) -> AsyncIterator[Running]:
    """`waypost run`, with its default policy, log level and admin port."""
    command = (str(WAYPOST), "run", *backend.to, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    async with program("waypost-run", command, directory=directory) as process:
        said = await process.until(lambda: _listening(process), within_s=READY_WITHIN_S)
        url = _chat(said["gateway"])
        yield await _ready(Running(name="waypost run", url=url, pids={"waypost": process.pid}), process)


@contextlib.asynccontextmanager
async def envoy(backend: Backend, directory: Path) -> AsyncIterator[Running]:
    """Envoy alone. The client names the backend, as nobody else does."""
    async with _envoy(directory / "envoy", EnvoyListener(name=_LISTENER, ext_proc=False)) as proxy:
        yield Running(
            name="Envoy alone",
            url=_chat(proxy.url(_LISTENER)),
            pids={"envoy": proxy.pid},
            headers={DESTINATION: backend.addresses[0]},
            program="Envoy",
            version=await _envoy_version(),
        )


@contextlib.asynccontextmanager
async def envoy_with_picker(backend: Backend, directory: Path) -> AsyncIterator[Running]:
    """Envoy asks `waypost picker`: request FULL_DUPLEX_STREAMED, response NONE with trailers SEND, ORIGINAL_DST.

    The picker serves TLS with a certificate of its own making, its default.
    """
    grpc, health, metrics = free_port(), free_port(), free_port()
    ports = ("--grpc-port", str(grpc), "--grpc-health-port", str(health), "--metrics-port", str(metrics))
    command = (str(WAYPOST), "picker", *backend.to, "--bind", "127.0.0.1", *ports)
    async with program("waypost-picker", command, directory=directory) as process:
        await process.until(lambda: _listening(process), within_s=READY_WITHIN_S)
        listener = EnvoyListener(name=_LISTENER)
        address = f"127.0.0.1:{grpc}"
        async with _envoy(directory / "envoy-picker", listener, picker_address=address) as proxy:
            contender = Running(
                name="Envoy + waypost picker",
                url=_chat(proxy.url(_LISTENER)),
                pids={"envoy": proxy.pid, "picker": process.pid},
                program="Envoy",
                version=await _envoy_version(),
            )
            yield await _ready(contender, process)


@contextlib.asynccontextmanager
async def sglang_router(backend: Backend, directory: Path) -> AsyncIterator[Running]:
    """sglang-router with round robin."""
    python = ROOT / ".venv-peers-sglang" / "bin" / "python"
    command = (python, "-m", "sglang_router.launch_router")
    async with _peer("sglang-router", command, backend, directory) as contender:
        yield contender


@contextlib.asynccontextmanager
async def vllm_router(backend: Backend, directory: Path) -> AsyncIterator[Running]:
    """vllm-router with round robin."""
    command = (ROOT / ".venv-peers-vllm" / "bin" / "vllm-router",)
    async with _peer("vllm-router", command, backend, directory) as contender:
        yield contender


OURS: Mapping[str, Start] = {
    "waypost run": waypost_run,
    "Envoy alone": envoy,
    "Envoy + waypost picker": envoy_with_picker,
}
PEERS: Mapping[str, Start] = {"sglang-router": sglang_router, "vllm-router": vllm_router}


@contextlib.asynccontextmanager
async def _peer(
    name: str, command: tuple[str | Path, ...], backend: Backend, directory: Path
) -> AsyncIterator[Running]:
    port = free_port()
    flags = ("--worker-urls", *backend.urls, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port))
    # Its own metrics port is fixed by default, and may be taken.
    metrics = ("--prometheus-port", str(free_port()))
    async with program(name, (*command, *flags, *metrics), directory=directory) as process:
        contender = Running(
            name=name,
            url=_chat(f"http://127.0.0.1:{port}"),
            pids={name: process.pid},
            program=name,
            version=await _package_version(Path(command[0]).parent / "python", name),
        )
        yield await _ready(contender, process)


@contextlib.asynccontextmanager
async def _envoy(
    directory: Path, listener: EnvoyListener, *, picker_address: str | None = None
) -> AsyncIterator[RealEnvoy]:
    if not os.access(ENVOY, os.X_OK):
        raise StartFailed("Envoy is not installed; `make envoy` does it")
    await asyncio.to_thread(directory.mkdir)
    # As many workers as cores, which is Envoy's default.
    proxy = RealEnvoy(
        directory,
        [listener],
        picker_address=picker_address,
        picker_tls=picker_address is not None,
        concurrency=os.cpu_count() or 1,
    )
    try:
        async with proxy:
            yield proxy
    except EnvoyFailed as error:
        raise StartFailed(f"Envoy: {error}") from None


async def _ready(contender: Running, process: Program) -> Running:
    """Waits until a request is answered with 200."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + READY_WITHIN_S
    while True:
        report = await run(_PROBE.plan(contender.url, headers=dict(contender.headers), watch=()))
        if report.statuses.get("200"):
            return contender
        if (code := process.exit_code()) is not None:
            raise process.failure(f"ended with code {code}")
        if loop.time() > deadline:
            raise process.failure(f"no answer within {READY_WITHIN_S:.0f} s: {report.statuses or report.error_kinds}")
        await asyncio.sleep(0.1)


def _chat(base: str) -> str:
    return f"{base}/v1/chat/completions"


def _first_line(process: Program) -> str | None:
    line, end, _ = process.text().partition("\n")
    return line if end else None


def _listening(process: Program) -> dict[str, str] | None:
    """The log line that says where it listens."""
    for line in process.text().splitlines():
        if '"listening"' in line and line.endswith("}"):
            said: dict[str, str] = json.loads(line)
            return said
    return None


async def _package_version(python: Path, package: str) -> str:
    return await _said(python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))")


async def _envoy_version() -> str:
    """It says `.../envoy version: COMMIT/1.40.0/Clean/...`."""
    said = await _said(ENVOY, "--version")
    parts = said.rpartition("version: ")[2].split("/")
    return parts[1] if len(parts) > 1 else said


async def _said(*command: str | Path) -> str:
    """What a short command prints, on one line."""
    process = await asyncio.create_subprocess_exec(
        *(str(part) for part in command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    return " ".join(output.decode(errors="replace").split())
