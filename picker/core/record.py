"""One finished request as metrics and logs want it: the same value from both doors."""

from __future__ import annotations

import msgspec

from picker.core.events import Usage


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is worth keeping of one finished request. Times in seconds; `status` 0 means the client got none, or that
    the door did not see it. `outcome` is an `Outcome`, or `left` when the door stopped watching before the end.

    `endpoint` is None when nobody was chosen; the model is then no metric label, since anybody can invent models.
    """

    id: str
    path: str
    status: int
    outcome: str
    duration_s: float
    model: str | None = None
    endpoint: str | None = None
    stream: bool = False
    attempts: int = 0
    first_byte_s: float | None = None
    usage: Usage | None = None
