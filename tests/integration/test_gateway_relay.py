"""What passes through the gateway unchanged, and what it changes on purpose."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.integration.gateway_rig import (
    CHAT,
    EVENT_STREAM,
    HELLO,
    JSON,
    MODEL,
    STREAM,
    Gateway,
    backend,
    events,
    gateway,
    get,
    post,
    request_bytes,
    request_id_of,
    says,
    until,
)
from tests.unit.upstream.hostile import Peer, Received, answer, chunked

OK = answer(b'{"ok":true}', JSON)
# Everything a parser that builds documents would change.
ODD_BODY = (
    b' {"model" : "tiny",\t"messages":[{"role":"user","content":"\\u00e9\\/ \xc3\xa9"}] ,"seed":1234567890123456789012,'
    b'\n"z":1.0e0,"a":-0.0,"temperature":1e400,"dup":1,"dup":{"x":[]},"unknown":null}\r\n '
)


@pytest.mark.parametrize(
    "body",
    [
        ODD_BODY,
        b'{"model":"tiny","model":"tiny","messages":[{"role":"user","content":"x"}]}',
        b'{"model":"tiny","messages":[{"role":"user","content":"' + b"long " * 60_000 + b'"}]}',
    ],
    ids=["odd", "duplicate", "long"],
)
async def test_requests_and_answers_pass_byte_for_byte(body: bytes) -> None:
    said = b'{"b":1,"a":123456789012345678901234567890,"a":2, "text":"\\ud83d"}\n'
    async with backend(says(answer(said, JSON))) as engine, gateway(engine.url) as door:
        got = await door.post(body)
        assert (got.status, got.body) == (200, said)
        assert engine.received[0].body == body
        assert engine.received[0].header(b"content-length") == str(len(body)).encode()


async def test_a_chunked_request_becomes_one_with_a_length() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        head = request_bytes("POST", CHAT, JSON, b"Transfer-Encoding: chunked", b"Trailer: x-late")
        pieces = [HELLO[i : i + 7] for i in range(0, len(HELLO), 7)]
        last = b"0\r\nx-late: 1\r\nauthorization: Bearer smuggled\r\n\r\n"
        got = await door.ask(head + b"".join(chunked(*pieces, end=False)) + last)
        assert got.status == 200
        (received,) = engine.received
        assert received.body == HELLO
        assert received.header(b"transfer-encoding") is None
        # Trailers are no headers: what was checked in front of us might not have seen them.
        assert received.header(b"authorization") is None
        assert received.header(b"x-late") is None


async def test_bodies_that_are_not_utf8_pass_in_the_prompt() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        body = b'{"model":"tiny","messages":[{"role":"user","content":"\xff\xfe"}]}'
        assert (await door.post(body)).status == 200
        assert engine.received[0].body == body


async def test_headers_pass_except_what_belongs_to_the_hop_or_the_fleet() -> None:
    sent = [
        b"Authorization: Bearer client-key",
        b"X-Custom: a",
        b"x-custom: b",
        b"X-Empty:",
        b"Accept-Encoding: gzip",
        b"Connection: keep-alive, X-Hop",
        b"X-Hop: 1",
        b"Keep-Alive: timeout=5",
        b"TE: trailers",
        b"Proxy-Authorization: Basic x",
        b"Upgrade-Insecure-Requests: 1",
        b"x-prefiller-host-port: 10.0.0.1:80",
        b"x-gateway-destination-endpoint: 10.0.0.1:80",
        b"X-Data-Parallel-Rank: 3",
        b"x-waypost-explain: 1",
        b"x-waypost-admin-token: t",
        b"x-request-id: mine",
    ]
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        got = await door.post(HELLO, *sent)
        assert request_id_of(got) == "mine"
        (received,) = engine.received
        assert received.headers[0] == (b"host", engine.url.removeprefix("http://").encode())
        assert sorted(received.headers[1:]) == sorted(
            [
                (b"authorization", b"Bearer client-key"),
                (b"x-custom", b"a"),
                (b"x-custom", b"b"),
                (b"x-empty", b""),
                (b"accept-encoding", b"gzip"),
                (b"upgrade-insecure-requests", b"1"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(HELLO)).encode()),
                (b"x-request-id", b"mine"),
            ]
        )


async def test_answer_headers_pass_except_the_hop_and_the_request_id() -> None:
    said = answer(
        b"{}",
        JSON,
        b"Server: engine",
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT",
        b"Set-Cookie: a=1",
        b"Set-Cookie: b=2",
        b"X-Request-Id: theirs",
        b"Connection: keep-alive, X-Hop",
        b"X-Hop: 1",
        b"Keep-Alive: timeout=5",
        b"OpenAI-Processing-Ms: 12",
    )
    async with backend(says(said)) as engine, gateway(engine.url) as door:
        got = await door.post(HELLO, b"x-request-id: mine")
        assert got.headers["x-request-id"] == "mine"
        assert got.headers["openai-processing-ms"] == "12"
        assert got.headers["set-cookie"] == "b=2"
        assert not {"server", "date", "x-hop", "keep-alive", "connection"} & set(got.headers)


@pytest.mark.parametrize("bad", [b"two words", b"x" * 257, b"caf\xe9", b"a___prefill_addr_10.0.0.1:1", b""])
async def test_unsafe_request_ids_are_replaced(bad: bytes) -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        ident = request_id_of(await door.post(HELLO, b"x-request-id: " + bad))
        assert len(ident) == 32
        assert engine.received[0].all(b"x-request-id") == [ident.encode()]


async def test_an_endpoints_api_key_replaces_the_clients() -> None:
    async with backend(says(OK)) as engine:
        entry = {"url": engine.url, "credentials": "main"}
        async with gateway(entry, credentials={"main": {"api_key": "engine-key"}}) as door:
            assert (await door.post(HELLO, b"Authorization: Bearer client-key")).status == 200
            assert engine.received[0].all(b"authorization") == [b"Bearer engine-key"]


async def test_fleet_fields_are_cut_out_and_nothing_else_changes() -> None:
    body = (
        b'{ "kv_transfer_params":{"remote_host":"10.0.0.1"}, "model":"tiny", "big":123456789012345678901,'
        b'"bootstrap_host" : "x" ,"messages":[{"role":"user","content":"hi"}],"nvext":{"worker_id":1,"keep":2} }'
    )
    kept = (
        b'{ "model":"tiny", "big":123456789012345678901,'
        b'"messages":[{"role":"user","content":"hi"}],"nvext":{"keep":2} }'
    )
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        assert (await door.post(body)).status == 200
        assert json.loads(engine.received[0].body) == json.loads(kept)
        assert b"123456789012345678901" in engine.received[0].body


async def test_an_alias_is_rewritten_in_place_and_restored() -> None:
    said = b'{"id":"x", "model":"tiny","choices":[],"seed":12345678901234567890}'
    async with backend(says(answer(said, JSON))) as engine, gateway(engine.url, models={"gpt-4o": MODEL}) as door:
        got = await door.post(HELLO.replace(b"tiny", b"gpt-4o"))
        assert engine.received[0].body == HELLO
        assert got.body == said.replace(b"tiny", b"gpt-4o")
        assert got.headers["content-length"] == str(len(got.body))


async def test_an_alias_is_restored_in_streams_however_they_are_cut() -> None:
    stream = b'data: {"id":"1","model":"tiny","choices":[]}\n\ndata: {"id":"2","model": "tiny"}\n\ndata: [DONE]\n\n'
    pieces = [stream[:20], stream[20:31], stream[31:60], stream[60:]]
    script = says(events(*pieces))
    async with backend(script) as engine, gateway(engine.url, models={"gpt-4o": MODEL}) as door:
        got = await door.post(STREAM.replace(b"tiny", b"gpt-4o"))
        assert got.body == stream.replace(b"tiny", b"gpt-4o")


async def test_an_alias_does_not_hold_up_what_is_not_json() -> None:
    more = asyncio.Event()

    async def speech(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.send(*chunked(b"RIFF", end=False))
        await more.wait()
        await peer.send(*chunked(b"more"))

    async with backend(speech) as engine, gateway(engine.url, models={"tts": MODEL}) as door, door.client() as client:
        await client.send(post(b'{"model":"tts","input":"hi","voice":"x"}', path="/v1/audio/speech"))
        assert (await client.head())[0] == 200
        assert await asyncio.wait_for(client.chunk(), 2) == b"RIFF"
        more.set()
        assert await client.chunk() == b"more"
        assert await client.chunk() == b""


async def test_events_are_flushed_one_by_one_and_headers_with_the_first() -> None:
    gates = [asyncio.Event() for _ in range(4)]

    async def script(peer: Peer, request: Received) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number, gate in enumerate(gates):
            await gate.wait()
            await peer.send(*chunked(b"data: %d\n\n" % number, end=False))
        await peer.send(b"0\r\n\r\n")

    async with backend(script) as engine, gateway(engine.url) as door, door.client() as client:
        await client.send(post(STREAM))
        with pytest.raises(TimeoutError):
            # The engine's headers are there, but no byte of its body.
            await asyncio.wait_for(client.reader.read(1), 0.1)
        gates[0].set()
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        for number in range(4):
            gates[number].set()
            assert await asyncio.wait_for(client.chunk(), 0.5) == b"data: %d\n\n" % number
        assert await client.chunk() == b""


async def test_paths_methods_and_what_is_ours() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url, gateway={"allow_paths": ["/admin/flush"]}) as door:
        for path in ("/", "/metrics", "/v1/nope", "/v1/chat/completions/", "/v1/chat%2Fcompletions", "/admin/other"):
            got = await door.ask(get(path))
            assert (got.status, got.error["code"]) == (404, "not_found"), path
            request_id_of(got)
        got = await door.ask(get("/v1/../admin/flush2"))
        assert got.status == 404
        for method, path, allow in (("GET", CHAT, "POST"), ("PUT", "/v1/embeddings", "POST")):
            got = await door.ask(get(path, method=method))
            assert (got.status, got.error["code"], got.headers["allow"]) == (405, "method_not_allowed", allow)
            request_id_of(got)
        assert engine.received == []
        assert (await door.ask(get("/admin/flush?x=%20y&z"))).status == 200
        assert engine.received[0].target == "/admin/flush?x=%20y&z"
        got = await door.ask(request_bytes("POST", "/v1/responses/resp_1/cancel", b"Content-Length: 0"))
        assert (got.status, engine.received[1].header(b"content-length")) == (200, b"0")


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/health", "/v1/models/tiny", "/openapi.json"])
async def test_own_pages_answer_get_and_head_with_a_request_id(path: str) -> None:
    async with backend(says(OK), models=[MODEL]) as engine, gateway({"url": engine.url, "models": []}) as door:
        await _models_known(door)
        async with door.client() as client:
            await client.send(get(path, b"x-request-id: mine"))
            whole = await client.answer()
            assert (whole.status, whole.headers["x-request-id"]) == (200, "mine")
            await client.send(get(path, b"x-request-id: mine", method="HEAD"))
            head = await client.answer(method="HEAD")
            assert (head.status, head.headers["content-length"]) == (200, whole.headers["content-length"])
            # Nothing of a body was sent: the next answer begins where it should.
            await client.send(post())
            assert (await client.answer()).status == 200
        assert (await door.ask(get(CHAT, method="HEAD"), method="HEAD")).status == 405


async def _models_known(door: Gateway) -> None:
    await until(lambda: all(models is not None for _, models in door.runtime.datastore.models()))


async def test_log_lines_name_the_request_and_never_its_prompt() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        await door.post(HELLO.replace(b'"hi"', b'"the secret prompt"'), b"x-request-id: one")
        await door.settled()
        (line,) = door.lines()
        assert (line["id"], line["model"], line["status"], line["outcome"]) == ("one", MODEL, 200, "completed")
        assert line["attempts"] == 1
        assert line["ttft_ms"] > 0
        assert "secret" not in str(door.lines())


# -- every way to cut an answer ---------------------------------------------------------------------------------------

STREAMED = (
    b"".join(b'data: {"n":%d,"t":"%s"}\n\n' % (n, b"\xc3\xa9\r" * n) for n in range(12)) + b": ping\n\n" + b"tail"
)


@given(
    body=st.one_of(st.just(STREAMED), st.just(STREAMED.replace(b"\n", b"\r\n")), st.binary(max_size=400)),
    cuts=st.lists(st.integers(0, 420), max_size=12),
    writes=st.lists(st.integers(1, 900), max_size=8),
    framing=st.sampled_from(["chunked", "length", "close"]),
    stream=st.booleans(),
)
@example(body=b"x\nHTTP/1.1 200 OK\r\n\r\n", cuts=[2], writes=[60], framing="length", stream=False)
@example(body=b"", cuts=[], writes=[], framing="chunked", stream=True)
@settings(max_examples=60)
def test_however_an_answer_is_cut_the_client_gets_the_same_bytes(
    body: bytes, cuts: list[int], writes: list[int], framing: str, stream: bool
) -> None:
    """One gateway per batch of examples would be quicker, but each example must leave nothing behind."""
    asyncio.run(_cut(body, cuts, writes, framing, stream))


async def _cut(body: bytes, cuts: list[int], writes: list[int], framing: str, stream: bool) -> None:
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [body[a:b] for a, b in itertools.pairwise(edges)]
    kind = EVENT_STREAM if stream else b"Content-Type: application/octet-stream"
    if framing == "chunked":
        wire = b"\r\n".join([b"HTTP/1.1 200 OK", kind, b"Transfer-Encoding: chunked", b"", b""])
        wire += b"".join(chunked(*pieces))
    else:
        wire = answer(body, kind, framed=framing == "length")
    steps = sorted({0, len(wire), *(write for write in writes if write < len(wire))})

    async def script(peer: Peer, request: Received) -> None:
        await peer.send(*[wire[a:b] for a, b in itertools.pairwise(steps)], pause_s=0.001)
        if framing == "close":
            peer.close()

    async with backend(script) as engine, gateway(engine.url) as door:
        got = await door.post(STREAM)
        if not body and framing == "close":
            # Nothing at all is a death before the first byte, not an empty answer.
            assert got.status == 502
        else:
            assert (got.status, got.body, got.whole) == (200, body, True)
