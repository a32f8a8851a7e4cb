"""Request bodies: the facts taken from them, and refusals as values."""

from __future__ import annotations

import base64
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.openai.estimate import MEDIA_TOKENS
from picker.openai.fleet import FLEET_BODY_FIELDS, FLEET_HEADERS, FLEET_HEADERS_BYTES, NVEXT_FIELDS, safe_request_id
from picker.openai.parse import BadRequest, ParsedBody, parse_body
from picker.openai.rewrite import strip_fleet_fields
from picker.openai.routes import ALLOWED, PASSTHROUGH_ROUTE, RouteKind

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
PATHS = (*ALLOWED, "/unknown")


def parsed(path: str, body: object, **kwargs: bool) -> ParsedBody:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    result = parse_body(path, raw, "application/json", **kwargs)
    assert isinstance(result, ParsedBody), result
    return result


def refused(path: str, body: object, **kwargs: bool) -> BadRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    result = parse_body(path, raw, "application/json", **kwargs)
    assert isinstance(result, BadRequest), result
    assert result.error().status == 400
    return result


def test_a_chat_request() -> None:
    got = parsed(
        CHAT,
        {
            "model": "m",
            "messages": MESSAGES,
            "stream": True,
            "max_tokens": 5,
            "max_completion_tokens": 7,
            "n": 3,
            "stream_options": {"include_usage": True},
            "user": "u",
            "prompt_cache_key": "k",
            "session_id": "s",
            "cache_salt": "salt",
            "seed": 2**90,
        },
    )
    assert (got.kind, got.model, got.stream, got.max_tokens, got.n) == (RouteKind.CHAT, "m", True, 7, 3)
    assert got.include_usage
    assert (got.user, got.prompt_cache_key, got.session_id, got.cache_salt) == ("u", "k", "s", "salt")
    assert got.session_hint == "s"
    assert got.prompt is not None
    assert json.loads(bytes(got.prompt)) == MESSAGES
    assert got.prompt_bytes == len(json.dumps(MESSAGES))
    assert got.prompt_tokens_estimate == -(-got.prompt_bytes // 4)
    assert got.fleet_fields == ()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": None, "prompt_embeds": "AA=="}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/embeddings", {"input": ["x"]}),
        ("/v1/embeddings", {"messages": MESSAGES}),
        ("/v1/messages", {"messages": MESSAGES}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("/rerank", {"query": "q", "documents": ["d"]}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/classify", {"input": "x"}),
        ("/pooling", {"data": {}}),
        ("/tokenize", {"prompt": "x"}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/audio/speech", {"input": "x"}),
        ("/v1/images/generations", {"prompt": "x"}),
        ("/inference/v1/generate", {"token_ids": [1]}),
        ("/generate", {"input_ids": [1]}),
        ("/generate", {"text": "x"}),
    ],
)
def test_each_route_needs_its_prompt_members(path: str, body: dict[str, object]) -> None:
    assert parsed(path, body).prompt_tokens_estimate >= 1
    if path != "/score":
        assert refused(path, {"other": 1}).code == "missing_required_parameter"
        assert refused(path, dict.fromkeys(body)).param is not None
    assert parsed(path, {"other": 1}, strict=False).prompt_tokens_estimate >= 1


@pytest.mark.parametrize("messages", [b"[]", b"[ \n]", b"{}", b'"x"', b"null", b"5"])
def test_messages_must_be_a_list_with_something_in_it(messages: bytes) -> None:
    got = refused(CHAT, b'{"model":"m","messages":' + messages + b"}")
    assert got.param == "messages"
    assert parsed(CHAT, b'{"messages":' + messages + b"}", strict=False).model is None


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"  \n", "invalid_json", None),
        (b"no healthy upstream", "invalid_json", None),
        (b"[1]", "invalid_json", None),
        (b'"x"', "invalid_json", None),
        (b"null", "invalid_json", None),
        (b'{"model":"m"', "invalid_json", None),
        (b'{"model":"m"} {}', "invalid_json", None),
        (b"\xef\xbb\xbf{}", "invalid_json", None),
        (b'{"model":"\\ud800"}', "invalid_json", None),
        (b'{"model":"\xff"}', "invalid_json", None),
        (b'{"x":NaN}', "invalid_json", None),
        (b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "invalid_json", None),
        (b'{"model":5}', "invalid_type", "model"),
        (b'{"model":{}}', "invalid_type", "model"),
        (b'{"stream":"yes"}', "invalid_type", "stream"),
        (b'{"stream":1}', "invalid_type", "stream"),
        ('{"model":"m"}'.encode("utf-16"), "invalid_json", None),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_understood_is_refused(body: bytes, code: str, param: str | None, strict: bool) -> None:
    got = refused(CHAT, body, strict=strict)
    assert (got.code, got.param) == (code, param)
    assert got.message
    assert parsed("/unknown", body) == ParsedBody(kind=RouteKind.PASSTHROUGH)


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[1],"seed":123456789012345678901234567890,"x":1e999}',
        b'{"messages":[1],"max_tokens":1e3}',
        b'{"messages":[1],"max_tokens":"16"}',
        b'{"messages":[1],"max_tokens":-1}',
        b'{"messages":[1],"max_tokens":99999999999999999999999}',
        b'{"messages":[1],"n":{},"user":5,"session_id":[],"stream_options":7,"nvext":3,"sampling_params":[]}',
        b'{"messages":[1],"model":null,"stream":null,"user":null,"nvext":null,"n":null}',
        b'{"messages":[1],"model":""}',
        b'{"x":' + b"[" * 200 + b"]" * 200 + b',"messages":[1]}',
    ],
)
def test_members_the_router_does_not_need_are_left_to_the_engine(body: bytes) -> None:
    got = parsed(CHAT, body)
    assert (got.model, got.max_tokens, got.n, got.user, got.fleet_fields) == (None, None, 1, None, ())
    assert not got.stream


