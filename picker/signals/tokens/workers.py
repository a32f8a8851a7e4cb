"""A few threads for tokenising, and a bound on what waits for them. More work than that is declined, not queued."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """Runs calls in threads. Belongs to one event loop; `close` it."""

    __slots__ = ("_closed", "_executor", "_limit", "declined", "pending")

    def __init__(self, threads: int, waiting: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokens")
        self._limit = threads + waiting
        self._closed = False
        self.pending = 0
        self.declined = 0

    def __repr__(self) -> str:
        return f"<Workers [{self.pending} of {self._limit} | {self.declined} declined]>"

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T] | None:
        """Starts `call` in a thread, or None when too much waits already, or after `close`.

        Giving up waiting for the future does not stop the call: it goes on, and its side effects count.
        """
        if self._closed or self.pending >= self._limit:
            self.declined += 1
            return None
        self.pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: asyncio.Future[T]) -> None:
        self.pending -= 1
        # Looked at here, so that an error nobody waited for is not logged with what it quotes.
        if not future.cancelled():
            future.exception()

    def close(self) -> None:
        """Drops what has not begun. A call that has begun ends by itself; nobody waits for it."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
