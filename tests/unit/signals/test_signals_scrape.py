"""The scraper in virtual time: when it asks, what it tells, and that one endpoint's trouble stays its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random

import msgspec
import pytest

from picker.core.updates import ModelsListed, ProbeFailure
from picker.core.values import Endpoint
from picker.signals.scrape import Scraper
from picker.signals.settings import ScrapeHooks, ScrapeSettings
from tests.unit.signals.fakes import BUSY, IDLE, MODELS, Answer, Network, Reply, Store
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


async def test_an_endpoint_is_recognised_scraped_and_listed() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(0.1)
        assert rig.engines == [("e", "vllm")]
        assert [(update.endpoint_id, update.signals.running) for update in rig.store.scraped] == [("e", 0)]
        assert [update.models for update in rig.store.models] == [frozenset({"base", "lora1"})]
        assert rig.scrapes == [("e", 0.0, True)]
        assert dict(rig.scraper.engines()) == {"e": "vllm"}
        assert repr(rig.scraper) == "<Scraper [1 watched, 0 ending]>"


async def test_a_scrape_is_dated_by_its_sending() -> None:
    async with scraping({}, msgspec.structs.replace(E, engine="vllm")) as rig:
        await rig.time.advance(5)
        rig.net.asked.clear()
        rig.net.replies[METRICS] = rig.takes(0.5, Answer(200, IDLE))
        await rig.time.advance(4)
        assert [update.signals.at for update in rig.store.scraped][:2] == rig.net.times("/metrics")[:2]


async def test_idle_endpoints_are_asked_once_a_second_and_busy_ones_five_times() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(20)
        assert 18 <= len(rig.store.scraped) <= 23
        rig.net.replies[METRICS] = Answer(200, BUSY)
        await rig.time.advance(2)
        rig.store.updates.clear()
        await rig.time.advance(20)
        assert 90 <= len(rig.store.scraped) <= 112


async def test_our_own_work_makes_it_hurry() -> None:
    async with scraping(dict(VLLM)) as rig:
        for _ in range(10):
            rig.store.load.clear()
            await rig.time.advance(1.23)
            rig.store.load["e"] = 1
            asked = len(rig.net.times("/metrics"))
            await rig.time.advance(0.25)
            assert len(rig.net.times("/metrics")) > asked


async def test_intervals_vary_so_that_a_fleet_is_not_asked_in_phase() -> None:
    fleet = [Endpoint(id=str(n), url=f"http://h{n}:1", engine="vllm") for n in range(50)]
    replies: dict[str, Reply] = {f"http://h{n}:1/metrics": Answer(200, IDLE) for n in range(50)}
    async with scraping(replies, *fleet) as rig:
        await rig.time.advance(60)
        late = Counter(int(at * 20) for at in rig.net.times("/metrics") if at >= 50)
        # 50 scrapes a second are 2.5 in each 50 ms; in phase they would be 50 in one of them.
        assert max(late.values()) <= 14


async def test_a_killed_engine_gives_two_failures_within_a_second_under_load() -> None:
    for moment in (5.0, 5.05, 5.1, 5.15, 5.2):
        async with scraping(dict(VLLM)) as rig:
            rig.store.load["e"] = 3
            await rig.time.advance(moment)
            rig.net.down["e:8000"] = ProbeFailure.REFUSED
            await rig.time.advance(1)
            first, second = rig.store.failures[:2]
            assert first.kind is second.kind is ProbeFailure.REFUSED
            assert second.at - moment < 0.5


async def test_a_failed_scrape_is_repeated_at_once_even_when_idle() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(5)
        rig.net.down["e:8000"] = ProbeFailure.REFUSED
        await rig.time.advance(5)
        assert all(0.17 <= gap <= 0.23 for gap in gaps([failure.at for failure in rig.store.failures[:5]]))


async def test_a_hanging_host_gives_two_failures_within_1_6_seconds() -> None:
    async with scraping(dict(VLLM)) as rig:
        rig.store.load["e"] = 1
        await rig.time.advance(5)
        rig.net.replies[METRICS] = rig.takes(0.6, ProbeFailure.TIMEOUT)
        await rig.time.advance(1.6)
        assert [failure.kind for failure in rig.store.failures] == [ProbeFailure.TIMEOUT] * 2
        failure = rig.store.failures[0]
        assert failure.at - failure.sent_at == pytest.approx(0.6)
        _, seconds, ok = rig.scrapes[-1]
        assert seconds == pytest.approx(0.6)
        assert not ok


async def test_dead_endpoints_are_asked_ever_more_rarely_and_noticed_when_back() -> None:
    async with scraping(dict(VLLM)) as rig:
        rig.net.down["e:8000"] = ProbeFailure.REFUSED
        await rig.time.advance(100)
        pauses = gaps([failure.at for failure in rig.store.failures])
        assert all(pause <= 2.2 for pause in pauses)
        assert 40 <= len(pauses) <= 70
        rig.net.down.clear()
        rig.store.updates.clear()
        await rig.time.advance(2.3)
        assert rig.store.scraped
        assert rig.store.models


async def test_models_are_listed_again_when_an_endpoint_comes_back() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(3)
        assert len(rig.store.models) == 1
        rig.net.down["e:8000"] = ProbeFailure.REFUSED
        await rig.time.advance(1)
        assert len(rig.net.times("/v1/models")) == 1
        rig.net.down.clear()
        rig.net.replies[LIST] = Answer(200, b'{"data":[{"id":"other"}]}')
        await rig.time.advance(0.3)
        assert [update.models for update in rig.store.models[1:]] == [frozenset({"other"})]


async def test_models_are_listed_every_15_seconds() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(151)
        times = rig.net.times("/v1/models")
        assert 9 <= len(times) <= 12
        assert len({round(gap, 1) for gap in gaps(times)}) > 3
        assert rig.store.models[0] == ModelsListed("e", times[0], frozenset({"base", "lora1"}))


@pytest.mark.parametrize(
    "answer", [Answer(500), Answer(404), Answer(200, b"<html>"), Answer(200, b'{"data": 3}'), ProbeFailure.TIMEOUT]
)
async def test_a_model_list_that_fails_is_asked_for_again_and_says_nothing(answer: Answer | ProbeFailure) -> None:
    async with scraping({**VLLM, LIST: answer}) as rig:
        await rig.time.advance(60)
        assert rig.store.models == []
        assert rig.store.failures == []
        assert 5 <= len(rig.net.times("/v1/models")) <= 9
        rig.net.replies[LIST] = Answer(200, MODELS)
        await rig.time.advance(17)
        assert len(rig.store.models) >= 1


async def test_a_hanging_model_list_does_not_hold_up_scrapes_nor_pile_up() -> None:
    async with scraping(dict(VLLM)) as rig:
        rig.store.load["e"] = 1
        rig.net.replies[LIST] = rig.takes(40, ProbeFailure.TIMEOUT)
        await rig.time.advance(40)
        assert len(rig.net.times("/v1/models")) <= 2
        assert not rig.net.overlapped
        assert max(gaps(rig.net.times("/metrics"))) < 0.3


async def test_slow_scrapes_never_overlap() -> None:
    async with scraping(dict(VLLM)) as rig:
        rig.store.load["e"] = 1
        rig.net.replies[METRICS] = rig.takes(0.5, Answer(200, BUSY))
        await rig.time.advance(20)
        assert not rig.net.overlapped
        assert {round(gap, 3) for gap in gaps(rig.net.times("/metrics")[3:])} == {0.55}


async def test_requests_under_way_are_bounded() -> None:
    fleet = [Endpoint(id=str(n), url=f"http://h{n}:1", engine="vllm") for n in range(100)]
    async with scraping({}, *fleet, concurrency=8) as rig:
        for n in range(100):
            rig.net.replies[f"http://h{n}:1/metrics"] = rig.takes(0.05, Answer(200, IDLE))
        await rig.time.advance(5)
        assert 1 < rig.net.most_under_way <= 8
        assert len({update.endpoint_id for update in rig.store.scraped}) == 100


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(500), ProbeFailure.HTTP),
        (Answer(503, IDLE), ProbeFailure.HTTP),
        (Answer(200, b"<html>"), ProbeFailure.PARSE),
        (ProbeFailure.PARSE, ProbeFailure.PARSE),
    ],
)
async def test_what_a_live_front_end_may_answer(answer: Answer | ProbeFailure, kind: ProbeFailure) -> None:
    async with scraping({**VLLM, METRICS: answer}, msgspec.structs.replace(E, engine="vllm")) as rig:
        await rig.time.advance(1)
        assert {failure.kind for failure in rig.store.failures} == {kind}
        assert rig.store.scraped == []
        assert len(rig.store.models) >= 1


async def test_an_engine_without_metrics_shows_that_it_lives() -> None:
    async with scraping({HEALTH: Answer(200), LIST: Answer(200, MODELS)}) as rig:
        await rig.time.advance(1)
        assert rig.engines == [("e", "none")]
        assert [life.at for life in rig.store.signs_of_life] == rig.net.times("/health")
        rig.net.down["e:8000"] = ProbeFailure.REFUSED
        await rig.time.advance(2)
        assert [failure.kind for failure in rig.store.failures[:2]] == [ProbeFailure.REFUSED] * 2
        rig.net.down.clear()
        rig.net.replies[HEALTH] = Answer(503)
        await rig.time.advance(1)
        assert rig.store.failures[-1].kind is ProbeFailure.HTTP


@pytest.mark.parametrize("models", [Answer(200, MODELS), Answer(404)])
async def test_an_engine_without_health_is_asked_for_its_models(models: Answer) -> None:
    async with scraping({LIST: models}, msgspec.structs.replace(E, engine="none")) as rig:
        await rig.time.advance(5)
        assert len(rig.net.times("/health")) == 1
        assert len(rig.store.signs_of_life) >= 4
        assert rig.store.failures == []


async def test_detection_is_repeated_ever_more_rarely_while_unknown() -> None:
    async with scraping({HEALTH: Answer(200)}) as rig:
        await rig.time.advance(700)
        times = rig.net.times("8000/metrics")
        assert 6 <= len(times) <= 9
        assert gaps(times)[:3] == [pytest.approx(wait, abs=1.2) for wait in (5, 10, 20)]
        assert max(gaps(times)) <= 302
        rig.net.replies[METRICS] = Answer(200, IDLE)
        await rig.time.advance(302)
        assert rig.engines == [("e", "none"), ("e", "vllm")]
        assert rig.store.scraped


async def test_an_engine_that_comes_back_is_recognised_anew_if_it_told_nothing() -> None:
    async with scraping({HEALTH: Answer(200)}) as rig:
        await rig.time.advance(100)
        rig.net.down["e:8000"] = ProbeFailure.REFUSED
        await rig.time.advance(3)
        rig.net.down.clear()
        rig.net.replies[METRICS] = Answer(200, IDLE)
        await rig.time.advance(4)
        assert rig.engines[-1] == ("e", "vllm")


@pytest.mark.parametrize("gone", [Answer(404), Answer(200, b"sglang:num_queue_reqs 4\n"), Answer(200, b'[{"a":1}]')])
async def test_another_engine_at_the_same_place_is_noticed(gone: Answer) -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(5)
        rig.net.replies[METRICS] = gone
        page = b"trtllm_num_requests_waiting 4\n"
        if not gone.body.startswith(b"sglang"):
            rig.net.replies["http://e:8000/prometheus/metrics"] = Answer(200, page)
        await rig.time.advance(3)
        assert rig.engines[-1][1] in ("sglang", "trtllm")
        assert rig.store.scraped[-1].signals.waiting == 4


async def test_a_page_that_stays_without_metrics_is_not_asked_about_for_ever() -> None:
    async with scraping({**VLLM, "http://e:8000/version": Answer(200, b'{"version":"1"}')}) as rig:
        await rig.time.advance(5)
        rig.net.replies[METRICS] = Answer(200, b"python_info 1\n")
        rig.net.asked.clear()
        await rig.time.advance(60)
        assert rig.engines == [("e", "vllm")]
        assert len(rig.net.times("/version")) == 0
        assert rig.store.scraped[-1].signals.running is None


async def test_a_flapping_page_does_not_cause_a_storm_of_detections() -> None:
    async with scraping(dict(VLLM)) as rig:
        for _ in range(60):
            rig.net.replies[METRICS] = Answer(404)
            await rig.time.advance(0.5)
            rig.net.replies[METRICS] = Answer(200, IDLE)
            await rig.time.advance(0.5)
        assert len(rig.net.times("/prometheus/metrics")) <= 8
        assert rig.store.scraped[-1].signals.at > 59 - 20


async def test_a_configured_engine_is_never_detected() -> None:
    async with scraping({METRICS: Answer(404)}, msgspec.structs.replace(E, engine="vllm")) as rig:
        await rig.time.advance(60)
        assert {url for _, url in rig.net.asked} == {METRICS, LIST}
        assert rig.store.failures[-1].kind is ProbeFailure.HTTP


async def test_endpoints_come_and_go() -> None:
    other = Endpoint(id="o", url="http://o:1")
    replies: dict[str, Reply] = {**VLLM, "http://o:1/metrics": Answer(200, IDLE)}
    async with scraping(replies) as rig:
        await rig.time.advance(3)
        rig.store.set(E, other)
        await rig.time.advance(1)
        assert {update.endpoint_id for update in rig.store.scraped} == {"e", "o"}
        rig.store.set(other)
        await rig.time.advance(0.1)
        rig.net.asked.clear()
        await rig.time.advance(30)
        assert {url.split("/")[2] for _, url in rig.net.asked} == {"o:1"}
        rig.store.set()
        await rig.time.advance(0.1)
        assert repr(rig.scraper) == "<Scraper [0 watched, 0 ending]>"


async def test_an_endpoint_that_goes_in_the_middle_of_a_scrape_is_let_go() -> None:
    async with scraping(dict(VLLM)) as rig:
        rig.net.replies[METRICS] = rig.takes(0.5, Answer(200, IDLE))
        await rig.time.advance(1.2)
        rig.store.set()
        before = len(rig.store.updates)
        await rig.time.advance(5)
        assert len(rig.store.updates) == before


@pytest.mark.parametrize("change", [{"address": "10.0.0.2:8000"}, {"url": "http://f:8000"}, {"engine": "none"}])
async def test_another_process_is_watched_anew(change: dict[str, str]) -> None:
    async with scraping({**VLLM, "http://f:8000/metrics": Answer(200, IDLE)}) as rig:
        await rig.time.advance(3)
        rig.engines.clear()
        rig.store.set(msgspec.structs.replace(E, **change))
        await rig.time.advance(0.3)
        assert len(rig.engines) == 1
        assert repr(rig.scraper) == "<Scraper [1 watched, 0 ending]>"


async def test_new_labels_do_not_disturb_a_watch() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(3)
        rig.engines.clear()
        rig.store.set(msgspec.structs.replace(E, labels={"zone": "x"}))
        await rig.time.advance(3)
        assert rig.engines == []
        assert len(rig.store.scraped) >= 5


async def test_a_bug_in_one_watch_is_reported_once_and_stays_there() -> None:
    other = Endpoint(id="o", url="http://o:1")
    replies: dict[str, Reply] = {**VLLM, "http://o:1/metrics": ValueError("bug")}
    async with scraping(replies, E, other) as rig:
        await rig.time.advance(10)
        assert rig.troubles == [("o", "ValueError", "bug")]
        assert len(rig.store.scraped) >= 8
        rig.net.replies["http://o:1/metrics"] = Answer(200, IDLE)
        await rig.time.advance(5)
        assert {update.endpoint_id for update in rig.store.scraped} == {"e", "o"}


async def test_a_bug_while_listing_models_is_contained_too() -> None:
    async with scraping({**VLLM, LIST: KeyError("bug")}) as rig:
        await rig.time.advance(40)
        assert rig.troubles == [("e", "KeyError", "'bug'")]
        assert len(rig.net.times("/v1/models")) <= 3
        assert len(rig.store.scraped) >= 35


async def test_a_bug_in_following_is_reported_and_following_goes_on() -> None:
    async with scraping(dict(VLLM)) as rig:
        await rig.time.advance(1)
        rig.store.known = None  # type: ignore[assignment]
        rig.store.version += 1
        await rig.time.advance(1)
        assert [(where, kind) for where, kind, _ in rig.troubles] == [("", "TypeError")]
        rig.store.set()
        await rig.time.advance(0.1)
        assert repr(rig.scraper) == "<Scraper [0 watched, 0 ending]>"


async def test_closing_twice_and_without_start_is_allowed() -> None:
    rig = Rig(dict(VLLM))
    await rig.scraper.close()
    rig.scraper.start()
    rig.scraper.start()
    await rig.time.advance(1)
    await rig.scraper.close()
    await rig.scraper.close()
