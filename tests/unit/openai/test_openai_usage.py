"""Usage, response ids and restored model names, whatever the chunking of the stream."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.openai.rewrite import StreamModelRestorer
from picker.openai.usage import Usage, UsageScanner, response_id, restore_model, usage_from_json


def sse(*events: object, space: str = " ", end: str = "\n") -> bytes:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data:{space}{line}{end}{end}" for line in lines).encode()


def scan(stream: bytes, cuts: list[int] | None = None, **options: bool) -> UsageScanner:
    scanner = UsageScanner(**options)
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts or [])})
    for start, end in itertools.pairwise(edges):
        scanner.feed(stream[start:end])
    scanner.close()
    return scanner


OPENAI_EVENTS: tuple[object, ...] = (
    {"choices": [{"delta": {"content": 'the "usage": {"prompt_tokens": 99} [DONE]\n\ndata: x'}}], "usage": None},
    {"choices": [{"delta": {"content": "b"}}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}},
    },
    "[DONE]",
)
RESPONSES_EVENTS: tuple[object, ...] = (
    {"type": "response.created", "response": {"id": "resp_1", "object": "response", "usage": None}},
    {"type": "response.output_text.delta", "delta": '"usage"'},
    {
        "type": "response.completed",
        "response": {
            "id": "resp_1",
            "usage": {"input_tokens": 5, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 2}},
        },
    },
)
ANTHROPIC_EVENTS: tuple[object, ...] = (
    {
        "type": "message_start",
        "message": {"id": "m", "usage": {"input_tokens": 1000, "cache_read_input_tokens": 800, "output_tokens": 1}},
    },
    {"type": "content_block_delta", "delta": {"text": "x"}},
    {"type": "message_delta", "usage": {"output_tokens": 200}},
    {"type": "message_stop"},
)
NATIVE_EVENTS: tuple[object, ...] = (
    {"text": "a", "meta_info": {"prompt_tokens": 3, "completion_tokens": 1, "cached_tokens": 0}},
    {"text": "ab", "meta_info": {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}},
    "[DONE]",
)
CUTS = st.lists(st.integers(0, 2_000), max_size=40)
FRAMING = st.tuples(st.sampled_from(["", " "]), st.sampled_from(["\n", "\r\n"]))


@given(CUTS, FRAMING)
def test_openai_streams(cuts: list[int], framing: tuple[str, str]) -> None:
    got = scan(sse(*OPENAI_EVENTS, space=framing[0], end=framing[1]), cuts)
    assert got.usage == Usage(7, 10, 4)
    assert (got.events, got.done) == (3, True)


@given(CUTS, FRAMING)
def test_responses_streams(cuts: list[int], framing: tuple[str, str]) -> None:
    got = scan(sse(*RESPONSES_EVENTS, space=framing[0], end=framing[1]), cuts, wants_id=True)
    assert got.usage == Usage(5, 6, 2)
    assert (got.events, got.done, got.response_id) == (3, False, "resp_1")


@given(CUTS, FRAMING)
def test_anthropic_streams(cuts: list[int], framing: tuple[str, str]) -> None:
    stream = b"event: message_start\n" + sse(*ANTHROPIC_EVENTS, space=framing[0], end=framing[1])
    got = scan(stream, cuts)
    assert got.usage == Usage(1000, 200, 800)
    assert got.events == 4


@given(CUTS)
def test_native_streams(cuts: list[int]) -> None:
    assert scan(sse(*NATIVE_EVENTS), cuts, native=True).usage == Usage(3, 2, 0)
    assert scan(sse(*NATIVE_EVENTS), cuts).usage is None


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_bytes_give_the_same_answer_in_any_chunks(chunks: list[bytes]) -> None:
    stream = b'data: {"usage":{"prompt_tokens":1}}\n' + b"".join(chunks)
    pieces, whole = UsageScanner(wants_id=True, native=True), UsageScanner(wants_id=True, native=True)
    pieces.feed(stream[:36])
    for chunk in chunks:
        pieces.feed(chunk)
    whole.feed(stream)
    for scanner in (pieces, whole):
        scanner.close()
    assert (pieces.usage, pieces.events, pieces.done) == (whole.usage, whole.events, whole.done)
    assert pieces.usage is not None


def test_a_last_line_without_line_end_is_read_on_close() -> None:
    scanner = UsageScanner()
    scanner.feed(b'data: {"usage":{"prompt_tokens":1,"completion_tokens":2}}')
    assert (scanner.usage, scanner.events) == (None, 0)
    scanner.close()
    assert (scanner.usage, scanner.events) == (Usage(1, 2), 1)


def test_a_line_over_the_limit_is_counted_and_skipped() -> None:
    scanner = UsageScanner(max_line_bytes=100)
    scanner.feed(b"data: " + b"x" * 60)
    for _ in range(50):
        scanner.feed(b"x" * 60)
        assert scanner._held_bytes <= 160
    scanner.feed(b'x"usage"\ndata: {"usage":{"prompt_tokens":1}}\n\n')
    assert (scanner.events, scanner.usage) == (2, Usage(1))


@pytest.mark.parametrize(
    "line",
    [
        '{"usage":5}',
        '{"usage":{"prompt_tokens":"many"}}',
        '{"usage":{"prompt_tokens":1.5}}',
        '{"usage":[]}',
        '{"usage":',
        '"usage"',
        '["usage"]',
        '{"message":"usage","usage":null}',
    ],
)
def test_odd_usage_is_no_usage(line: str) -> None:
    assert scan(sse(line)).usage is None
    assert usage_from_json(line.encode()) is None


def test_one_byte_chunks_are_linear() -> None:
    stream = sse({"choices": [{"delta": {"content": "x" * 200_000}}], "usage": {"prompt_tokens": 3}})
    scanner = UsageScanner()
    begin = time.perf_counter()
    for i in range(len(stream)):
        scanner.feed(stream[i : i + 1])
    assert time.perf_counter() - begin < 2.0
    assert scanner.usage == Usage(3)


_FULL = Usage(4, 5, 3)


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}, Usage(1, 2)),
        ({"usage": {"prompt_tokens": "7", "total_tokens": "7"}}, Usage(7)),
        ({"usage": {"prompt_tokens": 7, "prompt_tokens_details": None}}, Usage(7)),
        (
            {"usage": {"input_tokens": 4, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 3}}},
            Usage(4, 5, 3),
        ),
        ({"usage": {"input_tokens": 4, "output_tokens": 5, "cache_read_input_tokens": 3}}, Usage(4, 5, 3)),
        ({"usage": {"prompt_tokens": -1, "completion_tokens": 0}}, Usage(None, 0)),
        ({"meta_info": {"prompt_tokens": 4, "completion_tokens": 5, "cached_tokens": 3}}, Usage(4, 5, 3)),
        ({"usage": {}}, Usage()),
        ({"usage": None}, None),
        ({"choices": []}, None),
    ],
)
def test_usage_of_whole_answers(answer: dict[str, object], usage: Usage | None) -> None:
    assert usage_from_json(json.dumps(answer, indent=1).encode()) == usage


@given(st.binary(max_size=200))
def test_whole_answers_never_raise(body: bytes) -> None:
    usage_from_json(body + b'"usage"')
    response_id(body)
    assert isinstance(restore_model(body, "a", "b"), bytes)


def test_response_ids() -> None:
    assert response_id(b'{"object":"response","id":"resp_9","model":"m"}') == "resp_9"
    assert response_id(b'{"object":"chat.completion","id":"chatcmpl-1"}') is None
    assert response_id(b"event: response.created\n" + sse(*RESPONSES_EVENTS)) == "resp_1"
    assert response_id(b'data: {"type":"response.created","response":{"id":"resp_') is None
    assert response_id(b'{"object":"response","id":"' + b"x" * 300 + b'"}') is None
    assert response_id(b"") is None


def test_restore_model_only_at_the_top_and_only_the_target() -> None:
    body = b'{"id":1, "model" : "t/1","x":{"model":"t/1"},"choices":[{"text":"\\"model\\":\\"t/1\\""}],"n":%d}' % 2**70
    assert restore_model(body, "t/1", "alias") == body.replace(b'"t/1"', b'"alias"', 1)
    assert restore_model(body, "other", "alias") is body
    assert restore_model(b'{"model":"t\\/1"}', "t/1", "a") == b'{"model":"a"}'
    assert restore_model(b"not json", "t", "a") == b"not json"


def restore_stream(stream: bytes, cuts: list[int]) -> bytes:
    restorer = StreamModelRestorer("target", "alias")
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [restorer.feed(stream[start:end]) for start, end in itertools.pairwise(edges)]
    return b"".join((*pieces, restorer.flush()))


@given(CUTS, FRAMING)
def test_model_names_in_streams_are_restored(cuts: list[int], framing: tuple[str, str]) -> None:
    def events(model: str) -> bytes:
        return sse(
            {"id": 1, "model": model, "choices": [{"delta": {"content": '"model": "target"', "model": "target"}}]},
            {"type": "response.created", "response": {"id": "r", "model": model, "x": {"model": "target"}}},
            {"type": "message_start", "message": {"model": model}},
            {"type": "other", "inner": {"model": "target"}},
            {"model": "else"},
            "[DONE]",
            space=framing[0],
            end=framing[1],
        )

    assert restore_stream(events("target"), cuts) == events("alias")


@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b'"model"', b"data: ", b"\n", b"{"]))))
def test_restoring_never_loses_bytes(chunks: list[bytes]) -> None:
    restorer = StreamModelRestorer("target", "alias", max_line_bytes=20)
    out = b"".join([*(restorer.feed(chunk) for chunk in chunks), restorer.flush()])
    assert out == b"".join(chunks)


def test_a_complete_event_is_passed_on_at_once() -> None:
    restorer = StreamModelRestorer("target", "alias")
    assert restorer.feed(b'data: {"model":"target"}\n\n') == b'data: {"model":"alias"}\n\n'
    assert restorer.feed(b"data: {}\n\ndata: {") == b"data: {}\n\n"
    assert restorer.flush() == b"data: {"
