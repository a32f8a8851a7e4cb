"""The way back: an engine's answer to the client, chunk by chunk as it arrives.

It starts after the first body byte, when no other endpoint may be tried any more. Here the usage is read as it passes
by, the client's model name is restored where it was rewritten, and an engine that dies in the middle of a stream
becomes an error event instead of a silent end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from picker.core.events import FailureKind, Outcome, Usage
from picker.director import Guard
from picker.openai import errors
from picker.openai.rewrite import StreamModelRestorer, restore_model
from picker.openai.routes import Dialect
from picker.openai.usage import UsageScanner, response_id, usage_from_json
from picker.upstream.connection import Response

Send = Callable[[dict[str, Any]], Awaitable[None]]

# A non-streaming answer is kept up to this size to read its usage; generated text rarely passes 1 MB.
KEPT_ANSWER_BYTES = 4 * 2**20


class Committed(msgspec.Struct):
    """An attempt that produced its first body byte: from here on the answer belongs to the client."""

    response: Response
    first: bytes


class Delivered(msgspec.Struct, frozen=True):
    """How an answer ended, and what was learnt from it."""

    outcome: Outcome
    usage: Usage | None = None
    response_id: str | None = None


class Delivery:
    """Sends one committed answer to one client."""

    def __init__(
        self,
        committed: Committed,
        send: Send,
        *,
        dialect: Dialect,
        rename: tuple[str, str] | None,
        wants_id: bool,
        on_chunk: Callable[[], None],
    ) -> None:
        self._response = committed.response
        self._first = committed.first
        self._send = send
        self._dialect = dialect
        self._rename = rename
        self._wants_id = wants_id
        self._on_chunk = on_chunk
        self._started = False
        self._is_stream = self._response.header(b"content-type").startswith(b"text/event-stream")
        self._is_plain = not self._response.header(b"content-encoding")

    async def run(self, headers: list[tuple[bytes, bytes]], guard: Guard) -> Delivered:
        """Sends everything. Raises CancelledError when the client left; an eviction ends the stream with an error
        event.
        """
        try:
            if self._is_stream:
                return await self._stream(headers)
            return await self._whole(headers)
        except asyncio.CancelledError:
            if guard.absorb() is None:
                raise
            return await self._break_off(errors.upstream_timeout("the model server stopped answering"), Outcome.TIMEOUT)

    async def _stream(self, headers: list[tuple[bytes, bytes]]) -> Delivered:
        scanner = UsageScanner(wants_id=self._wants_id)
        restorer = StreamModelRestorer(*self._rename) if self._rename is not None and self._is_plain else None
        if restorer is not None:
            headers = [item for item in headers if item[0].lower() != b"content-length"]
        await self._start(headers)
        chunk: bytes | FailureKind = self._first
        while chunk:
            if isinstance(chunk, FailureKind):
                return await self._break_off(errors.upstream_reset("the model server died in the middle of its answer"))
            scanner.feed(chunk)
            out = chunk if restorer is None else restorer.feed(chunk)
            if out:
                await self._send({"type": "http.response.body", "body": out, "more_body": True})
            self._on_chunk()
            chunk = await self._response.read()
        rest = restorer.flush() if restorer is not None else b""
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})
        scanner.close()
        return Delivered(Outcome.COMPLETED, _usage(scanner.usage), scanner.response_id)

    async def _whole(self, headers: list[tuple[bytes, bytes]]) -> Delivered:
        if self._rename is not None and self._is_plain:
            return await self._renamed(headers, self._rename)
        await self._start(headers)
        kept: list[bytes] = []
        kept_bytes = 0
        chunk: bytes | FailureKind = self._first
        while chunk:
            if isinstance(chunk, FailureKind):
                return Delivered(Outcome.FAILED)
            finished = self._response.finished
            await self._send({"type": "http.response.body", "body": chunk, "more_body": not finished})
            kept_bytes += len(chunk)
            if kept_bytes <= KEPT_ANSWER_BYTES:
                kept.append(chunk)
            if finished:
                break
            self._on_chunk()
            chunk = await self._response.read()
        else:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return self._learn(b"".join(kept) if kept_bytes <= KEPT_ANSWER_BYTES else b"")

    async def _renamed(self, headers: list[tuple[bytes, bytes]], rename: tuple[str, str]) -> Delivered:
        """An answer whose model name changes must be read to its end: its length changes too."""
        parts = [self._first]
        while not self._response.finished:
            chunk = await self._response.read()
            if isinstance(chunk, FailureKind):
                return await self._break_off(errors.upstream_reset("the model server died in the middle of its answer"))
            if not chunk:
                break
            parts.append(chunk)
            self._on_chunk()
        body = b"".join(parts)
        learnt = self._learn(body)
        body = restore_model(body, *rename)
        kept = [item for item in headers if item[0].lower() != b"content-length"]
        await self._start([*kept, (b"content-length", str(len(body)).encode())])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        return learnt

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": self._response.status, "headers": headers})

    def _learn(self, body: bytes) -> Delivered:
        if not body or not self._is_plain or self._response.status >= 300:
            return Delivered(Outcome.COMPLETED)
        ident = response_id(body) if self._wants_id else None
        return Delivered(Outcome.COMPLETED, _usage(usage_from_json(body)), ident)

    async def _break_off(self, error: errors.ApiError, outcome: Outcome = Outcome.FAILED) -> Delivered:
        """Ends a broken answer as clearly as the protocol allows: an error answer, an error event, or a cut
        connection.
        """
        if not self._started:
            body = errors.render_error(error, dialect=self._dialect)
            headers = [(name.encode(), value.encode()) for name, value in errors.error_headers(error)]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif self._is_stream:
            event = b"\n\n" + errors.sse_error_event(error, self._dialect)
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        return Delivered(outcome)


def _usage(found: Any) -> Usage | None:
    if found is None:
        return None
    return Usage(
        prompt_tokens=found.prompt_tokens, output_tokens=found.completion_tokens, cached_tokens=found.cached_tokens
    )
