"""Connections to one origin with one set of credentials, kept alive between exchanges.

Last in, first out, so that a quiet pool shrinks by itself. It holds idle connections only: those in use belong to
their exchange.
"""

from __future__ import annotations

import asyncio
import ssl

from picker.core.events import FailureKind
from picker.upstream.connection import Connection
from picker.upstream.outbox import Outbox

# uvicorn, under vLLM and SGLang alike, closes idle connections after 5 s: ours must be gone before, or requests race
# the close.
KEEP_ALIVE_S = 4.0
# Idle connections kept per origin. Above it the pool has more than any engine runs at once (vLLM's default batch is
# 256 to 1,024).
IDLE_MAX = 1024


class Pool:
    """Idle connections to one origin."""

    __slots__ = ("_closed", "_context", "_host", "_idle", "_loop", "_outbox", "_port", "_server_name", "_sweeper")

    def __init__(
        self,
        host: str,
        port: int,
        outbox: Outbox,
        *,
        context: ssl.SSLContext | None,
        server_name: str | None,
    ) -> None:
        self._host = host
        self._port = port
        self._outbox = outbox
        self._context = context
        self._server_name = (server_name or host) if context is not None else None
        self._idle: list[Connection] = []
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Pool {self._host}:{self._port} [{len(self._idle)} idle]>"

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> Connection | None:
        """An idle connection that is still good, None when there is none."""
        oldest = self._loop.time() - KEEP_ALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def connect(self, timeout_s: float) -> Connection | FailureKind:
        """A new connection, or CONNECT."""
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self, self._outbox, self._loop),
                    self._host,
                    self._port,
                    ssl=self._context,
                    server_hostname=self._server_name,
                )
        except (OSError, ssl.SSLError, TimeoutError, UnicodeError):
            return FailureKind.CONNECT
        return connection

    def put(self, connection: Connection) -> None:
        """Takes a connection back after a complete exchange."""
        if self._closed or len(self._idle) >= IDLE_MAX:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEP_ALIVE_S / 2, self._sweep)

    def close(self) -> None:
        """Closes what is idle now and what comes back later."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _sweep(self) -> None:
        oldest = self._loop.time() - KEEP_ALIVE_S
        keep: list[Connection] = []
        for connection in self._idle:
            if connection.usable and connection.idle_since > oldest:
                keep.append(connection)
            else:
                connection.abort()
        self._idle = keep
        self._sweeper = self._loop.call_later(KEEP_ALIVE_S / 2, self._sweep) if keep else None
