"""An Upstream before a scripted server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from picker.core.events import FailureKind
from picker.core.values import Endpoint
from picker.upstream.client import Upstream
from picker.upstream.connection import Response
from picker.upstream.credentials import Credentials
from tests.unit.upstream.hostile import PATIENCE_S


@contextlib.asynccontextmanager
async def upstream(*, connect_timeout_s: float = 2.0, **credentials: Credentials) -> AsyncIterator[Upstream]:
    """A started client; leaving closes it and asserts that no task is left."""
    tasks = asyncio.all_tasks()
    client = Upstream(credentials, connect_timeout_s=connect_timeout_s)
    await client.start()
    try:
        yield client
    finally:
        await client.close()
    await until(lambda: not asyncio.all_tasks() - tasks)


def endpoint(url: str, credentials: str = "") -> Endpoint:
    """An endpoint at a URL."""
    return Endpoint(id=url, url=url, credentials=credentials)


async def read_all(response: Response | FailureKind) -> bytes | FailureKind:
    """The whole body, or the failure; the response is closed."""
    if isinstance(response, FailureKind):
        return response
    parts = []
    try:
        while chunk := await response.read():
            if isinstance(chunk, FailureKind):
                return chunk
            parts.append(chunk)
    finally:
        response.close()
    return b"".join(parts)


async def ask(client: Upstream, url: str, body: bytes = b"") -> bytes | FailureKind:
    """The body of the answer to one POST."""
    return await read_all(await client.open(endpoint(url), "POST", "/x", [], body))


async def until(condition: Callable[[], bool]) -> None:
    """Polls a condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
