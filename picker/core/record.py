"""One finished request as metrics and logs want it: the same value from both doors."""

from __future__ import annotations

import msgspec

from picker.core.events import Usage

LEFT = "left"
"""The outcome of a request whose end the door did not wait for: its duration says nothing."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is worth keeping of one finished request. Times in seconds; `status` 0 means the client got none, or that
    the door did not see it. `outcome` is an `Outcome`, or `left` when the door stopped watching before the end.

    `endpoint` is None when nobody was chosen; the model is then no metric label, since anybody can invent models.
    `target_model` is what the engine was asked for where that is another name.
    """

    id: str
    path: str
    status: int
    outcome: str
    duration_s: float
    model: str | None = None
    target_model: str | None = None
    priority: int = 0
    endpoint: str | None = None
    stream: bool = False
    attempts: int = 0
    first_byte_s: float | None = None
    usage: Usage | None = None
