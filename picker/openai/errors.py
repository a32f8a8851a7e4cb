"""Our own error answers: the table of codes, their bodies in both dialects, and their headers.

Shapes as the `openai` and `anthropic` SDKs read them: nested `error`, string `code`, `retry-after-ms` before
`retry-after`, `x-should-retry`. Knows nothing about how an answer is sent.
"""

from __future__ import annotations

import html
import re

import msgspec

from picker.openai.routes import Dialect

JSON_CONTENT_TYPE = "application/json"
DEFAULT_RETRY_AFTER_MS = 500
EXCERPT_CHARS = 300
_EXCERPT_SOURCE_BYTES = 4_096
_MAX_MESSAGE_CHARS = 2_000

_TAG = re.compile(r"<[^<>]*+>?")
_SPACES = re.compile(r"\s+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

# The status codes the Anthropic API documents, and the nearest one for the others.
_ANTHROPIC_TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ApiError(msgspec.Struct, frozen=True, kw_only=True):
    """One error answer. `type` is the OpenAI type; the Anthropic type follows from `status`.

    `should_retry` overrules the SDK's own judgement of the status; None leaves it alone.
    """

    status: int
    code: str
    message: str
    type: str
    param: str | None = None
    retry_after_ms: int | None = None
    should_retry: bool | None = None
    dropped_reason: str | None = None


class _CodedError(msgspec.Struct):
    code: int | str


class _StreamError(msgspec.Struct):
    error: _CodedError


def render_error(error: ApiError, *, dialect: Dialect = Dialect.OPENAI, request_id: str | None = None) -> bytes:
    """The JSON body of an error answer. `request_id` is part of the Anthropic shape only."""
    message = clean_text(error.message)
    if dialect is Dialect.ANTHROPIC:
        shape: dict[str, object] = {
            "type": "error",
            "error": {"type": anthropic_type(error.status), "message": message},
        }
        if request_id is not None:
            shape["request_id"] = clean_text(request_id)
        return msgspec.json.encode(shape)
    detail = {"message": message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": detail})


def error_headers(error: ApiError) -> list[tuple[str, str]]:
    """Headers of an error answer, lower-case names, without content-length and request id."""
    headers = [("content-type", JSON_CONTENT_TYPE)]
    if error.retry_after_ms is not None:
        wait_ms = max(0, error.retry_after_ms)
        headers.append(("retry-after", str(max(1, -(-wait_ms // 1_000)))))
        headers.append(("retry-after-ms", str(wait_ms)))
    if error.should_retry is not None:
        headers.append(("x-should-retry", "true" if error.should_retry else "false"))
    if error.dropped_reason is not None:
        headers.append(("x-llm-d-request-dropped-reason", error.dropped_reason))
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return headers


def sse_error_event(error: ApiError, dialect: Dialect = Dialect.OPENAI) -> bytes:
    """One server-sent event that ends a stream in error. Precede it by a blank line if a line was cut."""
    prefix = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
    return prefix + b"data: " + render_error(error, dialect=dialect) + b"\n\n"


def anthropic_type(status: int) -> str:
    """The Anthropic error type for an HTTP status."""
    return _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def wrap_engine_error(
    status: int, content_type: str | None, body: bytes, *, dialect: Dialect = Dialect.OPENAI
) -> bytes | None:
    """An engine's error body in our shape, or None when it is JSON and passes byte for byte.

    The text is cut to `EXCERPT_CHARS`, without HTML tags. A body that claims to be JSON and is not is wrapped too.
    """
    if _is_json(content_type, body):
        return None
    excerpt = _excerpt(body)
    said = f": {excerpt}" if excerpt else " without a message"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = ApiError(
        status=status, code="upstream_error", type=kind, message=f"the model server answered {status}{said}"
    )
    return render_error(error, dialect=dialect)


def refused_stream(first: bytes) -> tuple[int, bytes] | None:
    """Status and JSON of an event stream whose first event is an error of the engine (5xx), None for any other.

    vLLM sends it when the engine core died, or refused the request, after the headers of the stream were sent.
    """
    if not first.startswith(b"data:") or b'"error"' not in first[:64]:
        return None
    document = first[5:].split(b"\n", 1)[0].strip()
    try:
        code = msgspec.json.decode(document, type=_StreamError).error.code
    except (msgspec.MsgspecError, ValueError):
        return None
    status = int(code) if isinstance(code, int) or code.isdigit() else 0
    return (status, document) if 500 <= status < 600 else None


def engine_died(body: bytes) -> bool:
    """Whether a 500 is the front end's way of saying that its engine core is gone, as vLLM words it."""
    return b"EngineCore" in body or b"EngineDeadError" in body


def clean_text(text: str) -> str:
    """Text that any JSON encoder and any log takes: no lone surrogates, no control characters, bounded."""
    return _CONTROL.sub("\ufffd", text[:_MAX_MESSAGE_CHARS])


def _is_json(content_type: str | None, body: bytes) -> bool:
    claims = content_type is not None and "json" in content_type.lower()
    if not claims and body[:64].lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def _excerpt(body: bytes) -> str:
    text = body[:_EXCERPT_SOURCE_BYTES].decode("utf-8", "replace")
    if "<" in text:
        text = html.unescape(_TAG.sub(" ", _without_elements(text, ("script", "style"))))
    text = _SPACES.sub(" ", clean_text(text)).strip()
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1].rstrip() + "…"


def _without_elements(text: str, names: tuple[str, ...]) -> str:
    """Drop HTML elements whose content is not text; an unclosed one takes the rest with it."""
    for name in names:
        kept: list[str] = []
        lowered = text.lower()
        pos = 0
        while (start := lowered.find(f"<{name}", pos)) >= 0:
            kept.append(text[pos:start])
            end = lowered.find(f"</{name}", start)
            closing = lowered.find(">", end) if end >= 0 else -1
            pos = len(text) if closing < 0 else closing + 1
        kept.append(text[pos:])
        text = " ".join(kept)
    return text


def bad_request(message: str, *, param: str | None = None, code: str = "bad_request") -> ApiError:
    """400: the request cannot be understood."""
    return ApiError(status=400, code=code, type="invalid_request_error", message=message, param=param)


def not_found(path: str) -> ApiError:
    """404: the path is not one we relay."""
    message = f"unknown path: {path[:200]}"
    return ApiError(status=404, code="not_found", type="invalid_request_error", message=message)


def model_not_found(model: str) -> ApiError:
    """404: every endpoint's model list is known and fresh, and none has this model."""
    return ApiError(
        status=404,
        code="model_not_found",
        type="invalid_request_error",
        param="model",
        message=f"the model `{model[:200]}` does not exist on any endpoint",
    )


def response_gone(response_id: str) -> ApiError:
    """404: no endpoint is known to hold this stateful response any more."""
    return ApiError(
        status=404,
        code="response_gone",
        type="invalid_request_error",
        param="previous_response_id",
        message=f"the response `{response_id[:200]}` is not held by any endpoint any more",
        should_retry=False,
    )


def method_not_allowed(method: str, allowed: tuple[str, ...]) -> ApiError:
    """405: the path exists, the method does not. Send `allow` as well."""
    message = f"method {method[:20]} is not allowed here; use {' or '.join(allowed)}"
    return ApiError(status=405, code="method_not_allowed", type="invalid_request_error", message=message)


def request_too_large(limit_bytes: int) -> ApiError:
    """413: one body over its limit."""
    message = f"the request body is larger than {limit_bytes} bytes"
    return ApiError(status=413, code="request_too_large", type="invalid_request_error", message=message)


def headers_too_large(limit_bytes: int) -> ApiError:
    """431: header section over its limit."""
    message = f"the request headers are larger than {limit_bytes} bytes"
    return ApiError(status=431, code="headers_too_large", type="invalid_request_error", message=message)


def saturated(
    message: str = "all endpoints are saturated; try again shortly", *, retry_after_ms: int = DEFAULT_RETRY_AFTER_MS
) -> ApiError:
    """429: shed because the pool is full."""
    return ApiError(
        status=429,
        code="saturated",
        type="rate_limit_error",
        message=message,
        retry_after_ms=retry_after_ms,
        dropped_reason="rejected-saturated",
    )


def memory_limit(*, retry_after_ms: int = DEFAULT_RETRY_AFTER_MS) -> ApiError:
    """429: the bodies in memory together are over their limit."""
    return ApiError(
        status=429,
        code="memory_limit",
        type="rate_limit_error",
        message="too many request bytes are in flight; try again shortly",
        retry_after_ms=retry_after_ms,
        dropped_reason="rejected-saturated",
    )


def no_endpoints(message: str = "no endpoint is configured or discovered for this request") -> ApiError:
    """503: the pool is empty."""
    return _unavailable("no_endpoints", message)


def no_ready_endpoints(message: str = "no endpoint is ready for this request") -> ApiError:
    """503: endpoints exist, none may take the request now."""
    return _unavailable("no_ready_endpoints", message)


def subset_empty(message: str = "no ready endpoint is in the subset the proxy asked for") -> ApiError:
    """503: the proxy's subset hint leaves no endpoint."""
    return _unavailable("subset_empty", message)


def pool_not_found(message: str = "no endpoint is in the pool this request asks for") -> ApiError:
    """503: the pool does not exist, or nothing is in it."""
    return _unavailable("pool_not_found", message)


def shutting_down() -> ApiError:
    """503: this process drains."""
    return _unavailable("shutting_down", "this gateway is shutting down", dropped_reason="rejected-shutting-down")


def upstream_unreachable(message: str = "the model server cannot be reached", *, retried: bool = False) -> ApiError:
    """502: connect errors only. `retried`: other endpoints were tried too, so the client need not."""
    return _upstream(502, "upstream_unreachable", message, retried=retried)


def upstream_reset(message: str = "the model server closed the connection", *, retried: bool = False) -> ApiError:
    """502: the connection ended before the answer did."""
    return _upstream(502, "upstream_reset", message, retried=retried)


def upstream_timeout(message: str = "the model server did not answer in time", *, retried: bool = False) -> ApiError:
    """504: one of the upstream deadlines passed."""
    return _upstream(504, "upstream_timeout", message, retried=retried)


def internal_error(message: str = "internal error") -> ApiError:
    """500: a bug of ours. The message must not tell internals."""
    return ApiError(status=500, code="internal_error", type="server_error", message=message)


def _unavailable(code: str, message: str, *, dropped_reason: str = "rejected-no-endpoints") -> ApiError:
    return ApiError(
        status=503,
        code=code,
        type="server_error",
        message=message,
        retry_after_ms=DEFAULT_RETRY_AFTER_MS,
        dropped_reason=dropped_reason,
    )


def _upstream(status: int, code: str, message: str, *, retried: bool) -> ApiError:
    return ApiError(
        status=status, code=code, type="server_error", message=message, should_retry=False if retried else None
    )
