"""Starts real programs and ends them again, whatever happens in between.

Owns processes and their log files. Knows nothing of what the programs are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

STOP_WITHIN_S = 5.0
_POLL_S = 0.02
_ROOT = Path(__file__).resolve().parents[1]

Found = TypeVar("Found")


class StartFailed(Exception):
    """A program ended or did not get ready; the message says which and has the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A running program. `log` gets its stdout and stderr; `exit_code` is None while it runs."""

    name: str
    pid: int
    log: Path
    exit_code: Callable[[], int | None]

    def text(self) -> str:
        """Everything it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def failure(self, reason: str) -> StartFailed:
        """An error with the end of the log."""
        return StartFailed(f"{self.name}: {reason}; it said: {' | '.join(self.text().splitlines()[-3:]) or 'nothing'}")

    async def until(self, found: Callable[[], Found | None], *, within_s: float) -> Found:
        """Waits for `found` to give something. Raises StartFailed when the program ends or takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while (value := found()) is None:
            if (code := self.exit_code()) is not None:
                raise self.failure(f"ended with code {code}")
            if loop.time() > deadline:
                raise self.failure(f"not ready within {within_s:.0f} s")
            await asyncio.sleep(_POLL_S)
        return value


@contextlib.asynccontextmanager
async def program(name: str, arguments: Sequence[str | Path], *, directory: Path) -> AsyncIterator[Program]:
    """Runs a program in a session of its own, from the root of the repository, until the block ends.

    Then SIGTERM, and SIGKILL for its whole process group after `STOP_WITHIN_S`. Raises StartFailed if there is no such
    program.
    """
    path = directory / f"{name}.log"
    with path.open("wb") as log:
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(argument) for argument in arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
                start_new_session=True,
            )
        except OSError as error:
            raise StartFailed(f"{name}: {error}") from None
    try:
        yield Program(name=name, pid=process.pid, log=path, exit_code=lambda: process.returncode)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_WITHIN_S)
        # What it started is in its group, and may outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def free_port() -> int:
    """A loopback port nobody listens on now, for programs that cannot take port 0."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
