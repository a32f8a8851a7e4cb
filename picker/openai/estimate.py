"""Rough prompt sizes from raw JSON text, at the cost of a memory scan.

Estimates for load accounting only; exact tokens come from a tokenizer elsewhere. Never decodes, never raises.
"""

from __future__ import annotations

import re

from msgspec import Raw

# An image costs a vision model some hundred to some thousand tokens, whatever its size in base64.
MEDIA_TOKENS = 1_000
_PROBE_BYTES = 64
_PROBE_STRIDE_BYTES = 4_096
_MIN_DISTINCT = 20
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_="

_FIRST_ID = re.compile(rb"\[[ \t\n\r]*+(?:\[[ \t\n\r]*+)?-?[0-9]")
_EMPTY_LIST = re.compile(rb"\[[ \t\n\r]*+\]")


def token_ids(prompt: Raw) -> int | None:
    """Number of token ids when `prompt` is a list of ids or a list of such lists, else None."""
    view = memoryview(prompt)
    if view[0] != 0x5B or _FIRST_ID.match(view) is None:
        return None
    return bytes(view).count(b",") + 1


def is_empty_list(raw: Raw) -> bool:
    """True for `[]` with any white space inside."""
    return _EMPTY_LIST.match(memoryview(raw)) is not None


def inline_media(body: bytes) -> tuple[int, int]:
    """(bytes, items) of base64 strings inside `body`, whatever member they are in.

    Probes every 4 KiB instead of searching for markers, which would cost more than decoding the body. Smaller items
    are missed and count as text, about what an image of that size costs.
    """
    total = items = 0
    pos = _PROBE_STRIDE_BYTES // 2
    while pos < len(body):
        if body[pos : pos + _PROBE_BYTES].translate(None, _BASE64):
            pos += _PROBE_STRIDE_BYTES
            continue
        start = body.rfind(b'"', 0, pos) + 1
        end = body.find(b'"', pos)
        end = len(body) if end < 0 else end
        if _is_base64(body, start, end):
            total += end - start
            items += 1
        # Never probe the same string again: the look backwards would make this quadratic.
        pos = end + _PROBE_STRIDE_BYTES // 2
    return total, items


def _is_base64(body: bytes, start: int, end: int) -> bool:
    """Is the string at [start, end) base64 from end to end, after the prefix of a data URL if it has one?"""
    if body.startswith(b"data:", start):
        comma = body.find(b",", start, start + 128)
        start = start if comma < 0 else comma + 1
    head = body[start : start + _PROBE_BYTES]
    tail = body[max(start, end - _PROBE_BYTES) : end]
    # "xxxx..." is a test prompt, not an image.
    return not (head + tail).translate(None, _BASE64) and len(set(head)) >= _MIN_DISTINCT
