"""The gateway's small parts: headers, memory, homes, body reading, the cut of events, one response's transport."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.budget import BodyBudget, memory_available_bytes
from gateway.delivery import HELD_EVENT_BYTES, _whole_events
from gateway.headers import by_name, to_client, to_engine
from gateway.homes import ResponseHomes
from gateway.http1 import GatewayProtocol, HeadHolder, UnframedHolder
from gateway.intake import BodyLimits, BodyReader, ClientGone, allow_header, dialect_of, find_route, request_id
from gateway.verdicts import verdict
from picker.core.events import FailureKind
from picker.core.values import InferenceRequest, Rejection, RejectionCode
from picker.director import Failure
from picker.openai.errors import ApiError
from picker.openai.routes import Dialect, Route

# -- headers ----------------------------------------------------------------------------------------------------------


def test_repeated_headers_are_joined() -> None:
    assert by_name([(b"a", b"1"), (b"b", b"2")]) == {b"a": b"1", b"b": b"2"}
    assert by_name([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]) == {b"a": b"1, 3", b"b": b"2"}


def test_headers_that_connection_names_end_here() -> None:
    sent = [(b"connection", b"close, X-One"), (b"x-one", b"1"), (b"x-two", b"2")]
    assert to_engine(sent, by_name(sent), b"id", None) == [(b"x-two", b"2"), (b"x-request-id", b"id")]
    said = [(b"Connection", b"keep-alive"), (b"Connection", b"X-One , x-TWO"), (b"X-One", b"1"), (b"X-Two", b"2")]
    assert to_client([*said, (b"X-Three", b"3")], [(b"ours", b"o")]) == [(b"X-Three", b"3"), (b"ours", b"o")]


def test_the_fleets_key_replaces_the_clients() -> None:
    sent = [(b"authorization", b"Bearer theirs")]
    assert to_engine(sent, by_name(sent), b"i", b"Bearer ours")[1:] == [(b"authorization", b"Bearer ours")]
    assert to_engine(sent, by_name(sent), b"i", None)[0] == (b"authorization", b"Bearer theirs")


@pytest.mark.parametrize("good", [b"a", b"req-1", b"x" * 256, b"!~"])
def test_harmless_request_ids_stay(good: bytes) -> None:
    assert request_id({b"x-request-id": good}) == good.decode()


def test_request_ids_differ() -> None:
    assert len({request_id({}) for _ in range(1000)}) == 1000


def test_routes_and_their_methods() -> None:
    assert isinstance(find_route("POST", b"/v1/chat/completions", frozenset()), Route)
    for method, path, status in (
        ("GET", b"/v1/chat/completions", 405),
        ("POST", b"/x", 404),
        ("POST", b"/\xff", 404),
        ("HEAD", b"/extra", 405),
    ):
        refused = find_route(method, path, frozenset({"/extra"}))
        assert isinstance(refused, ApiError)
        assert refused.status == status
    assert allow_header(b"/v1/chat/completions") == b"POST"
    assert allow_header(b"/v1/responses/resp_1") == b"GET, DELETE"
    assert b"GET" in allow_header(b"/extra")
    assert dialect_of(b"/v1/messages/count_tokens") is Dialect.ANTHROPIC


def test_routes_below_openai_are_the_same_routes() -> None:
    extra = frozenset({"/v1/extra", "/openai/v1/odd"})
    for method, path in (("POST", b"/v1/chat/completions"), ("GET", b"/v1/responses/r"), ("GET", b"/v1/extra")):
        assert find_route(method, b"/openai" + path, extra) == find_route(method, path, extra)
        assert isinstance(find_route(method, b"/openai" + path, extra), Route)
    assert isinstance(find_route("POST", b"/openai/v1/odd", extra), Route)
    for path in (b"/openai/v1/missing", b"/openai/extra", b"/openai/openai/v1/chat/completions", b"/openai/rerank"):
        assert isinstance(find_route("POST", path, extra), ApiError)
    assert allow_header(b"/openai/v1/responses/resp_1") == b"GET, DELETE"
    assert dialect_of(b"/openai/v1/messages") is Dialect.ANTHROPIC


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_budget_gives_all_or_nothing() -> None:
    budget = BodyBudget(10)
    assert budget.reserve(7)
    assert not budget.reserve(4)
    assert budget.reserve(3)
    assert repr(budget) == "<BodyBudget [10 of 10 bytes]>"
    budget.release(10)
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemTotal:  1000 kB\nMemFree: 1 kB\n"}, 1_024_000),
        ({"proc/meminfo": "MemTotal: 1000 kB\n", "sys/fs/cgroup/memory.max": "5000\n"}, 5_000),
        ({"proc/meminfo": "MemTotal: 1000 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 1_024_000),
        ({"proc/meminfo": "MemTotal: 1 kB\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63)}, 1024),
        ({"proc/meminfo": "nonsense"}, 2**30),
        ({}, 2**30),
    ],
)
def test_memory_is_the_cgroups_or_the_machines(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_available_bytes(tmp_path) == expected


def test_homes_are_bounded_and_forgotten() -> None:
    homes = ResponseHomes(limit=2, ttl_s=10)
    homes.remember("a", "one", 0)
    homes.remember("b", "two", 1)
    # Asking keeps it.
    assert homes.home("a", 2) == "one"
    homes.remember("c", "three", 3)
    assert (homes.home("b", 3), homes.home("a", 3), homes.home("c", 3)) == (None, "one", "three")
    assert homes.home("a", 14) is None
    homes.forget("c")
    homes.forget("c")
    assert len(homes) == 0


# -- reading a body ---------------------------------------------------------------------------------------------------


class Feed:
    """An ASGI receive made of given messages; after them nothing comes."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self._messages = list(messages)
        self.calls = 0

    async def __call__(self) -> MutableMapping[str, Any]:
        self.calls += 1
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


