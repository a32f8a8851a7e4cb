"""The gRPC server over real sockets: limits, TLS, health, cancellation, draining."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2

from picker.core.events import AttemptFailed, Finished, Left
from picker.core.ledger import Eviction
from picker.core.values import Decision, InferenceRequest, Rejection
from picker.extproc.server import ExtProcServer
from picker.extproc.settings import ExtProcSettings, ResponsePath, SessionSettings, TlsSettings
from picker.extproc.tls import CertificateFiles, self_signed
from protos import PROCESS_METHOD, SERVICE
from protos import ext_proc_pb2 as pb
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import COMPLETION

PATIENCE_S = 5.0
HEALTH = "/grpc.health.v1.Health/Check"
BIG = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@contextlib.asynccontextmanager
async def serving(
    director: FakeDirector | None = None, *, tls: TlsSettings | None = None, ready: bool = True, **settings: object
) -> AsyncIterator[tuple[ExtProcServer, FakeDirector]]:
    director = director or FakeDirector()
    made = ExtProcSettings(host="127.0.0.1", port=0, health_port=0, tls=tls, drain_settle_s=0.0, **settings)  # type: ignore[arg-type]
    server = ExtProcServer(director, made, clock=time.monotonic, ready=lambda: ready)
    await server.start()
    try:
        yield server, director
    finally:
        await server.drain(0.0)


class Proxy:
    """One stream as a proxy opens it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.stream_stream(
            PROCESS_METHOD, pb.ProcessingRequest.SerializeToString, pb.ProcessingResponse.FromString
        )()

    async def send(self, message: pb.ProcessingRequest) -> None:
        await asyncio.wait_for(self._call.write(message), PATIENCE_S)

    async def read(self) -> pb.ProcessingResponse | None:
        """The next reply, None at the end of the stream."""
        try:
            reply = await asyncio.wait_for(self._call.read(), PATIENCE_S)
        except grpc.aio.AioRpcError:
            return None
        return reply if isinstance(reply, pb.ProcessingResponse) else None

    async def ask(self, body: bytes = COMPLETION) -> list[pb.ProcessingResponse]:
        """A request phase in full duplex; returns its replies."""
        await self.send(request_headers())
        await self.send(request_body(body))
        replies = []
        while True:
            reply = await self.read()
            assert reply is not None
            replies.append(reply)
            if reply.request_body.response.body_mutation.streamed_response.end_of_stream:
                return replies

    async def code(self) -> grpc.StatusCode:
        return await asyncio.wait_for(self._call.code(), PATIENCE_S)

    async def half_close(self) -> None:
        await self._call.done_writing()

    def cancel(self) -> None:
        self._call.cancel()


def request_headers(*, end: bool = False, modes: tuple[int, int] | None = None) -> pb.ProcessingRequest:
    made = pb.ProcessingRequest()
    made.request_headers.headers.headers.add(key=":path", raw_value=b"/v1/completions")
    made.request_headers.end_of_stream = end
    if modes is not None:
        made.protocol_config.request_body_mode, made.protocol_config.response_body_mode = modes  # type: ignore[assignment]
    return made


def request_body(body: bytes, *, end: bool = True) -> pb.ProcessingRequest:
    made = pb.ProcessingRequest()
    made.request_body.body, made.request_body.end_of_stream = body, end
    return made


def response_headers() -> pb.ProcessingRequest:
    made = pb.ProcessingRequest()
    made.response_headers.headers.headers.add(key=":status", raw_value=b"200")
    made.response_headers.headers.headers.add(key="content-type", raw_value=b"text/event-stream")
    return made


def plain(server: ExtProcServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=BIG)


async def eventually(condition: object) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def health(channel: grpc.aio.Channel, name: str) -> str:
    check = channel.unary_unary(
        HEALTH, health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString
    )
    try:
        answer = await check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def test_a_whole_exchange() -> None:
    async with serving() as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        head, body = await proxy.ask()
        assert MessageToDict(head.dynamic_metadata) == {"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:8000"}}
        assert body.request_body.response.body_mutation.streamed_response.body == COMPLETION
        await proxy.send(response_headers())
        reply = await proxy.read()
        assert reply is not None
        assert reply.HasField("response_headers")
        await proxy.half_close()
        assert await proxy.read() is None
        assert await proxy.code() is grpc.StatusCode.OK
        await eventually(lambda: server.open_streams == 0)
        assert len(director.endings) == 1
        assert (director.reserved, director.watchers) == ({}, {})


async def test_messages_over_4_mib() -> None:
    big = b'{"model":"m","prompt":"' + b"x" * (6 << 20) + b'"}'
    async with serving() as (server, _), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.send(request_headers(modes=(2, 0)))
        await proxy.read()
        await proxy.send(request_body(big))
        reply = await proxy.read()
        assert reply is not None
        assert reply.request_body.response.clear_route_cache

        replies = await Proxy(channel).ask(big)
        parts = [reply.request_body.response.body_mutation.streamed_response.body for reply in replies[1:]]
        assert b"".join(parts) == big


