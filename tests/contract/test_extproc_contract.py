"""The Endpoint Picker contract as a suite: the cases of the reference's own tables, by endpoint, status and order.

Not taken over: echoed headers, the debug header on responses, and error texts. A pool without pods answers 503 as the
protocol says, where the reference says 500. Case A14 and priorities are in `test_extproc_resources`. Left to later
work: the names of A1 to A13 in metrics, A6 (an EndpointPickerConfig with another parser; without one, a path nobody
claims is passed through), gRPC model servers (B), mid-flight eviction by flow control and the termination causes (D),
and the datastore of pods (F).
"""

from __future__ import annotations

import json

import pytest

from picker.core.values import Endpoint
from picker.extproc.settings import SessionSettings
from protos import ext_proc_pb2 as pb
from tests.contract.extproc_rig import (
    Conversation,
    Picker,
    Pod,
    destination,
    head,
    hint,
    kinds,
    picker,
    set_headers,
    streamed,
)

FIRST, SECOND, THIRD = (Pod(index).address for index in range(3))
LORA = "sql-lora-1fdg2"
LORA3 = "sql-lora-1fdg3"


async def route(served: Picker, model: str, **request: object) -> tuple[str, bytes, Conversation]:
    """Sends the tables' request and expects the two answers ROUTE stands for."""
    stream = served.stream()
    sent = await stream.llm_request(model, **request)  # type: ignore[arg-type]
    answers = await stream.read(2)
    assert kinds(answers) == ["request_headers", "request_body"]
    body, end = streamed(answers[1])
    assert end
    assert set_headers(answers[0])["content-length"] == str(len(body))
    removed = set(answers[0].request_headers.response.header_mutation.remove_headers)
    assert {name for name in set_headers(answers[0]) if name.startswith("x-llm-d")} == set()
    assert "x-llm-d-inference-objective" in removed
    target = request.get("target")
    assert json.loads(body) == json.loads(sent) | ({"model": target} if target else {})
    return destination(answers[0]), body, stream


# --- A: scheduling


FOO, BAR = "foo", "bar"
SCHEDULING = {
    "1 lower queue and kv": ([Pod(0, 3, 0.2), Pod(1, 0, 0.1), Pod(2, 10, 0.2)], "my-model", "my-model-12345", SECOND),
    "2 active adapter, low queue": (
        [Pod(0, 0, 0.2, (FOO, BAR)), Pod(1, 0, 0.1, (FOO, LORA)), Pod(2, 10, 0.2, (FOO, BAR))],
        *(LORA, LORA, SECOND),
    ),
    "5 adapter despite higher kv": (
        [Pod(0, 10, 0.2, (FOO, BAR)), Pod(1, 10, 0.4, (FOO, LORA3)), Pod(2, 10, 0.3, (FOO,))],
        *(LORA3, LORA3, SECOND),
    ),
    "7 no shedding by default": (
        [Pod(0, 6, 0.2, (FOO, BAR, LORA3)), Pod(1, 0, 0.85, (FOO,)), Pod(2, 10, 0.9, (FOO,))],
        *(LORA3, LORA3, FIRST),
    ),
    "13 model nobody declared": (
        [Pod(0, 6, 0.2, (FOO, BAR, LORA3)), Pod(1, 20, 0.85, (FOO,)), Pod(2, 10, 0.9, (FOO,))],
        *("direct-model", "direct-model", FIRST),
    ),
}


@pytest.mark.parametrize(("pods", "model", "target", "expected"), SCHEDULING.values(), ids=SCHEDULING.keys())
async def test_a_scheduling(pods: list[Pod], model: str, target: str, expected: str) -> None:
    async with picker(pods) as served:
        chosen, _, stream = await route(served, model, target=target)
        assert chosen == expected
        assert served.in_flight == 1
        stream.cancel()
        await served.settled()


async def test_a3_no_pods() -> None:
    async with picker([]) as served:
        stream = served.stream()
        await stream.headers({"content-type": "text/plain"}, end=True)
        [answer] = await stream.read()
        assert answer.immediate_response.status.code == 503
        assert await stream.ends()


