"""The record of each request: one, with what is known of its end."""

from __future__ import annotations

from picker.core.events import Outcome, Usage
from picker.core.ledger import Eviction
from picker.core.record import RequestRecord
from picker.core.values import RejectionCode
from picker.extproc.messages import BodyMode, Deadline, Draining, Evicted, PeerGone
from picker.extproc.settings import ResponsePath, SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import Talk


def record(talk: Talk) -> RequestRecord:
    [made] = talk.records
    assert (made.id, made.path) == ("r-1", "/v1/completions")
    return made


def test_a_completed_request() -> None:
    talk = Talk()
    talk.ask()
    talk.now += 2
    talk.response_headers()
    talk.response_body(b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}', end=True)
    talk.feed(PeerGone(clean=True))

    made = record(talk)
    assert (made.status, made.outcome, made.model, made.endpoint) == (200, Outcome.COMPLETED, "m", "10.0.0.1:8000")
    assert (made.duration_s, made.first_byte_s, made.attempts) == (2.0, 2.0, 1)
    assert made.usage == Usage(prompt_tokens=7, output_tokens=3)


def test_refused_requests() -> None:
    talk = Talk(FakeDirector(refuse=RejectionCode.SATURATED))
    talk.ask()
    assert (record(talk).status, record(talk).outcome, record(talk).endpoint) == (429, Outcome.REJECTED, None)

    talk = Talk()
    talk.headers()
    talk.body(b"?")
    assert (record(talk).status, record(talk).attempts) == (400, 0)

    talk = Talk()
    talk.headers()
    talk.feed(Deadline())
    assert record(talk).status == 408


def test_the_answer_of_the_proxy_itself() -> None:
    talk = Talk(request=BodyMode.BUFFERED)
    talk.headers()
    talk.response_headers(413)
    talk.response_body(b"too long", end=True)
    assert (record(talk).status, record(talk).outcome) == (413, Outcome.REJECTED)


def test_clients_that_leave() -> None:
    talk = Talk()
    talk.headers()
    talk.feed(PeerGone(clean=False))
    assert (record(talk).status, record(talk).outcome, record(talk).endpoint) == (0, Outcome.CLIENT_GONE, None)

    talk = Talk()
    talk.ask()
    talk.feed(PeerGone(clean=False))
    assert (record(talk).outcome, record(talk).endpoint) == (Outcome.CLIENT_GONE, "10.0.0.1:8000")


def test_failures() -> None:
    talk = Talk()
    talk.ask()
    talk.response_headers(502, end=True)
    assert (record(talk).status, record(talk).outcome) == (502, Outcome.FAILED)

    talk = Talk()
    talk.ask()
    talk.feed(Evicted(Eviction.HUNG))
    assert (record(talk).status, record(talk).outcome) == (503, Outcome.TIMEOUT)


def test_requests_that_are_left() -> None:
    talk = Talk(settings=SessionSettings(response_path=ResponsePath.LEAVE))
    talk.ask()
    assert (record(talk).status, record(talk).outcome) == (0, "left")

    talk = Talk(response=BodyMode.STREAMED)
    talk.ask()
    talk.response_headers(201)
    talk.feed(Draining())
    assert (record(talk).status, record(talk).outcome) == (201, "left")


def test_a_response_without_a_request_has_no_record() -> None:
    talk = Talk()
    talk.response_headers(end=True)
    talk.feed(PeerGone(clean=True))
    assert talk.records == []
