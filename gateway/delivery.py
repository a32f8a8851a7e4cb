"""The way back: an engine's answer to the client, chunk by chunk as it arrives.

It starts after the first body byte, when no other endpoint may be tried any more. Here the usage is read as it passes
by, the client's model name is restored where it was rewritten, and an engine that dies in the middle of a stream
becomes an error event instead of a silent end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

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
# An answer whose model name changes is held whole up to this size; a larger one keeps the engine's name.
RENAMED_ANSWER_BYTES = 64 * 2**20
# The longest incomplete event held back: a last event of the Responses API repeats the whole answer.
HELD_EVENT_BYTES = 2**20

_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
_DIED = "the model server died in the middle of its answer"


class Committed(msgspec.Struct):
    """An attempt that produced its first body byte: from here on the answer belongs to the client."""

    response: Response
    first: bytes


class Delivered(msgspec.Struct, frozen=True):
    """How an answer ended, and what was learnt from it.

    `error` is still to be sent: the client has seen nothing. `cut` says that the end of this process ended it.
    """

    outcome: Outcome
    usage: Usage | None = None
    error: errors.ApiError | None = None
    cut: bool = False


class Client(Protocol):
    """What a delivery asks of the client's connection."""

    @property
    def stuck(self) -> bool:
        """Whether the client does not take what was written for it."""

    def cut(self) -> None:
        """Breaks the answer off."""


class Delivery:
    """Sends one committed answer to one client."""

    def __init__(
        self,
        committed: Committed,
        send: Send,
        client: Client,
        *,
        dialect: Dialect,
        rename: tuple[str, str] | None,
        on_chunk: Callable[[], None],
        on_stall: Callable[[bool], None],
        on_id: Callable[[str], None] | None,
    ) -> None:
        response = committed.response
        self._response = response
        self._first = committed.first
        self._send = send
        self._client = client
        self._dialect = dialect
        self._on_chunk = on_chunk
        self._on_stall = on_stall
        self._on_id = on_id
        self._started = False
        self._torn = False
        self._is_stream = response.is_event_stream
        self._is_plain = not response.header(b"content-encoding")
        renames = self._is_plain and (self._is_stream or b"json" in response.header(b"content-type").lower())
        self._rename = rename if renames else None

    async def run(self, headers: list[tuple[bytes, bytes]], guard: Guard) -> Delivered:
        """Sends everything. Raises CancelledError when the client left; an eviction, or the end of this process,
        ends the stream with an error event.
        """
        try:
            if self._is_stream:
                return await self._stream(headers)
            if self._rename is not None:
                return await self._renamed(headers, self._rename)
            return await self._whole(headers)
        except asyncio.CancelledError:
            if guard.gone:
                raise
            if guard.absorb() is None:
                # The end of this process, after it waited as long as it was told.
                cut = await self._break_off(errors.shutting_down())
                return msgspec.structs.replace(cut, cut=True)
            if self._started and self._client.stuck:
                self._client.cut()
                return Delivered(Outcome.TIMEOUT)
            return await self._break_off(errors.upstream_timeout("the model server stopped answering"), Outcome.TIMEOUT)

    async def _stream(self, headers: list[tuple[bytes, bytes]]) -> Delivered:
        wanted = self._on_id
        scanner = UsageScanner(wants_id=wanted is not None)
        restorer = StreamModelRestorer(*self._rename) if self._rename is not None else None
        # An error event may come on top of what was announced.
        await self._start([item for item in headers if item[0].lower() != b"content-length"])
        held = b""
        chunk: bytes | FailureKind = self._first
        while chunk:
            if isinstance(chunk, FailureKind):
                return await self._break_off(errors.upstream_reset(_DIED))
            scanner.feed(chunk)
            if wanted is not None and scanner.response_id is not None:
                wanted(scanner.response_id)
                wanted = None
            out = chunk if restorer is None else restorer.feed(chunk)
            if (held or not out.endswith(_EVENT_ENDS)) and self._is_plain:
                out, held = _whole_events(held + out)
                self._torn = bool(out) and not out.endswith(_EVENT_ENDS)
            if out:
                await self._pass(out, more=True)
            self._on_chunk()
            chunk = await self._response.read()
        rest = held + restorer.flush() if restorer is not None else held
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})
        scanner.close()
        return Delivered(Outcome.COMPLETED, _usage(scanner.usage))

    async def _whole(self, headers: list[tuple[bytes, bytes]]) -> Delivered:
        if not self._first and self._response.status in (204, 304):
            headers = [item for item in headers if item[0].lower() != b"content-length"]
        await self._start(headers)
        kept: list[bytes] = []
        kept_bytes = 0
        chunk: bytes | FailureKind = self._first
        while chunk:
            if isinstance(chunk, FailureKind):
                return await self._break_off(errors.upstream_reset(_DIED))
            finished = self._response.finished
            await self._pass(chunk, more=not finished)
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
        parts, size_bytes = [self._first], len(self._first)
        while not self._response.finished:
            chunk = await self._response.read()
            if isinstance(chunk, FailureKind):
                return await self._break_off(errors.upstream_reset(_DIED))
            if not chunk:
                break
            parts.append(chunk)
            size_bytes += len(chunk)
            self._on_chunk()
            if size_bytes > RENAMED_ANSWER_BYTES:
                self._first = b"".join(parts)
                return await self._whole(headers)
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

    async def _pass(self, body: bytes, *, more: bool) -> None:
        """Sends body bytes. Waiting for a client that does not take them is not waiting for the engine."""
        message = {"type": "http.response.body", "body": body, "more_body": more}
        if not self._client.stuck:
            await self._send(message)
            return
        self._on_stall(True)
        try:
            await self._send(message)
        finally:
            self._on_stall(False)

    def _learn(self, body: bytes) -> Delivered:
        if not body or not self._is_plain or self._response.status >= 300:
            return Delivered(Outcome.COMPLETED)
        ident = response_id(body) if self._on_id is not None else None
        if ident is not None and self._on_id is not None:
            self._on_id(ident)
        return Delivered(Outcome.COMPLETED, _usage(usage_from_json(body)))

    async def _break_off(self, error: errors.ApiError, outcome: Outcome = Outcome.FAILED) -> Delivered:
        """Ends a broken answer as clearly as the protocol allows: an error answer, an error event, or a cut
        connection.
        """
        if not self._started:
            return Delivered(outcome, error=error)
        if self._is_stream and self._is_plain:
            event = errors.sse_error_event(error, self._dialect)
            event = b"\n\n" + event if self._torn else event
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            self._client.cut()
        return Delivered(outcome)


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    """What may go out, up to the last complete event, and what is held back.

    An event cut by the death of its engine would reach the client as a broken one before our error event does.
    """
    unix, internet = data.rfind(b"\n\n"), data.rfind(b"\n\r\n")
    cut = max(unix + 2 if unix >= 0 else 0, internet + 3 if internet >= 0 else 0)
    if len(data) - cut > HELD_EVENT_BYTES:
        return data, b""
    return data[:cut], data[cut:]


def _usage(found: Any) -> Usage | None:
    if found is None:
        return None
    return Usage(
        prompt_tokens=found.prompt_tokens, output_tokens=found.completion_tokens, cached_tokens=found.cached_tokens
    )
