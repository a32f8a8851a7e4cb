"""Following a source until cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from picker.core.rules import Objective, Rewrite, Rulebook, Target
from picker.core.updates import EndpointUpdate, Replace, RulesChanged, SourceUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources.follow import follow
from picker.sources.source import SourceStatus
from tests.unit.sources.waiting import until


class Store:
    def __init__(self) -> None:
        self.updates: list[EndpointUpdate] = []

    def apply(self, update: EndpointUpdate) -> None:
        self.updates.append(update)


class Source:
    name = "s"

    def __init__(self, *updates: SourceUpdate, error: Exception | None = None) -> None:
        self._updates = updates
        self._error = error
        self.closed = False

    def status(self) -> SourceStatus:
        return SourceStatus()

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        try:
            for update in self._updates:
                yield update
            if self._error is not None:
                raise self._error
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_updates_arrive_where_they_belong_and_cancelling_closes_the_source() -> None:
    store, rules = Store(), Rulebook()
    endpoint = Endpoint(id="a", url="http://10.0.0.1:8000", address="10.0.0.1:8000")
    objective = Objective(pool="p", name="chat", priority=2)
    rewrite = Rewrite(pool="p", name="r", models=frozenset({"m"}), targets=(Target("n"),))
    source = Source(Replace("s", ()), Upsert("s", endpoint), RulesChanged("s", (objective,), (rewrite,)))
    task = asyncio.create_task(follow(source, store, rules))
    await until(lambda: bool(rules))
    assert store.updates == [Replace("s", ()), Upsert("s", endpoint)]
    assert rules.rewrites == (rewrite,)
    assert rules.priority("chat", None, "p") == 2
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert source.closed


async def test_a_bug_in_the_source_comes_out() -> None:
    source = Source(Replace("s", ()), error=KeyError("bug"))
    store = Store()
    with pytest.raises(KeyError):
        await follow(source, store, Rulebook())
    assert len(store.updates) == 1
    assert source.closed
