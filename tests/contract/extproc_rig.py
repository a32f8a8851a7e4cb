"""The real director behind the real gRPC server, with a pool of pods as the reference's test tables describe them.

Metrics are put into the datastore directly; nothing is scraped. Requests and answers are protobuf messages on a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.json_format import MessageToDict

from picker import policies
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.scheduler import Scheduler
from picker.core.updates import Replace, Scraped
from picker.core.values import Endpoint, Lora, Signals
from picker.director import Director
from picker.extproc.server import ExtProcServer
from picker.extproc.settings import ExtProcSettings, SessionSettings
from picker.telemetry.metrics import Metrics
from protos import PROCESS_METHOD
from protos import ext_proc_pb2 as pb

PATIENCE_S = 5.0
DESTINATION = "x-gateway-destination-endpoint"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"
POLICY = "balanced"


@dataclass(frozen=True, slots=True)
class Pod:
    """Pod number `index` is 192.168.1.(index+1):8000."""

    index: int
    queue: int = 0
    kv: float = 0.0
    adapters: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"192.168.1.{self.index + 1}:8000"

    def signals(self, at: float) -> Signals:
        lora = Lora(running=frozenset(self.adapters), slots=4)
        return Signals(at=at, waiting=self.queue, running=0, kv_usage=self.kv, lora=lora)


class Picker:
    """A pool, its director, and a channel to its server."""

    def __init__(self, director: Director, channel: grpc.aio.Channel) -> None:
        self.director = director
        self._channel = channel

    def stream(self) -> Conversation:
        """A new stream, as a proxy opens one per request."""
        return Conversation(self._channel)

    @property
    def in_flight(self) -> int:
        return len(self.director.datastore.ledger)

    async def settled(self) -> None:
        """Waits until nothing is in flight any more."""
        async with asyncio.timeout(PATIENCE_S):
            while self.in_flight:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def picker(
    pods: Sequence[Pod] | Sequence[Endpoint], session: SessionSettings | None = None
) -> AsyncIterator[Picker]:
    datastore = Datastore(health=HealthLimits(), freshness=Freshness(), deadlines=Deadlines())
    endpoints = tuple(
        pod if isinstance(pod, Endpoint) else Endpoint(id=pod.address, url=f"http://{pod.address}", address=pod.address)
        for pod in pods
    )
    datastore.apply(Replace("table", endpoints))
    for pod in pods:
        if isinstance(pod, Pod):
            datastore.apply(Scraped(pod.address, pod.signals(time.monotonic())))
    director = Director(
        datastore,
        Scheduler(policies.build(POLICY, policies.BUILTIN[POLICY])),
        clock=time.monotonic,
        rng=random.Random(7),
        metrics=Metrics("test"),
        log=structlog.wrap_logger(structlog.ReturnLogger()),
    )
    settings = ExtProcSettings(
        host="127.0.0.1", port=0, health_port=None, tls=None, drain_settle_s=0.0, session=session or SessionSettings()
    )
    server = ExtProcServer(director, settings, clock=time.monotonic, ready=lambda: True)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Picker(director, channel)
    finally:
        await server.drain(0.0)
        assert len(datastore.ledger) == 0


class Conversation:
    """One stream: send messages, read answers."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        call = channel.stream_stream(
            PROCESS_METHOD, pb.ProcessingRequest.SerializeToString, pb.ProcessingResponse.FromString
        )
        self._call = call()

    async def send(self, message: pb.ProcessingRequest | None = None, **fields: Any) -> None:
        """One message, whole or in the keyword form of ProcessingRequest."""
        await self._call.write(message or pb.ProcessingRequest(**fields))

    async def read(self, count: int = 1) -> list[pb.ProcessingResponse]:
        """The next `count` answers; fails if the stream ends before."""
        answers = [await asyncio.wait_for(self._call.read(), PATIENCE_S) for _ in range(count)]
        assert grpc.aio.EOF not in answers
        return answers

    async def silent(self, seconds: float = 0.05) -> bool:
        """Whether no answer comes for a while. The stream cannot be read any more afterwards."""
        try:
            await asyncio.wait_for(self._call.read(), seconds)
        except TimeoutError:
            return True
        return False

    async def ends(self) -> bool:
        """Whether the picker has ended the stream with status OK and nothing more to say."""
        ended = await asyncio.wait_for(self._call.read(), PATIENCE_S) is grpc.aio.EOF
        return ended and await self._call.code() is grpc.StatusCode.OK

    def cancel(self) -> None:
        self._call.cancel()

    async def llm_request(
        self,
        model: str | None,
        *,
        target: str | None = None,
        prompt: str = "test",
        subset: object = None,
        split: bool = False,
        **more: str,
    ) -> bytes:
        """The tables' LLM request. Returns the body it sent."""
        fields = {"max_tokens": 100, "model": model, "prompt": prompt, "temperature": 0}
        body = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        steering = {"x-llm-d-inference-objective": model or ""} | (
            {"x-llm-d-model-name-rewrite": target} if target is not None else {}
        )
        await self.headers({"hi": "mom", "x-request-id": "test-request-id", **steering, **more})
        await self.body(body, subset=subset, split=split)
        return body

    async def headers(self, fields: dict[str, str], *, end: bool = False, subset: object = None) -> None:
        message = pb.ProcessingRequest(request_headers=head(fields, end=end))
        hint(message, subset)
        await self._call.write(message)

    async def body(self, body: bytes, *, subset: object = None, split: bool = False) -> None:
        cut = len(body) // 2 if split else 0
        if split:
            await self._call.write(pb.ProcessingRequest(request_body=pb.HttpBody(body=body[:cut])))
        message = pb.ProcessingRequest(request_body=pb.HttpBody(body=body[cut:], end_of_stream=True))
        hint(message, subset)
        await self._call.write(message)


def head(fields: dict[str, str], *, end: bool = False) -> pb.HttpHeaders:
    """Headers as Envoy sends them: raw values."""
    made = pb.HttpHeaders(end_of_stream=end)
    for name, value in fields.items():
        made.headers.headers.add(key=name, raw_value=value.encode())
    return made


def hint(message: pb.ProcessingRequest, subset: object) -> None:
    """Puts a subset hint on a message; None for none."""
    if subset is not None:
        fields: dict[str, Any] = {SUBSET: subset}
        message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update(fields)


def destination(answer: pb.ProcessingResponse) -> str:
    """The endpoint a headers answer picks; fails where header and metadata differ."""
    assert answer.HasField("request_headers")
    assert answer.request_headers.response.clear_route_cache
    chosen = set_headers(answer)[DESTINATION]
    assert MessageToDict(answer.dynamic_metadata) == {"envoy.lb": {DESTINATION: chosen}}
    return chosen


def set_headers(answer: pb.ProcessingResponse) -> dict[str, str]:
    """The headers a request-headers answer sets."""
    options = answer.request_headers.response.header_mutation.set_headers
    return {option.header.key: option.header.raw_value.decode() for option in options}


def streamed(answer: pb.ProcessingResponse) -> tuple[bytes, bool]:
    """Bytes and end of a full-duplex body answer, of either direction."""
    direction = answer.WhichOneof("response")
    assert direction in {"request_body", "response_body"}
    body = answer.request_body if direction == "request_body" else answer.response_body
    assert body.response.body_mutation.WhichOneof("mutation") == "streamed_response"
    part = body.response.body_mutation.streamed_response
    return part.body, part.end_of_stream


def kinds(answers: Sequence[pb.ProcessingResponse]) -> list[str | None]:
    """What the answers are, in order."""
    return [answer.WhichOneof("response") for answer in answers]
