"""Several simulated engines at once: in this process, or one process each so that a single one can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Final

import uvloop

from sim.frontend import EngineSpec
from sim.kv_encoding import EngineName
from sim.kv_events import KvEvents
from sim.profiles import profile_for
from sim.server import EngineServer

STOP_GRACE_S: Final = 5.0


class RunningEngines:
    """Engines that listen. Also an async context manager that closes them."""

    def __init__(self, servers: Sequence[EngineServer]) -> None:
        self.servers = tuple(servers)

    @property
    def urls(self) -> list[str]:
        """Base URLs in the order of the specs, without a trailing slash."""
        return [server.url for server in self.servers]

    async def close(self) -> None:
        """Stop all of them. May be called twice."""
        for server in self.servers:
            await server.close()

    async def __aenter__(self) -> RunningEngines:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def serve_engines(specs: Sequence[EngineSpec], *, host: str = "127.0.0.1") -> RunningEngines:
    """Start one engine per spec on the running loop. Raises OSError, with nothing left open, if a port is taken."""
    servers: list[EngineServer] = []
    try:
        for spec in specs:
            server = EngineServer(spec, host=host)
            await server.start()
            servers.append(server)
    except OSError:
        await RunningEngines(servers).close()
        raise
    return RunningEngines(servers)


def specs_for(
    engines: int,
    port: int,
    *,
    model: str = "sim-8b",
    accelerator: str | Sequence[str] = "H100",
    speed: float = 1.0,
    seed: int = 0,
    lora: Sequence[str] = (),
    first_index: int = 0,
    max_num_queued_reqs: int | None = None,
    api_key: str | None = None,
    engine: EngineName = "vllm",
    kv_events: KvEvents | None = None,
    data_parallel_size: int = 1,
    block_size: int | None = None,
) -> list[EngineSpec]:
    """Specs of ``engines`` engines on ports from ``port`` up (0: free ones). Several accelerators are dealt in turn.

    They share the seed, so all of them give the same answer to the same prompt, like replicas of one model. With
    ``data_parallel_size`` each engine is so many ranks, one spec and one port each; the ports of ``kv_events`` count
    up with the specs as well. ``block_size`` None is the accelerator's own.
    Raises ValueError for an unknown accelerator or a speed that is not positive.
    """
    names = [accelerator] if isinstance(accelerator, str) else list(accelerator)
    specs = []
    for offset in range(engines * data_parallel_size):
        index = first_index + offset
        profile = profile_for(model, names[index // data_parallel_size % len(names)]).sped_up(speed)
        spec = EngineSpec(
            profile=profile if block_size is None else profile.with_block_size(block_size),
            engine=engine,
            model=model,
            index=index,
            port=port + offset if port else 0,
            seed=seed,
            loras=tuple(lora),
            max_num_queued_reqs=max_num_queued_reqs,
            api_key=api_key,
            data_parallel_rank=offset % data_parallel_size,
            kv_events=None if kv_events is None else kv_events.moved(offset),
        )
        specs.append(spec)
    return specs


def run_specs(specs: Sequence[EngineSpec], *, host: str = "127.0.0.1", drain_s: float = 0.0) -> int:
    """Serve until SIGINT or SIGTERM, one line ``ready URL`` per engine on stdout. Returns the exit code.

    After the signal, requests that run have ``drain_s`` to end; with 0 the engines die at once.
    """

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with await serve_engines(specs, host=host) as running:
            for url in running.urls:
                # One write, so that the lines of several processes on one pipe do not mix.
                print(f"ready {url}\n", end="", flush=True)
            await stop.wait()
            if drain_s:
                await asyncio.gather(*(server.drain(drain_s) for server in running.servers))

    try:
        uvloop.run(serve())
    except OSError as error:
        print(f"cannot listen on {host}: {error}", file=sys.stderr)
        return 1
    return 0


def run_cluster(
    engines: int,
    port: int,
    *,
    model: str = "sim-8b",
    accelerator: str | Sequence[str] = "H100",
    speed: float = 1.0,
    seed: int = 0,
    lora: Sequence[str] = (),
    processes: bool = False,
    host: str = "127.0.0.1",
    engine: EngineName = "vllm",
    kv_events: KvEvents | None = None,
    data_parallel_size: int = 1,
    block_size: int | None = None,
) -> int:
    """``waypost sim``: serve ``engines`` engines on ports from ``port`` up until a signal. Returns the exit code.

    ``processes`` gives every engine a process of its own; the death of one leaves the others alone. The rest is as
    for ``specs_for``. Raises ValueError for an unknown accelerator or a bad speed.
    """
    specs = specs_for(
        engines,
        port,
        model=model,
        accelerator=accelerator,
        speed=speed,
        seed=seed,
        lora=lora,
        engine=engine,
        kv_events=kv_events,
        data_parallel_size=data_parallel_size,
        block_size=block_size,
    )
    if not processes:
        return run_specs(specs, host=host)
    names = [accelerator] if isinstance(accelerator, str) else list(accelerator)
    commands = [
        [
            *(sys.executable, "-m", "sim", "--engines", "1", "--port", str(spec.port), "--host", host),
            *("--model", model, "--accelerator", names[number % len(names)], "--speed", str(speed)),
            *("--seed", str(spec.seed), "--index", str(spec.index), "--engine", engine),
            *("--data-parallel-size", str(data_parallel_size)),
            *(("--lora", ",".join(lora)) if lora else ()),
            *(("--block-size", str(block_size)) if block_size else ()),
            *_kv_arguments(spec),
        ]
        for number, spec in enumerate(specs[::data_parallel_size])
    ]
    return _run_processes(commands)


def _kv_arguments(spec: EngineSpec) -> list[str]:
    events = spec.kv_events
    if events is None:
        return []
    name = spec.engine if events.encoding == "map" else f"{spec.engine}-array"
    arguments = [
        "--kv-events",
        name,
        "--kv-events-port",
        str(events.port),
        "--kv-buffer-steps",
        str(events.buffer_steps),
    ]
    if events.replay_port is not None:
        arguments += ["--kv-replay-port", str(events.replay_port)]
    if events.replay_topic is not None:
        arguments += ["--kv-replay-frames", "4" if events.replay_topic else "3"]
    return arguments


def _run_processes(commands: Sequence[Sequence[str]]) -> int:
    children: list[subprocess.Popen[bytes]] = []

    def stop(_number: int, _frame: object) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        children += [subprocess.Popen(command) for command in commands]
        for child in children:
            child.wait()
    finally:
        stop(0, None)
        for child in children:
            try:
                child.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
