"""Proves the Envoy harness with the smallest picker there can be; what Waypost's picker does is tested elsewhere."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import aiohttp
import grpc
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.json_format import MessageToDict

from protos import SERVICE
from protos.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from tests.integration import envoy as envoy_module
from tests.integration.envoy import EnvoyFailed, RealEnvoy, envoy_binary
from tests.integration.envoy_config import (
    DESTINATION,
    SUBSET_KEY,
    SUBSET_NAMESPACE,
    BodyMode,
    EnvoyListener,
    Retries,
    envoy_config,
)

BODY = b'{"model": "m", "prompt": "' + b"x" * 100_000 + b'"}'


class StubPicker:
    """Sends every full-duplex request to `destination` and notes what it saw."""

    def __init__(self, destination: str) -> None:
        self.destination = destination
        self.seen: list[str] = []
        self.hints: list[Any] = []
        self.ended = asyncio.Event()

    async def process(
        self, messages: AsyncIterator[ProcessingRequest], context: object
    ) -> AsyncIterator[ProcessingResponse]:
        body = b""
        try:
            async for message in messages:
                kind = str(message.WhichOneof("request"))
                self.seen.append(kind)
                if kind == "request_headers":
                    self.note_hint(message)
                    if message.request_headers.end_of_stream:
                        yield self.picked()
                elif kind == "request_body":
                    body += message.request_body.body
                    if message.request_body.end_of_stream:
                        yield self.picked()
                        for answer in chunked(body):
                            yield answer
                elif kind == "response_headers":
                    yield headers_seen()
        finally:
            # Envoy ends a stream by half-closing it or by a reset, which cancels this handler.
            self.ended.set()

    def note_hint(self, message: ProcessingRequest) -> None:
        namespaces = message.metadata_context.filter_metadata
        if SUBSET_NAMESPACE in namespaces:
            self.hints.append(MessageToDict(namespaces[SUBSET_NAMESPACE])[SUBSET_KEY])

    def picked(self) -> ProcessingResponse:
        answer = ProcessingResponse()
        answer.request_headers.response.clear_route_cache = True
        header = answer.request_headers.response.header_mutation.set_headers.add().header
        header.key, header.raw_value = DESTINATION, self.destination.encode()
        answer.dynamic_metadata.update({"envoy.lb": {DESTINATION: self.destination}})
        return answer


def headers_seen() -> ProcessingResponse:
    answer = ProcessingResponse()
    answer.response_headers.SetInParent()
    return answer


def chunked(body: bytes) -> list[ProcessingResponse]:
    answers = []
    for start in range(0, max(len(body), 1), 62_000):
        answer = ProcessingResponse()
        piece = answer.request_body.response.body_mutation.streamed_response
        piece.body, piece.end_of_stream = body[start : start + 62_000], start + 62_000 >= len(body)
        answers.append(answer)
    return answers


@asynccontextmanager
async def serving(picker: StubPicker, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[str]:
    """The stub on a port of its own; yields its address."""
    server = grpc.aio.server()
    process = grpc.stream_stream_rpc_method_handler(
        picker.process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": process}),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def echo_backend(name: str) -> AsyncIterator[str]:
    """Answers with the body it got and its own name; yields its address."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), headers={"x-served-by": name})

    app = web.Application(client_max_size=8 << 20)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield "{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


async def post(url: str, body: bytes = BODY) -> tuple[int, str | None, bytes]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.post(f"{url}/v1/completions", data=body) as response,
    ):
        return response.status, response.headers.get("x-served-by"), await response.read()


def self_signed() -> grpc.ServerCredentials:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "stub")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return grpc.ssl_server_credentials([(private, certificate)])


async def test_full_duplex_request_with_trailers_routes_a_post_over_both_cluster_kinds(tmp_path: Path) -> None:
    async with echo_backend("one") as one, echo_backend("two") as two:
        picker = StubPicker(two)
        async with serving(picker) as address:
            listeners = (
                EnvoyListener(name="original"),
                EnvoyListener(name="override", cluster="override_host", endpoints=(one, two)),
            )
            async with RealEnvoy(tmp_path, listeners, picker_address=address) as envoy:
                print(f"Envoy ready in {envoy.started_in_s:.3f} s")
                for name in ("original", "override"):
                    for _ in range(3):
                        assert await post(envoy.url(name)) == (200, "two", BODY)
                        await asyncio.wait_for(picker.ended.wait(), 5)
                        picker.ended.clear()
                assert await envoy.stat("http.original.downstream_rq_2xx") == 3
                assert (await envoy.stats("cluster.picker.upstream_rq_total")) == {
                    "cluster.picker.upstream_rq_total": 6
                }
            assert picker.seen.count("request_headers") == 6
            assert picker.seen.count("response_headers") == 6
            assert "response_body" not in picker.seen
            assert not picker.hints


