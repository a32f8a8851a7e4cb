"""Watches in virtual time: engines that change, endpoints that come and go, bugs that stay where they are."""

from __future__ import annotations

import msgspec
import pytest

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from tests.unit.signals.fakes import IDLE, MODELS, Answer, Reply
from tests.unit.signals.rig import HEALTH, LIST, METRICS, VLLM, E, Rig, gaps, scraping


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


@pytest.mark.parametrize(("replies", "lives_by"), [({HEALTH: Answer(200)}, "/health"), ({}, "/openai/v1/models")])
async def test_only_the_api_is_below_a_path_prefix(replies: dict[str, Reply], lives_by: str) -> None:
    listed = "http://e:8000/openai/v1/models"
    prefixed = msgspec.structs.replace(E, path_prefix="/openai")
    async with scraping({**replies, listed: Answer(200, MODELS)}, prefixed) as rig:
        await rig.time.advance(5)
        assert rig.store.models[0].models == {"base", "lora1"}
        assert len(rig.store.signs_of_life) >= 4
        assert len(rig.net.times(lives_by)) >= 4
        asked = {url.removeprefix("http://e:8000") for _, url in rig.net.asked}
        assert {"/metrics", "/health", "/openai/v1/models"} <= asked
        assert not {"/v1/models", "/openai/metrics", "/openai/health"} & asked


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