async def test_a_reset_releases() -> None:
    async with serving() as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.ask()
        assert len(director.reserved) == 1
        proxy.cancel()
        await eventually(lambda: server.open_streams == 0)
        assert (director.reserved, director.watchers) == ({}, {})
        assert isinstance(director.endings[0], Finished)


async def test_a_lost_connection_releases() -> None:
    async with serving() as (server, director):
        async with plain(server) as channel:
            await Proxy(channel).ask()
        await eventually(lambda: server.open_streams == 0)
        assert director.reserved == {}


async def test_an_eviction_reaches_the_proxy() -> None:
    async with serving() as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.ask()
        [evict] = director.watchers.values()
        evict(Eviction.HUNG)
        reply = await proxy.read()
        assert reply is not None
        assert reply.immediate_response.status.code == 503
        assert await proxy.read() is None
        assert await proxy.code() is grpc.StatusCode.OK
        assert isinstance(director.endings[0], AttemptFailed)
        await eventually(lambda: server.open_streams == 0)
        evict(Eviction.HUNG)


async def test_an_exchange_has_a_deadline() -> None:
    settings = SessionSettings(receive_timeout_s=0.05)
    async with serving(session=settings) as (server, _), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.send(request_headers())
        reply = await proxy.read()
        assert reply is not None
        assert reply.immediate_response.status.code == 408
        assert await proxy.code() is grpc.StatusCode.OK


async def test_a_broken_proxy_gets_an_error() -> None:
    async with serving() as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.send(request_body(b"x"))
        assert await proxy.read() is None
        assert await proxy.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert director.reserved == {}


class Failing(FakeDirector):
    """Breaks after it has reserved."""

    def decide(self, request: InferenceRequest) -> Decision | Rejection:
        super().decide(request)
        raise RuntimeError("a bug")


async def test_a_bug_is_a_grpc_error_and_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Failing()) as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.send(request_headers(end=True))
        assert await proxy.read() is None
        assert await proxy.code() is grpc.StatusCode.UNKNOWN
        assert (director.reserved, server.open_streams) == ({}, 0)


async def test_unknown_messages_are_skipped() -> None:
    async with serving() as (server, _), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.send(pb.ProcessingRequest())
        assert len(await proxy.ask()) == 2


async def test_too_many_streams_get_429() -> None:
    async with serving(max_streams=1) as (server, director), plain(server) as channel:
        await Proxy(channel).ask()
        second = Proxy(channel)
        await second.send(request_headers(end=True))
        reply = await second.read()
        assert reply is not None
        assert reply.immediate_response.status.code == 429
        assert await second.code() is grpc.StatusCode.OK
        assert len(director.requests) == 1


async def test_too_many_bytes_in_memory_get_429_and_are_given_back() -> None:
    async with serving(max_held_bytes=1000) as (server, _), plain(server) as channel:
        first, second = Proxy(channel), Proxy(channel)
        await first.send(request_headers())
        await first.send(request_body(b"x" * 900, end=False))
        await eventually(lambda: server.held_bytes == 900)
        await second.send(request_headers())
        await second.send(request_body(b"x" * 200, end=False))
        reply = await second.read()
        assert reply is not None
        assert reply.immediate_response.status.code == 429
        first.cancel()
        await eventually(lambda: server.open_streams == 0)
        assert len(await Proxy(channel).ask(COMPLETION + b" " * 900)) == 2


@pytest.mark.parametrize("mode", [4, 0])
async def test_leaving_ends_the_stream_with_the_last_reply(mode: int) -> None:
    settings = SessionSettings(response_path=ResponsePath.LEAVE)
    async with serving(session=settings) as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        if mode == 4:
            assert len(await proxy.ask(COMPLETION + b" " * 100_000)) == 3
        else:
            await proxy.send(request_headers(modes=(0, 4)))
            assert await proxy.read() is not None
        assert await proxy.read() is None
        assert await proxy.code() is grpc.StatusCode.OK
        assert [type(event) for event in director.endings] == [Left]

        gone = Proxy(channel)
        await gone.send(request_headers())
        await gone.half_close()
        await eventually(lambda: server.open_streams == 0)


