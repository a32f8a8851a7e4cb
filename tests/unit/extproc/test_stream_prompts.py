"""A stream that waits for the keys of a prompt: what it says when, and what may happen meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import msgspec
import pytest

from picker.core.events import Finished, Left, Outcome
from picker.core.ledger import Eviction
from picker.core.prefix.prompt import PromptKeys
from picker.core.record import RequestRecord
from picker.core.values import Decision, InferenceRequest, Rejection, RejectionCode
from picker.extproc.settings import ResponsePath, SessionSettings
from picker.extproc.stream import Books, Stream
from picker.openai.parse import ParsedBody
from protos import ext_proc_pb2 as pb
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import COMPLETION
from tests.unit.extproc.test_extproc_server import request_body, request_headers, response_headers

PATIENCE_S = 5.0
KEYS = PromptKeys(exact={16: [1, 2]}, tokens=33)


class Wire:
    """The proxy's side of one stream."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[object] = asyncio.Queue()
        self.sent: list[pb.ProcessingResponse] = []

    async def read(self) -> object:
        return await self.inbox.get()

    async def write(self, message: bytes) -> None:
        self.sent.append(pb.ProcessingResponse.FromString(message))

    def says(self, *messages: object) -> None:
        for message in messages:
            self.inbox.put_nowait(message)

    @property
    def kinds(self) -> list[str | None]:
        return [reply.WhichOneof("response") for reply in self.sent]


