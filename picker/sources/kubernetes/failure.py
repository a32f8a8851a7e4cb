"""What comes back when the API server did not do what was asked. Values and their reading; no I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from picker.sources.kubernetes.objects import Status

# Shown in logs and status pages; some proxies answer with whole pages.
MESSAGE_MAX = 300

UNREACHABLE = 0
NOT_UNDERSTOOD = 200

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected; the last one for absurdly nested ones."""


class ApiFailure(msgspec.Struct, frozen=True):
    """An answer that is none.

    `status` is the HTTP status, 0 when there was no (whole) answer, 200 when there was one that makes no sense.
    `reason` is the API server's word for it ("Expired"), `message` one short line for people, `retry_after_s` how long
    the server wants to be left alone.
    """

    status: int
    message: str
    reason: str = ""
    retry_after_s: float | None = None

    @property
    def expired(self) -> bool:
        """The version asked for is not kept any more; only a new list helps. Not every server says 410."""
        text = self.message.lower()
        return (
            self.status == 410
            or self.reason in ("Expired", "Gone")
            or "too old resource version" in text
            or "too large resource version" in text
        )


def one_line(text: str) -> str:
    """`text` cut to what fits a log line."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_MAX else line[: MESSAGE_MAX - 3] + "..."


def failure_of(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> ApiFailure:
    """What an error answer says: a Status object from the API server, anything from what is between."""
    try:
        told = msgspec.json.decode(body, type=Status)
    except DECODE_ERRORS:
        told = Status()
    return ApiFailure(
        status,
        one_line(told.message or told.reason or f"HTTP {status}"),
        reason=one_line(told.reason or ""),
        retry_after_s=_seconds((headers or {}).get("Retry-After", "")),
    )


def _seconds(text: str) -> float | None:
    """Retry-After in seconds; the API server never sends the other form, a date."""
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