async def test_draining_lets_requests_finish_and_leaves_responses() -> None:
    async with serving() as (server, director), plain(server) as channel:
        waiting, answered, streaming = Proxy(channel), Proxy(channel), Proxy(channel)
        await waiting.send(request_headers())
        await eventually(lambda: server.open_streams >= 1)
        await answered.ask()
        await streaming.ask()
        await streaming.send(response_headers())
        assert await streaming.read() is not None

        drain = asyncio.create_task(server.drain(PATIENCE_S))
        assert await answered.read() is None
        assert await answered.code() is grpc.StatusCode.OK
        assert (await health(channel, SERVICE), await health(channel, "liveness")) == ("NOT_SERVING", "SERVING")
        await waiting.send(request_body(COMPLETION))
        replies = [await waiting.read() for _ in range(3)]
        assert replies[1] is not None
        assert replies[2] is None
        assert await waiting.code() is grpc.StatusCode.OK
        assert not drain.done()
        # A full-duplex response that has begun is let run.
        last = pb.ProcessingRequest()
        last.response_body.end_of_stream = True
        await streaming.send(last)
        assert await streaming.read() is not None
        assert await drain == 0
        assert director.reserved == {}


async def test_draining_takes_new_streams_until_the_end() -> None:
    async with serving() as (server, _), plain(server) as channel:
        keeps_open = Proxy(channel)
        await keeps_open.send(request_headers())
        await eventually(lambda: server.open_streams == 1)
        drain = asyncio.create_task(server.drain(PATIENCE_S))
        await asyncio.sleep(0)
        late = Proxy(channel)
        assert len(await late.ask()) == 2
        assert await late.code() is grpc.StatusCode.OK
        keeps_open.cancel()
        assert await drain == 0


async def test_what_does_not_end_in_time_is_cut_and_counted() -> None:
    async with serving() as (server, director), plain(server) as channel:
        proxy = Proxy(channel)
        await proxy.send(request_headers())
        await eventually(lambda: server.open_streams == 1)
        assert await server.drain(0.05) == 1
        assert await proxy.read() is None
        await eventually(lambda: server.open_streams == 0)
        assert director.reserved == {}


async def test_health_on_both_ports_under_all_names() -> None:
    names = ["", "readiness", "inference-extension", SERVICE]
    async with serving() as (server, _):
        for port in (server.port, server.health_port):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                assert [await health(channel, name) for name in [*names, "liveness"]] == ["SERVING"] * 5
                assert await health(channel, "nobody") == "NOT_FOUND"
    async with serving(ready=False) as (server, _), plain(server) as channel:
        assert [await health(channel, name) for name in names] == ["NOT_SERVING"] * 4
        assert await health(channel, "liveness") == "SERVING"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[TlsSettings, Path]:
    write_pair(tmp_path, "first.test")
    return TlsSettings(cert_file=str(tmp_path / "tls.crt"), key_file=str(tmp_path / "tls.key")), tmp_path


def write_pair(directory: Path, name: str) -> bytes:
    key, certificate = self_signed((name,))
    (directory / "tls.key").write_bytes(key)
    (directory / "tls.crt").write_bytes(certificate)
    return certificate


def trusting(server: ExtProcServer, certificate: bytes, name: str) -> grpc.aio.Channel:
    options = [("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(
        f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials(certificate), options=options
    )


async def test_tls_from_files_is_read_again(pair: tuple[TlsSettings, Path]) -> None:
    settings, directory = pair
    async with serving(tls=settings) as (server, _):
        first = (directory / "tls.crt").read_bytes()
        async with trusting(server, first, "first.test") as channel:
            assert await health(channel, "") == "SERVING"
            assert len(await Proxy(channel).ask()) == 2
        second = write_pair(directory, "second.test")
        async with trusting(server, second, "second.test") as channel:
            assert await health(channel, "") == "SERVING"
        # A pair that does not belong together changes nothing.
        (directory / "tls.key").write_bytes(self_signed()[0])
        async with trusting(server, second, "second.test") as channel:
            assert await health(channel, "") == "SERVING"


def test_files_that_cannot_be_used(pair: tuple[TlsSettings, Path], tmp_path: Path) -> None:
    settings, directory = pair
    with pytest.raises(OSError, match="nowhere"):
        CertificateFiles(TlsSettings(cert_file=str(tmp_path / "nowhere"), key_file=settings.key_file))
    files = CertificateFiles(settings)
    assert files.changed() is None
    (directory / "tls.key").write_bytes(self_signed()[0])
    assert files.changed() is None
    with pytest.raises(ValueError, match="together"):
        CertificateFiles(settings)


async def test_the_self_signed_certificate_is_the_default() -> None:
    assert ExtProcSettings().tls == TlsSettings()
    certificate = x509.load_pem_x509_certificate(self_signed()[1])
    async with serving(tls=TlsSettings()) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=unverified())
        negotiated = writer.get_extra_info("ssl_object")
        assert negotiated.selected_alpn_protocol() == "h2"
        writer.close()
        with contextlib.suppress(ConnectionError, OSError):
            await writer.wait_closed()
        assert reader is not None
    assert certificate.subject == certificate.issuer


def unverified() -> object:
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