@pytest.mark.parametrize("pods", [[], [Pod(0)]])
async def test_a4_no_model_in_the_body(pods: list[Pod]) -> None:
    async with picker(pods) as served:
        stream = served.stream()
        await stream.headers({"hi": "mom"})
        await stream.body(b'{"prompt":"hello world"}')
        [answer] = await stream.read()
        assert answer.immediate_response.status.code == 400
        assert await stream.ends()


async def test_a6_a_path_nobody_claims_passes_through() -> None:
    async with picker([Pod(0, 6, 0.2), Pod(1, 0, 0.1)]) as served:
        stream = served.stream()
        await stream.headers({":path": "/anything", "x-llm-d-inference-objective": "my-model"})
        await stream.body(b"passthrough-parser")
        answers = await stream.read(2)
        assert destination(answers[0]) == SECOND
        assert streamed(answers[1]) == (b"passthrough-parser", True)
        stream.cancel()
        await served.settled()


async def test_a8_invalid_json() -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        await stream.headers({"hi": "mom"})
        await stream.body(b"no healthy upstream")
        [answer] = await stream.read()
        assert answer.immediate_response.status.code == 400
        assert await stream.ends()
        assert served.in_flight == 0


async def test_a9_a_body_split_across_messages() -> None:
    pods = [Pod(0, 4, 0.2, ("foo", "bar", LORA3)), Pod(1, 0, 0.85, ("foo",)), Pod(2, 10, 0.9, ("foo",))]
    async with picker(pods) as served:
        chosen, _, stream = await route(served, LORA3, target=LORA3, prompt="test6", split=True)
        assert chosen == FIRST
        stream.cancel()
        await served.settled()


@pytest.mark.parametrize("shape", ["list", "string", "with ports"])
@pytest.mark.parametrize(
    ("case", "subset", "expected"),
    [
        ("10 best of the subset", ["192.168.1.1", "192.168.1.2", "192.168.1.3"], SECOND),
        ("11 partial match", ["192.168.1.3"], THIRD),
        ("12 no match", ["192.168.1.99"], None),
        ("12 empty", [], None),
    ],
)
@pytest.mark.parametrize("where", ["headers", "body", "header-only"])
async def test_a_subsetting(shape: str, case: str, subset: list[str], expected: str | None, where: str) -> None:
    if shape == "with ports":
        subset = [f"{ip}:8000" for ip in subset]
    value = ",".join(subset) if shape == "string" else subset
    async with picker([Pod(0, 3, 0.2), Pod(1, 0, 0.1), Pod(2, 10, 0.2)]) as served:
        stream = served.stream()
        if where == "body":
            await stream.llm_request("my-model", subset=value)
        else:
            await stream.headers({}, end=where == "header-only", subset=value)
            if where == "headers":
                await stream.body(b'{"model":"m","prompt":"x"}')
        [answer] = await stream.read()
        if expected is not None:
            assert destination(answer) == expected, case
            stream.cancel()
            await served.settled()
            return
        immediate = answer.immediate_response
        reasons = {option.header.key: option.header.raw_value for option in immediate.headers.set_headers}
        assert immediate.status.code == 503
        assert reasons["x-llm-d-request-dropped-reason"] == b"rejected-no-endpoints"
        assert await stream.ends()


async def test_a15_a_simple_get() -> None:
    async with picker([Pod(0, 3), Pod(1, 0)]) as served:
        stream = served.stream()
        await stream.headers({":method": "GET"}, end=True)
        [answer] = await stream.read()
        assert destination(answer) == SECOND
        assert "content-length" not in set_headers(answer)
        stream.cancel()
        await served.settled()


# --- A: responses


@pytest.mark.parametrize(
    ("case", "chunks"),
    [
        ("16 several chunks", [b'{"max_tokens":100,"model":"a",', b'"prompt":"b"}']),
        ("17 invalid json", [b"no healthy upstream"]),
        ("18 empty last chunk", [b'{"a":"b"}', b""]),
    ],
)
async def test_a_response_buffering(case: str, chunks: list[bytes]) -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        await stream.send(response_headers=head({"content-type": "application/json"}))
        for number, chunk in enumerate(chunks, 1):
            await stream.send(response_body=pb.HttpBody(body=chunk, end_of_stream=number == len(chunks)))
        answers = await stream.read(2)
        assert kinds(answers) == ["response_headers", "response_body"], case
        assert streamed(answers[1]) == (b"".join(chunks), True)


