"""The `x-waypost-explain` header: a compact score summary for those who hold the admin token.

It tells what others have cached and how busy each endpoint is, so without the token there is none.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

import msgspec

from picker.admin.explained import best_rows
from picker.core.values import Decision

# Header sections are bounded everywhere; the best few endpoints say what matters.
ROWS = 8


def explain_header(headers: Mapping[bytes, bytes], decision: Decision, admin_token: str | None) -> bytes | None:
    """The header's value, or None when it was not asked for or the token is not the right one."""
    if admin_token is None or headers.get(b"x-waypost-explain") != b"1":
        return None
    given = headers.get(b"x-waypost-admin-token", b"")
    if not hmac.compare_digest(given, admin_token.encode()):
        return None
    return msgspec.json.encode(best_rows(decision, ROWS))