def test_the_last_of_repeated_keys_counts() -> None:
    assert parsed(CHAT, b'{"messages":[1],"model":"a","m\\u006fdel":"b"}').model == "b"


def test_model_is_required_only_when_asked() -> None:
    assert parsed(CHAT, {"messages": MESSAGES}).model is None
    assert refused(CHAT, {"messages": MESSAGES}, require_model=True).param == "model"
    assert parsed("/unknown", {"messages": MESSAGES}, require_model=True).model is None
    assert parsed("/v1/models", b"", require_model=True).kind is RouteKind.MODELS


def test_output_limits_of_the_other_apis() -> None:
    assert parsed("/v1/responses", {"input": "x", "max_output_tokens": 4}).max_tokens == 4
    native = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 9, "n": 2}}
    got = parsed("/inference/v1/generate", native)
    assert (got.max_tokens, got.n, got.prompt_ids) == (9, 2, 2)
    assert parsed("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 8}}).max_tokens == 8


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ([1, 2, 3], 3),
        ([[1, 2], [3]], 3),
        ([7], 1),
        ("1,2,3", None),
        (["1", "2"], None),
        ([], None),
        ("[1,2]", None),
    ],
)
def test_token_ids_are_counted(prompt: object, ids: int | None) -> None:
    for text in (json.dumps(prompt), json.dumps(prompt, indent=2)):
        got = parsed("/v1/completions", b'{"prompt":' + text.encode() + b"}")
        assert got.prompt_ids == ids
        if ids is not None:
            assert got.prompt_tokens_estimate == ids


def test_system_prompt_and_tools_add_to_the_size() -> None:
    bare = parsed("/v1/messages", {"messages": MESSAGES})
    full = parsed("/v1/messages", {"messages": MESSAGES, "system": "s" * 400, "tools": [{"name": "t" * 400}]})
    assert full.prompt_tokens_estimate > bare.prompt_tokens_estimate + 200


def test_inline_media_counts_per_item_and_not_per_byte() -> None:
    data = base64.b64encode(random.Random(1).randbytes(300_000)).decode()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    for part in (image, source, {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}):
        got = parsed(CHAT, {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "see"}, part]}]})
        assert got.media_items == 2
        assert 2 * MEDIA_TOKENS <= got.prompt_tokens_estimate < 2 * MEDIA_TOKENS + 200


@pytest.mark.parametrize("text", ["x" * 50_000, "word " * 10_000, "abcDEF012 " * 5_000, 'say "' + "a+b/" * 9_000])
def test_text_is_not_taken_for_media(text: str) -> None:
    got = parsed(CHAT, {"messages": [{"role": "user", "content": text}]})
    assert got.media_items == 0
    assert got.prompt_tokens_estimate >= len(text) // 4


def test_session_hints_are_bounded_and_ordered() -> None:
    assert parsed(CHAT, {"messages": MESSAGES, "user": "u" * 513}).session_hint is None
    assert parsed(CHAT, {"messages": MESSAGES, "user": "u", "prompt_cache_key": "k"}).session_hint == "k"
    got = parsed("/v1/responses", {"input": "x", "previous_response_id": "resp_1"})
    assert got.previous_response_id == "resp_1"


@pytest.mark.parametrize("field", FLEET_BODY_FIELDS)
def test_every_fleet_field_is_seen_and_stripped(field: str) -> None:
    for value in ("1", "null", '{"remote_host":"10.0.0.1"}'):
        for name in (field, f"\\u{ord(field[0]):04x}{field[1:]}"):
            body = f'{{"messages":[1],"{name}":{value},"keep":{2**70}}}'.encode()
            got = parsed(CHAT, body)
            assert got.fleet_fields == (field,)
            assert strip_fleet_fields(body, got.fleet_fields) == f'{{"messages":[1],"keep":{2**70}}}'.encode()


