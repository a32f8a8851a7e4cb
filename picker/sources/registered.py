"""Endpoints that announce themselves, for clusters nobody can be asked about: Slurm, RL jobs, a laptop.

Holds who is registered until when. The state is in memory: after a restart of this process registrants are unknown
until they renew, within their time to live, and each replica wants its own registrations. Who may register, and how
the request looks, is the admin app's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from picker.config import RegistrationSection
from picker.core.updates import Remove, Replace, SourceUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources.source import SourceStatus

# As many as one configuration may list.
REGISTERED_MAX = 4096
# Expired entries are looked for this often.
CHECK_S = 0.5
# Who left is still known as ours for this long: by then everybody behind this source has heard of it.
LEAVING_S = 5.0

OnChange = Callable[[str, str], None]
"""An endpoint's id and what became of it: `registered`, `changed`, `deregistered` or `expired`."""


class Registered(msgspec.Struct, frozen=True):
    """One registration. `new` when the endpoint was not registered before."""

    endpoint: Endpoint
    expires_in_s: float
    new: bool = False


class RegisteredSource:
    """What is registered now. Single-threaded; entries expire while somebody iterates `updates`, once at a time."""

    name = "registered"

    def __init__(
        self,
        section: RegistrationSection,
        *,
        on_change: OnChange,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.ttl_max_s = section.ttl_max
        self._ttl_s = min(section.ttl, section.ttl_max)
        self._on_change = on_change
        self._clock = clock
        self._sleep = sleep
        self._entries: dict[str, tuple[Endpoint, float]] = {}
        self._left: dict[str, float] = {}
        # What `updates` has to tell yet, by id; None for an endpoint that is gone. The last change of an id wins.
        self._untold: dict[str, Endpoint | None] = {}
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<RegisteredSource [{len(self._entries)} endpoints]>"

    def status(self) -> SourceStatus:
        """Nothing is behind it that could be away."""
        return SourceStatus()

    def register(self, endpoint: Endpoint, ttl_s: float | None = None) -> Registered | None:
        """Adds an endpoint, or renews and changes the one with its id, for `ttl_s` seconds from now, at most the
        configured maximum; None for the configured time. Returns None when there is no room for another one.
        """
        known = self._entries.get(endpoint.id)
        if known is None and max(len(self._entries), len(self._untold)) >= REGISTERED_MAX:
            return None
        ttl_s = min(self._ttl_s if ttl_s is None else ttl_s, self.ttl_max_s)
        self._entries[endpoint.id] = endpoint, self._clock() + ttl_s
        if known is None or known[0] != endpoint:
            self._left.pop(endpoint.id, None)
            self._tell(endpoint.id, endpoint, "registered" if known is None else "changed")
        return Registered(endpoint, ttl_s, new=known is None)

    def deregister(self, endpoint_id: str) -> bool:
        """Removes an endpoint at once. False when none with this id is registered."""
        if endpoint_id not in self._entries:
            return False
        self._remove(endpoint_id, "deregistered")
        return True

    def registered(self) -> list[Registered]:
        """What is registered now, oldest first."""
        now = self._clock()
        return [
            Registered(endpoint, expires_at - now)
            for endpoint, expires_at in self._entries.values()
            if expires_at > now
        ]

    def owns(self, endpoint_id: str) -> bool:
        """Whether an endpoint is registered, or was until a moment ago: others may not have heard of its end."""
        return endpoint_id in self._entries or endpoint_id in self._left

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """A `Replace` at once, then an `Upsert` or `Remove` per change; within CHECK_S of an entry's end."""
        ticking = asyncio.create_task(self._tick())
        try:
            self._untold.clear()
            yield Replace(self.name, tuple(endpoint for endpoint, _ in self._entries.values()))
            while True:
                await self._news.wait()
                self._news.clear()
                while self._untold:
                    endpoint_id = next(iter(self._untold))
                    endpoint = self._untold.pop(endpoint_id)
                    yield Upsert(self.name, endpoint) if endpoint is not None else Remove(self.name, endpoint_id)
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            await self._sleep(CHECK_S)
            self._expire()

    def _expire(self) -> None:
        now = self._clock()
        for endpoint_id in [name for name, (_, expires_at) in self._entries.items() if expires_at <= now]:
            self._remove(endpoint_id, "expired")
        for endpoint_id in [name for name, until in self._left.items() if until <= now]:
            del self._left[endpoint_id]

    def _remove(self, endpoint_id: str, what: str) -> None:
        del self._entries[endpoint_id]
        self._left[endpoint_id] = self._clock() + LEAVING_S
        self._tell(endpoint_id, None, what)

    def _tell(self, endpoint_id: str, endpoint: Endpoint | None, what: str) -> None:
        self._untold[endpoint_id] = endpoint
        self._news.set()
        self._on_change(endpoint_id, what)
