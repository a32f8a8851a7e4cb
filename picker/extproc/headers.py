"""Header and metadata names of the Endpoint Picker protocol, and what a session needs from them.

Pure lookups on lower-case names. Each control header has one current name and possibly an older alias; the current
name wins.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from picker.openai.fleet import FLEET_HEADERS, OBJECTIVE_HEADERS, POOL_HEADER

DESTINATION = "x-gateway-destination-endpoint"
SUBSET = "x-gateway-destination-endpoint-subset"
SERVED = "x-gateway-destination-endpoint-served"
SCORES = "x-gateway-destination-endpoint-scores"
DROPPED_REASON = "x-llm-d-request-dropped-reason"
REQUEST_ID = "x-request-id"
PATH = ":path"
AUTHORIZATION = "authorization"

LB_NAMESPACE = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"

MODEL_REWRITE = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
SESSION = ("x-session-token", "x-session-id")
PATHS = (PATH, "x-original-path", "x-forwarded-path")
OBJECTIVE = OBJECTIVE_HEADERS
POOL = POOL_HEADER
"""A request header, and a key of the metadata in `LB_NAMESPACE`."""

# Conformance tests of gateways choose the endpoint, and read who served. Their echo server repeats as a header of the
# response what `ECHO` names.
SELECTION = "test-epp-endpoint-selection"
SERVED_ECHO = "x-conformance-test-served-endpoint"
ECHO = "x-echo-set-header"

CONTROL = (FLEET_HEADERS - {DESTINATION}) | {
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
    SELECTION,
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


def selection(headers: Mapping[str, str]) -> tuple[str, ...] | None:
    """The endpoints a conformance test chooses; None when it chooses none."""
    chosen = headers.get(SELECTION)
    return subset_entries((chosen,)) if chosen else None


def in_both(one: tuple[str, ...] | None, other: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Entries that name what both name; None restricts nothing. A bare `ip` names all its ports."""
    if one is None or other is None:
        return other if one is None else one
    first, second = frozenset(one), frozenset(other)
    within = [entry for entry in one if entry in second or _host(entry) in second]
    return (*within, *(entry for entry in other if _host(entry) in first))


def _host(entry: str) -> str:
    """The `ip` of an entry."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry if entry.count(":") > 1 else entry.partition(":")[0]


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
