"""A watched file of endpoints: every way in which files change, and bad files that change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from picker.config import Problem
from picker.core.updates import Replace
from picker.sources.file import POLL_MS, FileSource
from tests.unit.sources.waiting import until


class Follower:
    """Reads a file source and keeps what it said: the ids of every version, and the problems reported."""

    def __init__(self, path: Path, poll_ms: int) -> None:
        self.versions: list[list[str]] = []
        self.problems: list[str] = []
        self.source = FileSource(path, on_problems=self._problems, poll_ms=poll_ms)

    def _problems(self, problems: Sequence[Problem]) -> None:
        self.problems += [str(problem) for problem in problems]

    async def run(self) -> None:
        async with aclosing(self.source.updates()) as updates:
            async for update in updates:
                assert isinstance(update, Replace)
                assert update.source == "file"
                self.versions.append([endpoint.id for endpoint in update.endpoints])

    async def sees(self, *ids: str) -> None:
        await until(lambda: self.versions[-1:] == [list(ids)])

    async def complains(self) -> None:
        await until(lambda: len(self.problems) >= 1)


@asynccontextmanager
async def following(path: Path, *, poll_ms: int = POLL_MS) -> AsyncIterator[Follower]:
    follower = Follower(path, poll_ms)
    task = asyncio.create_task(follower.run())
    try:
        yield follower
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def text(*names: str) -> str:
    return "endpoints:\n" + "".join(f"  - {{url: 'http://10.0.0.1:8000', name: {name}}}\n" for name in names)


async def test_the_file_as_it_is_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints:\n  - http://10.0.0.1:8000\n  - {url: 'http://[::1]:8000', name: b, role: decode}\n")
    async with following(path) as follower:
        await follower.sees("10.0.0.1:8000", "b")


async def test_writing_in_place_adds_and_removes(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text("a"))
    async with following(path) as follower:
        await follower.sees("a")
        path.write_text(text("a", "b"))
        await follower.sees("a", "b")
        path.write_text(text("b"))
        await follower.sees("b")
        path.write_text("endpoints: []\n")
        await follower.sees()
    assert follower.problems == []


async def test_editors_rename_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text("a"))
    async with following(path) as follower:
        await follower.sees("a")
        for name in ("b", "c"):
            new = tmp_path / ".endpoints.yaml.swp"
            new.write_text(text(name))
            new.replace(path)
            await follower.sees(name)
    assert follower.problems == []


async def test_config_maps_swap_a_symlink_to_a_directory(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()

    def publish(version: str, *names: str) -> None:
        (mount / version).mkdir()
        (mount / version / "endpoints.yaml").write_text(text(*names))
        (mount / "..data_tmp").symlink_to(version)
        (mount / "..data_tmp").replace(mount / "..data")

    publish("..2026_1", "a")
    (mount / "endpoints.yaml").symlink_to("..data/endpoints.yaml")
    # Longer than the test may take: the change is seen by watching, not by looking.
    async with following(mount / "endpoints.yaml", poll_ms=60_000) as follower:
        await follower.sees("a")
        await asyncio.sleep(0.3)
        publish("..2026_2", "b")
        await follower.sees("b")
        publish("..2026_3", "b", "c")
        await follower.sees("b", "c")
    assert follower.problems == []


async def test_a_change_that_nobody_announces_is_found_by_looking(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    watched = tmp_path / "watched"
    elsewhere.mkdir()
    watched.mkdir()
    (elsewhere / "real.yaml").write_text(text("a"))
    (watched / "endpoints.yaml").symlink_to(elsewhere / "real.yaml")
    async with following(watched / "endpoints.yaml", poll_ms=100) as follower:
        await follower.sees("a")
        (elsewhere / "real.yaml").write_text(text("a", "b"))
        await follower.sees("a", "b")


@pytest.mark.parametrize(
    "bad",
    ["endpoints: [", "endpoints:\n  - {url: nonsense}\n", "- a\n", "endpoints:\n  - {url: 'http://a:1', wieght: 1}\n"],
    ids=["syntax", "url", "shape", "key"],
)
async def test_a_bad_file_changes_nothing_but_is_reported_once(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text("a"))
    async with following(path, poll_ms=50) as follower:
        await follower.sees("a")
        path.write_text(bad)
        await follower.complains()
        await asyncio.sleep(0.3)
        assert len(follower.problems) == 1
        assert "endpoints.yaml:" in follower.problems[0]
        assert follower.versions == [["a"]]
        path.write_text(text("b"))
        await follower.sees("b")


async def test_the_same_endpoint_twice_is_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints: [http://10.0.0.1:8000, http://10.0.0.1:8000]\n")
    async with following(path) as follower:
        await follower.sees()
        assert "same endpoint" in follower.problems[0]


async def test_unknown_credentials_are_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints: [{url: 'http://10.0.0.1:8000', credentials: nope}]\n")
    problems: list[Problem] = []
    source = FileSource(path, credentials=frozenset({"main"}), on_problems=problems.extend)
    async with aclosing(source.updates()) as updates:
        assert await anext(updates) == Replace("file", ())
    assert "credentials" in str(problems[0])


async def test_a_file_that_goes_away_is_a_bad_file_and_may_come_back(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text("a"))
    async with following(path) as follower:
        await follower.sees("a")
        path.unlink()
        await follower.complains()
        assert follower.versions == [["a"]]
        path.write_text(text("b"))
        await follower.sees("b")


async def test_a_directory_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picker.sources.file.RETRY_S", 0.05)
    path = tmp_path / "later" / "endpoints.yaml"
    async with following(path) as follower:
        await follower.sees()
        assert len(follower.problems) == 1
        path.parent.mkdir()
        path.write_text(text("a"))
        await follower.sees("a")


async def test_a_slowly_written_file_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text("a"))
    async with following(path, poll_ms=50) as follower:
        await follower.sees("a")
        whole = text("a", "b", "c", "d")
        with path.open("w") as file:
            for line in whole.splitlines(keepends=True):
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
                await asyncio.sleep(0.01)
        await follower.sees("a", "b", "c", "d")
        # A busy machine may pause the writer for longer than the file must rest, so one early read is allowed.
        assert len(follower.versions) <= 3


async def test_cancelling_leaves_no_task_behind(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text("a"))
    before = asyncio.all_tasks()
    async with following(path) as follower:
        await follower.sees("a")
        await asyncio.sleep(0.2)
    assert asyncio.all_tasks() == before
