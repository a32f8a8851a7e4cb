"""Changes to whole messages: another model name, no fleet fields, the client's model name in the answer.

Built on the in-place edits of `edit`. Holds at most one incomplete line of a stream; does no parsing of its own.
"""

from __future__ import annotations

import msgspec

from picker.openai.edit import (
    EditError,
    encode_string,
    members,
    remove_members,
    remove_members_within,
    replace_spans,
    set_string,
)
from picker.openai.parse import ParsedBody

MAX_LINE_BYTES = 1 << 20
_NEEDLE = b'"model"'
# Streams of the Responses API and of the Anthropic API carry the model one level down.
_ENVELOPES = frozenset(("response", "message"))


def rewrite_model(body: bytes, parsed: ParsedBody, model: str) -> bytes:
    """The body asking for `model`, whether it is JSON or a multipart form; a JSON body without a model gains one.

    Raises EditError when the body is neither, or cannot be edited.
    """
    if parsed.is_json:
        return set_string(body, "model", model, insert=True)
    if not parsed.model_spans:
        raise EditError("the body has no model to rewrite")
    if "\r" in model or "\n" in model:
        raise EditError("the new value is not valid in a form")
    return replace_spans(body, parsed.model_spans, model.encode("utf-8", "replace"))


def strip_fleet_fields(body: bytes, fields: tuple[str, ...]) -> bytes:
    """Remove `ParsedBody.fleet_fields` from a JSON body, all occurrences; `body` itself when there are none.

    Raises EditError when the body cannot be edited: refuse the request then.
    """
    if not fields:
        return body
    nested: dict[str, set[str]] = {}
    top: set[str] = set()
    for field in fields:
        parent, dot, name = field.rpartition(".")
        (nested.setdefault(parent, set()) if dot else top).add(name)
    if top:
        body = remove_members(body, top)
    for parent, names in nested.items():
        body = remove_members_within(body, parent.split("."), names)
    return body


def restore_model(body: bytes, target: str, original: str) -> bytes:
    """A JSON answer that names `original` where its top-level `model` is `target`; anything else unchanged."""
    return _restore(body, target, original, envelopes=frozenset())


def _restore(body: bytes, target: str, original: str, *, envelopes: frozenset[str]) -> bytes:
    try:
        found = members(body)
        new = encode_string(original)
    except EditError:
        return body
    edits: list[tuple[int, int, bytes]] = []
    for member in found:
        value = body[member.value_start : member.value_end]
        if member.key == "model":
            if value[:1] == b'"' and _same_string(value, target):
                edits.append((member.value_start, member.value_end, new))
        elif member.key in envelopes and value[:1] == b"{":
            inner = restore_model(value, target, original)
            if inner is not value:
                edits.append((member.value_start, member.value_end, inner))
    for start, end, replacement in reversed(edits):
        body = body[:start] + replacement + body[end:]
    return body


def _same_string(quoted: bytes, text: str) -> bool:
    try:
        return msgspec.json.decode(quoted, type=str) == text
    except (msgspec.MsgspecError, ValueError):
        return False


class StreamModelRestorer:
    """Restores the model name in the `data:` lines of an event stream, whatever the chunking.

    Holds back an incomplete last line (engines end every chunk with one complete), at most `max_line_bytes` of it: a
    longer line passes unchanged. Call `flush` at the end of the stream.
    """

    __slots__ = ("_held_bytes", "_max_line_bytes", "_original", "_pass_line", "_pending", "_target")

    def __init__(self, target: str, original: str, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._target = target
        self._original = original
        self._max_line_bytes = max_line_bytes
        self._pending: list[bytes] = []
        self._held_bytes = 0
        self._pass_line = False

    def feed(self, chunk: bytes) -> bytes:
        """Bytes that may go to the client now."""
        cut = chunk.rfind(b"\n") + 1
        if self._pass_line:
            first = chunk.find(b"\n") + 1
            if first == 0:
                return chunk
            self._pass_line = False
            return chunk[:first] + self.feed(chunk[first:])
        if cut == 0:
            return self._hold(chunk)
        lines = self._take() + chunk[:cut] if self._pending else chunk[:cut]
        held_too_long = self._hold(chunk[cut:]) if cut < len(chunk) else b""
        return self._restore_lines(lines) + held_too_long

    def flush(self) -> bytes:
        """What is still held, restored if it is a complete document."""
        return self._restore_lines(self._take())

    def _hold(self, chunk: bytes) -> bytes:
        self._pending.append(chunk)
        self._held_bytes += len(chunk)
        if self._held_bytes <= self._max_line_bytes:
            return b""
        self._pass_line = True
        return self._take()

    def _take(self) -> bytes:
        held = b"".join(self._pending)
        self._pending = []
        self._held_bytes = 0
        return held

    def _restore_lines(self, lines: bytes) -> bytes:
        if _NEEDLE not in lines:
            return lines
        return b"".join(self._restore_line(line) for line in lines.splitlines(keepends=True))

    def _restore_line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:") or _NEEDLE not in line:
            return line
        start = 6 if line.startswith(b"data: ") else 5
        payload = line[start:]
        return line[:start] + _restore(payload, self._target, self._original, envelopes=_ENVELOPES)
