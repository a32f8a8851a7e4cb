"""The cache's bound, and the threads' bound."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.signals.tokens.cache import ENTRY_BYTES, IdCache
from picker.signals.tokens.workers import Workers


@given(puts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3000)), max_size=60), limit=st.integers(0, 20_000))
def test_the_books_are_right_and_within_bounds(puts: list[tuple[int, int]], limit: int) -> None:
    cache = IdCache(limit)
    kept: dict[int, bytes] = {}
    for digest, size_bytes in puts:
        kept[digest] = bytes(size_bytes)
        cache.put(digest, kept[digest])
        assert cache.used_bytes <= limit
    there = [found for digest in range(21) if (found := cache.get(digest)) is not None]
    assert cache.used_bytes == sum(len(ids) + ENTRY_BYTES for ids in there)
    assert len(cache) == len(there)


def test_what_was_used_last_stays() -> None:
    cache = IdCache(4 * ENTRY_BYTES)
    for digest in range(4):
        cache.put(digest, b"")
    assert cache.get(0) is not None
    cache.put(4, b"")
    assert cache.get(0) is not None
    assert cache.get(1) is None


async def test_more_than_the_bound_is_declined_and_room_comes_back() -> None:
    workers = Workers(1, 1)
    gate = threading.Event()
    try:
        running, waiting = workers.submit(gate.wait), workers.submit(gate.wait)
        assert running is not None
        assert waiting is not None
        assert workers.submit(gate.wait) is None
        assert (workers.pending, workers.declined) == (2, 1)
        gate.set()
        await asyncio.wait_for(asyncio.gather(running, waiting), 5)
        again = workers.submit(lambda: 7)
        assert again is not None
        assert await again == 7
    finally:
        gate.set()
        workers.close()


async def test_an_error_nobody_waits_for_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("s3cret prompt")

    workers = Workers(1, 1)
    try:
        future = workers.submit(fail)
        assert future is not None
        await asyncio.wait((future,), timeout=5)
        del future
        assert workers.pending == 0
    finally:
        workers.close()
    assert "s3cret" not in caplog.text
