"""Every address of a host name as an endpoint: headless Services, where pods may not be read.

Asks again and again, and tells two kinds of silence apart. "There is no such name, it has no addresses" is an answer:
all pods are gone or not ready. "Nobody could be asked" says nothing about pods, so what was last known stays. Knows
nothing about the pods but their addresses.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

import msgspec

from picker.config import DnsEntry, HostPort
from picker.core.plugins import Rng
from picker.core.updates import Replace, SourceUpdate
from picker.core.values import Endpoint
from picker.sources.resolve import Lookup
from picker.sources.source import SourceStatus

# Endpoints of one name. Far more than answers of name servers hold; a name with more is not what it seems.
ADDRESSES_MAX = 1024
# How often an answer that takes every endpoint away must come in a row: name servers that start have nothing yet.
CONFIRMATIONS = 2

_NO_NAME = socket.EAI_NONAME
_NO_ADDRESSES = getattr(socket, "EAI_NODATA", _NO_NAME)

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

OnTrouble = Callable[[str, str], None]
"""The name of the source and what is wrong with it."""


class DnsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, each varied by `jitter` so that many replicas do not ask at once.

    A name is asked again `interval_s` after an answer, and after `retry_s` where there was none or one that has to be
    confirmed; failures in a row double that up to `retry_max_s`. `grace_s` is how long the first picture waits for the
    first answer.
    """

    interval_s: float = 5.0
    retry_s: float = 1.0
    retry_max_s: float = 30.0
    grace_s: float = 3.0
    timeout_s: float = 5.0
    jitter: float = 0.2


class DnsSource:
    """The addresses of one name. Iterate `updates` once.

    Until the name was known for the first time its status is a problem: a mistyped name, or name servers that cannot
    be asked, and a process without any endpoint for that reason is not ready. A name that exists without addresses is
    none, and later on nothing is: what is then known may be nothing, but it is the truth.
    """

    def __init__(
        self,
        entry: DnsEntry,
        *,
        lookup: Lookup,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        rng: Rng,
        on_trouble: OnTrouble,
        settings: DnsSettings | None = None,
    ) -> None:
        self.name = f"dns {entry.name}"
        self._entry = entry
        self._lookup = lookup
        self._clock = clock
        self._sleep = sleep
        self._rng = rng
        self._on_trouble = on_trouble
        self._settings = settings or DnsSettings()
        self._news = asyncio.Event()
        self._ips: tuple[_Ip, ...] | None = None
        self._problem = "the name was not asked for yet"
        self._trouble = ""
        self._heard_at: float | None = None
        self._failures = 0
        self._doubts = 0

    def __repr__(self) -> str:
        return f"<DnsSource {self._entry.name} [{len(self._ips or ())} addresses]>"

    def status(self) -> SourceStatus:
        """A problem until the name was known once; heard of when there last was an answer, whatever it said."""
        return SourceStatus(problem=self._problem, heard_at=self._heard_at)

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """A `Replace` with the first answer, or without endpoints when there is none in time; then one per change."""
        asking = asyncio.create_task(self._ask_for_ever(), name=self.name)
        asking.add_done_callback(lambda _: self._news.set())
        waiting = asyncio.create_task(self._give_up_waiting())
        told: tuple[_Ip, ...] | None = None
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                if asking.done():
                    asking.result()
                if self._ips != told:
                    told = self._ips
                    yield Replace(self.name, tuple(self._endpoint(ip) for ip in told or ()))
        finally:
            for task in (asking, waiting):
                task.cancel()
            await asyncio.gather(asking, waiting, return_exceptions=True)

    async def _give_up_waiting(self) -> None:
        await self._sleep(self._settings.grace_s)
        if self._ips is None:
            self._know(())

    async def _ask_for_ever(self) -> None:
        while True:
            wait_s = await self._ask()
            await self._sleep(wait_s * (1 + self._settings.jitter * (2 * self._rng.random() - 1)))

    async def _ask(self) -> float:
        """Asks once and takes the answer in. Returns the seconds until the name should be asked for again."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                found = await self._lookup(self._entry.name.host)
        except TimeoutError:
            return self._unanswered("no answer in time")
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno in (_NO_NAME, _NO_ADDRESSES):
                return self._answered((), "there is no such name" if error.errno == _NO_NAME else "")
            return self._unanswered(error.strerror or str(error))
        return self._answered(_one_family(found))

    def _unanswered(self, why: str) -> float:
        """Nobody could be asked: what was known stays."""
        if self._problem:
            self._problem = f"the name was never known: {why}"
        self._report(f"cannot be asked for: {why}")
        self._doubts = 0
        wait_s = min(self._settings.retry_max_s, self._settings.retry_s * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return wait_s

    def _answered(self, ips: tuple[_Ip, ...], missing: str = "") -> float:
        self._heard_at = self._clock()
        self._failures = 0
        if not missing:
            self._problem = ""
        elif self._problem:
            self._problem = f"the name was never known: {missing}"
        if self._takes_all(ips):
            self._doubts += 1
            if self._doubts < CONFIRMATIONS:
                return self._settings.retry_s
        self._doubts = 0
        left_out = len(ips) - ADDRESSES_MAX
        self._report(f"has {len(ips)} addresses; {left_out} are left out" if left_out > 0 else missing)
        self._know(ips[:ADDRESSES_MAX])
        return self._settings.interval_s

    def _takes_all(self, ips: tuple[_Ip, ...]) -> bool:
        """Whether an answer leaves none of the endpoints. One in the other family does: it is what comes when only the
        question for the first family went unanswered.
        """
        if not self._ips:
            return False
        return not ips or ips[0].version != self._ips[0].version

    def _know(self, ips: tuple[_Ip, ...]) -> None:
        self._ips = ips
        self._news.set()

    def _report(self, trouble: str) -> None:
        """Tells what is wrong, once per change."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble(self.name, trouble or "is answered again")

    def _endpoint(self, ip: _Ip) -> Endpoint:
        entry = self._entry
        place = str(HostPort(str(ip), entry.name.port))
        return Endpoint(
            id=place,
            # The certificates of pods rarely hold their addresses; credentials say which name is expected instead.
            url=f"{entry.scheme}://{place}",
            address=place,
            path_prefix=entry.path_prefix or "",
            engine=entry.engine,
            credentials=entry.credentials or "",
            models=frozenset(() if entry.model is None else (entry.model,)),
        )


def _one_family(found: tuple[str, ...]) -> tuple[_Ip, ...]:
    """The addresses of one family, sorted, since name servers answer in another order each time.

    A pod with an address in both families is one endpoint, not two. IPv4 if there is any: engines listen on 0.0.0.0
    more often than on `::`.
    """
    ips: set[_Ip] = set()
    for text in found:
        with suppress(ValueError):
            ips.add(ipaddress.ip_address(text))
    old = [ip for ip in ips if ip.version == 4]
    return tuple(sorted(old or ips, key=int))