LIMITS = BodyLimits(size_bytes=100, timeout_s=0.05)


@given(st.lists(st.binary(max_size=40), max_size=6), st.booleans())
def test_bodies_are_read_whole_or_refused_and_the_budget_is_even(pieces: list[bytes], declared: bool) -> None:
    async def scenario() -> None:
        budget = BodyBudget(150)
        reader = BodyReader(budget, LIMITS)
        size = sum(map(len, pieces))
        headers = {b"content-length": str(size).encode()} if declared else {}
        feed = Feed(*(part(piece) for piece in pieces), part(b"", more=False))
        got = await reader.read(headers, feed, arrived=False)
        if size > 100:
            assert isinstance(got, ApiError)
            assert got.status == 413
            assert feed.calls == 0 or not declared
        else:
            assert got == b"".join(pieces)
            assert budget.used_bytes == size
        reader.release()
        reader.release()
        assert budget.used_bytes == 0

    asyncio.run(scenario())


async def test_a_body_has_one_deadline_for_all_its_pieces() -> None:
    async def drip() -> MutableMapping[str, Any]:
        await asyncio.sleep(0.02)
        return part(b"x")

    reader = BodyReader(BodyBudget(1000), LIMITS)
    late = await asyncio.wait_for(reader.read({}, drip, arrived=False), 1)
    assert isinstance(late, ApiError)
    assert (late.status, late.code) == (408, "request_timeout")
    reader.release()


@pytest.mark.parametrize("before", [(), (part(b"x"),)])
async def test_a_client_that_leaves_is_no_error_answer(before: tuple[dict[str, Any], ...]) -> None:
    reader = BodyReader(BodyBudget(1000), LIMITS)
    with pytest.raises(ClientGone):
        await reader.read({}, Feed(*before, {"type": "http.disconnect"}), arrived=False)
    reader.release()


async def test_a_full_memory_is_429_before_anything_is_read() -> None:
    budget = BodyBudget(50)
    feed = Feed()
    full = await BodyReader(budget, LIMITS).read({b"content-length": b"51"}, feed, arrived=False)
    assert isinstance(full, ApiError)
    assert (full.status, full.code, feed.calls, budget.used_bytes) == (429, "memory_limit", 0, 0)


# -- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "out", "held"),
    [
        (b"", b"", b""),
        (b"data: 1", b"", b"data: 1"),
        (b"data: 1\n", b"", b"data: 1\n"),
        (b"data: 1\n\n", b"data: 1\n\n", b""),
        (b"\n\nx", b"\n\n", b"x"),
        (b"a\n\nb\r\n\r\nc", b"a\n\nb\r\n\r\n", b"c"),
        (b"a\r\n\r\nb\n\nc", b"a\r\n\r\nb\n\n", b"c"),
        (b"a\r\n\r", b"", b"a\r\n\r"),
    ],
)
def test_only_whole_events_go_out(data: bytes, out: bytes, held: bytes) -> None:
    assert _whole_events(data) == (out, held)


def test_a_very_long_event_is_not_held() -> None:
    data = b"a\n\n" + b"x" * (HELD_EVENT_BYTES + 1)
    assert _whole_events(data) == (data, b"")