class Gate:
    """Prompts whose keys come when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[InferenceRequest, bytes, ParsedBody]] = []
        self.open = asyncio.Event()
        self.error: Exception | None = None

    async def keyed(self, request: InferenceRequest, body: bytes, parsed: ParsedBody) -> InferenceRequest:
        self.asked.append((request, body, parsed))
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return msgspec.structs.replace(request, keys=KEYS)


class Rig:
    """One stream over a fake wire."""

    def __init__(self, director: FakeDirector | None = None, **settings: Any) -> None:
        self.director = director or FakeDirector()
        self.wire = Wire()
        self.gate = Gate()
        self.books = Books(max_streams=10, max_held_bytes=10_000)
        self.records: list[RequestRecord] = []
        loop = asyncio.get_running_loop()
        self.stream = Stream(
            self.wire,
            director=self.director,
            authorization=lambda _: None,
            settings=SessionSettings(**settings),
            clock=loop.time,
            books=self.books,
            prompts=self.gate,
            on_report=self.records.append,
        )
        self.task = asyncio.create_task(self.stream.run())

    async def asks(self, body: bytes = COMPLETION, modes: tuple[int, int] | None = None) -> None:
        """A request, up to where its keys are awaited."""
        self.wire.says(request_headers(modes=modes), request_body(body))
        await until(lambda: bool(self.gate.asked))

    async def ended(self) -> bool:
        """Waits for the end of the stream. Whether it ended by itself, and not by an error."""
        async with asyncio.timeout(PATIENCE_S):
            [result] = await asyncio.gather(self.task, return_exceptions=True)
        assert self.books.held_bytes == 0
        assert not self.books.streams
        assert not self.director.watchers
        assert not self.director.reserved
        return not isinstance(result, BaseException)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def rig(director: FakeDirector | None = None, **settings: Any) -> AsyncIterator[Rig]:
    before = asyncio.all_tasks()
    made = Rig(director, **settings)
    try:
        yield made
    finally:
        made.gate.open.set()
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)
    assert asyncio.all_tasks() == before


async def test_a_decision_waits_for_the_keys_and_is_made_once() -> None:
    async with rig() as made:
        await made.asks()
        await asyncio.sleep(0.02)
        assert made.wire.sent == []
        assert made.director.requests == []
        [(asked, body, parsed)] = made.gate.asked
        assert (asked.keys, body, parsed.model) == (None, COMPLETION, "m")
        made.gate.open.set()
        await until(lambda: len(made.wire.sent) == 2)
        assert made.wire.kinds == ["request_headers", "request_body"]
        [decided] = made.director.requests
        assert decided.keys is KEYS
        assert made.wire.sent[1].request_body.response.body_mutation.streamed_response.body == COMPLETION
        made.wire.says(response_headers(), grpc.aio.EOF)
        assert await made.ended()
        assert len(made.gate.asked) == len(made.director.requests) == len(made.director.endings) == 1


async def test_the_keys_are_those_of_the_body_the_engine_gets() -> None:
    director = FakeDirector(aliases={"m": "llama"})
    async with rig(director) as made:
        await made.asks()
        [(asked, body, _)] = made.gate.asked
        assert asked.target_model == "llama"
        assert body == COMPLETION.replace(b'"m"', b'"llama"')


async def test_what_comes_meanwhile_is_answered_after_the_decision_and_in_order() -> None:
    """In duplex the proxy may send trailers, or even begin to answer by itself, while we wait."""
    async with rig() as made:
        await made.asks(modes=(2, 0))
        made.wire.says(response_headers())
        made.gate.open.set()
        await until(lambda: len(made.wire.sent) == 3)
        assert made.wire.kinds == ["request_headers", "request_body", "response_headers"]
        assert made.wire.sent[1].request_body.response.clear_route_cache


async def test_without_a_body_there_is_nothing_to_wait_for() -> None:
    async with rig() as made:
        made.wire.says(request_headers(end=True))
        await until(lambda: len(made.wire.sent) == 1)
        assert made.gate.asked == []
        assert len(made.director.requests) == 1


async def test_a_rejection_after_the_wait() -> None:
    async with rig(FakeDirector(refuse=RejectionCode.NO_READY_ENDPOINTS)) as made:
        await made.asks()
        made.gate.open.set()
        assert await made.ended()
        assert made.wire.kinds == ["immediate_response"]
        assert len(made.director.requests) == 1


async def test_the_deadline_may_pass_during_the_wait() -> None:
    async with rig(exchange_timeout_s=0.01) as made:
        await made.asks()
        await until(lambda: bool(made.records))
        made.gate.open.set()
        assert await made.ended()
        assert made.wire.kinds == ["immediate_response"]
        assert made.wire.sent[0].immediate_response.status.code in (503, 504)
        assert made.director.requests == []
        assert [record.outcome for record in made.records] == [Outcome.TIMEOUT]


async def test_draining_during_the_wait_still_answers_and_then_leaves() -> None:
    async with rig() as made:
        await made.asks()
        assert made.stream.in_request_phase
        made.stream.drain()
        made.gate.open.set()
        assert await made.ended()
        assert made.wire.kinds == ["request_headers", "request_body"]
        assert [type(event) for event in made.director.endings] == [Left]


async def test_leaving_at_once_does_not_leave_before_the_decision() -> None:
    async with rig(response_path=ResponsePath.LEAVE) as made:
        await made.asks()
        made.gate.open.set()
        assert await made.ended()
        assert made.wire.kinds == ["request_headers", "request_body"]
        assert [type(event) for event in made.director.endings] == [Left]


async def test_an_eviction_can_only_come_after_the_decision() -> None:
    async with rig() as made:
        await made.asks()
        assert made.director.watchers == {}
        made.gate.open.set()
        await until(lambda: bool(made.director.watchers))
        [evict] = made.director.watchers.values()
        evict(Eviction.HUNG)
        assert await made.ended()
        assert made.wire.kinds[-1] == "immediate_response"


@pytest.mark.parametrize("how", ["cut", "reset"])
async def test_a_stream_that_ends_during_the_wait_decides_nothing(how: str) -> None:
    async with rig() as made:
        await made.asks()
        if how == "cut":
            made.stream.cut()
        else:
            made.task.cancel()
        assert not await made.ended()
        assert made.task.cancelled()
        made.gate.open.set()
        await asyncio.sleep(0)
        assert made.director.requests == []
        assert made.wire.sent == []
        assert [record.outcome for record in made.records] == [Outcome.CLIENT_GONE]


async def test_a_half_close_during_the_wait_is_seen_after_it() -> None:
    async with rig() as made:
        await made.asks()
        made.wire.says(grpc.aio.EOF)
        made.gate.open.set()
        assert await made.ended()
        assert made.wire.kinds == ["request_headers", "request_body"]
        assert len(made.director.endings) == 1


async def test_the_body_is_counted_as_long_as_it_waits() -> None:
    async with rig() as made:
        await made.asks()
        assert made.books.held_bytes >= len(COMPLETION)
        made.gate.open.set()
        await until(lambda: len(made.wire.sent) == 2)
        assert made.books.held_bytes == 0


async def test_a_bug_in_the_keys_reserves_nothing() -> None:
    async with rig() as made:
        made.gate.error = RuntimeError("a bug")
        await made.asks()
        made.gate.open.set()
        assert not await made.ended()
        assert made.director.requests == []


class Failing(FakeDirector):
    """Breaks after it has reserved."""

    def decide(self, request: InferenceRequest) -> Decision | Rejection:
        super().decide(request)
        raise RuntimeError("a bug")


async def test_a_bug_in_the_decision_releases_what_it_reserved() -> None:
    async with rig(Failing()) as made:
        await made.asks()
        made.gate.open.set()
        assert not await made.ended()
        assert [type(event) for event in made.director.endings] == [Finished]
