"""The scorers: one pure class per file, and the table that names them.

To add one: write `scorers/<name>.py`, test it in `tests/unit/scorers/`, add it to BUILTIN. Packages outside Waypost
register theirs under the entry-point group `waypost.scorers`. Scorers do not know one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from picker.core.plugins import Scorer
from scorers.in_flight_requests import InFlightRequests
from scorers.in_flight_tokens import InFlightTokens
from scorers.kv_usage import KvUsage
from scorers.lora_affinity import LoraAffinity
from scorers.no_hit_lru import NoHitLru
from scorers.prefix_cache import PrefixCache
from scorers.queue_depth import QueueDepth
from scorers.running_requests import RunningRequests
from scorers.session_affinity import SessionAffinity

BUILTIN: Mapping[str, Callable[..., Scorer]] = {
    "queue-depth": QueueDepth,
    "running-requests": RunningRequests,
    "kv-usage": KvUsage,
    "in-flight-requests": InFlightRequests,
    "in-flight-tokens": InFlightTokens,
    "lora-affinity": LoraAffinity,
    "prefix-cache": PrefixCache,
    "no-hit-lru": NoHitLru,
    "session-affinity": SessionAffinity,
}


def available() -> Mapping[str, Callable[..., Scorer]]:
    """The built-in scorers and those of installed packages; a built-in name cannot be replaced."""
    outside = {entry.name: entry.load() for entry in entry_points(group="waypost.scorers")}
    return {**outside, **BUILTIN}


def build(name: str, params: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer of that name. Raises KeyError for an unknown name, TypeError for unknown parameters."""
    return (BUILTIN.get(name) or available()[name])(**(params or {}))
