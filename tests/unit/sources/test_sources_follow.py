"""Following a source until cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from picker.core.updates import Replace, SourceUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources.follow import follow
from tests.unit.sources.waiting import until


class Store:
    def __init__(self) -> None:
        self.updates: list[SourceUpdate] = []

    def apply(self, update: SourceUpdate) -> None:
        self.updates.append(update)


class Source:
    name = "s"

    def __init__(self, *updates: SourceUpdate, error: Exception | None = None) -> None:
        self._updates = updates
        self._error = error
        self.closed = False

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        try:
            for update in self._updates:
                yield update
            if self._error is not None:
                raise self._error
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def answer(host: str) -> tuple[str, ...]:
    return ("10.0.0.1",)


async def test_updates_arrive_with_addresses_and_cancelling_closes_the_source() -> None:
    store = Store()
    endpoint = Endpoint(id="a", url="http://engine:8000")
    source = Source(Replace("s", ()), Upsert("s", endpoint))
    task = asyncio.create_task(follow(source, store, lookup=answer))
    await until(lambda: len(store.updates) == 2)
    assert store.updates[0] == Replace("s", ())
    assert isinstance(store.updates[1], Upsert)
    assert store.updates[1].endpoint.address == "10.0.0.1:8000"
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert source.closed


async def test_a_bug_in_the_source_comes_out() -> None:
    source = Source(Replace("s", ()), error=KeyError("bug"))
    store = Store()
    with pytest.raises(KeyError):
        await follow(source, store, lookup=answer)
    assert len(store.updates) == 1
    assert source.closed
