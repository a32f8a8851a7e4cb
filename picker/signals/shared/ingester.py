"""Electing the one replica that listens to the engines, for fleets where not all can.

A lease in Redis says who. Owns nothing else: what the ingester hears travels as entries of a stream. Two may believe to
be it for a moment only when clocks run at different speeds; what they tell twice does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from picker.signals.shared.link import Link, Trouble, trouble_in
from picker.signals.shared.names import Identity, Names
from picker.signals.shared.settings import SharedSettings


class Election:
    """Seeks and keeps the lease. `on_change` is told when this replica becomes the ingester, or stops being it."""

    def __init__(
        self,
        link: Link,
        names: Names,
        identity: Identity,
        *,
        settings: SharedSettings,
        on_change: Callable[[bool], None],
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._key = names.ingester
        self._me = identity.sender.encode()
        self._lease_s = settings.ingester_lease_s
        self._on_change = on_change
        self._clock = clock
        self._until = -math.inf
        self._told = False

    @property
    def elected(self) -> bool:
        """Whether this replica is the ingester right now."""
        return self._clock() < self._until

    async def step(self) -> float | Trouble:
        """Asks for the lease or renews it; seconds until the next time."""
        sent_at = self._clock()
        lease_ms = int(self._lease_s * 1000)
        # A third of the lease, so that what stands in the way of one call does not cost it.
        timeout_s = self._lease_s / 3
        replies = await self._link.ask(
            ("SET", self._key, self._me, "NX", "PX", lease_ms), ("GET", self._key), timeout_s=timeout_s
        )
        trouble = replies if isinstance(replies, Trouble) else trouble_in(replies)
        if not isinstance(replies, Trouble) and not isinstance(replies[1], Exception):
            mine = replies[1] == self._me
            # Between the two calls another may have got it. It then keeps it a little longer, no more.
            renewed = await self._link.ask(("PEXPIRE", self._key, lease_ms), timeout_s=timeout_s) if mine else []
            if renewed == [1]:
                self._until = sent_at + self._lease_s
            elif not mine:
                self._until = -math.inf
        self._tell()
        return trouble or self._lease_s / 3

    def _tell(self) -> None:
        elected = self.elected
        if elected != self._told:
            self._told = elected
            self._on_change(elected)

    async def resign(self, *, timeout_s: float) -> None:
        """Gives the lease back, so that the next one need not wait for its end."""
        if self.elected:
            self._until = -math.inf
            await self._link.ask(("DEL", self._key), timeout_s=timeout_s)
            self._tell()
