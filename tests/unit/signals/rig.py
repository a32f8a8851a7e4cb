"""A scraper in virtual time with a network and a datastore in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random

import msgspec

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.scrape import Scraper
from picker.signals.settings import ScrapeHooks, ScrapeSettings
from tests.unit.signals.fakes import IDLE, MODELS, Answer, Network, Reply, Store
from tests.unit.signals.virtual_time import VirtualTime

METRICS, HEALTH, LIST = "http://e:8000/metrics", "http://e:8000/health", "http://e:8000/v1/models"
E = Endpoint(id="e", url="http://e:8000")


class Rig:
    """A scraper and everything around it."""

    def __init__(self, replies: dict[str, Reply], **settings: float) -> None:
        self.time = VirtualTime()
        self.net = Network(self.time.clock, replies)
        self.store = Store()
        self.engines: list[tuple[str, str]] = []
        self.troubles: list[tuple[str, str, str]] = []
        self.scrapes: list[tuple[str, float, bool]] = []
        self.scraper = Scraper(
            getter=self.net,
            store=self.store,
            clock=self.time.clock,
            settings=msgspec.convert(settings, ScrapeSettings),
            hooks=ScrapeHooks(
                on_engine=lambda *what: self.engines.append(what),
                on_trouble=lambda *what: self.troubles.append(what),
                on_scrape=lambda *what: self.scrapes.append(what),
            ),
            sleep=self.time.sleep,
            rng=Random(7),
        )

    def takes(self, seconds: float, answer: Answer | ProbeFailure) -> Callable[[], Awaitable[Answer | ProbeFailure]]:
        async def reply() -> Answer | ProbeFailure:
            await self.time.sleep(seconds)
            return answer

        return reply


@asynccontextmanager
async def scraping(replies: dict[str, Reply], *endpoints: Endpoint, **settings: float) -> AsyncIterator[Rig]:
    rig = Rig(replies, **settings)
    before = asyncio.all_tasks()
    rig.store.set(*(endpoints or (E,)))
    async with rig.scraper:
        await rig.time.settle()
        yield rig
    assert asyncio.all_tasks() == before


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


VLLM: dict[str, Reply] = {METRICS: Answer(200, IDLE), LIST: Answer(200, MODELS)}