@given(st.binary(max_size=60).map(lambda raw: raw.translate(bytes(b"\n\r\na"[i % 4] for i in range(256)))))
def test_nothing_is_lost_or_reordered(data: bytes) -> None:
    out, held = _whole_events(data)
    assert out + held == data
    assert b"\n\n" not in held
    assert not out or out.endswith((b"\n\n", b"\n\r\n"))


# -- one response's transport -----------------------------------------------------------------------------------------


class AtOnce:
    """An outbox that does not wait."""

    def write(self, transport: Wire, data: bytes) -> None:
        transport.write(data)

    def flush(self) -> None:
        pass


class Wire:
    """A connection and its transport, as far as a holder needs them."""

    outbox = AtOnce()

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False
        self.transport = self

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def hang_up(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def holder(kind: type[HeadHolder], wire: Wire, *, bodiless: bool = False) -> HeadHolder:
    return kind(cast(GatewayProtocol, wire), bodiless=bodiless)


def test_a_head_goes_out_with_the_first_bytes_of_its_body() -> None:
    wire = Wire()
    held = holder(HeadHolder, wire)
    held.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(wire.writes) == 1
    held.write(HEAD)
    assert len(wire.writes) == 1
    held.write(b"body")
    held.write(b"HTTP/1.1 is a fine way to begin a piece of a body")
    assert wire.writes[1:] == [HEAD + b"body", b"HTTP/1.1 is a fine way to begin a piece of a body"]
    held.close()
    assert held.is_closing()


def test_a_head_without_a_body_goes_out_at_once_or_at_the_end() -> None:
    wire = Wire()
    holder(HeadHolder, wire, bodiless=True).write(HEAD)
    assert wire.writes == [HEAD]
    wire = Wire()
    held = holder(HeadHolder, wire)
    held.write(HEAD)
    held.close()
    assert (wire.writes, wire.closed) == ([HEAD], True)


def test_old_clients_get_no_chunks() -> None:
    wire = Wire()
    held = holder(UnframedHolder, wire)
    held.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\na: b\r\n\r\n")
    for data in (b"", b"3\r\nabc\r\n", b"4\r\n\r\n\r\n\r\n", b"1\r\nx\r\n0\r\n\r\n", b"0\r\n\r\n"):
        held.write(data)
    assert held.unframed
    assert b"".join(wire.writes) == b"HTTP/1.1 200 OK\r\na: b\r\n\r\nabc\r\n\r\nx"
    wire = Wire()
    held = holder(UnframedHolder, wire)
    held.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
    held.write(b"2\r\nab")
    assert not held.unframed
    assert b"".join(wire.writes).endswith(b"\r\n\r\n2\r\nab")


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_every_refusal_has_an_answer() -> None:
    request = InferenceRequest(key=1, id="r", received_at=0.0)
    for code in RejectionCode:
        error = verdict(Rejection(request=request, code=code, message=""), None, attempts=0)
        assert 400 <= error.status < 600
        assert error.code


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (RejectionCode.NO_ENDPOINTS, 503, "no_endpoints"),
        (RejectionCode.NO_READY_ENDPOINTS, 503, "no_ready_endpoints"),
        (RejectionCode.SUBSET_EMPTY, 503, "subset_empty"),
        (RejectionCode.POOL_NOT_FOUND, 503, "pool_not_found"),
        (RejectionCode.MODEL_NOT_FOUND, 404, "model_not_found"),
        (RejectionCode.SATURATED, 429, "saturated"),
        (RejectionCode.RESPONSE_GONE, 404, "response_gone"),
    ],
)
def test_refusals_of_the_brain(code: RejectionCode, status: int, said: str) -> None:
    request = InferenceRequest(key=1, id="r", received_at=0.0, model="m")
    error = verdict(Rejection(request=request, code=code, message=""), "resp_1", attempts=0)
    assert (error.status, error.code) == (status, said)


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        (FailureKind.CONNECT, 502, "upstream_unreachable"),
        (FailureKind.RESET, 502, "upstream_reset"),
        (FailureKind.TIMEOUT, 504, "upstream_timeout"),
        (FailureKind.HUNG, 504, "upstream_timeout"),
        (FailureKind.SERVER_ERROR, 502, "upstream_reset"),
        (FailureKind.OVERLOADED, 502, "upstream_reset"),
    ],
)
def test_failures_of_the_last_attempt(kind: FailureKind, status: int, said: str) -> None:
    once, again = (verdict(Failure(kind), None, attempts=attempts) for attempts in (1, 2))
    assert (once.status, once.code, once.should_retry) == (status, said, None)
    assert again.should_retry is False
