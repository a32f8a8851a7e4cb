"""Header and metadata names of the Endpoint Picker protocol, and what a session needs from them.

Pure lookups on lower-case names. Each control header has one current name and possibly an older alias; the current
name wins.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from picker.openai.fleet import FLEET_HEADERS

DESTINATION = "x-gateway-destination-endpoint"
SUBSET = "x-gateway-destination-endpoint-subset"
SERVED = "x-gateway-destination-endpoint-served"
SCORES = "x-gateway-destination-endpoint-scores"
DROPPED_REASON = "x-llm-d-request-dropped-reason"
REQUEST_ID = "x-request-id"

LB_NAMESPACE = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"

MODEL_REWRITE = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
SESSION = ("x-session-token", "x-session-id")
PATHS = (":path", "x-original-path", "x-forwarded-path")

CONTROL = (FLEET_HEADERS - {DESTINATION}) | {
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
    *MODEL_REWRITE,
    "x-llm-d-slo-ttft-ms",
    "x-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
    "x-slo-tpot-ms",
    "x-llm-d-video-fps",
    "x-llm-d-video-duration-seconds",
    "x-llm-d-video-resolution",
    DROPPED_REASON,
}
"""Headers that steer the picker or the fleet. They are for us alone: a model server must not see them, least of all
a client's.
"""


def first_of(headers: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first non-empty value among `names`, in their order."""
    for name in names:
        value = headers.get(name)
        if value:
            return value
    return None


def to_remove(headers: Mapping[str, str]) -> tuple[str, ...]:
    """The control headers that are present, sorted: the model server shall not get them."""
    return tuple(sorted(CONTROL.intersection(headers)))


def subset_entries(values: Iterable[str]) -> tuple[str, ...]:
    """Entries of a subset hint, `ip:port` or bare `ip`. Elements may hold commas and spaces; empty entries are
    dropped.
    """
    return tuple(
        normal_address(part) for value in values for part in (piece.strip() for piece in value.split(",")) if part
    )


def normal_address(entry: str) -> str:
    """One spelling per address: IPv6 compressed, in brackets exactly when a port follows. Anything else stays as it
    is.
    """
    if entry.startswith("["):
        host, _, port = entry[1:].partition("]")
        return f"[{_normal_ip(host)}]{port}" if port.startswith(":") else _normal_ip(host)
    return _normal_ip(entry) if entry.count(":") > 1 else entry


def _normal_ip(host: str) -> str:
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        return host
