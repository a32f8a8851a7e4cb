"""A network and a datastore for signals, in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from picker.core.updates import Alive, ModelsListed, ProbeFailure, Scraped, ScrapeFailed, SignalUpdate
from picker.core.values import Endpoint


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""


Reply = Answer | ProbeFailure | Exception | Callable[[], Awaitable[Answer | ProbeFailure]]

IDLE = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
BUSY = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n"
MODELS = b'{"object":"list","data":[{"id":"base","object":"model"},{"id":"lora1","parent":"base"}]}'


@dataclass
class Network:
    """Answers by URL; what is not in `replies` is 404. `down` names hosts that refuse connections."""

    clock: Callable[[], float]
    replies: dict[str, Reply] = field(default_factory=dict)
    down: dict[str, ProbeFailure] = field(default_factory=dict)
    asked: list[tuple[float, str]] = field(default_factory=list)
    under_way: dict[str, int] = field(default_factory=dict)
    most_under_way: int = 0
    overlapped: bool = False

    async def get(
        self, endpoint: Endpoint, url: str, *, timeout_s: float, limit_bytes: int = 8 * 2**20
    ) -> Answer | ProbeFailure:
        self.asked.append((self.clock(), url))
        self.overlapped |= self.under_way.get(url, 0) > 0
        self.under_way[url] = self.under_way.get(url, 0) + 1
        self.most_under_way = max(self.most_under_way, sum(self.under_way.values()))
        try:
            host = url.split("/")[2]
            if host in self.down:
                return self.down[host]
            reply = self.replies.get(url, Answer(404))
            if isinstance(reply, Exception):
                raise reply
            if isinstance(reply, Answer | ProbeFailure):
                await asyncio.sleep(0)
                return reply
            return await reply()
        finally:
            self.under_way[url] -= 1

    def times(self, path: str) -> list[float]:
        """When URLs that end in `path` were asked for."""
        return [at for at, url in self.asked if url.endswith(path)]


@dataclass
class Store:
    """The part of the datastore that scrapers see; keeps every update."""

    known: list[Endpoint] = field(default_factory=list)
    updates: list[SignalUpdate] = field(default_factory=list)
    load: dict[str, int] = field(default_factory=dict)
    version: int = 0

    def set(self, *endpoints: Endpoint) -> None:
        self.known = list(endpoints)
        self.version += 1

    def apply(self, update: SignalUpdate) -> None:
        self.updates.append(update)

    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(self.known)

    def in_flight(self, endpoint_id: str) -> int:
        return self.load.get(endpoint_id, 0)

    @property
    def scraped(self) -> list[Scraped]:
        return [update for update in self.updates if isinstance(update, Scraped)]

    @property
    def failures(self) -> list[ScrapeFailed]:
        return [update for update in self.updates if isinstance(update, ScrapeFailed)]

    @property
    def signs_of_life(self) -> list[Alive]:
        return [update for update in self.updates if isinstance(update, Alive)]

    @property
    def models(self) -> list[ModelsListed]:
        return [update for update in self.updates if isinstance(update, ModelsListed)]