async def test_a19_streamed_responses_are_answered_one_by_one() -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        await stream.send(response_headers=head({"content-type": "text/event-stream", "status": "200"}))
        chunks = [b"data: {}\n\n", b'data: {"usage":{"prompt_tokens":7}}\n\ndata: [DONE]\n\n', b""]
        for chunk in chunks:
            await stream.send(response_body=pb.HttpBody(body=chunk, end_of_stream=not chunk))
        answers = await stream.read(4)
        assert kinds(answers) == ["response_headers", *["response_body"] * 3]
        assert [streamed(answer) for answer in answers[1:]] == [(chunk, not chunk) for chunk in chunks]


# --- C: whole conversations


@pytest.mark.parametrize("trailers", [False, True])
@pytest.mark.parametrize("asked_stream", [False, True])
@pytest.mark.parametrize("sse", [False, True])
async def test_c_conversations(trailers: bool, asked_stream: bool, sse: bool) -> None:
    async with picker([Pod(0), Pod(1, 5)]) as served:
        stream = served.stream()
        steering = {"x-llm-d-inference-fairness-id": "a", "x-llm-d-model-name-rewrite": "v1", ":method": "POST"}
        message = pb.ProcessingRequest(request_headers=head(steering))
        hint(message, [SECOND])
        await stream.send(message)
        body = {"model": "m", "prompt": "p", "stream": asked_stream}
        # The hint of the last message counts.
        await stream.body(json.dumps(body).encode(), subset=[FIRST])
        answers = await stream.read(2)
        assert destination(answers[0]) == FIRST
        assert json.loads(streamed(answers[1])[0]) == body | {"model": "v1"}

        await stream.send(
            response_headers=head(
                {":status": "200", "content-type": "text/event-stream" if sse else "application/json"}
            )
        )
        await stream.send(response_body=pb.HttpBody(body=b"data: 1\n\n", end_of_stream=not trailers))
        if trailers:
            await stream.send(response_trailers=pb.HttpTrailers())
        answers = await stream.read(3 if trailers else 2)
        assert kinds(answers) == ["response_headers", "response_body", *["response_trailers"] * trailers]
        assert streamed(answers[1]) == (b"data: 1\n\n", not trailers)
        # The end of the response is seen on the stream: nothing is in flight although the stream is still open.
        await served.settled()


async def test_c_a_plain_response_waits_for_its_trailers() -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        await stream.send(response_headers=head({":status": "200", "content-type": "application/json"}))
        await stream.send(response_body=pb.HttpBody(body=b"{}"))
        assert kinds(await stream.read()) == ["response_headers"]
        assert await stream.silent()


async def test_c_a_message_over_4_mib_is_taken() -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        await stream.headers({"hi": "mom"})
        await stream.body(b'{"model":"m","prompt":"' + b"x" * (5 << 20) + b'"}')
        answers = await stream.read(2)
        assert destination(answers[0]) == FIRST
        stream.cancel()
        await served.settled()


# --- D: units seen from outside


