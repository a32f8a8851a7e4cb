"""The response phase: what passes by, and how its end is told."""

from __future__ import annotations

import pytest

from picker.core.events import AttemptFailed, FailureKind, Finished, FirstByte, Left, Outcome, Progress, Served, Usage
from picker.core.ledger import Eviction
from picker.extproc.messages import (
    BodyMode,
    BodyReply,
    Direction,
    Draining,
    Evicted,
    HeadersReply,
    Immediate,
    Mutation,
    PeerGone,
    ResponseTrailers,
    StreamedBody,
    TrailersReply,
)
from picker.extproc.settings import SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import FDS, Talk

RESPONSE = Direction.RESPONSE
SSE = {"content-type": "text/event-stream; charset=utf-8"}
ANSWER = b'{"id":"1","model":"m","usage":{"prompt_tokens":7,"completion_tokens":3}}'
USAGE = Usage(prompt_tokens=7, output_tokens=3)


def asked(response: BodyMode = FDS, request: BodyMode = FDS, **kwargs: object) -> Talk:
    talk = Talk(request=request, response=response, **kwargs)  # type: ignore[arg-type]
    talk.headers()
    if request is not BodyMode.NONE:
        talk.body()
    talk.replies.clear()
    return talk


def ending(talk: Talk) -> Finished | Left | AttemptFailed:
    [event] = talk.director.endings
    assert isinstance(event, Finished | Left | AttemptFailed)
    assert talk.director.reserved == {}
    return event


def outcome(talk: Talk) -> Outcome:
    event = ending(talk)
    assert isinstance(event, Finished)
    return event.outcome


def test_a_plain_answer_is_joined_and_its_usage_read() -> None:
    talk = asked()

    assert talk.response_headers() == [HeadersReply(RESPONSE)]
    assert talk.response_body(ANSWER[:20]) == []
    assert talk.response_body(ANSWER[20:], end=True) == [StreamedBody(RESPONSE, ANSWER, True)]
    event = ending(talk)
    assert isinstance(event, Finished)
    assert (event.outcome, event.status, event.usage) == (Outcome.COMPLETED, 200, USAGE)
    assert isinstance(talk.director.events[0], FirstByte)


def test_a_plain_answer_may_end_with_an_empty_chunk() -> None:
    talk = asked()
    talk.response_headers()
    talk.response_body(ANSWER)

    assert talk.response_body(b"", end=True) == [StreamedBody(RESPONSE, ANSWER, True)]


def test_a_long_answer_is_passed_on_once_it_is_too_long_to_join() -> None:
    talk = asked(settings=SessionSettings(hold_response_bytes=10))
    talk.response_headers()

    assert talk.response_body(b"12345") == []
    assert talk.response_body(b"678901") == [StreamedBody(RESPONSE, b"12345678901", False)]
    assert talk.session.held_bytes == 0
    assert talk.response_body(b"x") == [StreamedBody(RESPONSE, b"x", False)]
    assert talk.response_body(b"", end=True) == [StreamedBody(RESPONSE, b"", True)]


def test_a_stream_passes_chunk_by_chunk() -> None:
    talk = asked()
    talk.response_headers(fields=SSE)
    usage = b'data: {"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'

    for chunk in (b"data: {}\n\n", usage[:30], usage[30:]):
        assert talk.response_body(chunk) == [StreamedBody(RESPONSE, chunk, False)]
    assert talk.response_body(b"", end=True) == [StreamedBody(RESPONSE, b"", True)]
    event = ending(talk)
    assert isinstance(event, Finished)
    assert event.usage == USAGE


def test_a_request_for_a_stream_makes_any_answer_a_stream() -> None:
    talk = Talk()
    talk.headers()
    talk.body(b'{"model":"m","stream":true}')

    talk.response_headers(400)
    assert talk.response_body(b"{") == [StreamedBody(RESPONSE, b"{", False)]


@pytest.mark.parametrize("fields", [SSE, {}])
def test_trailers_come_after_the_body(fields: dict[str, str]) -> None:
    talk = asked()
    talk.response_headers(fields=fields)
    talk.response_body(b"{}")
    talk.replies.clear() if fields else None

    after = talk.feed(ResponseTrailers())

    expected = [] if fields else [StreamedBody(RESPONSE, b"{}", False)]
    assert after == [*expected, TrailersReply(RESPONSE)]
    assert outcome(talk) is Outcome.COMPLETED


def test_only_a_response_on_the_stream() -> None:
    talk = Talk()

    assert talk.response_headers() == [HeadersReply(RESPONSE)]
    assert talk.response_body(b"no healthy ") == []
    assert talk.response_body(b"upstream", end=True) == [StreamedBody(RESPONSE, b"no healthy upstream", True)]
    assert talk.director.events == []


