"""Endpoints in a YAML file that may change at any time: by an editor, `kubectl`, a mounted ConfigMap.

The directory is watched and not the file, because editors and ConfigMaps put another file in its place. A bad new file
changes nothing but a report; a file that is gone is a bad file. Where changes cannot be watched, they are found by
looking every two seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

from watchfiles import awatch

from picker.config import EndpointEntry, Problem, is_problems, load_endpoint_file
from picker.core.updates import Replace, SourceUpdate
from picker.sources.endpoints import endpoint_of
from picker.sources.source import SourceStatus

# Changes closer together than this are one change.
DEBOUNCE_MS = 200
# Network file systems tell nobody about changes; looking at one file's metadata is cheap.
POLL_MS = 2000
# A file is read when it has not changed for this long: half a file can be valid YAML with fewer endpoints.
SETTLE_S = 0.05
# A file that is written without pause is read anyway after so many looks.
SETTLE_LOOKS = 20
# Directory gone or watches used up: try again this often.
RETRY_S = 2.0

_Mark = tuple[int, int, int, int] | None
"""What tells two versions of a file apart; None when there is no file."""


class FileSource:
    """The endpoints in `path`.

    `credentials` are the names entries may use, None for any. `on_problems` gets everything that is wrong with a new
    file, once per version; the endpoints of the last good version stay.
    """

    name = "file"

    def __init__(
        self,
        path: Path,
        *,
        credentials: frozenset[str] | None = None,
        on_problems: Callable[[Sequence[Problem]], None],
        poll_ms: int = POLL_MS,
    ) -> None:
        self._path = path
        self._credentials = credentials
        self._on_problems = on_problems
        self._poll_ms = poll_ms

    def __repr__(self) -> str:
        return f"<FileSource {self._path}>"

    def status(self) -> SourceStatus:
        """Nothing is behind it that could be away."""
        return SourceStatus()

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """A `Replace` for the file as it is (with no endpoints if it is bad), then one for every good new version."""
        mark = await self._settled()
        endpoints = await self._load()
        yield Replace(self.name, tuple(endpoint_of(entry) for entry in endpoints or ()))
        async with aclosing(self._wakes()) as wakes:
            async for _ in wakes:
                seen = await self._settled()
                if seen == mark:
                    continue
                mark = seen
                endpoints = await self._load()
                if endpoints is not None:
                    yield Replace(self.name, tuple(endpoint_of(entry) for entry in endpoints))

    async def _load(self) -> list[EndpointEntry] | None:
        loaded = await asyncio.to_thread(load_endpoint_file, self._path, credentials=self._credentials)
        if is_problems(loaded):
            self._on_problems(loaded)
            return None
        return [entry for entry in loaded if isinstance(entry, EndpointEntry)]

    async def _wakes(self) -> AsyncGenerator[None, None]:
        """One wake now, then one after every change in the directory and at least every `poll_ms`."""
        yield
        while True:
            changes = awatch(
                self._path.absolute().parent,
                watch_filter=None,
                debounce=DEBOUNCE_MS,
                step=20,
                rust_timeout=self._poll_ms,
                yield_on_timeout=True,
                recursive=False,
            )
            try:
                async with aclosing(changes):
                    async for _ in changes:
                        yield
            except OSError:
                # The directory is gone or cannot be watched; the file is still looked at.
                await asyncio.sleep(RETRY_S)
                yield

    async def _settled(self) -> _Mark:
        mark = self._mark()
        for _ in range(SETTLE_LOOKS):
            await asyncio.sleep(SETTLE_S)
            again = self._mark()
            if again == mark:
                break
            mark = again
        return mark

    def _mark(self) -> _Mark:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
