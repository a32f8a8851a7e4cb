"""The HTTP client of the API server: one GET, one watch, and credentials that stay fresh. Nothing of what objects mean.

From the `kubernetes` package come the readers of kubeconfigs and service accounts, exec plugins and auth providers
included, and the TLS context. Not from it: its watch (after an expired version it goes on with the same one), its
models (decoding a pod into them costs many times more), its retries, and its care for tokens, which it reads again once
a minute in a pod and never from a kubeconfig. Here they are read again regularly and at once after a 401.

What the library does not do is not done here either: a refreshed OIDC token is not written back to the kubeconfig.

Importing this takes half a second, so that only who follows a cluster should.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path

import aiohttp

from picker.sources.kubernetes.access import REREAD_S, SERVICE_ACCOUNT, Access, AccessLoader, NoCluster
from picker.sources.kubernetes.failure import NOT_UNDERSTOOD, UNREACHABLE, ApiFailure, failure_of, one_line

__all__ = ["ClusterApi", "NoCluster"]

CONNECT_TIMEOUT_S = 10.0
# A watch is answered at once; lists are not, they have their own time.
ACCEPT_TIMEOUT_S = 30.0
# A page holds 500 objects of at most about 1.5 MiB (what etcd takes), in practice of a few KiB.
BODY_MAX_BYTES = 64 * 2**20
ERROR_BODY_MAX_BYTES = 64 * 2**10
# One object and what is around it.
LINE_MAX_BYTES = 16 * 2**20
# After credentials were refused and reading them again brought nothing new: plugins are not run all the time.
FRUITLESS_APART_S = 2.0
# A host that vanished does not even reset connections: after 30 + 3 x 10 s without an answer they end.
KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))

_CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)


class ClusterApi:
    """A client for one cluster.

    The cluster is that of `kubeconfig` or `context` if either is given; else the one we are a pod of; else that of
    `$KUBECONFIG` or `~/.kube/config`. `service_account` and `environ` are where a pod finds itself.
    """

    def __init__(
        self,
        *,
        kubeconfig: Path | None = None,
        context: str | None = None,
        service_account: Path = SERVICE_ACCOUNT,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loader = AccessLoader(
            kubeconfig=kubeconfig, context=context, service_account=service_account, environ=environ, clock=clock
        )
        self._clock = clock
        self._access: Access | None = None
        self._session: aiohttp.ClientSession | None = None
        self._rereading = asyncio.Lock()
        self._reread_at = 0.0
        self._fruitless_until = 0.0

    def __repr__(self) -> str:
        return f"<ClusterApi {self._access!r}>"

    @property
    def namespace(self) -> str | None:
        """The namespace of the service account, or of the context; None when neither says."""
        return self._access.namespace if self._access is not None else None

    async def start(self) -> None:
        """Reads the configuration. Raises NoCluster when there is none that can be used; the cluster is not asked."""
        try:
            self._take(await self._loader.load())
        except NoCluster:
            await self._loader.close()
            raise
        self._session = aiohttp.ClientSession(
            # Unlimited: each watch holds a connection, and the configuration bounds them.
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "User-Agent": "waypost"},
        )

    async def close(self) -> None:
        """Closes every connection; may be called twice."""
        await self._loader.close()
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, params: Mapping[str, str], *, timeout_s: float) -> bytes | ApiFailure:
        """The body of a 200, read within `timeout_s`."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        response = await self._send(path, params, timeout, timeout_s)
        if isinstance(response, ApiFailure):
            return response
        try:
            body = await _body(response, BODY_MAX_BYTES)
        except _CONNECTION_ERRORS as error:
            return _lost(error)
        finally:
            response.release()
        return body if body is not None else _too_large("an answer", BODY_MAX_BYTES)

    async def watch(
        self, path: str, params: Mapping[str, str], *, timeout_s: float, idle_s: float
    ) -> AsyncGenerator[bytes | ApiFailure, None]:
        """The lines of a watch, without what ends them. The first one is empty: the server has accepted the watch. A
        failure comes last, and none when the server ended it in good order; a line that was cut off is not told.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_s)
        response = await self._send(path, params, timeout, ACCEPT_TIMEOUT_S)
        if isinstance(response, ApiFailure):
            yield response
            return
        try:
            yield b""
            pieces: list[bytes] = []
            size = 0
            async for chunk in response.content.iter_any():
                first, *others = chunk.split(b"\n")
                pieces.append(first)
                size += len(first)
                if size > LINE_MAX_BYTES:
                    yield _too_large("a line of the watch", LINE_MAX_BYTES)
                    return
                if others:
                    *whole, rest = b"".join(pieces), *others
                    for line in whole:
                        if line:
                            yield line
                    pieces, size = [rest], len(rest)
        except _CONNECTION_ERRORS as error:
            yield _lost(error)
        finally:
            response.close()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _send(
        self, path: str, params: Mapping[str, str], timeout: aiohttp.ClientTimeout, answer_s: float
    ) -> aiohttp.ClientResponse | ApiFailure:
        """The beginning of a 200. What was refused for its credentials is sent again if there are new ones."""
        access = await self._current()
        response = await self._request(access, path, params, timeout, answer_s)
        if not isinstance(response, ApiFailure) or response.status != 401:
            return response
        try:
            fresh = await self._reread(access)
        except NoCluster as error:
            return ApiFailure(401, one_line(f"{response.message}; {error}"), reason=response.reason)
        if _same(fresh, access):
            return response
        return await self._request(fresh, path, params, timeout, answer_s)

    async def _request(
        self,
        access: Access,
        path: str,
        params: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,
        answer_s: float,
    ) -> aiohttp.ClientResponse | ApiFailure:
        if self._session is None:
            raise RuntimeError("start() comes first")
        try:
            async with asyncio.timeout(answer_s):
                response = await self._session.get(
                    access.server + path,
                    params=params,
                    headers={"Authorization": access.authorization} if access.authorization else None,
                    ssl=access.tls if access.tls is not None else True,
                    server_hostname=access.server_name,
                    proxy=access.proxy,
                    timeout=timeout,
                    # Nobody else gets our token.
                    allow_redirects=False,
                )
                if response.status == 200:
                    return response
                try:
                    body = await _body(response, ERROR_BODY_MAX_BYTES)
                finally:
                    response.release()
                return failure_of(response.status, body or b"", response.headers)
        except aiohttp.ClientSSLError as error:
            # The cluster may have a new certificate authority; its file is read again soon, and now.
            self._reread_at = self._clock()
            return _lost(error)
        except (*_CONNECTION_ERRORS, ValueError) as error:
            return _lost(error)

    # -- credentials ---------------------------------------------------------------------------------------------------

    async def _current(self) -> Access:
        """What to use now, read again when it is time."""
        access = self._access
        if access is None:
            raise RuntimeError("start() comes first")
        if self._clock() < self._reread_at:
            return access
        try:
            return await self._reread(access)
        except NoCluster:
            # What worked until now may go on working; if not, a 401 will say why.
            return access

    async def _reread(self, stale: Access) -> Access:
        """The configuration after `stale`, read once for all who found that one stale."""
        async with self._rereading:
            now = self._clock()
            if self._access is not None and (self._access is not stale or now < self._fruitless_until):
                return self._access
            self._reread_at = now + REREAD_S
            self._fruitless_until = now + FRUITLESS_APART_S
            fresh = await self._loader.load()
            if not _same(fresh, stale):
                self._fruitless_until = now
            self._take(fresh)
            return fresh

    def _take(self, access: Access) -> None:
        self._access = access
        self._reread_at = access.reread_at


def _same(one: Access, other: Access) -> bool:
    return (one.authorization, one.tls) == (other.authorization, other.tls)


async def _body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes | None:
    """All of it, or None when it is larger; what is larger is not read further."""
    pieces: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        pieces.append(chunk)
        size += len(chunk)
        if size > most_bytes:
            response.close()
            return None
    return b"".join(pieces)


def _lost(error: Exception) -> ApiFailure:
    if isinstance(error, TimeoutError):
        return ApiFailure(UNREACHABLE, "the API server did not answer in time")
    return ApiFailure(UNREACHABLE, one_line(f"no connection to the API server: {str(error) or type(error).__name__}"))


def _too_large(what: str, most_bytes: int) -> ApiFailure:
    return ApiFailure(NOT_UNDERSTOOD, f"{what} has more than {most_bytes >> 20} MiB")


def _socket(address: tuple[int, int, int, str, object]) -> socket.socket:
    """A socket whose dead peers are found."""
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        # Not every system has them all.
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return sock
