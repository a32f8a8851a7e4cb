"""One HTTP client for all model servers: requests of the relay, and pages for probes and scrapes.

Deadlines after the connect belong to the ledger, so no timers are armed per relayed request here. Trouble with the
network is a value, never an exception.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from picker.core.events import FailureKind
from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.upstream.connection import RawHeaders, Response
from picker.upstream.credentials import Credentials, tls_context
from picker.upstream.outbox import Outbox
from picker.upstream.pool import Pool

# A length is expected with these even when it is zero (RFC 9110 section 8.6).
_WITH_BODY = frozenset(("POST", "PUT", "PATCH"))
# Origins with a pool; pods come and go, and the pools of the gone are dropped when there are too many.
POOLS_MAX = 4096


class Fetched(msgspec.Struct, frozen=True):
    """The answer to a probe. `body` may be cut at the limit asked for."""

    status: int
    body: bytes


class Upstream:
    """Connection pools per origin and set of credentials. Start it on the loop that uses it, close it once."""

    def __init__(self, credentials: Mapping[str, Credentials], *, connect_timeout_s: float) -> None:
        self._credentials = {"": Credentials(), **credentials}
        self._connect_timeout_s = connect_timeout_s
        self.outbox = Outbox()
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._pools: dict[tuple[str, str], tuple[Pool, bytes]] = {}
        self._authorizations = {
            name: f"Bearer {entry.api_key}".encode() for name, entry in self._credentials.items() if entry.api_key
        }

    def __repr__(self) -> str:
        return f"<Upstream [{len(self._pools)} origins | {sum(len(pool) for pool, _ in self._pools.values())} idle]>"

    async def start(self) -> None:
        """Reads the files of the credentials. Raises OSError or ssl.SSLError when one is unusable."""
        for name, credentials in self._credentials.items():
            if credentials.has_files:
                self._context(name)

    async def close(self) -> None:
        """Closes all idle connections; those in use close with their exchange."""
        for pool, _ in self._pools.values():
            pool.close()
        self._pools.clear()

    def authorization(self, endpoint: Endpoint) -> bytes | None:
        """The value of the Authorization header this endpoint wants from us, None to keep the client's."""
        return self._authorizations.get(endpoint.credentials)

    async def open(
        self, endpoint: Endpoint, method: str, target: str, headers: RawHeaders, body: bytes
    ) -> Response | FailureKind:
        """Sends one request and waits for the response headers. `target` is path and query.

        `headers` must hold neither Host nor Content-Length, and no line breaks. CONNECT when no connection could be
        made, RESET when it died before the headers. Cancelling aborts the request.
        """
        pool, host = self._pool(endpoint.url, endpoint.credentials)
        connection = pool.take()
        if connection is None:
            opened = await pool.connect(self._connect_timeout_s)
            if isinstance(opened, FailureKind):
                return opened
            connection = opened
        return await connection.exchange(_head(method, target, host, headers, body), body)

    async def get(
        self, endpoint: Endpoint, url: str, *, timeout_s: float, limit_bytes: int = 8 * 2**20
    ) -> Fetched | ProbeFailure:
        """Fetches a page for a probe with the endpoint's credentials, reading at most about `limit_bytes` of it."""
        return await self._fetch(endpoint, "GET", url, b"", timeout_s, limit_bytes)

    async def post(
        self, endpoint: Endpoint, url: str, body: bytes, *, timeout_s: float, limit_bytes: int = 8 * 2**20
    ) -> Fetched | ProbeFailure:
        """The same with a JSON body: for questions to an engine, never for requests of clients."""
        return await self._fetch(endpoint, "POST", url, body, timeout_s, limit_bytes)

    async def _fetch(
        self, endpoint: Endpoint, method: str, url: str, body: bytes, timeout_s: float, limit_bytes: int
    ) -> Fetched | ProbeFailure:
        origin, target = _split(url)
        # Metrics may live on another host, which has no business knowing the key.
        same_host = urlsplit(origin).hostname == urlsplit(endpoint.url).hostname
        authorization = self.authorization(endpoint) if same_host else None
        headers = [(b"authorization", authorization)] if authorization is not None else []
        if body:
            headers.append((b"content-type", b"application/json"))
        try:
            async with asyncio.timeout(timeout_s):
                probed = msgspec.structs.replace(endpoint, url=origin)
                response = await self.open(probed, method, target, headers, body)
                if isinstance(response, FailureKind):
                    return ProbeFailure.REFUSED
                try:
                    page = await response.read_up_to(limit_bytes)
                    if isinstance(page, FailureKind):
                        return ProbeFailure.REFUSED
                    return Fetched(response.status, page[:limit_bytes])
                finally:
                    response.close()
        except TimeoutError:
            return ProbeFailure.TIMEOUT

    def _pool(self, origin: str, credentials: str) -> tuple[Pool, bytes]:
        found = self._pools.get((origin, credentials))
        if found is None:
            if len(self._pools) >= POOLS_MAX:
                self._drop_idle_pools()
            parts = urlsplit(origin)
            secure = parts.scheme == "https"
            pool = Pool(
                parts.hostname or "",
                parts.port or (443 if secure else 80),
                self.outbox,
                context=self._context(credentials) if secure else None,
                server_name=self._credentials[credentials].server_name,
            )
            found = self._pools[origin, credentials] = (pool, parts.netloc.encode("ascii"))
        return found

    def _context(self, name: str) -> ssl.SSLContext:
        """The TLS context of a set of credentials, made once. Without files of its own that reads the system's
        authorities, which takes tens of milliseconds, so it waits until an endpoint has https.
        """
        found = self._contexts.get(name)
        if found is None:
            found = self._contexts[name] = tls_context(self._credentials[name])
        return found

    def _drop_idle_pools(self) -> None:
        for key in [key for key, (pool, _) in self._pools.items() if not len(pool)]:
            del self._pools[key]


def _head(method: str, target: str, host: bytes, headers: RawHeaders, body: bytes) -> bytes:
    parts = [method.encode(), b" ", target.encode("latin-1"), b" HTTP/1.1\r\nhost: ", host, b"\r\n"]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    if body or method in _WITH_BODY:
        parts += (b"content-length: ", str(len(body)).encode(), b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def _split(url: str) -> tuple[str, str]:
    """Origin and target of an absolute URL."""
    parts = urlsplit(url)
    target = parts.path or "/"
    return f"{parts.scheme}://{parts.netloc}", f"{target}?{parts.query}" if parts.query else target
