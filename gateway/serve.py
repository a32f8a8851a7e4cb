"""Running the doors: sockets, servers, signals, drain. What the CLI's `run` and `picker` do.

Bind first, then start, then say so; on SIGTERM stop being ready, let requests finish, say how many were cut. A second
signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from gateway.app import build as build_app
from gateway.budget import BodyBudget, memory_available_bytes
from gateway.homes import ResponseHomes
from gateway.http1 import HeaderLimits, limited
from gateway.intake import BodyLimits
from gateway.relay import Relay, RelaySettings
from picker.admin import app as admin
from picker.config import Config, HostPort, Loaded
from picker.extproc.server import ExtProcServer
from picker.extproc.settings import ExtProcSettings, ResponsePath, SessionSettings, TlsSettings
from picker.runtime import Runtime
from picker.telemetry import logs
from picker.telemetry.requests import record_request

VERSION = importlib.metadata.version("waypost")
# Connections the kernel holds while the loop is busy: bursts of a few thousand are normal for batch clients.
BACKLOG = 4096
# A request makes a few hundred objects that die with it, almost none in cycles: the default of 700 would collect at
# every third request.
GC_THRESHOLDS = (50_000, 20, 50)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: one place decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


class HttpServer:
    """One uvicorn server on a socket of ours."""

    def __init__(self, config: uvicorn.Config, sock: socket.socket) -> None:
        self._server = _Server(config)
        self._sock = sock
        self._task: asyncio.Task[None] | None = None
        self.address = _address(sock)

    async def start(self) -> None:
        """Returns when connections are accepted."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._sock]), name=f"http {self.address}")
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise OSError(f"cannot serve on {self.address}")
            await asyncio.sleep(0.005)

    async def stop(self, timeout_s: float) -> None:
        """Stops accepting, lets responses finish for at most `timeout_s`, then cuts them."""
        self._server.config.timeout_graceful_shutdown = max(1, round(timeout_s))
        self._server.should_exit = True
        if self._task is not None:
            await self._task

    def force(self) -> None:
        """Stops without waiting for anybody."""
        self._server.should_exit = True
        self._server.force_exit = True


