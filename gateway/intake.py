"""From an ASGI request to a request the brain understands: route, body within its bounds, parse, edits.

Everything wrong with a request is found here, as an ApiError value, before any endpoint hears of it. It chooses
nothing and sends nothing.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from gateway.budget import BodyBudget
from picker.core.values import InferenceRequest
from picker.director import Director
from picker.openai import errors
from picker.openai.edit import EditError
from picker.openai.errors import ApiError
from picker.openai.fleet import OBJECTIVE_HEADERS, POOL_HEADER, safe_request_id
from picker.openai.parse import BadRequest, ParsedBody, parse_body
from picker.openai.rewrite import rewrite_model, strip_fleet_fields
from picker.openai.routes import PASSTHROUGH_ROUTE, Dialect, Route, RouteKind, allowed, target_path

Scope = MutableMapping[str, Any]
Headers = Mapping[bytes, bytes]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Session hints in headers, most specific first: the reference's session header, then what agents commonly send.
_SESSION_HEADERS = (b"x-session-id", b"x-conversation-id")
_POOL_HEADERS = (POOL_HEADER.encode(),)
_OBJECTIVE_HEADERS = tuple(name.encode() for name in OBJECTIVE_HEADERS)
# Clients choose these texts; real ones are short.
_NAME_CHARS = 512
_DIGITS = re.compile(rb"[0-9]{1,20}")


_LATE = ApiError(
    status=408,
    code="request_timeout",
    type="invalid_request_error",
    message="the request body did not arrive in time",
)


class ClientGone(Exception):
    """The client closed its connection while its request was read."""


class BodyLimits(msgspec.Struct, frozen=True):
    """Bounds on one request body."""

    size_bytes: int
    timeout_s: float


class Intake(msgspec.Struct):
    """One accepted request: what the scheduler sees, what the engine gets, and what was read of it.

    `rename` is the name the engine knows and the one the client used; `stored_id` the response it builds upon.
    """

    request: InferenceRequest
    route: Route
    body: bytes
    target: str
    parsed: ParsedBody | None = None
    rename: tuple[str, str] | None = None
    stored_id: str | None = None


class BodyReader:
    """Reads one body against its own limit and the budget of all bodies. `release` gives the budget back, once."""

    __slots__ = ("_budget", "_late_at", "_limits", "_reserved_bytes")

    def __init__(self, budget: BodyBudget, limits: BodyLimits) -> None:
        self._budget = budget
        self._limits = limits
        self._reserved_bytes = 0
        self._late_at: float | None = None

    async def read(self, headers: Headers, receive: Receive, *, arrived: bool) -> bytes | ApiError:
        """The whole body. A declared length is reserved before a byte is read; an undeclared one as it comes.

        `arrived` says that the server already holds all of it, so no timer is needed. Raises ClientGone when the
        client leaves first.
        """
        declared = headers.get(b"content-length")
        if declared is not None and _DIGITS.fullmatch(declared):
            refusal = self._reserve(int(declared))
            if refusal is not None:
                return refusal
        message = await receive() if arrived else await self._next(receive)
        if isinstance(message, ApiError):
            return message
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return self._reserve(len(body)) or body
        parts = [body]
        size_bytes = len(body)
        while message.get("more_body", False):
            refusal = self._reserve(size_bytes)
            if refusal is not None:
                return refusal
            message = await self._next(receive)
            if isinstance(message, ApiError):
                return message
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size_bytes += len(parts[-1])
        return self._reserve(size_bytes) or b"".join(parts)

    def release(self) -> None:
        """Gives back what was reserved. Idempotent."""
        self._budget.release(self._reserved_bytes)
        self._reserved_bytes = 0

    async def _next(self, receive: Receive) -> MutableMapping[str, Any] | ApiError:
        if self._late_at is None:
            # One deadline for the whole body: drops of it must not hold a place and a reservation for ever.
            self._late_at = asyncio.get_running_loop().time() + self._limits.timeout_s
        try:
            async with asyncio.timeout_at(self._late_at):
                return await receive()
        except TimeoutError:
            return _LATE

    def _reserve(self, total_bytes: int) -> ApiError | None:
        if total_bytes > self._limits.size_bytes:
            return errors.request_too_large(self._limits.size_bytes)
        missing = total_bytes - self._reserved_bytes
        if missing > 0:
            if not self._budget.reserve(missing):
                return errors.memory_limit()
            self._reserved_bytes = total_bytes
        return None


def request_id(headers: Headers) -> str:
    """The client's `x-request-id` when it is harmless, otherwise a new one."""
    given = headers.get(b"x-request-id")
    if given is not None:
        text = given.decode("latin-1")
        if safe_request_id(text):
            return text
    # An identifier, not a secret: the system's entropy would cost a system call per request.
    return f"{random.getrandbits(128):032x}"


