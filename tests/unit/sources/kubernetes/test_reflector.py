"""The reflector where all is well, and where versions expire."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from picker.sources.kubernetes.failure import ApiFailure
from picker.sources.kubernetes.reflector import PAGES_MAX
from tests.unit.sources.kubernetes.scripted_api import (
    ACCEPTED,
    Followed,
    ScriptedApi,
    added,
    bookmark,
    deleted,
    error,
    follow,
    modified,
    page,
)


async def test_a_list_then_every_change() -> None:
    ran = await follow(
        [page("a", "b", version="10")],
        [[ACCEPTED, added("c", "11"), modified("a", "12"), deleted("b", "13"), 200.0]],
    )
    assert ran.told == ["=a,b", "+c", "+a", "-b"]
    assert ran.api.words == ["list", "watch@10", "watch@13"]
    assert (ran.reflector.problem, ran.reflector.present, ran.troubles, ran.slept) == ("", True, [], [])


async def test_a_watch_asks_for_bookmarks_and_for_times_that_differ() -> None:
    ran = await follow([page()], [[ACCEPTED, 240.0]] * 20, label_selector="app=x", field_selector="metadata.name=p")
    list_params, *watches = (params for _, params in ran.api.asked)
    assert list_params == {"limit": "500", "labelSelector": "app=x", "fieldSelector": "metadata.name=p"}
    asked_s = [int(params.pop("timeoutSeconds")) for params in watches]
    assert all(240 <= each <= 300 for each in asked_s)
    assert len(set(asked_s)) > 10
    assert watches[0] == {
        "watch": "true",
        "resourceVersion": "10",
        "allowWatchBookmarks": "true",
        "labelSelector": "app=x",
        "fieldSelector": "metadata.name=p",
    }
    # The connection may outlive the time the server was given, but not by much.
    assert [timeout_s - asked for (timeout_s, _), asked in zip(ran.api.watch_times, asked_s, strict=True)] == [
        30.0
    ] * 21


async def test_a_list_in_pages_is_one_list() -> None:
    ran = await follow([page("a", more="x"), page("b", more="y"), page("c", version="99")])
    assert ran.told == ["=a,b,c"]
    assert ran.api.words == ["list", "list+x", "list+y", "watch@99"]


async def test_pages_that_expire_start_the_list_anew_and_nothing_is_half_told() -> None:
    ran = await follow([page("a", "ghost", more="x"), ApiFailure(410, "too old"), page("a", more="y"), page("b")])
    assert ran.told == ["=a,b"]
    assert ran.api.words == ["list", "list+x", "list", "list+y", "watch@10"]
    assert ran.reflector.problem == ""


async def test_pages_without_end_are_given_up() -> None:
    ran = await follow([page("a", more="x")] * PAGES_MAX)
    assert ran.told == []
    assert "pages" in ran.reflector.problem


async def test_a_bookmark_moves_the_version_and_is_a_sign_of_life() -> None:
    ran = await follow([page("a")], [[ACCEPTED, 60.0, bookmark("20"), 60.0, bookmark("30"), 5.0]])
    assert ran.told == ["=a"]
    assert ran.api.words == ["list", "watch@10", "watch@30"]
    assert ran.reflector.heard_at == 1120.0


async def test_versions_are_opaque() -> None:
    ran = await follow([page(version="zz")], [[ACCEPTED, added("a", "9"), added("b", "a0"), added("c", "08"), 60.0]])
    assert ran.api.words == ["list", "watch@zz", "watch@08"]
    assert ran.told == ["=", "+a", "+b", "+c"]


async def test_an_object_without_a_version_leaves_the_version_as_it_is() -> None:
    ran = await follow([page()], [[ACCEPTED, added("a", ""), bookmark(""), 60.0]])
    assert ran.told == ["=", "+a"]
    assert ran.api.words == ["list", "watch@10", "watch@10"]


EXPIRED = {
    "event": error(410, "Expired", "too old resource version: 10 (90)"),
    "event with another code": error(500, "Expired", "x"),
    "event with only words": error(400, "", "Too old resource version"),
    "status": ApiFailure(410, "Gone"),
    "disguised as a bad request": ApiFailure(400, "BadRequest: too old resource version: 10 (90)"),
    "by its reason": ApiFailure(400, "the provided version", reason="Expired"),
    "from before a restore": ApiFailure(504, "Too large resource version: 10, current: 5", reason="Timeout"),
}


@pytest.mark.parametrize("expired", EXPIRED.values(), ids=EXPIRED.keys())
async def test_an_expired_version_brings_a_new_list(expired: bytes | ApiFailure) -> None:
    first: list[bytes | float] = [ACCEPTED, added("b", "11"), 60.0] if isinstance(expired, bytes) else []
    ran = await follow([page("a"), page("c", version="100")], [[*first, expired]])
    assert ran.told == (["=a", "+b", "=c"] if first else ["=a", "=c"])
    assert ran.api.words == ["list", "watch@10", "list", "watch@100"]
    assert (ran.reflector.problem, ran.troubles) == ("", [])


async def test_a_version_that_expires_as_soon_as_it_is_listed_does_not_spin() -> None:
    ran = await follow([page("a")] * 12, [[ApiFailure(410, "x")]] * 12)
    assert len(ran.slept) == 12
    assert sum(ran.slept) > 30
    assert ran.troubles == []


async def test_a_watch_that_lasted_and_expired_is_listed_at_once() -> None:
    ran = await follow([page("a")] * 2, [[ACCEPTED, 60.0, error(410)]])
    assert ran.slept == []


async def test_watches_that_end_at_once_again_and_again_do_not_spin() -> None:
    ran = await follow([page("a")], [[ACCEPTED]] * 20)
    assert len(ran.slept) == 20
    assert all(0.75 <= each <= 1.25 for each in ran.slept)
    assert ran.reflector.problem == ""


async def test_a_watch_that_ended_in_its_time_goes_on_at_once() -> None:
    ran = await follow([page("a")], [[ACCEPTED, 270.0]] * 3)
    assert ran.slept == []
    assert ran.api.words == ["list", *["watch@10"] * 4]


async def test_the_clock_of_life_stands_still_while_nothing_comes() -> None:
    api = ScriptedApi([page("a")])
    followed = Followed(api)
    assert (followed.reflector.heard_at, followed.reflector.present) == (None, None)
    await followed.run()
    api.clock.now += 500
    assert followed.reflector.heard_at == 1000.0


async def test_closing_the_events_closes_the_watch() -> None:
    api = ScriptedApi([page("a")], [[ACCEPTED, added("b", "11"), added("c", "12")]])
    followed = Followed(api)
    async with asyncio.timeout(5), aclosing(followed.reflector.events()) as events:
        await anext(events)
        await anext(events)
        assert api.open == 1
    assert api.open == 0
