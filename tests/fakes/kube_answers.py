"""How a fake API server spells its answers."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from tests.fakes.kube_state import Json

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
# The API server compresses lists from this size on.
_GZIP_FROM_BYTES = 128 * 1024


def watch_line(event: str, found: Json) -> bytes:
    return msgspec.json.encode({"type": event, "object": found}) + b"\n"


def not_served() -> web.Response:
    """What the API server says of kinds it never heard of."""
    return web.Response(status=404, text="404 page not found\n")


def status_object(code: int, message: str) -> Json:
    reason = _REASONS.get(code, "")
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def refuse(status: int, message: str, retry_after_s: int | None = None) -> web.Response:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return json_answer(status_object(status, message), status, headers)


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(value)
    response = web.Response(status=status, body=body, content_type="application/json", headers=headers)
    if len(body) >= _GZIP_FROM_BYTES:
        response.enable_compression(web.ContentCoding.gzip)
    return response
