"""The reflector before an API server that is away, refuses, or talks nonsense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from picker.sources.kubernetes.failure import ApiFailure
from tests.unit.sources.kubernetes.scripted_api import (
    ACCEPTED,
    PATH,
    added,
    bookmark,
    deleted,
    error,
    follow,
    line,
    modified,
    page,
)

AWAY = ApiFailure(0, "connection refused")
NOT_THERE = ApiFailure(404, "404 page not found")
FORBIDDEN = ApiFailure(403, 'pods is forbidden: User "x" cannot list resource', reason="Forbidden")


async def test_while_the_server_is_away_nothing_is_said_and_the_pauses_grow() -> None:
    ran = await follow([page("a"), *[AWAY] * 30], [[ACCEPTED, 60.0, bookmark("11"), error(410)]])
    assert ran.told == ["=a"]
    assert all(0.25 <= each <= 30 for each in ran.slept)
    limits = [min(30.0, 0.5 * 2**n) for n in range(len(ran.slept))]
    assert all(slept <= limit for slept, limit in zip(ran.slept, limits, strict=True))
    assert sum(ran.slept[10:]) / 20 == pytest.approx(15, abs=6)
    assert "connection refused" in ran.reflector.problem
    assert ran.reflector.heard_at == 1060.0
    assert len(ran.troubles) == 1


async def test_pauses_begin_small_again_after_a_watch_that_lasted() -> None:
    ran = await follow([*[AWAY] * 10, page("a")], [[AWAY], [ACCEPTED, 11.0, AWAY], [ACCEPTED, 12.0]])
    assert max(ran.slept[5:11]) > 5
    assert ran.slept[11] <= 0.5
    assert ran.told == ["=a"]


async def test_pauses_do_not_begin_small_after_a_watch_that_broke_at_once() -> None:
    ran = await follow([page("a")], [[ACCEPTED, AWAY]] * 12)
    assert sum(ran.slept[6:]) > 20
    assert ran.api.words == ["list", *["watch@10"] * 13]
    assert len(ran.troubles) == 1


async def test_a_line_that_was_cut_goes_on_after_the_last_good_one() -> None:
    ran = await follow([page("a")], [[ACCEPTED, added("b", "11"), 60.0, AWAY], [ACCEPTED, added("c", "12")]])
    assert ran.told == ["=a", "+b", "+c"]
    assert ran.api.words == ["list", "watch@10", "watch@11", "watch@12"]
    # A connection that breaks now and then is nobody's trouble.
    assert (ran.troubles, ran.reflector.problem) == ([], "")


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_asks_for_time_gets_it(status: int) -> None:
    busy = ApiFailure(status, "too many requests", retry_after_s=17.0)
    ran = await follow([busy, page("a")], [[busy]])
    assert ran.slept == [17.0, 17.0]
    assert ran.api.words == ["list", "list", "watch@10", "watch@10"]
    assert "overloaded" in ran.reflector.problem


async def test_a_server_that_asks_for_a_day_does_not_get_it() -> None:
    ran = await follow([ApiFailure(429, "x", retry_after_s=86400.0), page("a")])
    assert ran.slept == [120.0]


async def test_what_is_not_allowed_is_said_with_what_to_grant() -> None:
    ran = await follow([FORBIDDEN] * 12)
    assert ran.told == []
    assert PATH in ran.reflector.problem
    assert "RBAC" in ran.reflector.problem
    assert ran.troubles == [ran.reflector.problem]
    assert max(ran.slept) > 10
    assert ran.reflector.present is None


async def test_without_the_right_to_watch_lists_go_on() -> None:
    ran = await follow([page("a"), page("b")], [[FORBIDDEN]])
    assert ran.told == ["=a", "=b"]
    assert len(ran.slept) == 1


async def test_refused_credentials_are_a_problem_until_they_are_accepted() -> None:
    refused = ApiFailure(401, "Unauthorized")
    ran = await follow([refused])
    assert "credentials" in ran.reflector.problem
    ran = await follow([refused, page("a")], [[refused], [ACCEPTED]])
    assert ran.reflector.problem == ""
    assert ran.api.words == ["list", "list", "watch@10", "watch@10", "watch@10"]


@pytest.mark.parametrize("status", [400, 404, 405, 500, 504])
async def test_a_watch_that_is_refused_for_good_reasons_lists_again(status: int) -> None:
    ran = await follow([page("a"), page("b")], [[ApiFailure(status, "x")]])
    assert ran.told == ["=a", "=b"]
    assert len(ran.slept) == 1


async def test_an_error_in_the_stream_counts_like_the_status_it_names() -> None:
    ran = await follow([page("a"), page("b")], [[ACCEPTED, added("c", "11"), error(429)], [ACCEPTED, error(500)]])
    assert ran.told == ["=a", "+c", "=b"]
    assert ran.api.words == ["list", "watch@10", "watch@11", "list", "watch@10"]


# -- kinds that need not exist -----------------------------------------------------------------------------------------


async def test_a_kind_that_must_exist_and_does_not_is_a_problem() -> None:
    ran = await follow([NOT_THERE, NOT_THERE])
    assert ran.told == []
    assert "CustomResourceDefinition" in ran.reflector.problem
    assert ran.reflector.present is False
    assert all(each <= 1 for each in ran.slept)


async def test_a_kind_that_need_not_exist_comes_and_goes() -> None:
    ran = await follow(
        [*[NOT_THERE] * 4, page("a"), NOT_THERE, NOT_THERE], [[ACCEPTED, 100.0, NOT_THERE]], optional=True
    )
    assert ran.told == ["=", "=a", "="]
    assert ran.reflector.present is False
    asked_again = [each for each in ran.slept if each > 1]
    assert len(asked_again) == 6
    assert all(45 <= each <= 75 for each in asked_again)
    assert len(set(asked_again)) == 6
    assert ran.reflector.problem == ""
    # The watch that found the kind gone is in the log, the absence is not.
    assert len(ran.troubles) == 1


async def test_a_kind_that_need_not_exist_is_present_when_it_does() -> None:
    ran = await follow([NOT_THERE, page("a")], optional=True)
    assert (ran.told, ran.reflector.present) == (["=", "=a"], True)


async def test_what_we_may_not_see_from_the_start_is_nothing_where_it_is_optional() -> None:
    ran = await follow([FORBIDDEN, FORBIDDEN, page("a"), FORBIDDEN], [[FORBIDDEN]], optional=True)
    assert ran.told == ["=", "=a"]
    assert "RBAC" in ran.reflector.problem


async def test_an_optional_kind_is_not_gone_because_the_server_is_away() -> None:
    ran = await follow([page("a"), AWAY, ApiFailure(500, "x")], [[ACCEPTED, 60.0, error(410)]], optional=True)
    assert ran.told == ["=a"]
    assert ran.reflector.present is True


# -- nonsense ----------------------------------------------------------------------------------------------------------

ODD = {"metadata": {"name": "odd", "namespace": "default", "resourceVersion": "15"}, "spec": 7}


async def test_an_odd_object_does_not_hide_the_others() -> None:
    body = page("a", "b").replace(b'"items":[', b'"items":[' + b'{"metadata":{"name":5}},[],null,')
    ran = await follow([body], [[ACCEPTED, line("ADDED", ODD), line("MODIFIED", ODD), added("c", "16")]])
    assert ran.told == ["=a,b", "-odd", "-odd", "+c"]
    assert ran.api.words == ["list", "watch@10", "watch@16"]
    assert len(ran.troubles) == 1
    assert PATH in ran.troubles[0]
    assert ran.reflector.problem == ""


async def test_an_odd_object_that_is_deleted_is_gone() -> None:
    ran = await follow([page("odd")], [[ACCEPTED, line("DELETED", ODD)]])
    assert ran.told == ["=odd", "-odd"]


NONSENSE = {
    "no JSON": b"<html>login</html>",
    "half a line": added("b", "11")[:-5],
    "not even text": b"\xff\xfe\x00",
    "another shape": b'["ADDED"]',
    "no object": b'{"type":"ADDED"}',
    "an object without a name": line("DELETED", {"metadata": None}),
    "a bookmark of nothing": line("BOOKMARK", {}),
    "an error of nothing": line("ERROR", []),
    "very deep": b'{"type":"ADDED","object":' + b"[" * 100_000,
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
async def test_a_line_of_which_nothing_is_known_brings_a_new_list(nonsense: bytes) -> None:
    ran = await follow([page("a"), page("b")], [[ACCEPTED, nonsense, added("never", "12")]])
    assert ran.told == ["=a", "=b"]
    assert len(ran.slept) == 1
    assert len(ran.troubles) == 1


async def test_an_event_of_an_unknown_type_is_passed_over() -> None:
    events = [ACCEPTED, line("SPARKLED", {"metadata": {"name": "x", "resourceVersion": "12"}}), added("b", "13")]
    ran = await follow([page("a")], [events * 3])
    assert ran.told == ["=a", "+b", "+b", "+b"]
    assert len(ran.troubles) == 1
    assert "SPARKLED" in ran.troubles[0]


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"items":[]}', b'{"metadata":{},"items":[]}', b"\xff", b"[" * 100_000]
)
async def test_a_list_that_is_none_is_a_problem_and_not_an_empty_list(body: bytes) -> None:
    ran = await follow([page("a"), body], [[ACCEPTED, 60.0, error(410)]])
    assert ran.told == ["=a"]
    assert ran.reflector.problem != ""
    assert len(ran.slept) == 1


async def test_a_list_without_items_is_empty() -> None:
    ran = await follow([b'{"metadata":{"resourceVersion":"5"},"items":null}'])
    assert ran.told == ["="]


async def test_troubles_are_said_once_and_again_after_all_was_well() -> None:
    odd = [ACCEPTED, line("ADDED", ODD), bookmark("16")]
    ran = await follow([page("a")], [odd, [AWAY], [AWAY], [AWAY], [*odd, 60.0], [AWAY], [AWAY]])
    assert len([each for each in ran.troubles if "refused" in each]) == 2
    assert len([each for each in ran.troubles if "cannot be read" in each]) == 1


async def test_duplicates_after_a_resumption_are_passed_on() -> None:
    ran = await follow([page("a")], [[ACCEPTED, modified("a", "11"), AWAY], [modified("a", "11"), deleted("a", "12")]])
    assert ran.told == ["=a", "+a", "+a", "-a"]


def test_the_reflector_does_not_bring_the_library() -> None:
    """Those who follow no cluster, and unit tests, do not wait for its import."""
    check = "sys.exit(not {'kubernetes', 'aiohttp'}.isdisjoint(sys.modules))"
    code = f"import sys, picker.sources.kubernetes.reflector; {check}"
    root = Path(__file__).parents[4]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0
