"""Registrations: they live for their time, renewals keep them, and every change is told once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from picker.config import RegistrationSection
from picker.core.updates import Remove, Replace, SourceUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources import registered
from picker.sources.registered import RegisteredSource
from tests.unit.signals.virtual_time import VirtualTime


class Rig:
    """A source on a simulated clock, and what it said."""

    def __init__(self, **section: object) -> None:
        self.time = VirtualTime(50.0)
        self.changes: list[tuple[str, str]] = []
        self.said: list[SourceUpdate] = []
        self.source = RegisteredSource(
            RegistrationSection.model_validate({"enabled": True, **section}),
            on_change=lambda endpoint_id, what: self.changes.append((endpoint_id, what)),
            clock=self.time.clock,
            sleep=self.time.sleep,
        )

    async def collect(self) -> None:
        async with aclosing(self.source.updates()) as updates:
            async for update in updates:
                self.said.append(update)

    def names(self) -> list[str]:
        return [each.endpoint.id for each in self.source.registered()]


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    task = asyncio.create_task(rig.collect())
    try:
        await rig.time.settle()
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def endpoint(name: str, port: int = 8000) -> Endpoint:
    return Endpoint(id=name, url=f"http://10.0.0.1:{port}")


async def test_nothing_is_the_first_picture() -> None:
    async with running(Rig()) as rig:
        assert rig.said == [Replace("registered", ())]
        assert rig.source.status().problem == ""


async def test_what_was_registered_before_is_in_the_first_picture() -> None:
    rig = Rig()
    rig.source.register(endpoint("a"))
    async with running(rig):
        assert rig.said == [Replace("registered", (endpoint("a"),))]


async def test_an_entry_comes_and_goes() -> None:
    async with running(Rig()) as rig:
        came = rig.source.register(endpoint("a"))
        assert came is not None
        assert (came.new, came.expires_in_s) == (True, 30.0)
        await rig.time.settle()
        assert rig.said[1:] == [Upsert("registered", endpoint("a"))]
        assert rig.source.deregister("a")
        assert not rig.source.deregister("a")
        await rig.time.settle()
        assert rig.said[2:] == [Remove("registered", "a")]
        assert rig.changes == [("a", "registered"), ("a", "deregistered")]


async def test_an_entry_expires_within_a_second() -> None:
    async with running(Rig(ttl="10s")) as rig:
        rig.source.register(endpoint("a"))
        rig.source.register(endpoint("b"), 20.0)
        await rig.time.advance(9.9)
        assert rig.names() == ["a", "b"]
        await rig.time.advance(1.1)
        assert rig.names() == ["b"]
        assert rig.said[-1] == Remove("registered", "a")
        assert rig.changes[-1] == ("a", "expired")
        await rig.time.advance(10)
        assert rig.said[-1] == Remove("registered", "b")


async def test_a_renewal_is_no_news_but_keeps_the_entry() -> None:
    async with running(Rig(ttl="10s")) as rig:
        for _ in range(5):
            renewed = rig.source.register(endpoint("a"))
            await rig.time.advance(8)
        assert renewed is not None
        assert not renewed.new
        assert rig.said == [Replace("registered", ()), Upsert("registered", endpoint("a"))]
        assert rig.changes == [("a", "registered")]


async def test_a_change_is_told() -> None:
    async with running(Rig()) as rig:
        rig.source.register(endpoint("a"))
        await rig.time.settle()
        changed = rig.source.register(endpoint("a", 9000))
        assert changed is not None
        assert not changed.new
        await rig.time.settle()
        assert rig.said[-1] == Upsert("registered", endpoint("a", 9000))
        assert rig.changes[-1] == ("a", "changed")


async def test_of_many_changes_in_a_row_the_last_one_counts() -> None:
    async with running(Rig()) as rig:
        rig.source.register(endpoint("a"))
        rig.source.deregister("a")
        rig.source.register(endpoint("a", 9000))
        rig.source.register(endpoint("b"))
        rig.source.deregister("b")
        await rig.time.settle()
        assert rig.said[1:] == [Upsert("registered", endpoint("a", 9000)), Remove("registered", "b")]


async def test_no_time_is_longer_than_the_maximum() -> None:
    async with running(Rig(ttl="2h", ttl_max="1m")) as rig:
        for ttl_s in (None, 1e6):
            got = rig.source.register(endpoint("a"), ttl_s)
            assert got is not None
            assert got.expires_in_s == 60
        await rig.time.advance(30)
        assert rig.source.registered()[0].expires_in_s == pytest.approx(30)


async def test_a_full_house_takes_renewals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "REGISTERED_MAX", 3)
    async with running(Rig()) as rig:
        for name in "abc":
            assert rig.source.register(endpoint(name)) is not None
        assert rig.source.register(endpoint("d")) is None
        assert rig.source.register(endpoint("a")) is not None
        rig.source.deregister("a")
        await rig.time.settle()
        assert rig.source.register(endpoint("d")) is not None
        assert rig.names() == ["b", "c", "d"]


async def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "REGISTERED_MAX", 3)
    rig = Rig()
    for number in range(100):
        rig.source.register(endpoint(f"e{number}"))
        rig.source.deregister(f"e{number}")
    assert len(rig.source._untold) <= 3


async def test_who_left_is_known_for_a_moment() -> None:
    async with running(Rig()) as rig:
        assert not rig.source.owns("a")
        rig.source.register(endpoint("a"))
        assert rig.source.owns("a")
        rig.source.deregister("a")
        assert rig.source.owns("a")
        await rig.time.advance(6)
        assert not rig.source.owns("a")
        assert not rig.source._left


async def test_closing_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    async with running(Rig()) as rig:
        rig.source.register(endpoint("a"))
    assert asyncio.all_tasks() == before
