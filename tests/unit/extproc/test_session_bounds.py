"""Limits, deadlines, leaving and draining: how a request phase ends when it does not end well."""

from __future__ import annotations

import pytest

from picker.core.events import Finished, Left, Outcome
from picker.core.values import RejectionCode
from picker.extproc.messages import (
    BodyMode,
    BodyReply,
    Deadline,
    Direction,
    Draining,
    HeadersReply,
    Immediate,
    Mutation,
    Overloaded,
    PeerGone,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    StreamedBody,
)
from picker.extproc.settings import ResponsePath, SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import Talk, only_immediate

REQUEST = Direction.REQUEST
ADDRESS = "10.0.0.1:8000"
PICKED = Mutation(set_headers=(("x-gateway-destination-endpoint", ADDRESS),), destination=ADDRESS)


def test_a_body_over_the_limit_gets_413() -> None:
    for mode in (BodyMode.FULL_DUPLEX_STREAMED, BodyMode.BUFFERED):
        talk = Talk(settings=SessionSettings(max_body_bytes=100), request=mode)
        talk.headers()
        talk.body(b"x" * 60, end=False) if mode is BodyMode.FULL_DUPLEX_STREAMED else None
        assert only_immediate(talk.body(b"x" * 101, end=False)).status == 413
        assert talk.session.held_bytes == 0


def test_empty_chunks_are_bounded_too() -> None:
    talk = Talk(settings=SessionSettings(max_body_bytes=100))
    talk.headers()
    for _ in range(100):
        assert talk.body(b"", end=False) == []

    assert only_immediate(talk.body(b"", end=False)).status == 413


def test_deadlines_end_what_takes_too_long() -> None:
    talk = Talk()
    talk.headers()
    assert talk.deadline == talk.now + 60.0
    assert only_immediate(talk.feed(Deadline())).status == 408

    talk = Talk(decide_at_once=False)
    talk.headers(end=True)
    assert talk.deadline == talk.now + 10.0
    assert only_immediate(talk.feed(Deadline())).status == 503
    talk.settle()
    assert [event.outcome for event in talk.director.endings if isinstance(event, Finished)] == [Outcome.CLIENT_GONE]

    talk = Talk()
    talk.ask()
    assert talk.deadline is None
    assert talk.feed(Deadline()) == []


def test_a_decision_that_comes_after_the_client_left_is_given_back() -> None:
    talk = Talk(decide_at_once=False)
    talk.headers(end=True)
    talk.feed(PeerGone(clean=False))
    assert talk.director.endings == []

    assert talk.settle() == []
    assert [type(event) for event in talk.director.endings] == [Finished]
    assert talk.director.reserved == {}


def test_messages_that_come_while_a_decision_is_pending_are_answered_after_it() -> None:
    talk = Talk(request=BodyMode.STREAMED, decide_at_once=False)
    talk.headers()

    assert talk.body(b"1", end=False) == []
    assert talk.body(b"2", end=True) == []
    assert talk.settle() == [HeadersReply(REQUEST, PICKED), BodyReply(REQUEST), BodyReply(REQUEST)]


def test_too_much_while_a_decision_is_pending_is_refused() -> None:
    talk = Talk(settings=SessionSettings(max_body_bytes=10), request=BodyMode.STREAMED, decide_at_once=False)
    talk.headers()

    assert only_immediate(talk.body(b"x" * 11, end=False)).status == 413
    assert talk.settle() == []
    assert talk.director.reserved == {}


def test_no_room_is_429_with_a_time_to_wait() -> None:
    talk = Talk()
    answer = only_immediate(talk.feed(Overloaded("full")))

    assert answer.status == 429
    assert dict(answer.headers)["retry-after-ms"] == "1000"


def test_leave_closes_after_the_answer() -> None:
    talk = Talk(settings=SessionSettings(response_path=ResponsePath.LEAVE))
    talk.headers()

    replies = talk.body()

    assert [type(reply) for reply in replies] == [HeadersReply, StreamedBody]
    assert talk.closed is True
    assert [type(event) for event in talk.director.endings] == [Left]


def test_leave_waits_for_the_last_chunk_of_a_streamed_body() -> None:
    talk = Talk(settings=SessionSettings(response_path=ResponsePath.LEAVE), request=BodyMode.STREAMED)
    talk.headers()
    talk.body(b"1", end=False)
    assert talk.closed is None
    talk.body(b"2")
    assert talk.closed is True


def test_draining_lets_a_request_phase_finish() -> None:
    talk = Talk()
    talk.headers()
    assert talk.feed(Draining()) == []
    assert talk.session.in_request_phase

    assert [type(reply) for reply in talk.body()] == [HeadersReply, StreamedBody]
    assert talk.closed is True
    assert [type(event) for event in talk.director.endings] == [Left]


@pytest.mark.parametrize("mode", list(BodyMode))
def test_a_client_that_leaves_while_sending_is_forgotten(mode: BodyMode) -> None:
    talk = Talk(request=mode)
    talk.headers()
    talk.feed(PeerGone(clean=True))

    assert talk.director.reserved == {}
    assert all(isinstance(event, Finished) for event in talk.director.endings)


def test_broken_order_closes_with_an_error() -> None:
    orders: list[list[RequestHeaders | RequestBody | RequestTrailers]] = [
        [RequestBody(b"x", True)],
        [RequestHeaders({}), RequestHeaders({})],
        [RequestHeaders({":path": "/x"}), RequestBody(b"", True), RequestBody(b"", True)],
        [RequestTrailers()],
    ]
    for order in orders:
        talk = Talk()
        for event in order:
            talk.feed(event)
        assert talk.closed is False
        assert talk.director.reserved == {}


def test_the_answer_of_the_proxy_itself_ends_the_request_phase() -> None:
    talk = Talk(request=BodyMode.BUFFERED)
    talk.headers()

    replies: list[Reply] = talk.response_headers(413, {"content-type": "text/plain"})

    assert replies == [HeadersReply(Direction.RESPONSE)]
    assert talk.deadline is None
    assert talk.body() == [BodyReply(REQUEST)]
    assert talk.director.requests == []


def test_no_reply_is_a_404() -> None:
    for code in RejectionCode:
        talk = Talk(FakeDirector(refuse=code))
        [answer] = talk.headers(end=True)
        assert isinstance(answer, Immediate)
        assert (answer.status == 404) == (code is RejectionCode.RESPONSE_GONE)
