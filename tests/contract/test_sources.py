"""What every source must keep: the whole picture first, ghosts removed, and a clean end when cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from picker.config import EndpointEntry
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.updates import Replace, SourceUpdate
from picker.sources.file import FileSource
from picker.sources.follow import follow
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


SOURCES: dict[str, Build] = {
    "static": static,
    "file": file,
    "resolving-static": resolving(static),
    "resolving-file": resolving(file),
}
CHANGING: dict[str, Change] = {"file": write, "resolving-file": write}
URLS = ["http://10.0.0.1:8000", "http://engine.test:8000", "http://[::1]:8000"]
IDS = ["10.0.0.1:8000", "engine.test:8000", "[::1]:8000"]

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
    source = SOURCES[kind](tmp_path / "e.yaml", URLS)
    async with aclosing(source.updates()) as updates:
        update = await first(updates)
    assert isinstance(update, Replace)
    assert [endpoint.id for endpoint in update.endpoints] == IDS
    assert update.source == source.name


@every_source
async def test_nothing_is_a_picture_too(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path / "e.yaml", [])
    async with aclosing(source.updates()) as updates:
        assert await first(updates) == Replace(source.name, ())


@every_source
async def test_endpoints_are_whole(kind: str, tmp_path: Path) -> None:
    async with aclosing(SOURCES[kind](tmp_path / "e.yaml", URLS).updates()) as updates:
        update = await first(updates)
    assert isinstance(update, Replace)
    addresses = [endpoint.address for endpoint in update.endpoints]
    named = "127.0.0.1:8000" if kind.startswith("resolving") else ""
    assert addresses == ["10.0.0.1:8000", named, "[::1]:8000"]
    assert all(endpoint.url.startswith("http://") and endpoint.url.endswith(":8000") for endpoint in update.endpoints)


@every_source
async def test_ghosts_of_an_earlier_run_are_removed(kind: str, tmp_path: Path) -> None:
    path, store = tmp_path / "e.yaml", datastore()
    for urls, expected in ((URLS, IDS), (URLS[:1], IDS[:1])):
        task = asyncio.create_task(follow(SOURCES[kind](path, urls), store, lookup=loopback))
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
    task = asyncio.create_task(follow(SOURCES[kind](path, URLS[:1]), store, lookup=loopback))
    await known(store, ["10.9.9.9:1", IDS[0]])
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", CHANGING)
async def test_changes_reach_the_store(kind: str, tmp_path: Path) -> None:
    path, store = tmp_path / "e.yaml", datastore()
    task = asyncio.create_task(follow(SOURCES[kind](path, URLS), store, lookup=loopback))
    await known(store, IDS)
    CHANGING[kind](path, [URLS[0], "http://10.0.0.4:8000"])
    await known(store, [IDS[0], "10.0.0.4:8000"])
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@every_source
async def test_cancelling_ends_cleanly_at_any_moment(kind: str, tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    for wait_s in (0.0, 0.001, 0.06, 0.3):
        source = SOURCES[kind](tmp_path / "e.yaml", URLS)
        task = asyncio.create_task(follow(source, datastore(), lookup=loopback))
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before


@every_source
async def test_closing_the_iterator_early_is_allowed(kind: str, tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    updates = SOURCES[kind](tmp_path / "e.yaml", URLS).updates()
    await first(updates)
    await updates.aclose()
    assert asyncio.all_tasks() == before
