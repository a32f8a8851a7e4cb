"""The director's loop: attempts, evictions, cancellations, and books that are empty in the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from picker.core.events import FailureKind, Finished, FirstByte, Left, Outcome, Progress, Stalled
from picker.core.ledger import Eviction
from picker.core.updates import ProbeFailure, Remove, ScrapeFailed, Upsert
from picker.core.values import Decision, Rejection, RejectionCode, Standing
from picker.director import Answer, Failure, Guard
from tests.unit.core.builders import chosen, pod, request, row
from tests.unit.director_rig import Attempt, Rig, until

# -- attempts ------------------------------------------------------------------------------------------


async def test_a_committed_attempt_stays_booked_until_its_end_is_observed() -> None:
    rig = Rig()
    result, decision, attempts = await rig.dispatch(rig.attempt("fine"))

    assert (result, attempts) == ("fine", 1)
    assert chosen(decision) == rig.seen[0]
    assert len(rig.store.ledger) == 1
    rig.director.observe(FirstByte(1, rig.now))
    rig.director.observe(Progress(1, rig.now))
    rig.director.observe(Finished(key=1, at=rig.now, outcome=Outcome.COMPLETED, status=200))
    rig.director.observe(Finished(key=1, at=rig.now, outcome=Outcome.COMPLETED, status=200))
    assert rig.empty


@pytest.mark.parametrize("kind", list(FailureKind))
async def test_a_failed_attempt_is_repeated_elsewhere(kind: FailureKind) -> None:
    rig = Rig()
    result, decision, attempts = await rig.dispatch(rig.attempt(kind, "fine"))

    assert (result, attempts) == ("fine", 2)
    assert sorted(rig.seen) == ["a", "b"]
    assert chosen(decision) == rig.seen[1]
    assert rig.store.in_flight(rig.seen[0]) == 0
    assert rig.sample("waypost_attempts_failed_total", endpoint=rig.seen[0], kind=kind.value) == 1
    rig.director.observe(Finished(key=1, at=rig.now, outcome=Outcome.COMPLETED, status=200))
    assert rig.empty


@pytest.mark.parametrize(("names", "bound"), [("abcdef", 3), ("abcdef", 2), ("ab", 2), ("abcdef", 1)])
async def test_attempts_are_bounded_and_each_elsewhere(names: str, bound: int) -> None:
    rig = Rig(names, max_attempts=bound)
    result, _, attempts = await rig.dispatch(rig.attempt(FailureKind.SERVER_ERROR))

    assert result == Failure(FailureKind.SERVER_ERROR)
    assert attempts == bound == len(set(rig.seen)) == len(rig.seen)
    assert rig.empty


async def test_a_failure_that_forbids_another_attempt_is_final() -> None:
    rig = Rig()
    result, _, attempts = await rig.dispatch(rig.attempt(Failure(FailureKind.SERVER_ERROR, retry=False)))
    assert (result.kind, attempts, len(rig.seen)) == (FailureKind.SERVER_ERROR, 1, 1)
    assert rig.empty


async def test_a_refusal_at_once_is_passed_on() -> None:
    rig = Rig("")
    result, decision, attempts = await rig.dispatch(rig.attempt("fine"))

    assert isinstance(result, Rejection)
    assert result.code is RejectionCode.NO_ENDPOINTS
    assert (decision, attempts, rig.seen) == (None, 0, [])
    assert rig.sample("waypost_rejections_total", reason="no_endpoints") == 1
    assert rig.empty


async def test_a_refusal_after_a_failure_gives_way_to_the_failure() -> None:
    """The engine's own answer says more than that nobody else is there."""
    rig = Rig("a")
    answer = Answer(503, (), b"busy")
    result, decision, attempts = await rig.dispatch(rig.attempt(Failure(FailureKind.OVERLOADED, answer=answer)))

    assert result.answer is answer
    assert (chosen(decision), attempts) == ("a", 1)
    assert rig.empty


async def test_a_reset_of_the_only_endpoint_is_tried_once_more() -> None:
    rig = Rig("a")
    result, _, attempts = await rig.dispatch(rig.attempt(FailureKind.RESET, "fine"))
    assert (result, attempts, rig.seen) == ("fine", 2, ["a", "a"])


async def test_a_reset_of_the_only_endpoint_is_not_tried_for_ever() -> None:
    rig = Rig("a", max_attempts=9)
    result, _, attempts = await rig.dispatch(rig.attempt(FailureKind.RESET))
    assert (result, attempts, rig.seen) == (Failure(FailureKind.RESET), 2, ["a", "a"])
    assert rig.empty


