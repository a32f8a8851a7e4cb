"""The way to Redis: every call has a deadline and answers with values, trouble included.

Owns the connections, and what errors of Redis mean to people. It neither retries nor sleeps; those who call do.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from picker.signals.shared.address import client_of

Command = Sequence[str | bytes | int | float]


class Kind(enum.StrEnum):
    """Kinds of trouble with Redis."""

    AWAY = "away"
    SLOW = "slow"
    REFUSED = "refused"
    FULL = "full"
    ODD = "odd"


class Trouble(msgspec.Struct, frozen=True):
    """Why something could not be done. The text is for people and holds neither secrets nor data."""

    kind: Kind
    text: str


def trouble_in(replies: Sequence[Any]) -> Trouble | None:
    """The first error among the replies."""
    for reply in replies:
        if isinstance(reply, Exception):
            return trouble_of(reply)
    return None


def trouble_of(error: Exception) -> Trouble:
    """What an error means. Texts of replies are not passed on: Redis repeats arguments in them."""
    match error:
        case AuthenticationError():
            return Trouble(Kind.REFUSED, "Redis does not accept the user or password")
        case NoPermissionError():
            return Trouble(Kind.REFUSED, "the Redis user may not do what is needed (ACL)")
        case OutOfMemoryError():
            return Trouble(Kind.FULL, "Redis is out of memory (maxmemory)")
        case ReadOnlyError():
            return Trouble(Kind.REFUSED, "this Redis is a read-only replica")
        case BusyLoadingError():
            return Trouble(Kind.AWAY, "Redis is loading its data")
        case ResponseError():
            code = error.status_code or str(error).partition(" ")[0]
            return Trouble(Kind.ODD, f"Redis answers {code[:20] if code.isupper() else 'an error'}")
        case TimeoutError() | RedisTimeoutError():
            return Trouble(Kind.SLOW, "Redis does not answer in time")
        case RedisError() | OSError():
            return Trouble(Kind.AWAY, f"no connection to Redis ({type(error).__name__})")
        case _:
            return Trouble(Kind.ODD, f"the Redis client failed ({type(error).__name__})")


class Link:
    """Calls to one Redis. Raises ValueError for a bad URL; connects when first used."""

    def __init__(self, url: str, *, timeout_s: float, username: str = "", password: str = "") -> None:
        self._timeout_s = timeout_s
        self._client, self._owned = client_of(url, connect_timeout_s=timeout_s, username=username, password=password)

    def __repr__(self) -> str:
        return "<Link to Redis>"

    async def ask(self, *commands: Command, timeout_s: float | None = None) -> list[Any] | Trouble:
        """The replies, in one round trip; errors of single commands are among them."""
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                pipeline = self._client.pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)
                replies: list[Any] = await pipeline.execute(raise_on_error=False)
                return replies
        except Exception as error:
            # Whatever comes out of the library is trouble with what it talks to: on garbage it raises all sorts.
            return trouble_of(error)

    async def all_of(self, *commands: Command, timeout_s: float | None = None) -> list[Any] | Trouble:
        """The replies when all commands went well, otherwise the first trouble."""
        replies = await self.ask(*commands, timeout_s=timeout_s)
        return replies if isinstance(replies, Trouble) else trouble_in(replies) or replies

    async def close(self) -> None:
        """Closes all connections, politely where that takes no time."""
        for owned in self._owned:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await owned.aclose()
            except (RedisError, OSError):
                pass
