"""Error answers in both dialects, and engine errors that are not JSON."""

from __future__ import annotations

import json
from typing import Any, cast

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.openai import errors
from picker.openai.errors import ApiError, error_headers, render_error, sse_error_event, wrap_engine_error
from picker.openai.routes import Dialect

TABLE: dict[str, tuple[ApiError, int, str]] = {
    "bad_request": (errors.bad_request("m", param="p"), 400, "invalid_request_error"),
    "not_found": (errors.not_found("/x"), 404, "not_found_error"),
    "model_not_found": (errors.model_not_found("m"), 404, "not_found_error"),
    "response_gone": (errors.response_gone("r"), 404, "not_found_error"),
    "method_not_allowed": (errors.method_not_allowed("PUT", ("GET",)), 405, "invalid_request_error"),
    "request_too_large": (errors.request_too_large(1), 413, "request_too_large"),
    "headers_too_large": (errors.headers_too_large(1), 431, "request_too_large"),
    "saturated": (errors.saturated(), 429, "rate_limit_error"),
    "memory_limit": (errors.memory_limit(), 429, "rate_limit_error"),
    "no_endpoints": (errors.no_endpoints(), 503, "overloaded_error"),
    "no_ready_endpoints": (errors.no_ready_endpoints(), 503, "overloaded_error"),
    "subset_empty": (errors.subset_empty(), 503, "overloaded_error"),
    "shutting_down": (errors.shutting_down(), 503, "overloaded_error"),
    "upstream_unreachable": (errors.upstream_unreachable(), 502, "api_error"),
    "upstream_reset": (errors.upstream_reset(), 502, "api_error"),
    "upstream_timeout": (errors.upstream_timeout(), 504, "timeout_error"),
    "internal_error": (errors.internal_error(), 500, "api_error"),
}


@pytest.mark.parametrize("code", sorted(TABLE))
def test_every_code_renders_in_both_dialects(code: str) -> None:
    error, status, anthropic_type = TABLE[code]
    assert (error.status, error.code) == (status, code)
    body = json.loads(render_error(error))
    assert body == {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": code},
    }
    other = json.loads(render_error(error, dialect=Dialect.ANTHROPIC, request_id="r-1"))
    assert other == {
        "type": "error",
        "error": {"type": anthropic_type, "message": error.message},
        "request_id": "r-1",
    }
    assert ("content-type", "application/json") in error_headers(error)


@pytest.mark.parametrize(
    ("wait_ms", "seconds"), [(0, "1"), (1, "1"), (1_000, "1"), (1_001, "2"), (119_500, "120"), (-5, "1")]
)
def test_retry_after_is_whole_seconds_rounded_up(wait_ms: int, seconds: str) -> None:
    headers = dict(error_headers(errors.saturated(retry_after_ms=wait_ms)))
    assert headers["retry-after"] == seconds
    assert headers["retry-after-ms"] == str(max(0, wait_ms))
    assert headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
    assert "x-should-retry" not in headers


def test_retry_advice_is_sent_only_when_there_is_one() -> None:
    assert dict(error_headers(errors.upstream_reset(retried=True)))["x-should-retry"] == "false"
    forced = ApiError(status=503, code="c", type="t", message="m", should_retry=True)
    assert dict(error_headers(forced))["x-should-retry"] == "true"
    assert [name for name, _ in error_headers(errors.internal_error())] == ["content-type"]
    unknown_key = ApiError(status=401, code="c", type="t", message="m")
    assert dict(error_headers(unknown_key))["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.bad_request("m", param="model"), openai.BadRequestError),
        (errors.model_not_found("m"), openai.NotFoundError),
        (errors.saturated(), openai.RateLimitError),
        (errors.no_endpoints(), openai.InternalServerError),
    ],
)
def test_the_sdk_reads_code_type_and_param(error: ApiError, kind: type[openai.APIStatusError]) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        headers = [*error_headers(error), ("x-request-id", "r-1")]
        return httpx.Response(error.status, headers=headers, content=render_error(error))

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as http,
        openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=cast(Any, http), max_retries=0) as client,
        pytest.raises(kind) as caught,
    ):
        client.models.list()
    raised = caught.value
    assert (raised.code, raised.type, raised.param) == (error.code, error.type, error.param)
    assert error.message in raised.message
    assert raised.request_id == "r-1"


def test_the_sdk_raises_on_an_error_event() -> None:
    error = errors.upstream_reset("the model server went away")
    stream = b'data: {"id":"1","choices":[]}\n\n' + sse_error_event(error)

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=stream)

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as http,
        openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=cast(Any, http), max_retries=0) as client,
    ):
        chunks = client.chat.completions.create(model="m", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="went away") as caught:
            list(chunks)
    assert caught.value.code == "upstream_reset"


def test_the_anthropic_error_event_is_named() -> None:
    event = sse_error_event(errors.upstream_timeout(), Dialect.ANTHROPIC)
    name, data, *rest = event.split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["error"]["type"] == "timeout_error"
    assert rest == [b"", b""]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"error":{"message":"x","code":400}}'),
        ("application/json; charset=utf-8", b'"Internal Server Error"'),
        ("text/plain", b' {"detail":"Not Found"}'),
        (None, b'[{"x":12345678901234567890}]'),
    ],
)
def test_json_errors_of_engines_pass(content_type: str | None, body: bytes) -> None:
    assert wrap_engine_error(500, content_type, body) is None


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        ("text/plain", b"Internal Server Error", ": Internal Server Error"),
        ("text/plain", b"404", ": 404"),
        ("text/html", b"<html><script>x()</script><h1>Bad &amp; ugly</h1>\n<p>no</p>", ": Bad & ugly no"),
        ("text/html", b"<script>never closed", " without a message"),
        ("text/html", b"a <b", ": a"),
        ("application/json", b'{"error":', ': {"error":'),
        ("application/json", b"", " without a message"),
        (None, b"\xff\x00\x1b[31mred", ": \ufffd\ufffd\ufffd[31mred"),
        (None, b"[" * 5_000, ": " + "[" * 299 + "…"),
    ],
)
def test_other_errors_of_engines_are_wrapped(content_type: str | None, body: bytes, said: str) -> None:
    wrapped = wrap_engine_error(502, content_type, body)
    assert wrapped is not None
    error = json.loads(wrapped)["error"]
    assert error["message"] == "the model server answered 502" + said
    assert (error["code"], error["type"]) == ("upstream_error", "server_error")
    other = wrap_engine_error(404, content_type, body, dialect=Dialect.ANTHROPIC)
    assert other is not None
    assert json.loads(other)["error"]["type"] == "not_found_error"


@given(st.binary(max_size=300), st.one_of(st.none(), st.sampled_from(["text/html", "application/json"])))
def test_wrapping_never_raises(body: bytes, content_type: str | None) -> None:
    wrapped = wrap_engine_error(500, content_type, body)
    if wrapped is None:
        json.loads(body.decode("utf-8", "replace"))
    else:
        assert len(json.loads(wrapped)["error"]["message"]) < 400


@given(st.text(st.characters(), max_size=50))
def test_any_message_renders_as_one_line_of_json(message: str) -> None:
    event = sse_error_event(errors.bad_request(message))
    assert event.count(b"\n") == 2
    assert "error" in json.loads(event.removeprefix(b"data: "))


def test_messages_are_bounded() -> None:
    assert len(render_error(errors.bad_request("x" * 1_000_000))) < 3_000
    assert len(errors.model_not_found("m" * 10_000).message) < 300
    assert len(errors.not_found("/" * 10_000).message) < 300
