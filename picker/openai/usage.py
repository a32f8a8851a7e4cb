"""Token usage and response ids from answers, streamed or not, while the bytes pass by unchanged.

Reads OpenAI chat and completions, the Responses API, the Anthropic API and SGLang's native answers. Cheap per chunk:
a substring test decides whether anything is decoded. Never raises on input.
"""

from __future__ import annotations

import msgspec

from picker.openai.rewrite import restore_model

__all__ = ["Usage", "UsageScanner", "response_id", "restore_model", "usage_from_json"]

MAX_LINE_BYTES = 1 << 20
_DONE = b"[DONE]"
_USAGE_NEEDLE = b'"usage"'
_NATIVE_NEEDLE = b'"meta_info"'
_ID_NEEDLE = b'"response"'
_MAX_ID_CHARS = 256


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer; None where the engine does not tell. `cached_tokens` is a part of the prompt.

    Anthropic answers count cached tokens outside `prompt_tokens`: they are passed on as they come.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None

    def merged(self, later: Usage) -> Usage:
        """Field-wise, the later value wins where there is one."""
        return Usage(
            self.prompt_tokens if later.prompt_tokens is None else later.prompt_tokens,
            self.completion_tokens if later.completion_tokens is None else later.completion_tokens,
            self.cached_tokens if later.cached_tokens is None else later.cached_tokens,
        )


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _RawUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cached_tokens: int | None = None


class _Envelope(msgspec.Struct):
    usage: _RawUsage | None = None


class _Answer(msgspec.Struct):
    """A whole answer or one event: usage at the top, in `response` (Responses) or in `message` (Anthropic)."""

    usage: _RawUsage | None = None
    response: _Envelope | None = None
    message: _Envelope | None = None
    meta_info: _RawUsage | None = None


class _Identity(msgspec.Struct):
    id: str | None = None


class _Identified(msgspec.Struct):
    id: str | None = None
    object: str | None = None
    response: _Identity | None = None


# Not strict: some engines write counts as strings.
_DECODE_ANSWER = msgspec.json.Decoder(_Answer, strict=False).decode
_DECODE_IDENTIFIED = msgspec.json.Decoder(_Identified).decode
_BAD_INPUT = (msgspec.MsgspecError, ValueError, RecursionError)


def usage_from_json(body: bytes) -> Usage | None:
    """Usage of a whole (not streamed) JSON answer, None when it has none."""
    if _USAGE_NEEDLE not in body and _NATIVE_NEEDLE not in body:
        return None
    return _usage_of(body)


def response_id(data: bytes) -> str | None:
    """Id of a stateful response: from a whole JSON answer, or from the complete lines of a stream's beginning."""
    if data[:64].lstrip()[:1] == b"{":
        return _identity(data)
    pos = 0
    while (end := data.find(b"\n", pos)) >= 0:
        if data.startswith(b"data:", pos) and (found := _identity(data[pos + 5 : end])) is not None:
            return found
        pos = end + 1
    return None


class UsageScanner:
    """Follows one server-sent event stream through arbitrary chunks.

    `events` counts `data:` lines (without `[DONE]`) that are complete, `done` tells that `[DONE]` passed, `usage` is
    merged over the events that had one, `response_id` is learnt when `wants_id` is set. An incomplete line is kept
    until it ends, at most `max_line_bytes` of it: a longer one is counted but not read. Lines end with LF or CRLF.
    """

    __slots__ = (
        "_held_bytes",
        "_max_line_bytes",
        "_native",
        "_pending",
        "_skipping",
        "_wants_id",
        "done",
        "events",
        "response_id",
        "usage",
    )

    def __init__(self, *, wants_id: bool = False, native: bool = False, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.usage: Usage | None = None
        self.response_id: str | None = None
        self.events = 0
        self.done = False
        self._wants_id = wants_id
        self._native = native
        self._max_line_bytes = max_line_bytes
        self._pending: list[bytes] = []
        self._held_bytes = 0
        self._skipping = False

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes of the stream."""
        cut = chunk.rfind(b"\n") + 1
        if cut == 0:
            self._hold(chunk)
            return
        lines = chunk
        if cut < len(chunk):
            lines = chunk[:cut]
        if self._skipping:
            self._skipping = False
            lines = lines[lines.find(b"\n") + 1 :]
        elif self._pending:
            lines = b"".join((*self._pending, lines))
            self._pending = []
            self._held_bytes = 0
        self._read(lines)
        if cut < len(chunk):
            self._hold(chunk[cut:])

    def close(self) -> None:
        """The stream ended: read a last line without a line end."""
        if self._pending:
            self.feed(b"\n")

    def _hold(self, chunk: bytes) -> None:
        if self._skipping:
            return
        self._pending.append(chunk)
        self._held_bytes += len(chunk)
        if self._held_bytes > self._max_line_bytes:
            if b"".join(self._pending).startswith(b"data:"):
                self.events += 1
            self._pending = []
            self._held_bytes = 0
            self._skipping = True

    def _read(self, lines: bytes) -> None:
        self.events += lines.count(b"\ndata:") + lines.startswith(b"data:")
        if _USAGE_NEEDLE in lines:
            self._read_usage(lines, _USAGE_NEEDLE)
        if self._native and _NATIVE_NEEDLE in lines:
            self._read_usage(lines, _NATIVE_NEEDLE)
        if self._wants_id and _ID_NEEDLE in lines:
            self.response_id = response_id(lines)
            self._wants_id = self.response_id is None
        if _DONE in lines:
            self._read_done(lines)

    def _read_usage(self, lines: bytes, needle: bytes) -> None:
        pos = lines.find(needle)
        while pos >= 0:
            start = lines.rfind(b"\n", 0, pos) + 1
            end = lines.find(b"\n", pos)
            end = len(lines) if end < 0 else end
            if lines.startswith(b"data:", start):
                found = _usage_of(lines[start + 5 : end])
                if found is not None:
                    self.usage = found if self.usage is None else self.usage.merged(found)
            pos = lines.find(needle, end)

    def _read_done(self, lines: bytes) -> None:
        for line in lines.split(b"\n"):
            if line.startswith(b"data:") and line[5:].strip() == _DONE:
                self.done = True
                self.events -= 1


def _usage_of(document: bytes) -> Usage | None:
    try:
        answer = _DECODE_ANSWER(document)
    except _BAD_INPUT:
        return None
    found: Usage | None = None
    for envelope in (answer.message, answer.response, answer):
        raw = envelope.usage if envelope is not None else None
        if raw is not None:
            found = _normalised(raw) if found is None else found.merged(_normalised(raw))
    if found is None and answer.meta_info is not None:
        found = _normalised(answer.meta_info)
    return found


def _normalised(raw: _RawUsage) -> Usage:
    details = raw.prompt_tokens_details or raw.input_tokens_details
    cached = details.cached_tokens if details is not None else None
    return Usage(
        _first(raw.prompt_tokens, raw.input_tokens),
        _first(raw.completion_tokens, raw.output_tokens),
        _first(cached, raw.cache_read_input_tokens, raw.cached_tokens),
    )


def _first(*counts: int | None) -> int | None:
    for count in counts:
        if count is not None and count >= 0:
            return count
    return None


def _identity(document: bytes) -> str | None:
    try:
        found = _DECODE_IDENTIFIED(document)
    except _BAD_INPUT:
        return None
    ident = found.response.id if found.response is not None else None
    if ident is None and found.object == "response":
        ident = found.id
    return ident if ident and len(ident) <= _MAX_ID_CHARS else None
