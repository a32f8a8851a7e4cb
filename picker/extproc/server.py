"""The gRPC server of the ext-proc door: ports, TLS, health, limits, draining. The protocol is in `session`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc

import protos
from picker.extproc.health import HealthService
from picker.extproc.mutation import Authorization
from picker.extproc.settings import ExtProcSettings, ResponsePath
from picker.extproc.stream import Books, DirectorLike, OnReport, PromptsLike, Stream
from picker.extproc.tls import server_credentials
from protos import ext_proc_pb2 as pb

_STOP_GRACE_S = 1.0
# Health checks and streams that are only refused come on top of the streams served.
_SPARE_RPCS = 1024


Process = Callable[[object, grpc.aio.ServicerContext], Awaitable[object]]


class ExtProcServer:
    """Serves Envoy's external processing API on one port and health on another.

    Belongs to the event loop it is started on. `port` and `health_port` are known after `start`. `authorization` says
    what an endpoint wants as such; without it, what clients send. `on_report` gets the record of every request that
    ended; it must not raise.
    """

    def __init__(
        self,
        director: DirectorLike,
        settings: ExtProcSettings,
        *,
        clock: Callable[[], float],
        ready: Callable[[], bool],
        authorization: Authorization = lambda _: None,
        prompts: PromptsLike | None = None,
        on_report: OnReport | None = None,
    ) -> None:
        self.port = 0
        self.health_port = 0
        self._director = director
        self._settings = settings
        self._clock = clock
        self._ready = ready
        self._authorization = authorization
        self._prompts = prompts
        self._on_report = on_report
        self._books = Books(max_streams=settings.max_streams, max_held_bytes=settings.max_held_bytes)
        self._servers: list[grpc.aio.Server] = []

    def __repr__(self) -> str:
        return f"<ExtProcServer :{self.port} {self._books!r}>"

    @property
    def open_streams(self) -> int:
        """Exchanges going on."""
        return len(self._books.streams)

    @property
    def held_bytes(self) -> int:
        """Body bytes in memory."""
        return self._books.held_bytes

    @property
    def ready(self) -> bool:
        """What health answers: ready and not draining."""
        return not self._books.draining and self._ready()

    async def start(self) -> None:
        """Opens the ports. Raises OSError or ValueError for unusable certificates, RuntimeError for a port in use."""
        settings = self._settings
        main = grpc.aio.server(
            options=_options(settings.max_message_bytes), maximum_concurrent_rpcs=settings.max_streams + _SPARE_RPCS
        )
        health = HealthService(alive=lambda: True, ready=lambda: self.ready)
        process = _ProcessHandlers(self._process, self._process_and_leave, self._leaves)
        main.add_generic_rpc_handlers((process, health.handler()))
        address = _address(settings.host, settings.port)
        if settings.tls is None:
            self.port = main.add_insecure_port(address)
        else:
            self.port = main.add_secure_port(address, server_credentials(settings.tls))
        self._servers = [main]
        if settings.health_port is not None:
            aside = grpc.aio.server(maximum_concurrent_rpcs=_SPARE_RPCS, options=[("grpc.so_reuseport", 0)])
            aside.add_generic_rpc_handlers((health.handler(),))
            self.health_port = aside.add_insecure_port(_address(settings.host, settings.health_port))
            self._servers.append(aside)
        for server in self._servers:
            await server.start()

    async def drain(self, timeout_s: float) -> int:
        """Stops. Not ready at once; requests being decided finish, other streams are closed with status OK.

        Returns how many streams had to be cut after `timeout_s`.
        """
        books = self._books
        books.draining = True
        for stream in tuple(books.streams):
            stream.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self._settings.drain_settle_s)
                await books.idle.wait()
        cut = len(books.streams)
        for stream in tuple(books.streams):
            stream.cut()
        for server in self._servers:
            await server.stop(_STOP_GRACE_S)
        return cut

    async def _process(self, _: object, context: grpc.aio.ServicerContext) -> None:
        await self._run(context, keeps_last=False)

    async def _process_and_leave(self, _: object, context: grpc.aio.ServicerContext) -> bytes:
        # The other end has left when there is nothing to say; it reads an empty message as little as any other.
        return await self._run(context, keeps_last=True) or b""

    async def _run(self, context: grpc.aio.ServicerContext, *, keeps_last: bool) -> bytes | None:
        stream = Stream(
            context,
            director=self._director,
            authorization=self._authorization,
            settings=self._settings.session,
            clock=self._clock,
            books=self._books,
            prompts=self._prompts,
            on_report=self._on_report,
            keeps_last=keeps_last,
        )
        last = await stream.run()
        if not stream.ok:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "messages out of order")
        return last

    def _leaves(self) -> bool:
        return self._books.draining or self._settings.session.response_path is ResponsePath.LEAVE


class _ProcessHandlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Registers the method twice, and chooses for each stream.

    A picker that leaves must end the stream in the same write as its last reply. A proxy in full duplex hands a
    response over as soon as the engine answers; if the status arrives after that, those bytes are lost (measured with
    Envoy 1.40: 15 % of the answers of an engine that refuses at once). gRPC joins message and status only where the
    method returns one message, so such streams are served as a method that returns its last reply and writes the
    others before.
    """

    def __init__(self, observing: Process, leaving: Process, leaves: Callable[[], bool]) -> None:
        # Replies are serialised by the stream: gRPC would not do it for those written before the one returned.
        read = pb.ProcessingRequest.FromString
        self._observing = grpc.stream_stream_rpc_method_handler(observing, request_deserializer=read)
        self._leaving = grpc.stream_unary_rpc_method_handler(leaving, request_deserializer=read)
        self._leaves = leaves

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of one call; None when it is for somebody else."""
        if handler_call_details.method != protos.PROCESS_METHOD:
            return None
        return self._leaving if self._leaves() else self._observing


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),
        # The probe costs a ping per exchange, which is a tenth of the proxy's share; a fixed window does as well.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 1 << 20),
        # Proxies ping idle connections as they like.
        ("grpc.http2.max_ping_strikes", 0),
        # A proxy that vanished without a word is noticed, and what it had in flight released.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