@pytest.mark.parametrize("kind", [FailureKind.CONNECT, FailureKind.OVERLOADED, FailureKind.TIMEOUT])
async def test_other_failures_of_the_only_endpoint_are_final(kind: FailureKind) -> None:
    rig = Rig("a")
    _, _, attempts = await rig.dispatch(rig.attempt(kind))
    assert (attempts, rig.seen) == (1, ["a"])
    assert rig.empty


async def test_a_degraded_endpoint_serves_when_the_ready_one_failed() -> None:
    rig = Rig("ab")
    for _ in range(2):
        rig.store.apply(ScrapeFailed("b", rig.now, rig.now, ProbeFailure.HTTP))
    result, _, _ = await rig.dispatch(rig.attempt(FailureKind.SERVER_ERROR, "fine"))
    assert (result, rig.seen) == ("fine", ["a", "b"])


@pytest.mark.parametrize("kind", [FailureKind.RESET, FailureKind.CONNECT, FailureKind.OVERLOADED])
async def test_a_pinned_request_never_goes_elsewhere(kind: FailureKind) -> None:
    rig = Rig("abc")
    result, _, attempts = await rig.dispatch(rig.attempt(kind), pinned="b")
    assert (result.kind, attempts, rig.seen) == (kind, 1, ["b"])
    assert rig.empty


async def test_an_exception_in_an_attempt_releases_and_propagates() -> None:
    rig = Rig()

    async def broken(decision: Decision) -> str | Failure:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await rig.dispatch(broken)
    assert rig.empty


# -- evictions and cancellations -----------------------------------------------------------------------


def stuck_on(rig: Rig, *names: str) -> Attempt:
    """Attempts that never answer on these endpoints and at once on others."""

    async def make(decision: Decision) -> str | Failure:
        rig.seen.append(decision.endpoint.id)
        if decision.endpoint.id in names:
            await asyncio.Event().wait()
        return "fine"

    return make


async def test_a_hung_endpoint_costs_its_request_an_attempt_not_an_error() -> None:
    rig = Rig("ab")
    task = asyncio.create_task(rig.dispatch(stuck_on(rig, "a")))
    await until(lambda: rig.seen == ["a"])
    rig.pass_time(2.3)

    result, _, attempts = await task

    assert (result, attempts, rig.seen) == ("fine", 2, ["a", "b"])
    assert row(rig.store, "a", rig.now).standing is Standing.OUT
    assert rig.store.in_flight("a") == 0
    assert rig.sample("waypost_evictions_total", reason="hung") == 1
    assert rig.sample("waypost_attempts_failed_total", endpoint="a", kind="hung") == 1
    assert task.cancelling() == 0
    assert '"event":"endpoint_standing"' in rig.log.getvalue()
    rig.director.observe(Finished(key=1, at=rig.now, outcome=Outcome.COMPLETED, status=200))
    assert rig.empty


async def test_all_endpoints_hung_ends_with_the_failure() -> None:
    rig = Rig("ab")
    task = asyncio.create_task(rig.dispatch(stuck_on(rig, "a", "b")))
    for name in "ab":
        await until(lambda name=name: rig.seen[-1:] == [name])  # type: ignore[misc]
        rig.pass_time(2.3)
    result, _, attempts = await task
    assert (result, attempts) == (Failure(FailureKind.HUNG), 2)
    assert rig.empty


async def test_a_deadline_ends_the_request_without_another_attempt() -> None:
    rig = Rig("ab")
    task = asyncio.create_task(rig.dispatch(stuck_on(rig, "a", "b"), stream=False))
    await until(lambda: len(rig.seen) == 1)
    rig.now += 301
    rig.director.tick()
    result, _, attempts = await task
    assert (result, attempts) == (Failure(FailureKind.TIMEOUT, retry=False), 1)
    assert rig.empty


async def test_a_client_that_leaves_during_an_attempt_frees_everything() -> None:
    rig = Rig("ab")
    guards: list[Guard] = []

    async def serve() -> object:
        guards.append(Guard())
        return await rig.director.dispatch(request(1, received_at=rig.now), guards[0], stuck_on(rig, "a"))

    task = asyncio.create_task(serve())
    await until(lambda: rig.seen == ["a"])
    guards[0].client_left()
    guards[0].client_left()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.seen == ["a"]
    assert rig.empty
    assert row(rig.store, "a", rig.now).standing is Standing.READY, "its leaving says nothing about the endpoint"