@pytest.mark.parametrize("mode", [BodyMode.STREAMED, BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL])
def test_every_message_gets_one_answer_outside_full_duplex(mode: BodyMode) -> None:
    talk = asked(mode)

    assert talk.response_headers() == [HeadersReply(RESPONSE)]
    if mode is BodyMode.STREAMED:
        assert talk.response_body(ANSWER[:9]) == [BodyReply(RESPONSE)]
        assert talk.response_body(ANSWER[9:], end=True) == [BodyReply(RESPONSE)]
    else:
        assert talk.response_body(ANSWER, end=True) == [BodyReply(RESPONSE)]
    event = ending(talk)
    assert isinstance(event, Finished)
    assert event.usage == USAGE
    assert talk.feed(ResponseTrailers()) == [TrailersReply(RESPONSE)]


def test_a_buffered_answer_with_trailers_is_over_with_its_body() -> None:
    talk = asked(BodyMode.BUFFERED)
    talk.response_headers()
    talk.response_body(ANSWER, end=False)
    assert outcome(talk) is Outcome.COMPLETED
    assert talk.feed(ResponseTrailers()) == [TrailersReply(RESPONSE)]


def test_headers_may_end_the_response() -> None:
    talk = asked()
    assert talk.response_headers(204, end=True) == [HeadersReply(RESPONSE)]
    assert outcome(talk) is Outcome.COMPLETED


def test_the_clients_model_name_is_restored() -> None:
    director = FakeDirector(aliases={"m": "real"})
    talk = Talk(director)
    talk.ask()
    talk.response_headers()
    answer = b'{"model":"real","text":"\\"model\\":\\"real\\""}'
    assert talk.response_body(answer, end=True) == [
        StreamedBody(RESPONSE, answer.replace(b'"model":"real"', b'"model":"m"', 1), True)
    ]

    talk = Talk(director)
    talk.ask()
    talk.response_headers(fields=SSE)
    assert talk.response_body(b'data: {"model":"real"}\n\n') == [
        StreamedBody(RESPONSE, b'data: {"model":"m"}\n\n', False)
    ]
    # A line that is cut waits for its rest, and nothing is lost at the end.
    assert talk.response_body(b'data: {"mod') == []
    assert talk.response_body(b'el":"real"}', end=True) == [StreamedBody(RESPONSE, b'data: {"model":"m"}', True)]

    talk = Talk(director, response=BodyMode.BUFFERED)
    talk.ask()
    talk.response_headers()
    assert talk.response_body(b'{"model":"real"}', end=True) == [
        BodyReply(RESPONSE, b'{"model":"m"}', Mutation(set_headers=(("content-length", "13"),)))
    ]


def test_served_feedback_is_passed_on() -> None:
    talk = asked()
    talk.response_headers(served="10.0.0.9:1")
    assert Served(1, talk.now, "10.0.0.9:1") in talk.director.events


def test_signs_of_life_are_rationed() -> None:
    talk = asked()
    talk.response_headers(fields=SSE)
    for _ in range(100):
        talk.now += 0.01
        talk.response_body(b"data: {}\n\n")

    kinds = [type(event) for event in talk.director.events]
    assert kinds[0] is FirstByte
    assert 3 <= kinds.count(Progress) <= 5


def test_without_the_body_the_headers_are_the_first_byte() -> None:
    talk = asked(BodyMode.NONE)
    talk.response_headers()
    assert [type(event) for event in talk.director.events] == [FirstByte]
    assert talk.director.requests[0].sees_body is False


@pytest.mark.parametrize(
    ("status", "fields", "kind"),
    [
        (500, {}, FailureKind.SERVER_ERROR),
        (502, {}, FailureKind.RESET),
        (503, {}, FailureKind.OVERLOADED),
        (503, {"date": "", "content-type": "text/plain"}, FailureKind.OVERLOADED),
        (504, {}, FailureKind.TIMEOUT),
        (529, {}, FailureKind.OVERLOADED),
    ],
)
def test_server_errors_blame_the_endpoint(status: int, fields: dict[str, str], kind: FailureKind) -> None:
    talk = asked()
    talk.response_headers(status, fields)
    talk.response_body(b"{}", end=True)
    assert ending(talk) == AttemptFailed(1, talk.now, kind, status)


def test_an_undated_503_is_the_proxys_own() -> None:
    from picker.extproc.response import blame

    assert blame(503, {"content-type": "text/plain"}) is FailureKind.CONNECT
    assert blame(503, {"content-type": "application/json"}) is FailureKind.OVERLOADED
    assert blame(429, {}) is None


@pytest.mark.parametrize("status", [400, 429, 501])
def test_other_statuses_only_end_the_request(status: int) -> None:
    talk = asked()
    talk.response_headers(status, end=True)
    assert outcome(talk) is (Outcome.FAILED if status >= 500 else Outcome.COMPLETED)


