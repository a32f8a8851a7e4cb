"""Host names to addresses, for any source: wraps it and fills in `address`, again and again.

Look-ups run off the loop and never hold up what the source says: an endpoint whose name does not resolve exists without
an address, since the gateway can use its URL. The last good answer stays when later look-ups fail.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from picker.core.updates import Remove, Replace, RulesChanged, SourceUpdate, Upsert
from picker.core.values import Endpoint
from picker.sources.endpoints import address_at, host_of
from picker.sources.source import Source, SourceStatus

# Each holds a thread of the resolver; a fleet with a thousand names takes its turn.
MAX_LOOKUPS = 16

Lookup = Callable[[str], Awaitable[tuple[str, ...]]]
"""The IP addresses of a name, best first. Raises OSError when there are none."""


class ResolveSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. Failed look-ups are tried again after `retry_s`, then ever more rarely up to `again_s`.

    `grace_s` is how long a new endpoint may wait for its address before it is announced without one: an address that
    comes later looks like a move, and what was learnt about the endpoint until then is lost.
    """

    again_s: float = 30.0
    retry_s: float = 1.0
    grace_s: float = 0.5
    timeout_s: float = 5.0


@dataclass(slots=True)
class _Host:
    """One name in use. `ip` is the address chosen last, empty while there was none."""

    ip: str = ""
    due_at: float = 0.0
    failures: int = 0
    lookup: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class _Broken:
    """The inner source raised."""

    error: Exception


_Item = SourceUpdate | _Broken | None
"""None only wakes: names may be due, or answers may have come."""


async def look_up(host: str) -> tuple[str, ...]:
    """The addresses of `host` by the system's resolver, IPv4 first: engines bind 0.0.0.0 more often than `::`."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"not a host name: {host}") from error
    ordered = sorted(found, key=lambda info: info[0] != socket.AF_INET)
    # A link-local address needs its zone, which neither a URL nor Envoy would take.
    return tuple(dict.fromkeys(str(info[4][0]) for info in ordered if "%" not in str(info[4][0])))


class Resolving:
    """A source like `source`, with addresses. Does not end, since addresses may change. Iterate it once."""

    def __init__(
        self,
        source: Source,
        *,
        lookup: Lookup = look_up,
        settings: ResolveSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._source = source
        self._lookup = lookup
        self._settings = settings or ResolveSettings()
        self._clock = clock
        self._sleep = sleep
        self._hosts: dict[str, _Host] = {}
        self._known: dict[str, Endpoint] = {}
        self._told: dict[str, Endpoint] = {}
        self._answered: set[str] = set()
        self._lookups: set[asyncio.Task[None]] = set()
        self._inbox: asyncio.Queue[_Item] = asyncio.Queue(maxsize=64)
        self._places = asyncio.Semaphore(MAX_LOOKUPS)

    @property
    def name(self) -> str:
        """The inner source's name."""
        return self._source.name

    def __repr__(self) -> str:
        return f"<Resolving {self._source!r} [{len(self._hosts)} names]>"

    def status(self) -> SourceStatus:
        """The inner source's."""
        return self._source.status()

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """What the inner source says, with addresses, and an `Upsert` for every address that changes later."""
        tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._tick())]
        try:
            while True:
                item = await self._inbox.get()
                if isinstance(item, _Broken):
                    raise item.error
                for update in [*await self._handle(item), *self._moved()]:
                    yield update
        finally:
            tasks += self._lookups
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self) -> None:
        updates = self._source.updates()
        try:
            async for update in updates:
                await self._inbox.put(update)
        except Exception as error:
            await self._inbox.put(_Broken(error))
        finally:
            await updates.aclose()

    async def _tick(self) -> None:
        while True:
            await self._sleep(self._settings.retry_s)
            await self._inbox.put(None)

    async def _handle(self, item: SourceUpdate | None) -> list[SourceUpdate]:
        match item:
            case Replace(source, endpoints):
                self._known = {endpoint.id: endpoint for endpoint in endpoints}
                await self._await_new()
                self._told = {endpoint.id: self._placed(endpoint) for endpoint in endpoints}
                return [Replace(source, tuple(self._told.values()))]
            case Upsert(source, endpoint):
                self._known[endpoint.id] = endpoint
                await self._await_new()
                self._told[endpoint.id] = self._placed(endpoint)
                return [Upsert(source, self._told[endpoint.id])]
            case Remove(_, endpoint_id):
                self._known.pop(endpoint_id, None)
                self._told.pop(endpoint_id, None)
                self._forget_unused()
                return [item]
            case RulesChanged():
                return [item]
            case None:
                self._start_due()
                return []

    async def _await_new(self) -> None:
        self._forget_unused()
        for endpoint in self._known.values():
            host = host_of(endpoint)
            if host:
                self._hosts.setdefault(host, _Host())
        self._start_due()
        new = [host for host in self._hosts.values() if not host.ip and not host.failures]
        pending = [host.lookup for host in new if host.lookup is not None]
        if pending:
            await asyncio.wait(pending, timeout=self._settings.grace_s)

    def _forget_unused(self) -> None:
        used = {host_of(endpoint) for endpoint in self._known.values()}
        for name in [name for name in self._hosts if name not in used]:
            lookup = self._hosts.pop(name).lookup
            if lookup is not None:
                lookup.cancel()

    def _start_due(self) -> None:
        now = self._clock()
        for name, host in self._hosts.items():
            if now >= host.due_at and (host.lookup is None or host.lookup.done()):
                host.lookup = asyncio.create_task(self._resolve(name, host))
                self._lookups.add(host.lookup)
                host.lookup.add_done_callback(self._lookups.discard)

    async def _resolve(self, name: str, host: _Host) -> None:
        try:
            async with self._places, asyncio.timeout(self._settings.timeout_s):
                ips = await self._lookup(name)
        except (OSError, TimeoutError):
            ips = ()
        if ips:
            # Round-robin names answer in another order each time: an address that is still there has not moved.
            host.ip = host.ip if host.ip in ips else ips[0]
            host.failures = 0
            wait_s = self._settings.again_s
        else:
            wait_s = min(self._settings.again_s, self._settings.retry_s * 2.0 ** min(host.failures, 10))
            host.failures += 1
        host.due_at = self._clock() + wait_s
        self._answered.add(name)
        if not self._inbox.full():
            self._inbox.put_nowait(None)

    def _placed(self, endpoint: Endpoint) -> Endpoint:
        host = self._hosts.get(host_of(endpoint))
        if host is None or not host.ip:
            return endpoint
        return msgspec.structs.replace(endpoint, address=address_at(endpoint, host.ip))

    def _moved(self) -> list[SourceUpdate]:
        """Updates for the endpoints whose names were answered since, where the answer is new."""
        answered, self._answered = self._answered, set()
        moved: list[SourceUpdate] = []
        for endpoint in self._known.values() if answered else ():
            if host_of(endpoint) not in answered:
                continue
            placed = self._placed(endpoint)
            if placed != self._told.get(endpoint.id):
                self._told[endpoint.id] = placed
                moved.append(Upsert(self.name, placed))
        return moved
