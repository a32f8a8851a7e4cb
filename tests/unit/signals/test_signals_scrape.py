"""The scraper in virtual time: when it asks, and what it tells."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from picker.core.updates import ModelsListed, ProbeFailure
from picker.core.values import Endpoint
from tests.unit.signals.fakes import BUSY, IDLE, MODELS, Answer, Reply
from tests.unit.signals.rig import LIST, METRICS, VLLM, E, gaps, scraping


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
        assert rig.store.models[0] == ModelsListed("e", times[0], frozenset({"base", "lora1"}), frozenset({"lora1"}))


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