@pytest.mark.parametrize(("size", "count"), [(0, 1), (61_999, 1), (62_000, 1), (62_001, 2), (124_000, 2), (150_000, 3)])
async def test_d_chunking(size: int, count: int) -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        body = bytes(range(256)) * (size // 256 + 1)
        await stream.headers({":path": "/elsewhere"})
        await stream.body(body[:size])
        _, *parts = [streamed(a) if a.HasField("request_body") else (b"", False) for a in await stream.read(1 + count)]
        assert b"".join(part for part, _ in parts) == body[:size]
        assert [end for _, end in parts] == [False] * (count - 1) + [True]
        stream.cancel()
        await served.settled()


async def test_d_names_in_any_case_and_raw_values_first() -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        made = pb.HttpHeaders()
        made.headers.headers.add(key="X-LLM-D-Model-Name-Rewrite", value="no", raw_value=b"new")
        made.headers.headers.add(key="x-gateway-model-name-rewrite", value="old")
        await stream.send(request_headers=made)
        await stream.body(b'{"model":"m","prompt":"x","big":123456789012345678901234567890,"a":1.0}')
        answers = await stream.read(2)
        assert streamed(answers[1])[0] == b'{"model":"new","prompt":"x","big":123456789012345678901234567890,"a":1.0}'
        stream.cancel()
        await served.settled()


# --- E: the lightweight picker's tests


@pytest.mark.parametrize(
    ("case", "subset", "expected"),
    [
        ("list", ["10.0.0.2:8080", "10.0.0.3:8080"], {"10.0.0.2:8080", "10.0.0.3:8080"}),
        ("string", "10.0.0.2:8080", {"10.0.0.2:8080"}),
        ("blanks", " 10.0.0.2:8080 ,  , 10.0.0.3:8080 ", {"10.0.0.2:8080", "10.0.0.3:8080"}),
        ("comma in an element", ["10.0.0.2:8080,10.0.0.3:8080"], {"10.0.0.2:8080", "10.0.0.3:8080"}),
        ("port", ["10.0.0.1:8081"], {"10.0.0.1:8081"}),
        ("ip", ["10.0.0.1"], {"10.0.0.1:8080", "10.0.0.1:8081"}),
        ("mix", ["10.0.0.1:8081", "10.0.0.2"], {"10.0.0.1:8081", "10.0.0.2:8080"}),
        ("ipv6", ["[FD00::0:1]:8080"], {"[fd00::1]:8080"}),
        ("bare ipv6", ["fd00::1"], {"[fd00::1]:8080"}),
        ("nothing", None, None),
        ("no match", ["10.0.0.9:8080"], set()),
        ("wrong port", ["10.0.0.2:1"], set()),
        ("empty", [], set()),
    ],
)
async def test_e_subsets(case: str, subset: object, expected: set[str] | None) -> None:
    addresses = ["10.0.0.1:8080", "10.0.0.1:8081", "10.0.0.2:8080", "10.0.0.3:8080", "[fd00::1]:8080"]
    everybody = set(addresses)
    async with picker([Endpoint(id=a, url=f"http://{a}", address=a) for a in addresses]) as served:
        seen = set()
        for _ in range(40):
            stream = served.stream()
            await stream.headers({":method": "GET"}, end=True, subset=subset)
            [answer] = await stream.read()
            if expected == set():
                assert answer.immediate_response.status.code == 503
                assert await stream.ends()
                return
            seen.add(destination(answer))
            stream.cancel()
        assert seen == (everybody if expected is None else expected), case
        await served.settled()


async def test_e_the_headers_answer_comes_before_the_body_answer() -> None:
    async with picker([Pod(0)]) as served:
        stream = served.stream()
        await stream.headers({"hi": "mom"})
        await stream.send(request_body=pb.HttpBody(body=b'{"model":"m",'))
        await stream.send(request_body=pb.HttpBody(body=b'"prompt":"x"}'))
        await stream.send(request_trailers=pb.HttpTrailers())
        answers = await stream.read(3)
        assert kinds(answers) == ["request_headers", "request_body", "request_trailers"]
        assert streamed(answers[1]) == (b'{"model":"m","prompt":"x"}', False)
        stream.cancel()
        await served.settled()


async def test_e_served_feedback_moves_the_request() -> None:
    async with picker([Pod(0), Pod(1, 9)], SessionSettings(fallbacks=1)) as served:
        stream = served.stream()
        await stream.headers({":method": "GET"}, end=True)
        [answer] = await stream.read()
        assert destination(answer) == f"{FIRST},{SECOND}"
        message = pb.ProcessingRequest(response_headers=head({":status": "200"}))
        message.metadata_context.filter_metadata["envoy.lb"].update({"x-gateway-destination-endpoint-served": SECOND})
        await stream.send(message)
        assert kinds(await stream.read()) == ["response_headers"]
        datastore = served.director.datastore
        assert (datastore.in_flight(FIRST), datastore.in_flight(SECOND)) == (0, 1)
        stream.cancel()
        await served.settled()
