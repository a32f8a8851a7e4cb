"""What a model server says when it announces itself: an entry of the configuration and how long to believe it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from picker.config.fleet import EndpointEntry
from picker.config.values import parse_duration, refuse

# Seconds beyond this are no time anybody means.
_ANY_S = 1e9


def _ttl(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 < value < _ANY_S:
            raise refuse("must be longer than 0 seconds and finite")
        return float(value)
    seconds = parse_duration(value)
    if seconds <= 0:
        raise refuse("must be longer than 0s")
    return seconds


class Announcement(EndpointEntry):
    """One model server in its own words. `ttl` is in seconds, None for the time the configuration says."""

    ttl: Annotated[float, BeforeValidator(_ttl)] | None = Field(
        default=None, description="How long the entry lives unless it is renewed: a duration, or seconds."
    )