@pytest.mark.parametrize("subset", ["10.0.0.1:8000,10.0.0.2:8000", ("10.0.0.1:8000", "10.0.0.2:8000"), ()])
async def test_subset_hint_arrives_as_it_was_given(tmp_path: Path, subset: str | tuple[str, ...]) -> None:
    async with echo_backend("one") as one:
        picker = StubPicker(one)
        async with (
            serving(picker) as address,
            RealEnvoy(tmp_path, [EnvoyListener(name="hinted", subset=subset)], picker_address=address) as envoy,
        ):
            assert (await post(envoy.url("hinted"), b"x"))[:2] == (200, "one")
        assert picker.hints == [subset if isinstance(subset, str) else list(subset)]


async def test_tls_to_a_self_signed_picker(tmp_path: Path) -> None:
    async with echo_backend("one") as one, serving(StubPicker(one), self_signed()) as address:
        listeners = [EnvoyListener(name="secure")]
        async with RealEnvoy(tmp_path, listeners, picker_address=address, picker_tls=True) as envoy:
            assert (await post(envoy.url("secure")))[:2] == (200, "one")


async def test_fail_open_serves_without_a_picker(tmp_path: Path) -> None:
    async with echo_backend("one") as one, serving(StubPicker(one)) as gone:
        pass
    async with echo_backend("two") as two:
        closed = EnvoyListener(name="closed", cluster="override_host", endpoints=(two,))
        opened = EnvoyListener(name="open", cluster="override_host", endpoints=(two,), fail_open=True)
        async with RealEnvoy(tmp_path, (closed, opened), picker_address=gone) as envoy:
            assert await envoy.stat("cluster.picker_checked.membership_healthy") == 0
            assert await post(envoy.url("open")) == (200, "two", BODY)
            assert (await post(envoy.url("closed")))[0] == 500


async def test_a_comma_list_and_a_retry_policy_reach_the_fallback(tmp_path: Path) -> None:
    async with echo_backend("dead") as dead:
        pass
    async with echo_backend("two") as two:
        picker = StubPicker(f"{dead},{two}")
        listener = EnvoyListener(name="retry", cluster="override_host", endpoints=(dead, two), retries=Retries())
        async with (
            serving(picker) as address,
            RealEnvoy(tmp_path, [listener], picker_address=address) as envoy,
        ):
            assert await post(envoy.url("retry")) == (200, "two", BODY)
            assert await envoy.stat("cluster.override_host_retry.upstream_rq_retry") == 1


async def test_plain_proxy_follows_the_clients_header(tmp_path: Path) -> None:
    async with (
        echo_backend("one") as one,
        RealEnvoy(tmp_path, [EnvoyListener(name="plain", ext_proc=False)]) as envoy,
        aiohttp.ClientSession() as session,
        session.get(envoy.url("plain"), headers={DESTINATION: one}) as response,
    ):
        assert (response.status, response.headers["x-served-by"]) == (200, "one")


async def test_envoy_accepts_every_mode(tmp_path: Path) -> None:
    modes: tuple[BodyMode, ...] = get_args(BodyMode)
    listeners = [
        EnvoyListener(
            name=f"{request}-{response}",
            request_body_mode=request,
            response_body_mode=response,
            response_trailers=trailers,
        )
        for request in modes
        for response in modes
        for trailers in [request != response]
    ]
    special = EnvoyListener(name="special", allow_mode_override=True, observability=True, buffer_bytes=4 << 20)
    headers_off = EnvoyListener(name="headers-off", response_headers=False, message_timeout_s=0.2)

    async with RealEnvoy(tmp_path, [*listeners, special, headers_off], picker_address="127.0.0.1:1") as envoy:
        assert len({envoy.url(listener.name) for listener in listeners}) == len(modes) ** 2


def test_without_envoy_a_test_skips_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envoy_module, "BINARY", tmp_path / "envoy")
    monkeypatch.delenv("REQUIRE_ENVOY", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make envoy"):
        envoy_binary()
    monkeypatch.setenv("REQUIRE_ENVOY", "1")
    with pytest.raises(pytest.fail.Exception, match="make envoy"):
        envoy_binary()


async def test_a_refused_configuration_is_told(tmp_path: Path) -> None:
    listener = EnvoyListener(name="x", message_timeout_s=-1)

    with pytest.raises(EnvoyFailed, match="Invalid duration"):
        await RealEnvoy(tmp_path, [listener], picker_address="127.0.0.1:1").__aenter__()


@pytest.mark.parametrize(
    "listeners",
    [
        [EnvoyListener(name="a", ext_proc=False), EnvoyListener(name="a", ext_proc=False)],
        [EnvoyListener(name="a")],
        [EnvoyListener(name="a", ext_proc=False, cluster="override_host")],
        [EnvoyListener(name="a", ext_proc=False, endpoints=("127.0.0.1:1",))],
    ],
    ids=["names", "picker", "no endpoints", "endpoints"],
)
def test_specifications_that_make_no_sense(listeners: list[EnvoyListener]) -> None:
    with pytest.raises(ValueError, match=r"unique|picker_address|endpoint"):
        envoy_config(listeners)