@pytest.mark.parametrize("field", NVEXT_FIELDS)
def test_nvext_pins_are_stripped_and_its_hints_stay(field: str) -> None:
    body = f'{{"messages":[1],"nvext":{{"annotations":["a"],"{field}":7, "cache_salt":"s"}}}}'.encode()
    got = parsed(CHAT, body)
    assert got.fleet_fields == (f"nvext.{field}",)
    kept = strip_fleet_fields(body, got.fleet_fields)
    assert kept == b'{"messages":[1],"nvext":{"annotations":["a"],"cache_salt":"s"}}'
    assert parsed(CHAT, kept).fleet_fields == ()


def test_fleet_fields_hidden_in_extra_arguments_are_stripped() -> None:
    body = (
        b'{"token_ids":[1],"sampling_params":{"max_tokens":1,"extra_args":{"kv_transfer_params":{"remote_host":"h"},'
        b'"k":1}},"vllm_xargs":{"kv_transfer_params":"x"},"request_id":"a___prefill_addr_h:1___decode_addr_i:2_b"}'
    )
    got = parsed("/inference/v1/generate", body)
    assert set(got.fleet_fields) == {
        "sampling_params.extra_args.kv_transfer_params",
        "vllm_xargs.kv_transfer_params",
        "request_id",
    }
    expected = b'{"token_ids":[1],"sampling_params":{"max_tokens":1,"extra_args":{"k":1}},"vllm_xargs":{}}'
    assert strip_fleet_fields(body, got.fleet_fields) == expected


def test_names_of_fleet_fields_inside_prompts_are_left_alone() -> None:
    body = b'{"messages":[{"content":"\\"kv_transfer_params\\": 1","bootstrap_host":1}],"x":{"nvext":{"dp_rank":1}}}'
    got = parsed(CHAT, body)
    assert got.fleet_fields == ()
    assert strip_fleet_fields(body, got.fleet_fields) is body


def test_fleet_headers_are_lower_case_in_both_types() -> None:
    assert {name.decode() for name in FLEET_HEADERS_BYTES} == FLEET_HEADERS
    assert all(name == name.lower() for name in FLEET_HEADERS)
    assert {"x-prefiller-host-port", "x-data-parallel-rank", "x-dynamo-worker-instance-id"} <= FLEET_HEADERS


@pytest.mark.parametrize(
    ("request_id", "safe"),
    [
        ("req-1", True),
        ("", False),
        ("a" * 257, False),
        ("a b", False),
        ("a\r\nx: y", False),
        ("é", False),
        ("___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.2:2_abc", False),
    ],
)
def test_request_ids_that_may_go_upstream(request_id: str, safe: bool) -> None:
    assert safe_request_id(request_id) is safe


@given(st.binary(max_size=300), st.sampled_from(PATHS), st.booleans(), st.booleans())
def test_never_raises_on_arbitrary_bytes(body: bytes, path: str, strict: bool, require_model: bool) -> None:
    result = parse_body(path, body, None, strict=strict, require_model=require_model)
    assert isinstance(result, ParsedBody | BadRequest)


MEMBER_NAMES = (*FLEET_BODY_FIELDS, "model", "stream", "messages", "prompt", "n", "max_tokens", "nvext", "user")
MEMBER_NAMES += ("sampling_params", "stream_options", "vllm_xargs", "request_id", "input", "token_ids", "session_id")
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), st.text(st.characters(), max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from((*NVEXT_FIELDS, "max_tokens", "n")), st.text(max_size=3)), inner),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(MEMBER_NAMES), JSON, max_size=8), st.sampled_from(PATHS), st.booleans())
def test_never_raises_on_objects_of_wrong_types(body: dict[str, object], path: str, strict: bool) -> None:
    raw = json.dumps(body, ensure_ascii=True).encode()
    result = parse_body(path, raw, "application/json", strict=strict)
    if isinstance(result, ParsedBody) and result.is_json:
        stripped = strip_fleet_fields(raw, result.fleet_fields)
        again = parse_body(path, stripped, None, strict=False)
        assert isinstance(again, ParsedBody)
        assert again.fleet_fields == ()
        assert again.model == result.model
        assert not set(json.loads(stripped)) & set(FLEET_BODY_FIELDS)


def test_passthrough_reads_json_when_it_is() -> None:
    body = {"model": "m", "prompt": "x", "stream": True, "kv_transfer_params": {}}
    result = parse_body(PASSTHROUGH_ROUTE, json.dumps(body).encode(), None, require_model=True)
    assert isinstance(result, ParsedBody)
    assert (result.model, result.stream, result.fleet_fields) == ("m", True, ("kv_transfer_params",))
    raw = parse_body(PASSTHROUGH_ROUTE, b"\x00\x01", "application/grpc")
    assert raw == ParsedBody(kind=RouteKind.PASSTHROUGH)