@pytest.mark.parametrize("eviction_first", [True, False])
async def test_a_cancel_that_races_an_eviction_wins(eviction_first: bool) -> None:
    rig = Rig("ab")
    guards: list[Guard] = []

    async def serve() -> object:
        guards.append(Guard())
        return await rig.director.dispatch(request(1, received_at=rig.now), guards[0], stuck_on(rig, "a"))

    task = asyncio.create_task(serve())
    await until(lambda: rig.seen == ["a"])
    steps = [lambda: guards[0].evict(Eviction.HUNG), guards[0].client_left]
    for step in steps if eviction_first else steps[::-1]:
        step()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.seen == ["a"], "nobody wants the answer any more"
    assert rig.empty


async def test_a_cancel_after_an_absorbed_eviction_still_cancels() -> None:
    rig = Rig("ab")
    task = asyncio.create_task(rig.dispatch(stuck_on(rig, "a", "b")))
    await until(lambda: rig.seen == ["a"])
    rig.pass_time(2.3)
    await until(lambda: rig.seen == ["a", "b"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.empty


async def test_an_eviction_reaches_only_its_own_request() -> None:
    rig = Rig("ab")
    first = asyncio.create_task(rig.dispatch(stuck_on(rig, "a", "b"), key=1))
    await until(lambda: rig.seen == ["a"])
    second = asyncio.create_task(rig.dispatch(stuck_on(rig, "a"), key=2))
    assert (await second)[0] == "fine"
    rig.director.observe(FirstByte(2, rig.now))
    rig.director.observe(Stalled(2, rig.now, stalled=True))
    rig.pass_time(2.3)

    await until(lambda: rig.seen == ["a", "b", "b"])
    assert second.done()
    assert rig.store.in_flight("a") == 0
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    rig.director.observe(Finished(key=2, at=rig.now, outcome=Outcome.COMPLETED, status=200))
    assert rig.empty


async def test_a_committed_request_is_evicted_through_its_guard_once() -> None:
    rig = Rig("a")
    told: list[Eviction] = []
    await rig.dispatch(rig.attempt("fine"), stream=False)
    rig.director.watch(1, told.append)
    rig.director.observe(FirstByte(1, rig.now))
    rig.now += 121
    for _ in range(20):
        rig.now += 0.1
        rig.director.tick()
    assert told == [Eviction.IDLE_TIMEOUT]
    rig.director.observe(Finished(key=1, at=rig.now, outcome=Outcome.TIMEOUT))
    assert rig.empty


def test_an_overdue_request_nobody_watches_is_released() -> None:
    rig = Rig("a")
    rig.director.decide(request(1, received_at=rig.now))
    rig.director.observe(Left(1, rig.now))
    rig.now += 3601
    rig.director.tick()
    assert rig.empty
    assert rig.sample("waypost_evictions_total", reason="total_timeout") == 1


async def test_a_guard_outside_of_trouble_absorbs_nothing() -> None:
    assert Guard().absorb() is None


async def test_a_storm_of_everything_ends_with_empty_books() -> None:
    """300 requests that succeed, fail, hang, get cancelled, on endpoints that come and go."""
    rig, rng = Rig("abcd"), random.Random(11)

    async def attempt(decision: Decision) -> str | Failure:
        what = rng.random()
        if what < 0.2:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return Failure(rng.choice(list(FailureKind))) if what < 0.6 else "fine"

    async def serve(key: int) -> None:
        asked = request(key, received_at=rig.now, stream=rng.random() < 0.8)
        try:
            result, _, _ = await rig.director.dispatch(asked, Guard(), attempt)
            if result == "fine":
                rig.director.observe(FirstByte(key, rig.now))
                await asyncio.sleep(0)
        finally:
            rig.director.observe(Finished(key=key, at=rig.now, outcome=Outcome.COMPLETED, status=200))

    tasks = []
    for key in range(300):
        tasks.append(asyncio.create_task(serve(key)))
        await asyncio.sleep(0)
        if rng.random() < 0.2:
            rng.choice(tasks).cancel()
        if rng.random() < 0.05:
            rig.store.apply(Remove("test", rng.choice("abcd")))
        if rng.random() < 0.1:
            rig.store.apply(Upsert("test", pod(rng.choice("abcd"), address=f"10.1.1.{rng.randrange(9)}:8000")))
        rig.pass_time(0.1)
    for _ in range(100):
        rig.now += 60
        rig.director.tick()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)

    assert all(task.done() for task in tasks)
    assert rig.empty
