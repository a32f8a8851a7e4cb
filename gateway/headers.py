"""Which headers pass through the relay, in both directions.

Hop-by-hop headers (RFC 9110 section 7.6.1) end here; headers that name hosts or memory of the fleet are never taken
from clients; our own are set by the relay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from picker.openai.fleet import FLEET_HEADERS_BYTES

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# Set by us or by the client library: host and length of the request we make.
_NOT_UPSTREAM = (
    HOP_BY_HOP
    | FLEET_HEADERS_BYTES
    | {b"host", b"content-length", b"expect", b"x-request-id", b"x-waypost-explain", b"x-waypost-admin-token"}
)
_NOT_DOWNSTREAM = HOP_BY_HOP | {b"x-request-id", b"server", b"date"}


def to_engine(
    headers: Iterable[tuple[bytes, bytes]],
    first: Mapping[bytes, bytes],
    request_id: bytes,
    authorization: bytes | None,
) -> list[tuple[bytes, bytes]]:
    """The client's headers as an engine gets them. `authorization` replaces the client's when it is given.

    `first` is the same headers by name.
    """
    dropped = _NOT_UPSTREAM
    if authorization is not None:
        dropped |= {b"authorization"}
    named = first.get(b"connection")
    if named is not None and named != b"keep-alive":
        dropped |= {token.strip().lower() for token in named.split(b",")}
    passed = [item for item in headers if item[0] not in dropped]
    passed.append((b"x-request-id", request_id))
    if authorization is not None:
        passed.append((b"authorization", authorization))
    return passed


def to_client(headers: Iterable[tuple[bytes, bytes]], ours: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """An engine's headers as the client gets them, followed by ours."""
    passed = []
    named = b""
    for item in headers:
        name = item[0].lower()
        if name not in _NOT_DOWNSTREAM:
            passed.append(item)
        elif name == b"connection" and item[1] not in (b"close", b"keep-alive"):
            named += b"," + item[1]
    if named:
        dropped = {token.strip().lower() for token in named.split(b",")}
        passed = [item for item in passed if item[0].lower() not in dropped]
    passed.extend(ours)
    return passed


def by_name(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Headers by lower-case name; of a repeated one all values, joined as RFC 9110 section 5.3 has it."""
    pairs = list(headers)
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    joined: dict[bytes, bytes] = {}
    for name, value in pairs:
        joined[name] = joined[name] + b", " + value if name in joined else value
    return joined
