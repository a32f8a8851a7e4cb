"""The few form fields a router needs out of a multipart body (audio uploads).

A bounded scan over part headers; file contents are skipped by a substring search and never copied.
"""

from __future__ import annotations

import re

import msgspec

MAX_PARTS = 64
MAX_PART_HEADER_BYTES = 8_192
MAX_VALUE_BYTES = 1_024

_BOUNDARY = re.compile(r';[ \t]*boundary=(?:"([^"]{1,200})"|([^";, \t]{1,200}))', re.IGNORECASE)
_DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition:[ \t]*form-data([^\r\n]*)", re.IGNORECASE)
_NAME = re.compile(rb';[ \t]*name=(?:"([^"]*)"|([^";\s]+))', re.IGNORECASE)
_FILENAME = re.compile(rb";[ \t]*filename\*?=", re.IGNORECASE)
_TRUE = frozenset((b"true", b"1", b"yes", b"on", b"t", b"y"))


class Form(msgspec.Struct, frozen=True):
    """Wanted fields. `model_spans` has the byte range of every `model` value; the last one is the model."""

    model: str | None
    stream: bool
    file_bytes: int
    model_spans: tuple[tuple[int, int], ...]


def parse_form(body: bytes, content_type: str) -> Form | None:
    """None when the boundary is missing, the body does not use it, or the parts go beyond the limits."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        return None
    try:
        delimiter = b"--" + (found.group(1) or found.group(2)).encode("latin-1")
    except UnicodeEncodeError:
        return None
    parts = _parts(body, delimiter)
    if parts is None:
        return None
    model: str | None = None
    stream = False
    file_bytes = 0
    spans: list[tuple[int, int]] = []
    for name, is_file, start, end in parts:
        if is_file:
            file_bytes += end - start
        elif name == b"model" and end - start <= MAX_VALUE_BYTES:
            spans.append((start, end))
            model = body[start:end].decode("utf-8", "replace") or None
        elif name == b"stream":
            stream = body[start : min(end, start + 8)].strip().lower() in _TRUE
    return Form(model, stream, file_bytes, tuple(spans))


def _parts(body: bytes, delimiter: bytes) -> list[tuple[bytes, bool, int, int]] | None:
    """(field name, is a file, start and end of the content) of each form-data part."""
    pos = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter)
    if pos < 0:
        return None
    pos += len(delimiter) + (0 if body.startswith(delimiter) else 2)
    parts: list[tuple[bytes, bool, int, int]] = []
    while not body.startswith(b"--", pos):
        if len(parts) >= MAX_PARTS:
            return None
        line_end = body.find(b"\r\n", pos, pos + MAX_VALUE_BYTES)
        head_end = body.find(b"\r\n\r\n", pos, pos + MAX_PART_HEADER_BYTES)
        if line_end < 0 or head_end < 0:
            return None
        start = head_end + 4
        end = body.find(b"\r\n" + delimiter, head_end + 2)
        if end < 0:
            return None
        disposition = _DISPOSITION.search(body, line_end, head_end)
        params = disposition.group(1) if disposition else b""
        name = _NAME.search(params)
        field = (name.group(1) or name.group(2) or b"") if name else b""
        parts.append((field, _FILENAME.search(params) is not None, start, max(start, end)))
        pos = end + 2 + len(delimiter)
    return parts