def find_route(method: str, raw_path: bytes, extra_paths: frozenset[str]) -> Route | ApiError:
    """The route of a path the gateway relays: the known ones, those the configuration allows, and their twins below
    `/openai`.
    """
    try:
        path = raw_path.decode("ascii")
    except UnicodeDecodeError:
        return errors.not_found("(not ASCII)")
    route = allowed(path)
    if route is None:
        if extra_paths.isdisjoint((path, target_path(path, ""))):
            return errors.not_found(path)
        route = PASSTHROUGH_ROUTE
    if method not in route.methods:
        return errors.method_not_allowed(method, route.methods)
    return route


def allow_header(raw_path: bytes) -> bytes:
    """The value of the Allow header that goes with a 405."""
    route = allowed(raw_path.decode("latin-1")) or PASSTHROUGH_ROUTE
    return ", ".join(route.methods).encode()


def understand(
    route: Route,
    body: bytes,
    headers: Headers,
    *,
    target: str,
    key: int,
    ident: str,
    now: float,
    director: Director,
) -> Intake | ApiError:
    """Parses a body, takes out what clients must not set, and renames the model if the configuration or the cluster
    says so. The director is only asked what names mean.
    """
    content_type = headers.get(b"content-type")
    parsed = parse_body(route, body, content_type.decode("latin-1") if content_type is not None else None)
    if isinstance(parsed, BadRequest):
        return parsed.error()
    pool = director.pool_named(_named(headers, _POOL_HEADERS))
    objective = _named(headers, _OBJECTIVE_HEADERS)
    target_model = director.target_model(parsed.model, pool) if parsed.model is not None else None
    if target_model == parsed.model:
        target_model = None
    rename = None
    try:
        if parsed.fleet_fields:
            body = strip_fleet_fields(body, parsed.fleet_fields)
        if target_model is not None and parsed.model is not None:
            if parsed.fleet_fields and parsed.model_spans:
                return errors.bad_request("the request cannot be rewritten")
            body = rewrite_model(body, parsed, target_model)
            rename = (target_model, parsed.model)
    except EditError:
        return errors.bad_request("the request body cannot be rewritten safely", code="invalid_json")
    request = InferenceRequest(
        key=key,
        id=ident,
        received_at=now,
        path=route.name,
        model=parsed.model,
        target_model=target_model,
        stream=parsed.stream,
        prompt_tokens=parsed.prompt_tokens_estimate,
        max_output_tokens=parsed.max_tokens if route.generates else 0,
        session=_named(headers, _SESSION_HEADERS) or parsed.session_hint,
        pool=pool,
        objective=objective,
        priority=director.priority(objective, parsed.model, pool),
        strict_model=True,
    )
    return Intake(request, route, body, target, parsed, rename, route.resource_id or parsed.previous_response_id)


def dialect_of(raw_path: bytes) -> Dialect:
    """Whose error shape the client of a path expects, known before the route is."""
    return Dialect.ANTHROPIC if raw_path.startswith((b"/v1/messages", b"/openai/v1/messages")) else Dialect.OPENAI


def is_stateful(kind: RouteKind) -> bool:
    """Whether answers of this kind stay on the engine under an id."""
    return kind in (RouteKind.RESPONSES, RouteKind.RESPONSE_STATE)


def _named(headers: Headers, names: tuple[bytes, ...]) -> str | None:
    """The first value there is, of bounded length."""
    for name in names:
        value = headers.get(name)
        if value:
            return value.decode("latin-1")[:_NAME_CHARS]
    return None


def target_of(scope: Scope) -> str:
    """Path and query as the client sent them; where an engine has that path is another matter (`target_path`)."""
    path: str = scope["raw_path"].decode("ascii")
    query: bytes = scope["query_string"]
    return f"{path}?{query.decode('latin-1')}" if query else path
