"""What every source must keep: the whole picture first, ghosts removed, and a clean end when cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from picker.config import DnsEntry, EndpointEntry, RegistrationSection
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.rules import Rulebook
from picker.core.updates import Replace, SourceUpdate
from picker.sources.dns import DnsSettings, DnsSource
from picker.sources.endpoints import endpoint_of
from picker.sources.file import FileSource
from picker.sources.follow import follow
from picker.sources.registered import RegisteredSource
from picker.sources.resolve import Resolving
from picker.sources.source import Source
from picker.sources.static import StaticSource
from tests.unit.sources.waiting import PATIENCE_S, until

Build = Callable[[Path, list[str]], Source]
Change = Callable[[Path, list[str]], None]


def write(path: Path, urls: list[str]) -> None:
    new = path.with_suffix(".new")
    new.write_text("endpoints:" + "".join(f'\n  - "{url}"' for url in urls) + ("\n" if urls else " []\n"))
    new.replace(path)


def static(path: Path, urls: list[str]) -> Source:
    return StaticSource([EndpointEntry.model_validate(url) for url in urls])


def file(path: Path, urls: list[str]) -> Source:
    write(path, urls)
    return FileSource(path, on_problems=lambda problems: pytest.fail(str(problems)))


async def loopback(host: str) -> tuple[str, ...]:
    return ("127.0.0.1",)


def resolving(build: Build) -> Build:
    return lambda path, urls: Resolving(build(path, urls), lookup=loopback)


# What a name server would say and where to register, by the path a test was given.
NAMED: dict[Path, list[str]] = {}
REGISTERED: dict[Path, RegisteredSource] = {}


def dns(path: Path, urls: list[str]) -> Source:
    name(path, urls)

    async def lookup(host: str) -> tuple[str, ...]:
        return tuple(str(urlsplit(url).hostname) for url in reversed(NAMED[path]))

    return DnsSource(
        DnsEntry.model_validate("engines.test:8000"),
        lookup=lookup,
        clock=time.monotonic,
        sleep=asyncio.sleep,
        rng=random.Random(1),
        on_trouble=lambda _, trouble: pytest.fail(trouble),
        settings=DnsSettings(interval_s=0.02, retry_s=0.01),
    )


def name(path: Path, urls: list[str]) -> None:
    NAMED[path] = urls


def registered(path: Path, urls: list[str]) -> Source:
    source = RegisteredSource(RegistrationSection(enabled=True), on_change=lambda *_: None)
    REGISTERED[path] = source
    register(path, urls)
    return source


def register(path: Path, urls: list[str]) -> None:
    source = REGISTERED[path]
    endpoints = [endpoint_of(EndpointEntry.model_validate(url)) for url in urls]
    for known in source.registered():
        if known.endpoint not in endpoints:
            source.deregister(known.endpoint.id)
    for endpoint in endpoints:
        source.register(endpoint)


SOURCES: dict[str, Build] = {
    "static": static,
    "file": file,
    "dns": dns,
    "registered": registered,
    "resolving-static": resolving(static),
    "resolving-file": resolving(file),
    "resolving-registered": resolving(registered),
}
CHANGING: dict[str, Change] = {
    "file": write,
    "dns": name,
    "registered": register,
    "resolving-file": write,
    "resolving-registered": register,
}
URLS = ["http://10.0.0.1:8000", "http://engine.test:8000", "http://[::1]:8000"]
# One name has addresses of one family.
DNS_URLS = ["http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10.0.0.3:8000"]


def urls_of(kind: str) -> list[str]:
    return DNS_URLS if kind == "dns" else URLS


def ids_of(kind: str) -> list[str]:
    return [url.removeprefix("http://") for url in urls_of(kind)]


every_source = pytest.mark.parametrize("kind", SOURCES)


def datastore() -> Datastore:
    return Datastore(
        health=HealthLimits(),
        freshness=Freshness(),
        deadlines=Deadlines(first_byte_s=60, between_chunks_s=60, total_s=600),
    )


async def first(updates: AsyncGenerator[SourceUpdate, None]) -> SourceUpdate:
    async with asyncio.timeout(PATIENCE_S):
        return await anext(updates)


def ids(store: Datastore) -> list[str]:
    return sorted(endpoint.id for endpoint in store.endpoints())


async def known(store: Datastore, wanted: list[str]) -> None:
    await until(lambda: ids(store) == sorted(wanted))


@every_source
async def test_the_whole_picture_comes_first(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path / "e.yaml", urls_of(kind))
    async with aclosing(source.updates()) as updates:
        update = await first(updates)
    assert isinstance(update, Replace)
    assert [endpoint.id for endpoint in update.endpoints] == ids_of(kind)
    assert update.source == source.name


@every_source
async def test_nothing_is_a_picture_too(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path / "e.yaml", [])
    async with aclosing(source.updates()) as updates:
        assert await first(updates) == Replace(source.name, ())


@every_source
async def test_endpoints_are_whole(kind: str, tmp_path: Path) -> None:
    async with aclosing(SOURCES[kind](tmp_path / "e.yaml", urls_of(kind)).updates()) as updates:
        update = await first(updates)
    assert isinstance(update, Replace)
    addresses = [endpoint.address for endpoint in update.endpoints]
    named = "127.0.0.1:8000" if kind.startswith("resolving") else ""
    assert addresses == [named if place == "engine.test:8000" else place for place in ids_of(kind)]
    assert all(endpoint.url.startswith("http://") and endpoint.url.endswith(":8000") for endpoint in update.endpoints)


@every_source
async def test_ghosts_of_an_earlier_run_are_removed(kind: str, tmp_path: Path) -> None:
    path, store = tmp_path / "e.yaml", datastore()
    whole, ids_whole = urls_of(kind), ids_of(kind)
    for urls, expected in ((whole, ids_whole), (whole[:1], ids_whole[:1])):
        task = asyncio.create_task(follow(SOURCES[kind](path, urls), store, Rulebook()))
        await known(store, expected)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@every_source
async def test_other_sources_endpoints_are_left_alone(kind: str, tmp_path: Path) -> None:
    path, store = tmp_path / "e.yaml", datastore()
    other = EndpointEntry.model_validate("http://10.9.9.9:1")
    async with aclosing(StaticSource([other]).updates()) as updates:
        update = await first(updates)
    assert isinstance(update, Replace)
    store.apply(Replace("other", update.endpoints))
    task = asyncio.create_task(follow(SOURCES[kind](path, URLS[:1]), store, Rulebook()))
    await known(store, ["10.9.9.9:1", "10.0.0.1:8000"])
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", CHANGING)
async def test_changes_reach_the_store(kind: str, tmp_path: Path) -> None:
    path, store = tmp_path / "e.yaml", datastore()
    task = asyncio.create_task(follow(SOURCES[kind](path, urls_of(kind)), store, Rulebook()))
    await known(store, ids_of(kind))
    CHANGING[kind](path, [URLS[0], "http://10.0.0.4:8000"])
    await known(store, ["10.0.0.1:8000", "10.0.0.4:8000"])
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@every_source
async def test_cancelling_ends_cleanly_at_any_moment(kind: str, tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    for wait_s in (0.0, 0.001, 0.06, 0.3):
        source = SOURCES[kind](tmp_path / "e.yaml", urls_of(kind))
        task = asyncio.create_task(follow(source, datastore(), Rulebook()))
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before


@every_source
async def test_closing_the_iterator_early_is_allowed(kind: str, tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    updates = SOURCES[kind](tmp_path / "e.yaml", urls_of(kind)).updates()
    await first(updates)
    await updates.aclose()
    assert asyncio.all_tasks() == before
