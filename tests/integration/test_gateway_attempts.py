"""Attempts, and what a client is told when they fail: other endpoints before the first byte, never after it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest

from tests.integration.gateway_rig import (
    CHAT,
    EVENT_STREAM,
    HELLO,
    JSON,
    MODEL,
    STREAM,
    Script,
    backend,
    events,
    gateway,
    get,
    post,
    request_id_of,
    says,
)
from tests.unit.upstream.hostile import Hostile, Peer, Received, answer, chunked

GOOD = b'{"from":"the good one"}'
OVERLOADED = b'{"error":{"message":"The engine is currently busy","type":"Service Unavailable","code":503}}'
# As vLLM 0.32 words it, for whole answers and for streams without a token.
DIED = b'{"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","param":null,"code":500}}'


def refused(status: bytes, body: bytes = OVERLOADED, kind: bytes = JSON) -> Script:
    return says(answer(body, kind, b"X-Engine: e", status=status))


async def reset(peer: Peer, request: Received) -> None:
    peer.reset()


async def close(peer: Peer, request: Received) -> None:
    peer.close()


async def head_then_reset(peer: Peer, request: Received) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    await asyncio.sleep(0.02)
    peer.reset()


async def head_then_close(peer: Peer, request: Received) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\n" + JSON + b"\r\nContent-Length: 10\r\n\r\n")
    peer.close()


async def unframed_head_then_close(peer: Peer, request: Received) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\n\r\n")
    peer.close()


BEFORE_THE_FIRST_BYTE: dict[str, Script] = {
    "reset": reset,
    "close": close,
    "reset after the head": head_then_reset,
    "close after the head": head_then_close,
    "close after an unframed head": unframed_head_then_close,
    "garbage": says(b"\x16\x03\x01\x00\xa5 this is no HTTP\r\n\r\n"),
    "status 999": says(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n"),
    "upgrade": says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
    "502": refused(b"502 Bad Gateway"),
    "503": refused(b"503 Service Unavailable"),
    "504": refused(b"504 Gateway Timeout"),
    "529": refused(b"529 Overloaded"),
    "the engine core died": refused(b"500 Internal Server Error", DIED),
    "a stream that is only a refusal": says(events(b"data: " + OVERLOADED + b"\n\n", b"data: [DONE]\n\n")),
    "a stream of a dead engine core": says(events(b"data: " + DIED + b"\n\n")),
    "503 in HTML": refused(b"503 Service Unavailable", b"<html><h1>busy</h1></html>", b"Content-Type: text/html"),
}


@contextlib.asynccontextmanager
async def bad_then_good(script: Script) -> AsyncIterator[tuple[Hostile, Hostile]]:
    async with backend(script) as bad, backend(says(answer(GOOD, JSON))) as good:
        yield bad, good


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("name", BEFORE_THE_FIRST_BYTE)
async def test_another_endpoint_answers_before_the_first_byte(name: str, body: bytes) -> None:
    async with (
        bad_then_good(BEFORE_THE_FIRST_BYTE[name]) as (bad, good),
        gateway(bad.url, good.url, policy="round-robin") as door,
    ):
        for _ in range(2):
            got = await door.post(body, b"x-request-id: same")
            assert (got.status, got.body) == (200, GOOD)
            assert got.headers["x-waypost-endpoint"] == good.url.removeprefix("http://")
        assert len(bad.received) >= 1
        assert {request.body for request in good.received} == {body}
        assert {request.header(b"x-request-id") for request in good.received} == {b"same"}


async def test_a_refused_connection_costs_nobody_anything() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with backend(says(answer(GOOD, JSON))) as good, gateway(dead, good.url) as door:
            assert all([(await door.post()).status == 200 for _ in range(6)])
        async with gateway(dead) as door:
            got = await door.post()
            assert got.status in (502, 503)
            assert got.error["code"] in ("upstream_unreachable", "no_ready_endpoints")
            request_id_of(got)


async def test_attempts_are_bounded() -> None:
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(backend(reset)) for _ in range(5)]
        async with gateway(*(engine.url for engine in engines), gateway={"max_attempts": 3}) as door:
            got = await door.post()
            assert (got.status, got.error["code"]) == (502, "upstream_reset")
            assert got.headers["x-should-retry"] == "false"
            assert sum(len(engine.received) for engine in engines) == 3
            await door.settled()
            assert door.lines()[0]["attempts"] == 3


@pytest.mark.parametrize("others", [[], ["same"], ["reset"]], ids=["alone", "all busy", "other dead"])
async def test_an_engines_refusal_passes_when_nobody_else_can(others: list[str]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        busy = await stack.enter_async_context(backend(refused(b"503 Service Unavailable")))
        scripts = {"same": refused(b"503 Service Unavailable"), "reset": reset}
        more = [await stack.enter_async_context(backend(scripts[name])) for name in others]
        async with gateway(busy.url, *(engine.url for engine in more)) as door:
            got = await door.post()
            assert (got.status, got.body) == (503, OVERLOADED)
            assert (got.headers["x-engine"], got.headers["content-type"]) == ("e", "application/json")
            # The SDK tries again by itself, since somebody only was too busy.
            assert "x-should-retry" not in got.headers
            request_id_of(got)


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"501 Not Implemented", b"507 Full"])
async def test_other_errors_of_an_engine_are_its_answer(status: bytes) -> None:
    said = b'{ "error":{"message":"boom", "code":500} }'
    async with (
        bad_then_good(refused(status, said)) as (bad, good),
        gateway(bad.url, good.url, policy="round-robin") as door,
    ):
        results = [await door.post() for _ in range(2)]
        wrong = [got for got in results if got.status != 200]
        assert len(wrong) == len(bad.received) >= 1
        assert {(got.status, got.body) for got in wrong} == {(int(status[:3]), said)}


HTML = b"<html><head><style>p{}</style></head><body><p>Proxy &amp; error</p></body></html>"


@pytest.mark.parametrize(
    ("kind", "said", "shown"),
    [
        (b"Content-Type: text/html", HTML, "the model server answered 500: Proxy & error"),
        (b"Content-Type: text/plain", b"Internal Server Error", "the model server answered 500: Internal Server Error"),
        (b"Content-Type: application/json", b"not json", "the model server answered 500: not json"),
        (b"X-No: type", b"", "the model server answered 500 without a message"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_errors_that_are_no_json_are_wrapped(kind: bytes, said: bytes, shown: str, path: str) -> None:
    body = HELLO.replace(b"}]}", b'}],"max_tokens":5}')
    async with backend(says(answer(said, kind, status=b"500 X"))) as engine, gateway(engine.url) as door:
        got = await door.post(body, path=path)
        assert (got.status, got.headers["content-type"]) == (500, "application/json")
        if path == CHAT:
            assert got.error == {"message": shown, "type": "server_error", "param": None, "code": "upstream_error"}
        else:
            assert json.loads(got.body)["type"] == "error"
            assert got.error == {"type": "api_error", "message": shown}


@pytest.mark.parametrize("status", [b"400 Bad Request", b"422 Unprocessable Entity", b"500 X"])
async def test_long_json_errors_pass_whole(status: bytes) -> None:
    """Validators repeat the input in their error, and inputs are long."""
    said = b'{"detail":"' + b"x" * 300_000 + b'"}'
    for framed in (True, False):
        wire = answer(said, JSON, status=status, framed=framed)

        async def script(peer: Peer, request: Received, wire: bytes = wire) -> None:
            await peer.send(wire)
            peer.close()

        async with backend(script) as engine, gateway(engine.url) as door:
            got = await door.post()
            assert (got.status, got.body, got.whole) == (int(status[:3]), said, True)


async def test_a_long_page_of_html_is_cut_not_lost() -> None:
    said = b"<html><body>" + b"word " * 60_000
    for status in (b"500 X", b"503 X"):
        wire = answer(said, b"Content-Type: text/html", status=status)
        async with backend(says(wire)) as engine, gateway(engine.url) as door:
            got = await door.post()
            assert (got.status, got.error["code"]) == (int(status[:3]), "upstream_error")
            assert len(got.error["message"]) < 500


async def test_an_error_that_breaks_off_is_a_reset() -> None:
    async def script(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n" + JSON + b"\r\nContent-Length: 100\r\n\r\n{")
        await asyncio.sleep(0.02)
        peer.reset()

    async with backend(script) as engine, gateway(engine.url) as door:
        got = await door.post()
        assert (got.status, got.error["code"], len(engine.received)) == (502, "upstream_reset", 1)


# -- after the first byte ---------------------------------------------------------------------------------------------


def dies_after(*pieces: bytes, kind: bytes = EVENT_STREAM, end: str = "reset", frame: bool = True) -> Script:
    async def script(peer: Peer, request: Received) -> None:
        framing = b"Transfer-Encoding: chunked" if frame else b"Content-Length: 1000"
        await peer.send(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n" + framing + b"\r\n\r\n")
        await peer.send(*(chunked(*pieces, end=False) if frame else pieces), pause_s=0.01)
        await asyncio.sleep(0.05)
        (peer.reset if end == "reset" else peer.close)()

    return script


@pytest.mark.parametrize("end", ["reset", "close"])
@pytest.mark.parametrize("cut", [b"", b'data: {"half":', b"data: 2\n"], ids=["between", "in an event", "in a line end"])
async def test_a_stream_that_dies_ends_with_an_error_event_and_nobody_else_is_asked(end: str, cut: bytes) -> None:
    script = dies_after(b"data: 1\n\n", *([cut] if cut else []), end=end)
    async with backend(script) as first, backend(script) as second, gateway(first.url, second.url) as door:
        got = await door.post(STREAM)
        assert (got.status, got.whole) == (200, True)
        whole, _, last = got.body.partition(b"\n\n")
        assert whole == b"data: 1"
        # A cut event must not reach the client as a broken one.
        error = json.loads(last.strip().removeprefix(b"data: "))["error"]
        assert (error["code"], error["type"]) == ("upstream_reset", "server_error")
        assert len(first.received) + len(second.received) == 1
        await door.settled()
        assert door.lines()[0]["outcome"] == "failed"


async def test_a_dying_stream_of_messages_speaks_anthropic() -> None:
    body = b'{"model":"tiny","max_tokens":5,"stream":true,"messages":[{"role":"user","content":"hi"}]}'
    start = b'event: message_start\ndata: {"type":"message_start"}\n\n'
    async with backend(dies_after(start)) as engine, gateway(engine.url) as door:
        got = await door.post(body, path="/v1/messages")
        assert got.whole
        event, data = got.body.removeprefix(start).strip().split(b"\n")
        assert event == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["error"]["type"] == "api_error"


@pytest.mark.parametrize("frame", [True, False], ids=["chunked", "length"])
async def test_a_whole_answer_that_dies_is_cut_where_it_died(frame: bool) -> None:
    script = dies_after(b'{"half":', kind=JSON, frame=frame)
    async with backend(script) as first, backend(script) as second, gateway(first.url, second.url) as door:
        got = await door.post()
        assert (got.status, got.body, got.whole) == (200, b'{"half":', False)
        assert len(first.received) + len(second.received) == 1
        await door.settled()
        assert door.lines()[0]["outcome"] == "failed"


async def test_a_compressed_stream_that_dies_is_cut() -> None:
    kind = EVENT_STREAM + b"\r\nContent-Encoding: br"
    async with backend(dies_after(b"\x8b\x02\x80", kind=kind)) as engine, gateway(engine.url) as door:
        got = await door.post(STREAM)
        assert (got.body, got.whole) == (b"\x8b\x02\x80", False)


async def test_a_renamed_answer_that_dies_is_an_error_since_nothing_was_sent() -> None:
    script = dies_after(b'{"model":"tiny",', kind=JSON)
    async with backend(script) as engine, gateway(engine.url, models={"other": MODEL}) as door:
        got = await door.post(HELLO.replace(b"tiny", b"other"))
        assert (got.status, got.error["code"]) == (502, "upstream_reset")
        request_id_of(got)
        await door.settled()
        assert (door.lines()[0]["status"], door.lines()[0]["outcome"]) == (502, "failed")


# -- deadlines --------------------------------------------------------------------------------------------------------


async def test_the_first_byte_deadline_ends_in_504() -> None:
    async def silent(peer: Peer, request: Received) -> None:
        await peer.gone()

    async with backend(silent) as engine, gateway(engine.url, timeouts={"first_byte": "200ms"}) as door:
        got = await door.post()
        assert (got.status, got.error["code"]) == (504, "upstream_timeout")
        request_id_of(got)


@pytest.mark.parametrize("kind", ["stream", "whole", "error"])
async def test_silence_between_chunks_ends_an_answer(kind: str) -> None:
    async def stops(peer: Peer, request: Received) -> None:
        status = b"400 Bad Request" if kind == "error" else b"200 OK"
        head = EVENT_STREAM if kind == "stream" else JSON
        await peer.send(b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(*chunked(b"data: 1\n\n", end=False))
        await peer.gone()

    async with backend(stops) as engine, gateway(engine.url, timeouts={"between_chunks": "200ms"}) as door:
        got = await door.post(STREAM if kind == "stream" else HELLO)
        if kind == "error":
            assert (got.status, got.error["code"], got.whole) == (504, "upstream_timeout", True)
        else:
            assert got.status == 200
            assert got.body.startswith(b"data: 1\n\n")
            assert got.whole == (kind == "stream")
            assert (b"upstream_timeout" in got.body) == (kind == "stream")
        await door.settled()
        assert door.lines()[0]["outcome"] == "timeout"
        assert door.lines("relay_failed") == []


async def test_a_request_on_a_closed_idle_connection_goes_elsewhere_or_is_tried_anew() -> None:
    """The engine closes a connection while a request is on its way: the only endpoint gets one more try."""
    served = 0

    async def script(peer: Peer, request: Received) -> None:
        nonlocal served
        served += 1
        if served == 2:
            peer.reset()
        else:
            await peer.send(answer(GOOD, JSON))

    async with backend(script) as engine, gateway(engine.url) as door:
        assert [(await door.post()).status for _ in range(3)] == [200, 200, 200]


async def test_models_that_nobody_serves_are_404_only_when_all_lists_are_known() -> None:
    body = HELLO.replace(b"tiny", b"nobody")
    async with backend(says(answer(GOOD, JSON))) as engine:
        async with gateway(engine.url) as door:
            got = await door.post(body)
            assert (got.status, got.error["code"], got.error["param"]) == (404, "model_not_found", "model")
            assert (await door.ask(get("/v1/models/nobody"))).error["code"] == "model_not_found"
        async with gateway(engine.url, {"url": "http://127.0.0.1:9", "models": []}) as door:
            got = await door.ask(get("/v1/models/nobody"))
            assert (got.status, got.error["code"]) == (503, "no_ready_endpoints")
            got = await door.post(body)
            assert got.error["code"] in ("upstream_unreachable", "no_ready_endpoints")
        async with gateway({"url": engine.url, "models": []}) as door:
            # Its list is not known: it may serve anything.
            assert (await door.post(body)).status == 200


async def test_a_stream_that_is_only_a_refusal_is_an_error_answer_when_nobody_else_can() -> None:
    async with backend(says(events(b"data: " + OVERLOADED + b"\n\n"))) as engine, gateway(engine.url) as door:
        got = await door.post(STREAM)
        assert (got.status, got.body, got.headers["content-type"]) == (503, OVERLOADED, "application/json")


async def test_a_stream_that_speaks_of_errors_is_an_answer() -> None:
    for first in (b'data: {"error":{"code":400}}\n\n', b'data: {"error":null,"choices":[]}\n\n', b'data: "error"\n\n'):
        async with backend(says(events(first))) as engine, gateway(engine.url) as door:
            got = await door.post(STREAM)
            assert (got.status, got.body) == (200, first)


async def test_an_evented_error_passes_as_a_stream() -> None:
    said = events(b'data: {"error":{}}\n\n').replace(b"200 OK", b"400 Bad Request")
    async with backend(says(said)) as engine, gateway(engine.url) as door:
        got = await door.ask(post(STREAM))
        assert (got.status, got.body) == (400, b'data: {"error":{}}\n\n')
