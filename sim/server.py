"""One simulated engine on one port: its listener, its connections, its fault switches and its restarts.

``/sim`` is answered whatever else is broken. The API itself is in ``sim.frontend``, the physics in ``sim.physics``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from typing import Any, Final

from sim.answers import ApiError, encode_json
from sim.driver import EngineDriver
from sim.faults import Faults, command_from
from sim.frontend import EngineSpec, FrontEnd
from sim.http1 import Connection, HttpRequest, Reply
from sim.kv_encoding import KvEncoder
from sim.kv_events import KvPublisher
from sim.meter import Meter
from sim.physics import Engine
from sim.recorder import Recorder

BACKLOG: Final = 1_024
RECORDED_PROBES: Final = 32
# A restart answers its caller first.
RESTART_DELAY_S: Final = 0.02
BIND_RETRY_S: Final = 0.01
BIND_ATTEMPTS: Final = 500
_PROBES: Final = frozenset(
    {"/metrics", "/health", "/ping", "/version", "/v1/models", "/kv_event_sources", "/server_info", "/get_server_info"}
)


class EngineServer:
    """Serves one engine until ``close``. Start it on the event loop that is to run it."""

    def __init__(self, spec: EngineSpec, *, host: str = "127.0.0.1") -> None:
        self.spec = spec
        self.host = host
        self.port = spec.port
        self.head = b"Server: sim\r\nx-sim-engine: %d\r\n" % spec.index
        self.connections: set[Connection] = set()
        self.restarts = 0
        self._faults = Faults()
        self._rng = random.Random(spec.index)
        self._requests = Recorder(spec.recorded_requests)
        self._probes = Recorder(RECORDED_PROBES)
        self._listener: asyncio.Server | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._front: FrontEnd | None = None
        # With the real ports once it has published: a restart comes back where it was.
        self._kv_events = spec.kv_events

    @property
    def engine(self) -> Engine | None:
        """The engine of this incarnation, for tests that compare with the truth; None while it is down."""
        return None if self._front is None else self._front.driver.engine

    @property
    def publisher(self) -> KvPublisher | None:
        """The publisher of KV events of this incarnation; None while it is down and when it has none."""
        return None if self._front is None else self._front.publisher

    @property
    def url(self) -> str:
        """Where it listens, with the real port once started."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.spec.tls else 'http'}://{host}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        await self._listen(self._bind())

    async def close(self) -> None:
        """Stop listening, drop the connections, stop the engine."""
        if self._restarting is not None:
            self._restarting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restarting
        self._die()
        # One turn of the loop lets the transports close their sockets.
        await asyncio.sleep(0)

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections and close each when its requests are answered, as servers do on SIGTERM; return when
        all are closed or the time is over.
        """
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.finish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for connection in tuple(self.connections):
                    await connection.lost.wait()

    # Application of the connections

    def silent(self, path: str) -> bool:
        """While everything hangs only ``/sim`` is read."""
        return self._faults.hang == "all" and path != "/sim"

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Apply the faults, else let the front end answer."""
        if request.path == "/sim":
            self._control(request, reply)
            return
        (self._probes if request.path in _PROBES else self._requests).note(request)
        if request.path.startswith("/v1/") and not self._authorised(request):
            reply.send(b'{"error":"Unauthorized"}', status=401)
            return
        if request.method == "POST" and request.path.startswith("/v1/"):
            if self._faults.close_before_response:
                reply.close()
                return
            status = self._faults.drawn_error(self._rng)
            if status is not None:
                reply.send(_injected(status).body(), status=status)
                return
        if self._front is not None:
            self._front.handle(request, reply)

    def _authorised(self, request: HttpRequest) -> bool:
        key = self.spec.api_key
        return key is None or request.header(b"authorization") == b"Bearer " + key.encode()

    # Switches

    def _control(self, request: HttpRequest, reply: Reply) -> None:
        if request.method == "POST":
            command = command_from(request.body, self._faults)
            if isinstance(command, str):
                reply.send(encode_json({"error": command}), status=400)
                return
            if command.forget:
                self._requests.forget()
                self._probes.forget()
            self._switch(command.faults)
            if command.drop_kv_batches and self.publisher is not None:
                self.publisher.drop(command.drop_kv_batches)
            if command.restart_after_s is not None and self._restarting is None:
                self._restarting = asyncio.get_running_loop().create_task(self._restart(command.restart_after_s))
        elif request.method != "GET":
            reply.send(b'{"error":"use GET or POST"}', status=405)
            return
        reply.send(encode_json(self._state(with_requests=request.method == "GET")))

    def _switch(self, faults: Faults) -> None:
        before, self._faults = self._faults, faults
        front = self._front
        if front is None:
            return
        front.driver.engine.slowdown = faults.slow
        if faults.stale_metrics and not before.stale_metrics:
            front.freeze_page()
        if faults.hang is None:
            front.driver.thaw()
        else:
            front.driver.freeze()
        if before.hang == "all" and faults.hang != "all":
            for connection in tuple(self.connections):
                connection.wake()

    def _state(self, *, with_requests: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"engine": self.spec.index, "pid": os.getpid(), "restarts": self.restarts}
        state["faults"] = self._faults
        if self._front is not None:
            engine = self._front.driver.engine
            state |= {
                "running": engine.running,
                "waiting": engine.waiting,
                "aborted": engine.aborted_total,
                "finished": sum(engine.finished_total.values()),
                "kv_usage": engine.kv_usage,
                "steps": engine.steps_total,
                "generation_tokens": engine.generation_tokens_total,
            }
        if self.publisher is not None:
            state["kv_next_seq"] = self.publisher.next_seq
        state |= {"connections": len(self.connections), "received": self._requests.total}
        if with_requests:
            state |= {"requests": self._requests.as_json(), "probes": self._probes.as_json()}
        return state

    # Life and death

    def _bind(self) -> socket.socket:
        # The protocol is named because event loops switch off Nagle's algorithm only for sockets that say TCP.
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, self.port))
        except OSError:
            sock.close()
            raise
        self.port = sock.getsockname()[1]
        return sock

    async def _listen(self, sock: socket.socket) -> None:
        spec, loop = self.spec, asyncio.get_running_loop()
        try:
            publisher = self._publisher(loop)
        except OSError:
            sock.close()
            raise
        engine = Engine(
            spec.profile,
            seed=spec.seed,
            noise_seed=spec.index,
            max_num_queued_reqs=spec.max_num_queued_reqs,
            max_loras=spec.max_loras,
            block_copies=spec.engine == "vllm",
            on_cache_changes=None if publisher is None else publisher.publish,
        )
        meter = Meter(started_at_s=time.time(), max_loras=spec.max_loras if spec.loras else None)
        meter.note_loras(engine, time.time())
        driver = EngineDriver(engine, loop=loop, meter=meter)
        self._front = FrontEnd(
            spec, driver=driver, faults=lambda: self._faults, later=loop.call_later, publisher=publisher
        )
        self._listener = await loop.create_server(
            lambda: Connection(self), sock=sock, backlog=BACKLOG, ssl=self.spec.tls
        )

    def _publisher(self, loop: asyncio.AbstractEventLoop) -> KvPublisher | None:
        spec, settings = self.spec, self._kv_events
        if settings is None:
            return None
        encoder = KvEncoder(
            spec.engine,
            settings.encoding,
            block_size=spec.profile.block_size,
            rank=spec.data_parallel_rank,
            lora_ids={name: number for number, name in enumerate(spec.loras, 1)},
        )
        publisher = KvPublisher(
            settings,
            encoder=encoder,
            host=self.host,
            topic=f"kv@{self.host}:{self.port}@{spec.model}",
            loop=loop,
            answers=lambda: self._faults.kv_replay == "on" and self._faults.hang != "all",
        )
        self._kv_events = publisher.settings
        return publisher

    def _die(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self.publisher is not None:
            self.publisher.close()
        if self._front is not None:
            self._front.driver.close()
            self._front = None
        for connection in tuple(self.connections):
            connection.drop()

    async def _restart(self, seconds: float) -> None:
        await asyncio.sleep(RESTART_DELAY_S)
        self._die()
        # Bound but not listening: connects are refused, and nobody else can take the port meanwhile.
        sock = await self._bind_again()
        try:
            await asyncio.sleep(seconds)
            self._faults = Faults()
            self._rng = random.Random(self.spec.index)
            self.restarts += 1
            await self._listen(sock)
        except asyncio.CancelledError:
            sock.close()
            raise
        self._restarting = None

    async def _bind_again(self) -> socket.socket:
        # The old listener leaves the port when its loop gets round to it.
        for _ in range(BIND_ATTEMPTS):
            with contextlib.suppress(OSError):
                return self._bind()
            await asyncio.sleep(BIND_RETRY_S)
        return self._bind()


def _injected(status: int) -> ApiError:
    if status == 503:
        return ApiError(503, "Service Unavailable", "Injected fault: service unavailable.")
    return ApiError(status, "InternalServerError", "Injected fault.")