@pytest.mark.parametrize(
    ("fields", "after_s", "clean", "expected"),
    [
        ({"content-length": "9"}, 0.0, False, Outcome.COMPLETED),
        (SSE, 0.001, False, None),
        (SSE, 0.001, True, None),
        (SSE, 5.0, True, Outcome.COMPLETED),
        (SSE, 5.0, False, Outcome.CLIENT_GONE),
    ],
)
@pytest.mark.parametrize("request_mode", [FDS, BodyMode.NONE, BodyMode.BUFFERED])
def test_the_end_of_a_response_that_is_not_shown(
    fields: dict[str, str], after_s: float, clean: bool, expected: Outcome | None, request_mode: BodyMode
) -> None:
    talk = asked(BodyMode.NONE, request_mode)
    talk.response_headers(fields=fields)
    talk.now += after_s
    talk.feed(PeerGone(clean))

    if expected is None:
        assert isinstance(ending(talk), Left)
    else:
        assert outcome(talk) is expected


def test_the_rest_of_a_partial_answer_is_not_shown_either() -> None:
    talk = asked(BodyMode.BUFFERED_PARTIAL)
    talk.response_headers(fields=SSE)
    talk.now += 9
    talk.response_body(b"data: 1\n\n", end=False)
    talk.feed(PeerGone(clean=False))
    assert isinstance(ending(talk), Left)


@pytest.mark.parametrize("mode", [BodyMode.STREAMED, FDS])
@pytest.mark.parametrize("clean", [True, False])
def test_a_stream_that_ends_before_the_response_means_the_client_left(mode: BodyMode, clean: bool) -> None:
    talk = asked(mode)
    talk.response_headers(fields=SSE)
    talk.response_body(b"data: 1\n\n")
    talk.feed(PeerGone(clean))
    assert outcome(talk) is Outcome.CLIENT_GONE

    talk = asked(mode)
    talk.feed(PeerGone(clean))
    assert outcome(talk) is Outcome.CLIENT_GONE


def test_a_hung_pod_before_the_headers_gives_503_and_another_try() -> None:
    talk = asked()

    [answer] = talk.feed(Evicted(Eviction.HUNG))

    assert isinstance(answer, Immediate)
    assert answer.status == 503
    assert dict(answer.headers)["x-should-retry"] == "true"
    assert talk.closed is True
    assert ending(talk) == AttemptFailed(1, talk.now, FailureKind.HUNG, 503)


@pytest.mark.parametrize("reason", [Eviction.FIRST_BYTE_TIMEOUT, Eviction.TOTAL_TIMEOUT])
def test_a_passed_deadline_gives_504(reason: Eviction) -> None:
    talk = asked()
    [answer] = talk.feed(Evicted(reason))
    assert isinstance(answer, Immediate)
    assert answer.status == 504
    event = ending(talk)
    assert isinstance(event, AttemptFailed)
    assert event.kind is FailureKind.TIMEOUT


def test_an_eviction_after_the_headers_resets_the_client() -> None:
    talk = asked()
    talk.response_headers(fields=SSE)
    assert isinstance(talk.feed(Evicted(Eviction.HUNG))[0], Immediate)
    assert outcome(talk) is Outcome.TIMEOUT


def test_an_eviction_of_what_is_over_does_nothing() -> None:
    talk = asked()
    talk.response_headers(204, end=True)
    assert talk.feed(Evicted(Eviction.HUNG)) == []


@pytest.mark.parametrize("mode", [BodyMode.NONE, BodyMode.STREAMED, BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL])
def test_draining_leaves_a_response(mode: BodyMode) -> None:
    talk = asked(mode)
    talk.response_headers(fields=SSE)
    talk.feed(Draining())
    assert talk.closed is True
    assert isinstance(ending(talk), Left)


def test_draining_leaves_before_a_full_duplex_response_but_not_during_it() -> None:
    talk = asked()
    talk.feed(Draining())
    assert talk.closed is True
    assert isinstance(ending(talk), Left)

    begun = asked()
    begun.response_headers(fields=SSE)
    assert begun.feed(Draining()) == []
    assert not begun.session.closed
    begun.response_body(b"data: 1\n\n", end=True)
    assert begun.closed is True
    assert outcome(begun) is Outcome.COMPLETED


def test_broken_order_closes_with_an_error_and_releases() -> None:
    talk = asked()
    talk.response_headers(fields=SSE)
    talk.response_headers(fields=SSE)
    assert talk.closed is False
    assert outcome(talk) is Outcome.FAILED


def test_nothing_follows_the_end() -> None:
    talk = asked()
    talk.feed(PeerGone(clean=True))
    for event in (PeerGone(clean=False), Evicted(Eviction.HUNG), Draining(), ResponseTrailers()):
        assert talk.feed(event) == []
    assert len(talk.director.endings) == 1
