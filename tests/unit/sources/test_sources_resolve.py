"""Host names become addresses, late, again and again, and never at the cost of an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from picker.core.updates import Remove, Replace, SourceUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources.resolve import ResolveSettings, Resolving, look_up
from picker.sources.source import SourceStatus
from tests.unit.signals.virtual_time import VirtualTime
from tests.unit.sources.waiting import until


class Scripted:
    """A source that says what a test puts into it."""

    name = "scripted"

    def __init__(self) -> None:
        self.queue: asyncio.Queue[SourceUpdate | Exception | None] = asyncio.Queue()
        self.closed = False

    def status(self) -> SourceStatus:
        return SourceStatus()

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        try:
            while (update := await self.queue.get()) is not None:
                if isinstance(update, Exception):
                    raise update
                yield update
        finally:
            self.closed = True


class Names:
    """A resolver with a table. A missing name fails; a name in `slow` never answers."""

    def __init__(self, **table: tuple[str, ...]) -> None:
        self.table = table
        self.slow: set[str] = set()
        self.asked: list[str] = []

    async def __call__(self, host: str) -> tuple[str, ...]:
        self.asked.append(host)
        if host in self.slow:
            await asyncio.Event().wait()
        if host not in self.table:
            raise OSError(f"no such host: {host}")
        return self.table[host]


class Rig:
    """A resolving source, its inner source, resolver and time, and what it said so far."""

    def __init__(self, names: Names, **settings: float) -> None:
        self.names = names
        self.inner = Scripted()
        self.time = VirtualTime(1000.0)
        self.said: list[SourceUpdate] = []
        self.source = Resolving(
            self.inner,
            lookup=names,
            settings=ResolveSettings(**settings),
            clock=self.time.clock,
            sleep=self.time.sleep,
        )

    async def collect(self) -> None:
        async with aclosing(self.source.updates()) as updates:
            async for update in updates:
                self.said.append(update)

    async def say(self, update: SourceUpdate | None) -> None:
        self.inner.queue.put_nowait(update)
        await self.time.settle()

    @property
    def addresses(self) -> dict[str, str]:
        """The endpoints as somebody who followed everything knows them."""
        known: dict[str, str] = {}
        for update in self.said:
            match update:
                case Replace(_, endpoints):
                    known = {endpoint.id: endpoint.address for endpoint in endpoints}
                case Upsert(_, endpoint):
                    known[endpoint.id] = endpoint.address
                case Remove(_, endpoint_id):
                    del known[endpoint_id]
        return known


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    task = asyncio.create_task(rig.collect())
    try:
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def endpoint(name: str, host: str) -> Endpoint:
    return Endpoint(id=name, url=f"http://{host}:8000")


def replace(*endpoints: Endpoint) -> Replace:
    return Replace("scripted", endpoints)


async def test_the_first_update_has_addresses_already() -> None:
    async with running(Rig(Names(a=("10.0.0.1",), b=("::1",)))) as rig:
        await rig.say(replace(endpoint("x", "a"), endpoint("y", "b"), endpoint("z", "10.9.9.9")))
        assert len(rig.said) == 1
        assert rig.addresses == {"x": "10.0.0.1:8000", "y": "[::1]:8000", "z": ""}
        assert sorted(rig.names.asked) == ["a", "b"]


async def test_a_name_that_does_not_resolve_leaves_the_endpoint_without_address() -> None:
    async with running(Rig(Names())) as rig:
        await rig.say(replace(endpoint("x", "a")))
        assert rig.addresses == {"x": ""}
        rig.names.table["a"] = ("10.0.0.1",)
        await rig.time.advance(3)
        assert rig.addresses == {"x": "10.0.0.1:8000"}
        assert isinstance(rig.said[-1], Upsert)


async def test_a_slow_name_is_not_waited_for() -> None:
    names = Names(b=("10.0.0.2",))
    names.slow.add("a")
    async with running(Rig(names, grace_s=0.05)) as rig:
        rig.inner.queue.put_nowait(replace(endpoint("x", "a"), endpoint("y", "b")))
        await until(lambda: bool(rig.said))
        assert rig.addresses == {"x": "", "y": "10.0.0.2:8000"}


async def test_a_changed_address_is_told_within_the_interval() -> None:
    async with running(Rig(Names(a=("10.0.0.1",)))) as rig:
        await rig.say(replace(endpoint("x", "a"), endpoint("y", "a")))
        rig.names.table["a"] = ("10.0.0.2",)
        await rig.time.advance(28)
        assert rig.addresses == {"x": "10.0.0.1:8000", "y": "10.0.0.1:8000"}
        await rig.time.advance(4)
        assert rig.addresses == {"x": "10.0.0.2:8000", "y": "10.0.0.2:8000"}
        assert rig.names.asked == ["a", "a"]


async def test_an_address_that_is_still_there_has_not_moved() -> None:
    async with running(Rig(Names(a=("10.0.0.1", "10.0.0.2")))) as rig:
        await rig.say(replace(endpoint("x", "a")))
        rig.names.table["a"] = ("10.0.0.2", "10.0.0.1")
        await rig.time.advance(100)
        assert len(rig.names.asked) >= 3
        assert len(rig.said) == 1


async def test_the_last_good_answer_is_kept() -> None:
    async with running(Rig(Names(a=("10.0.0.1",)))) as rig:
        await rig.say(replace(endpoint("x", "a")))
        del rig.names.table["a"]
        await rig.time.advance(300)
        assert rig.addresses == {"x": "10.0.0.1:8000"}
        await rig.say(replace(endpoint("x", "a"), endpoint("y", "a")))
        assert rig.addresses == {"x": "10.0.0.1:8000", "y": "10.0.0.1:8000"}


async def test_failing_names_are_asked_ever_more_rarely() -> None:
    async with running(Rig(Names())) as rig:
        await rig.say(replace(endpoint("x", "a")))
        await rig.time.advance(600)
        assert 15 <= len(rig.names.asked) <= 30


async def test_upserts_and_removals_pass_through() -> None:
    async with running(Rig(Names(a=("10.0.0.1",), b=("10.0.0.2",)))) as rig:
        await rig.say(replace(endpoint("x", "a")))
        await rig.say(Upsert("scripted", endpoint("y", "b")))
        assert rig.addresses == {"x": "10.0.0.1:8000", "y": "10.0.0.2:8000"}
        await rig.say(Remove("scripted", "y"))
        assert rig.addresses == {"x": "10.0.0.1:8000"}
        rig.names.asked.clear()
        await rig.time.advance(100)
        assert "b" not in rig.names.asked


async def test_it_goes_on_when_the_inner_source_has_nothing_more_to_say() -> None:
    async with running(Rig(Names(a=("10.0.0.1",)))) as rig:
        await rig.say(replace(endpoint("x", "a")))
        await rig.say(None)
        rig.names.table["a"] = ("10.0.0.2",)
        await rig.time.advance(40)
        assert rig.addresses == {"x": "10.0.0.2:8000"}


async def test_a_bug_in_the_inner_source_comes_out() -> None:
    rig = Rig(Names())
    rig.inner.queue.put_nowait(ValueError("bug"))
    with pytest.raises(ValueError, match="bug"):
        await rig.collect()
    assert rig.inner.closed


async def test_cancelling_closes_the_inner_source_and_ends_look_ups() -> None:
    names = Names()
    names.slow.add("a")
    before = asyncio.all_tasks()
    async with running(Rig(names, grace_s=0.01)) as rig:
        await rig.say(replace(endpoint("x", "a")))
    assert rig.inner.closed
    assert asyncio.all_tasks() == before


async def test_the_systems_resolver() -> None:
    assert "127.0.0.1" in await look_up("localhost")
    assert (await look_up("localhost"))[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["." * 300, "a" * 70 + ".invalid"])
async def test_what_is_no_name_has_no_address(host: str) -> None:
    with pytest.raises(OSError, match=r".+"):
        await look_up(host)