def bind(address: HostPort) -> socket.socket:
    """A listening-ready socket. Raises OSError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def gateway_server(runtime: Runtime, sock: socket.socket) -> tuple[HttpServer, Relay]:
    """The gateway door on a socket."""
    config = runtime.config
    limits = config.limits
    budget = BodyBudget(limits.bodies_in_memory.resolve(memory_available_bytes()))
    runtime.metrics.bodies_bytes.set_function(lambda: budget.used_bytes)
    relay = Relay(
        runtime.director,
        runtime.upstream,
        settings=RelaySettings(
            body=BodyLimits(limits.body, config.timeouts.request_body),
            concurrent_requests=limits.concurrent_requests,
            extra_paths=frozenset(config.gateway.allow_paths),
            expose=_exposure(config),
            admin_token=_token(config),
        ),
        budget=budget,
        homes=ResponseHomes(limit=limits.response_ids, ttl_s=limits.response_id_ttl),
        metrics=runtime.metrics,
        log=runtime.log,
        prompts=runtime.prompts,
    )
    headers = HeaderLimits(
        count=limits.header_count, size_bytes=limits.headers, timeout_s=config.timeouts.request_headers
    )
    server_config = uvicorn.Config(
        build_app(runtime, relay),
        http=limited(headers, runtime.upstream.outbox),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(config.timeouts.keep_alive)),
        backlog=BACKLOG,
    )
    return HttpServer(server_config, sock), relay


def admin_server(runtime: Runtime, sock: socket.socket) -> HttpServer:
    """The admin port on a socket."""
    app = admin.build(
        runtime.director,
        runtime.metrics,
        checks=runtime.checks,
        engines=runtime.engines,
        token=_token(runtime.config),
        version=runtime.version,
        registered=runtime.registered,
        credentials=frozenset(runtime.config.credentials),
        details=runtime.details,
    )
    config = uvicorn.Config(
        app, ws="none", lifespan="off", access_log=False, log_config=None, server_header=False, proxy_headers=False
    )
    return HttpServer(config, sock)


def serve_gateway(loaded: Loaded) -> int:
    """`waypost run`: serves until a signal. Returns the exit code: 0 when no request was cut.

    Raises OSError when a port is taken or a credential's file is unusable.
    """
    return _run(_gateway(loaded.config))


def serve_picker(loaded: Loaded) -> int:
    """`waypost picker`: serves until a signal. Returns the exit code: 0 when no stream was cut.

    Raises OSError when a port is taken or a certificate or credential's file is unusable.
    """
    return _run(_picker(loaded.config))


def _run(serve: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve)


async def _gateway(config: Config) -> int:
    runtime = Runtime(config, log=logs.configure(config.log.level, style=config.log.format), version=VERSION)
    gateway_sock, admin_sock = bind(config.listen), bind(config.admin.listen)
    door, relay = gateway_server(runtime, gateway_sock)
    pages = admin_server(runtime, admin_sock)
    stop = Signals()
    await runtime.start()
    await runtime.synced(5.0)
    await pages.start()
    await door.start()
    _freeze()
    runtime.log.info(
        "listening", gateway=f"http://{door.address}", admin=f"http://{pages.address}", policy=config.policy
    )
    await stop.first.wait()
    runtime.stopping = True
    runtime.log.info("draining", active=relay.active, delay_s=config.drain.delay, timeout_s=config.drain.timeout)
    await stop.sleep(config.drain.delay)
    runtime.director.draining = True
    stop.on_second(door.force)
    await door.stop(config.drain.timeout)
    cut = relay.active
    runtime.log.info("stopped", cut=cut)
    await pages.stop(1)
    await runtime.close()
    return 1 if cut else 0


async def _picker(config: Config) -> int:
    runtime = Runtime(config, log=logs.configure(config.log.level, style=config.log.format), version=VERSION, h2c=True)
    pages = admin_server(runtime, bind(HostPort(config.picker.host, config.picker.metrics_port)))
    door = ExtProcServer(
        runtime.director,
        _extproc_settings(config),
        clock=runtime.director.clock,
        ready=runtime.ready,
        prompts=runtime.prompts,
        authorization=runtime.upstream.authorization,
        on_report=lambda record: record_request(record, runtime.metrics, runtime.log),
    )
    runtime.metrics.extproc_streams.set_function(lambda: door.open_streams)
    runtime.metrics.bodies_bytes.set_function(lambda: door.held_bytes)
    stop = Signals()
    await runtime.start()
    await runtime.synced(5.0)
    await pages.start()
    await door.start()
    _freeze()
    runtime.log.info(
        "listening",
        grpc=f"{config.picker.host}:{door.port}",
        health=f"{config.picker.host}:{door.health_port}",
        admin=f"http://{pages.address}",
        policy=config.policy,
        tls=config.picker.secure_serving,
    )
    await stop.first.wait()
    runtime.stopping = True
    runtime.log.info("draining", delay_s=config.drain.delay, timeout_s=config.drain.timeout)
    await stop.sleep(config.drain.delay)
    runtime.director.draining = True
    cut = await door.drain(config.drain.timeout)
    runtime.log.info("stopped", cut=cut)
    await pages.stop(1)
    await runtime.close()
    return 1 if cut else 0


class Signals:
    """SIGTERM and SIGINT: the first asks for a drain, the second for an end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self._second = asyncio.Event()
        self._on_second: Callable[[], None] | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def on_second(self, act: Callable[[], None]) -> None:
        """What a second signal does; at once if it came already."""
        self._on_second = act
        if self._second.is_set():
            act()

    async def sleep(self, seconds: float) -> None:
        """Sleeps, unless a second signal cuts it short."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._second.wait(), seconds)

    def _arrived(self, *_: int | FrameType | None) -> None:
        if not self.first.is_set():
            self.first.set()
            return
        self._second.set()
        if self._on_second is not None:
            self._on_second()


def _freeze() -> None:
    """Everything made so far lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _extproc_settings(config: Config) -> ExtProcSettings:
    door = config.picker
    files = door.cert_path
    tls = TlsSettings()
    if files is not None:
        tls = TlsSettings(cert_file=str(files / "tls.crt"), key_file=str(files / "tls.key"), reload=door.cert_reload)
    return ExtProcSettings(
        host=door.host,
        port=door.grpc_port,
        health_port=door.grpc_health_port,
        tls=tls if door.secure_serving else None,
        session=SessionSettings(
            response_path=ResponsePath(door.response_path),
            fallbacks=door.fallbacks,
            use_subset=door.subset_filter,
            emit_scores=door.emit_scores,
            conformance=door.conformance,
            max_body_bytes=config.limits.body,
            receive_timeout_s=config.timeouts.request_body,
            exchange_timeout_s=door.deadline,
        ),
        max_streams=door.max_streams,
        max_held_bytes=config.limits.bodies_in_memory.resolve(memory_available_bytes()),
        max_message_bytes=door.max_message,
    )


def _exposure(config: Config) -> Callable[[str], bool]:
    mode = config.gateway.expose_headers
    if mode == "auto":
        return admin.is_loopback
    return lambda _: mode == "always"


def _token(config: Config) -> str | None:
    return config.admin.token.get_secret_value() if config.admin.token is not None else None


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
