"""Small writes of one turn of the event loop, sent together at its end.

A send on a socket wakes the process behind it, which on a busy machine takes the processor away right then. Doing the
turn's work first and its sends after costs a third less per request; figures are in `docs/performance.md`.
"""

from __future__ import annotations

import asyncio


class Outbox:
    """Holds writes until the loop's current turn is over, in order. Belongs to one loop.

    Who writes to a transport past its outbox must `flush` first. What is held for a transport that closes meanwhile is
    dropped, as the transport itself would.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.WriteTransport, bytes]] = []

    def __repr__(self) -> str:
        return f"<Outbox [{len(self._waiting)} waiting]>"

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Writes at the end of the turn."""
        self._waiting.append((transport, data))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Writes what is held, now."""
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)
