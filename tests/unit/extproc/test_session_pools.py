"""Which pool, which objective, which name: what a request says beside its model. And what its endpoint wants of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from picker.core.values import RejectionCode
from picker.extproc.messages import (
    Action,
    BodyMode,
    BodyReply,
    Context,
    Decided,
    Direction,
    HeadersReply,
    Mutation,
    Reply,
    RequestBody,
    RequestHeaders,
    Send,
)
from picker.extproc.settings import SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import COMPLETION, KEY, Talk, only_immediate

POOL = "x-waypost-pool"
ADDRESSES = ["10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3"]
KEYED = {"credentials": "main"}
PREFIXED = {"path_prefix": "/openai"}


def mutation(replies: list[Reply]) -> Mutation:
    """The change of the request headers among replies."""
    [found] = [reply.mutation for reply in replies if isinstance(reply, HeadersReply | BodyReply)]
    return found


def set_headers(replies: list[Reply]) -> dict[str, str]:
    return dict(mutation(replies).set_headers)


# --- pools


@pytest.mark.parametrize(
    ("header", "hints", "expected"),
    [
        (None, (None, None), None),
        ("ns/client", (None, None), "ns/client"),
        ("", (None, None), None),
        ("ns/client", ("ns/route", None), "ns/route"),
        ("ns/client", (None, "ns/late"), "ns/late"),
        (None, ("ns/route", "ns/late"), "ns/late"),
        (None, ("ns/route", ""), "ns/route"),
        ("ns/client", ("", ""), "ns/client"),
    ],
)
def test_the_proxys_route_names_the_pool_or_else_the_client(
    header: str | None, hints: tuple[str | None, str | None], expected: str | None
) -> None:
    talk = Talk(FakeDirector(pools=["ns/client"]))
    fields = {":path": "/v1/completions"} | ({} if header is None else {POOL: header})
    talk.feed(RequestHeaders(fields, False, Context(modes=talk.context.modes, pool=hints[0])))
    replies = talk.feed(RequestBody(COMPLETION, True, Context(pool=hints[1])))

    assert talk.director.requests[0].pool == expected
    assert mutation(replies).remove_headers == (() if header is None else (POOL,))
    assert talk.director.asked == [("m", expected)]


def test_where_there_is_no_choice_the_header_is_taken_out_and_means_nothing() -> None:
    talk = Talk()
    [head] = talk.headers({POOL: "ns/a"}, end=True)

    assert talk.director.requests[0].pool is None
    assert mutation([head]).remove_headers == (POOL,)


def test_an_unknown_pool_is_503() -> None:
    answer = only_immediate(Talk(FakeDirector(refuse=RejectionCode.POOL_NOT_FOUND)).headers({POOL: "x"}, end=True))

    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "pool_not_found")
    assert dict(answer.headers)["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"


def test_a_pool_named_after_the_decision_changes_nothing() -> None:
    talk = Talk(FakeDirector(aliases={"m": "target"}, pools=["a", "b"]), request=BodyMode.STREAMED)
    talk.headers({POOL: "a"})
    talk.feed(RequestBody(COMPLETION, True, Context(pool="b")))

    assert talk.director.asked == [("m", "a")]


# --- objectives


@pytest.mark.parametrize(
    ("fields", "objective", "priority"),
    [
        ({}, None, 0),
        ({"x-llm-d-inference-objective": "gold"}, "gold", 7),
        ({"x-gateway-inference-objective": "batch"}, "batch", -1),
        ({"x-llm-d-inference-objective": "gold", "x-gateway-inference-objective": "batch"}, "gold", 7),
        ({"x-llm-d-inference-objective": "", "x-gateway-inference-objective": "batch"}, "batch", -1),
        ({"x-llm-d-inference-objective": "unheard of"}, "unheard of", 0),
    ],
)
@pytest.mark.parametrize("mode", [BodyMode.FULL_DUPLEX_STREAMED, BodyMode.NONE])
def test_an_objective_has_a_priority(
    mode: BodyMode, fields: dict[str, str], objective: str | None, priority: int
) -> None:
    talk = Talk(FakeDirector(priorities={"gold": 7, "batch": -1}), request=mode)
    replies = talk.headers(fields)
    if mode is not BodyMode.NONE:
        replies = talk.body()

    [request] = talk.director.requests
    assert (request.objective, request.priority) == (objective, priority)
    assert mutation(replies).remove_headers == tuple(sorted(fields))


# --- rewrites


@pytest.mark.parametrize("mode", list(BodyMode))
def test_the_target_is_asked_at_most_once(mode: BodyMode) -> None:
    """It may be drawn by lot: asked twice, the body could name another model than the decision."""
    talk = Talk(FakeDirector(aliases={"m": "target"}), request=mode)
    talk.headers()
    if mode in (BodyMode.FULL_DUPLEX_STREAMED, BodyMode.STREAMED):
        talk.body(COMPLETION[:9], end=False)
        talk.body(COMPLETION[9:])
    elif mode is not BodyMode.NONE:
        talk.body()
    talk.response_headers()
    talk.response_body(b'{"model":"target"}', end=True)

    readable = mode not in (BodyMode.NONE, BodyMode.BUFFERED_PARTIAL)
    assert talk.director.asked == [("m", None)] * readable


def test_a_body_without_a_model_is_not_given_one() -> None:
    talk = Talk(FakeDirector(aliases={"m": "target"}))
    talk.headers({":path": "/elsewhere"})
    talk.body(b'{"other":"api"}')

    assert talk.director.asked == []


def test_rewrites_are_looked_up_when_the_request_comes() -> None:
    director = FakeDirector()
    talk = Talk(director, request=BodyMode.STREAMED)
    assert mutation(talk.headers({"content-length": "9"})).remove_headers == ()
    assert talk.body() == [BodyReply(Direction.REQUEST)]

    director.aliases = {"m": "target"}
    talk = Talk(director, request=BodyMode.STREAMED)
    assert mutation(talk.headers({"content-length": "9"})).remove_headers == ("content-length",)
    assert talk.body() == [BodyReply(Direction.REQUEST, COMPLETION.replace(b'"m"', b'"target"'))]


# --- paths


@pytest.mark.parametrize(
    ("path", "prefix", "expected"),
    [
        ("/v1/completions?a=/v1/b", "/openai", "/openai/v1/completions?a=/v1/b"),
        ("/openai/v1/completions", "/openai", None),
        ("/openai/v1/completions", "", "/v1/completions"),
        ("/v1/completions", "", None),
        ("/elsewhere", "/openai", None),
    ],
)
@pytest.mark.parametrize("mode", list(BodyMode))
def test_the_path_is_the_endpoints_and_only_set_when_it_differs(
    mode: BodyMode, path: str, prefix: str, expected: str | None
) -> None:
    talk = Talk(FakeDirector(endpoint={"path_prefix": prefix}), request=mode)
    replies = talk.headers({":path": path})
    if talk.director.requests == []:
        replies = talk.body()

    assert set_headers(replies).get(":path") == expected
    # The log, the metrics and the errors go by what the client asked.
    talk.response_headers(end=True)
    assert [record.path for record in talk.records] == [path]


def test_a_path_of_another_header_is_no_reason_to_set_one() -> None:
    talk = Talk(FakeDirector(endpoint=PREFIXED))
    talk.feed(RequestHeaders({"x-original-path": "/v1/completions"}, False, talk.context))

    assert ":path" not in set_headers(talk.body())


# --- credentials


@pytest.mark.parametrize("client", [{}, {"authorization": "Bearer client"}])
def test_the_endpoints_key_replaces_the_clients(client: dict[str, str]) -> None:
    for endpoint, expected in ((KEYED, KEY), ({}, None)):
        talk = Talk(FakeDirector(endpoint=endpoint))
        talk.headers(client)
        assert set_headers(talk.body()).get("authorization") == expected


def test_a_key_does_not_show_in_any_action() -> None:
    talk = Talk(FakeDirector(endpoint=KEYED), decide_at_once=False)
    talk.headers()
    talk.body()
    actions: list[Action] = talk.session.handle(Decided(talk.director.decide(talk.pending[0].request)), talk.now)

    [sent] = [action.reply for action in actions if isinstance(action, Send) and isinstance(action.reply, HeadersReply)]
    assert ("authorization", KEY) in sent.mutation.set_headers
    assert "s3cret" not in repr(actions)
    assert "s3cret" not in repr(talk.session)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "10.0.0.2:2,10.0.0.3:3,10.0.0.1:1"),
        (dict.fromkeys(ADDRESSES, KEYED), "10.0.0.2:2,10.0.0.3:3,10.0.0.1:1"),
        ({ADDRESSES[1]: KEYED}, "10.0.0.2:2"),
        ({ADDRESSES[2]: KEYED}, "10.0.0.2:2,10.0.0.1:1"),
        ({ADDRESSES[2]: PREFIXED, ADDRESSES[0]: PREFIXED}, "10.0.0.2:2"),
    ],
)
def test_fallbacks_want_the_request_as_the_first_choice_does(fields: dict[str, dict[str, Any]], expected: str) -> None:
    talk = Talk(FakeDirector(ADDRESSES, fields=fields), SessionSettings(fallbacks=2))

    assert mutation(talk.headers(end=True)).destination == expected
