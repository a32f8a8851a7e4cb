"""Addresses of a name as endpoints: what an answer is, what silence is, and when endpoints may go."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from picker.config import DnsEntry
from picker.core.updates import Replace
from picker.core.values import Endpoint
from picker.sources.dns import ADDRESSES_MAX, DnsSettings, DnsSource
from picker.sources.resolve import look_up
from tests.unit.signals.virtual_time import VirtualTime
from tests.unit.sources.waiting import until

NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NO_ADDRESSES = socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
CANNOT_ASK = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.10"

Answer = tuple[str, ...] | Exception | None
"""Addresses, a failure, or no answer at all."""


class Rig:
    """A source, the answer its name server gives, and what it said so far."""

    def __init__(self, answer: Answer, entry: object = "vllm:8000", **settings: float) -> None:
        self.answer = answer
        self.asked: list[float] = []
        self.time = VirtualTime(1000.0)
        self.said: list[Replace] = []
        self.troubles: list[str] = []
        self.source = DnsSource(
            DnsEntry.model_validate(entry),
            lookup=self.lookup,
            clock=self.time.clock,
            sleep=self.time.sleep,
            rng=random.Random(1),
            on_trouble=lambda name, trouble: self.troubles.append(trouble),
            settings=DnsSettings(**settings),
        )

    async def lookup(self, host: str) -> tuple[str, ...]:
        assert host == "vllm"
        self.asked.append(self.time.now)
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    async def collect(self) -> None:
        async with aclosing(self.source.updates()) as updates:
            async for update in updates:
                assert isinstance(update, Replace)
                self.said.append(update)

    async def answers(self, answer: Answer, seconds: float) -> None:
        """Lets time pass with another answer."""
        self.answer = answer
        await self.time.advance(seconds)

    async def once(self, answer: Answer) -> None:
        """Lets one more question be answered like this."""
        self.answer = answer
        before = len(self.asked)
        while len(self.asked) == before:
            await self.time.advance(0.1)

    @property
    def sets(self) -> list[list[str]]:
        """The addresses of every picture so far."""
        return [[endpoint.id.rsplit(":", 1)[0] for endpoint in update.endpoints] for update in self.said]

    @property
    def problem(self) -> str:
        return self.source.status().problem

    @property
    def waits_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.asked, self.asked[1:], strict=False)]


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    task = asyncio.create_task(rig.collect())
    try:
        await rig.time.settle()
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_every_address_is_an_endpoint() -> None:
    entry = {
        "name": "vllm:8000",
        "scheme": "https",
        "engine": "vllm",
        "model": "m",
        "credentials": "main",
        "path_prefix": "/openai",
    }
    async with running(Rig((B, A), entry)) as rig:
        assert rig.said == [
            Replace(
                "dns vllm:8000",
                tuple(
                    Endpoint(
                        id=f"{ip}:8000",
                        url=f"https://{ip}:8000",
                        address=f"{ip}:8000",
                        path_prefix="/openai",
                        engine="vllm",
                        credentials="main",
                        models=frozenset({"m"}),
                    )
                    for ip in (A, B)
                ),
            )
        ]
        assert rig.source.name == "dns vllm:8000"


async def test_only_changes_are_told() -> None:
    async with running(Rig((A, B))) as rig:
        await rig.answers((B, A), 20)
        assert rig.sets == [[A, B]]
        await rig.answers((C, A, A), 7)
        assert rig.sets == [[A, B], [A, C]]
        assert len(rig.asked) >= 4


@pytest.mark.parametrize("gone", [NO_NAME, NO_ADDRESSES, ()])
async def test_no_addresses_twice_in_a_row_empties_the_set(gone: Answer) -> None:
    async with running(Rig((A,))) as rig:
        await rig.once(gone)
        assert rig.sets == [[A]], "seen once"
        await rig.time.advance(1.3)
        assert rig.sets == [[A], []], "asked again at once"
        assert rig.problem == ""
        await rig.answers((B,), 7)
        assert rig.sets == [[A], [], [B]], "an empty name is asked for as often as a full one"


async def test_one_empty_answer_between_good_ones_is_nothing() -> None:
    async with running(Rig((A, B))) as rig:
        for _ in range(3):
            await rig.once(NO_NAME)
            await rig.once((A, B))
        assert rig.sets == [[A, B]]


async def test_silence_between_two_empty_answers_starts_the_count_again() -> None:
    async with running(Rig((A,))) as rig:
        for _ in range(5):
            await rig.once(NO_NAME)
            await rig.once(CANNOT_ASK)
        assert rig.sets == [[A]]


@pytest.mark.parametrize("silence", [CANNOT_ASK, OSError("not a host name"), socket.gaierror(socket.EAI_FAIL, "no")])
async def test_when_nobody_can_be_asked_the_last_set_stays(silence: Exception) -> None:
    async with running(Rig((A,))) as rig:
        heard_at = rig.source.status().heard_at
        await rig.answers(silence, 3600)
        assert rig.sets == [[A]]
        assert rig.problem == ""
        assert heard_at == rig.source.status().heard_at == 1000.0
        assert len(rig.troubles) == 1, "told once"
        await rig.answers((B,), 40)
        assert rig.sets == [[A], [B]]
        assert rig.troubles[1:] == ["is answered again"]
        assert (rig.source.status().heard_at or 0) > 4600


async def test_a_look_up_that_hangs_is_given_up() -> None:
    async with running(Rig((A,), timeout_s=0.02)) as rig:
        rig.answer = None
        await rig.time.advance(7)
        await until(lambda: bool(rig.troubles))
        assert "in time" in rig.troubles[0]
        await rig.answers((B,), 3)
        assert rig.sets == [[A], [B]]


async def test_how_often_a_name_is_asked_for() -> None:
    async with running(Rig((A,))) as rig:
        await rig.time.advance(100)
        waits = rig.waits_s
        assert all(4 <= wait <= 6 for wait in waits)
        assert len({round(wait, 3) for wait in waits}) > 5, "jitter"
        rig.asked.clear()
        await rig.answers(CANNOT_ASK, 300)
        waits = rig.waits_s
        for wait, wanted in zip(waits, [1, 2, 4, 8, 16, 30, 30], strict=False):
            assert 0.8 * wanted <= wait <= 1.2 * wanted
        rig.asked.clear()
        await rig.answers((A,), 60)
        assert all(4 <= wait <= 6 for wait in rig.waits_s)


async def test_the_first_picture_does_not_wait_for_ever() -> None:
    async with running(Rig(None)) as rig:
        await rig.time.advance(2.9)
        assert rig.said == []
        await rig.time.advance(0.2)
        assert rig.sets == [[]]
        assert rig.problem


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((A,), ""),
        (NO_ADDRESSES, ""),
        ((), ""),
        (NO_NAME, "no such name"),
        (CANNOT_ASK, "Temporary failure"),
        (None, ""),
    ],
)
async def test_a_name_that_was_never_known_is_a_problem(answer: Answer, problem: str) -> None:
    async with running(Rig(answer)) as rig:
        if answer is None:
            assert rig.problem
            return
        assert problem in rig.problem
        assert bool(rig.problem) == bool(problem)
        assert (rig.source.status().heard_at is None) == (answer is CANNOT_ASK)


async def test_a_known_name_that_disappears_is_the_truth() -> None:
    async with running(Rig(NO_NAME)) as rig:
        assert rig.sets == [[]]
        await rig.answers((A,), 7)
        assert rig.sets == [[], [A]]
        assert rig.problem == ""
        await rig.answers(NO_NAME, 20)
        assert rig.sets == [[], [A], []]
        assert rig.problem == ""


async def test_one_family_only() -> None:
    async with running(Rig(("fd00::1", B, "fd00::2", A))) as rig:
        assert rig.sets == [[A, B]]
    async with running(Rig(("fd00::2", "FD00:0::1"))) as rig:
        assert [endpoint.id for endpoint in rig.said[0].endpoints] == ["[fd00::1]:8000", "[fd00::2]:8000"]
        assert rig.said[0].endpoints[0].url == "http://[fd00::1]:8000"
        await rig.answers(("fd00::2", A), 8)
        assert rig.sets[-1] == [A]


async def test_losing_the_family_once_is_not_believed() -> None:
    both = (A, B, "fd00::1", "fd00::2")
    async with running(Rig(both)) as rig:
        for _ in range(3):
            await rig.once(("fd00::1", "fd00::2"))
            await rig.once(both)
        assert rig.sets == [[A, B]]
        await rig.answers(("fd00::1", "fd00::2"), 20)
        assert rig.sets == [[A, B], ["[fd00::1]", "[fd00::2]"]]


async def test_texts_that_are_no_addresses_are_left_out() -> None:
    async with running(Rig(("nonsense", "", A, "10.0.0.256"))) as rig:
        assert rig.sets == [[A]]


async def test_too_many_addresses_are_cut_and_told() -> None:
    many = tuple(f"10.0.{number // 256}.{number % 256}" for number in range(ADDRESSES_MAX + 10))
    async with running(Rig(many)) as rig:
        assert len(rig.said[0].endpoints) == ADDRESSES_MAX
        assert rig.troubles == ["has 1034 addresses; 10 are left out"]
        await rig.answers(tuple(reversed(many)), 20)
        assert len(rig.said) == len(rig.troubles) == 1, "the same ones every time"


async def test_a_bug_in_the_look_up_comes_out() -> None:
    rig = Rig(ValueError("bug"))
    with pytest.raises(ValueError, match="bug"):
        await rig.collect()


async def test_closing_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    for answer in ((A,), NO_NAME, None):
        async with running(Rig(answer)) as rig:
            await rig.time.advance(1)
        assert asyncio.all_tasks() == before


async def test_the_systems_resolver_tells_what_kind_of_failure_it_was() -> None:
    with pytest.raises(socket.gaierror) as caught:
        await look_up("no-such-name.invalid")
    kinds: set[Any] = {socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_AGAIN}
    assert caught.value.errno in kinds
