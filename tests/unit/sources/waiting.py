"""Waiting for something that happens outside of the test: a file being noticed, a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# Far more than a change takes (about 0.3 s), because other jobs share the machine.
PATIENCE_S = 10.0


async def until(condition: Callable[[], bool]) -> None:
    """Returns when `condition()` is true; raises TimeoutError when it does not become so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)
