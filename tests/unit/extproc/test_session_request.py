"""The request phase, in every body mode."""

from __future__ import annotations

import json
import math
from array import array

import pytest

from picker.core.values import Decision, Endpoint, RejectionCode, ScoreTable
from picker.extproc.headers import CONTROL
from picker.extproc.messages import (
    BodyMode,
    BodyReply,
    Context,
    Decided,
    Direction,
    HeadersReply,
    Mutation,
    PeerGone,
    RequestBody,
    RequestTrailers,
    StreamedBody,
    TrailersReply,
)
from picker.extproc.settings import SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import COMPLETION, Talk, only_immediate

REQUEST = Direction.REQUEST
ADDRESS = "10.0.0.1:8000"
ENDPOINTS = [("near", "10.0.0.1:1"), ("far", "10.0.0.2:2"), ("unnamed", "")]


def picked(*, length: int | None = None, remove: tuple[str, ...] = (), address: str = ADDRESS) -> Mutation:
    headers = [("x-gateway-destination-endpoint", address)]
    if length is not None:
        headers.append(("content-length", str(length)))
    return Mutation(set_headers=tuple(headers), remove_headers=remove, destination=address)


def test_full_duplex_answers_headers_and_body_at_the_end_of_the_body() -> None:
    talk = Talk()

    assert talk.headers() == []
    assert talk.body(COMPLETION[:10], end=False) == []
    assert talk.body(COMPLETION[10:], end=False) == []
    assert talk.body(b"", end=True) == [
        HeadersReply(REQUEST, picked(length=len(COMPLETION))),
        StreamedBody(REQUEST, COMPLETION, True),
    ]
    assert talk.director.requests[0].model == "m"
    assert talk.closed is None
    assert talk.session.held_bytes == 0


@pytest.mark.parametrize("size", [0, 1, 61_999, 62_000, 62_001, 124_000, 200_000])
def test_chunks_are_bounded_and_only_the_last_ends_the_stream(size: int) -> None:
    talk = Talk()
    body = b"x" * size

    talk.headers({":path": "/elsewhere"})
    head, *chunks = talk.body(body)

    assert isinstance(head, HeadersReply)
    assert [type(chunk) for chunk in chunks] == [StreamedBody] * max(1, -(-size // 62_000))
    streamed = [chunk for chunk in chunks if isinstance(chunk, StreamedBody)]
    assert b"".join(chunk.chunk for chunk in streamed) == body
    assert all(len(chunk.chunk) <= 62_000 for chunk in streamed)
    assert [chunk.end_of_stream for chunk in streamed] == [False] * (len(streamed) - 1) + [True]


def test_trailers_end_a_body_and_are_answered_last() -> None:
    talk = Talk()
    talk.headers()
    talk.body(end=False)

    assert talk.feed(RequestTrailers()) == [
        HeadersReply(REQUEST, picked()),
        StreamedBody(REQUEST, COMPLETION, False),
        TrailersReply(REQUEST),
    ]


def test_a_buffered_request_gets_one_answer_per_message() -> None:
    talk = Talk(request=BodyMode.BUFFERED)

    assert talk.headers({"x-llm-d-inference-objective": "gold"}) == [HeadersReply(REQUEST)]
    assert talk.body() == [BodyReply(REQUEST, None, picked(remove=("x-llm-d-inference-objective",)))]
    assert talk.feed(RequestTrailers()) == [TrailersReply(REQUEST)]


def test_a_buffered_body_is_replaced_with_its_length_when_the_model_changes() -> None:
    talk = Talk(FakeDirector(aliases={"m": "real/model"}), request=BodyMode.BUFFERED)
    talk.headers()

    new = COMPLETION.replace(b'"m"', b'"real/model"')
    assert talk.body() == [BodyReply(REQUEST, new, picked(length=len(new)))]


def test_buffered_trailers_without_a_body_carry_the_destination() -> None:
    talk = Talk(request=BodyMode.BUFFERED)
    talk.headers({":path": "/anything"})

    assert talk.feed(RequestTrailers()) == [TrailersReply(REQUEST, ADDRESS)]


@pytest.mark.parametrize("end", [True, False])
def test_a_partial_body_is_read_leniently_and_never_changed(end: bool) -> None:
    talk = Talk(FakeDirector(aliases={"m": "other"}), request=BodyMode.BUFFERED_PARTIAL)
    talk.headers()

    assert talk.body(COMPLETION[:20] if not end else COMPLETION, end=end) == [BodyReply(REQUEST, None, picked())]
    assert talk.director.requests[0].model == ("m" if end else None)
    assert talk.director.requests[0].target_model is None


def test_streamed_bodies_are_picked_at_the_headers() -> None:
    talk = Talk(request=BodyMode.STREAMED)

    assert talk.headers() == [HeadersReply(REQUEST, picked())]
    assert talk.body(b"12", end=False) == [BodyReply(REQUEST)]
    assert talk.body(b"34", end=True) == [BodyReply(REQUEST)]
    assert talk.feed(RequestTrailers()) == [TrailersReply(REQUEST)]
    assert talk.director.requests[0].model is None


def test_a_streamed_body_is_rewritten_on_its_last_chunk() -> None:
    talk = Talk(request=BodyMode.STREAMED)

    head = talk.headers({"x-llm-d-model-name-rewrite": "new", "content-length": str(len(COMPLETION))})
    assert head == [HeadersReply(REQUEST, picked(remove=("x-llm-d-model-name-rewrite", "content-length")))]
    assert talk.body(COMPLETION[:9], end=False) == [BodyReply(REQUEST, b"")]
    assert talk.body(COMPLETION[9:]) == [BodyReply(REQUEST, COMPLETION.replace(b'"m"', b'"new"'))]


def test_a_streamed_body_with_trailers_cannot_be_rewritten() -> None:
    talk = Talk(FakeDirector(aliases={"other": "target"}), request=BodyMode.STREAMED)
    talk.headers()
    talk.body(end=False)

    assert only_immediate(talk.feed(RequestTrailers())).status == 400
    assert talk.director.reserved == {}


def test_mode_none_is_picked_at_the_headers() -> None:
    talk = Talk(request=BodyMode.NONE)

    assert talk.headers() == [HeadersReply(REQUEST, picked())]
    assert talk.feed(RequestTrailers()) == [TrailersReply(REQUEST)]


@pytest.mark.parametrize("mode", list(BodyMode))
def test_a_request_without_body_is_scheduled_like_any_other(mode: BodyMode) -> None:
    talk = Talk(FakeDirector(["10.0.0.1:1", "10.0.0.2:2"]), request=mode, subset=("10.0.0.2:2",))

    assert talk.headers({":method": "GET", ":path": "/v1/models"}, end=True) == [
        HeadersReply(REQUEST, picked(address="10.0.0.2:2"))
    ]


@pytest.mark.parametrize("mode", list(BodyMode))
def test_a_request_without_body_and_without_endpoints_gets_503(mode: BodyMode) -> None:
    talk = Talk(FakeDirector(refuse=RejectionCode.NO_READY_ENDPOINTS), request=mode)

    assert only_immediate(talk.headers(end=True)).status == 503
    assert talk.closed is True


def test_nothing_is_answered_in_observability_mode() -> None:
    talk = Talk(observability=True)

    assert talk.headers() == []
    assert talk.body() == []
    assert talk.response_headers() == []
    assert talk.response_body(b"{}", end=True) == []
    assert talk.director.requests == []
    talk.feed(PeerGone(clean=True))
    assert talk.director.events == []


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (RejectionCode.SATURATED, 429, "rejected-saturated"),
        (RejectionCode.NO_ENDPOINTS, 503, "rejected-no-endpoints"),
        (RejectionCode.NO_READY_ENDPOINTS, 503, "rejected-no-endpoints"),
        (RejectionCode.SUBSET_EMPTY, 503, "rejected-no-endpoints"),
        (RejectionCode.MODEL_NOT_FOUND, 503, "rejected-no-endpoints"),
    ],
)
def test_refusals_of_the_director(code: RejectionCode, status: int, reason: str) -> None:
    talk = Talk(FakeDirector(refuse=code))
    talk.headers()

    answer = only_immediate(talk.body())

    headers = dict(answer.headers)
    assert answer.status == status
    assert headers["x-llm-d-request-dropped-reason"] == reason
    assert headers["x-request-id"] == "r-1"
    assert int(headers["retry-after"]) >= 1
    assert isinstance(json.loads(answer.body)["error"]["code"], str)
    assert (talk.closed, talk.deadline) == (True, None)


def test_errors_have_the_shape_of_the_route() -> None:
    talk = Talk()
    talk.headers({":path": "/v1/messages"})

    answer = only_immediate(talk.body(b"{}"))

    assert json.loads(answer.body)["type"] == "error"
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"no healthy upstream", "invalid_json"),
        (b'{"prompt": "x"}', "missing_required_parameter"),
        (b"", "invalid_json"),
    ],
)
def test_bad_bodies_get_400(body: bytes, code: str) -> None:
    talk = Talk(FakeDirector([]))
    talk.headers()

    answer = only_immediate(talk.body(body))

    assert answer.status == 400
    assert json.loads(answer.body)["error"]["code"] == code
    assert talk.director.requests == []


def test_an_unknown_path_may_carry_anything() -> None:
    talk = Talk()
    talk.headers({":path": "/primary-gateway-test"})

    assert talk.body(b"not json")[1:] == [StreamedBody(REQUEST, b"not json", True)]


def test_a_compressed_body_is_passed_unread() -> None:
    talk = Talk()
    talk.headers({"content-encoding": "gzip"})

    assert talk.body(b"\x1f\x8b")[1:] == [StreamedBody(REQUEST, b"\x1f\x8b", True)]


@pytest.mark.parametrize("header", ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"])
def test_the_model_is_rewritten_in_place(header: str) -> None:
    talk = Talk()
    talk.headers({header: "target"})

    head, chunk = talk.body()

    new = COMPLETION.replace(b'"m"', b'"target"')
    assert chunk == StreamedBody(REQUEST, new, True)
    assert head == HeadersReply(REQUEST, picked(length=len(new), remove=(header,)))
    assert (talk.director.requests[0].model, talk.director.requests[0].target_model) == ("m", "target")


def test_the_current_control_header_beats_its_alias_and_configuration_beats_both() -> None:
    both = {"x-llm-d-model-name-rewrite": "new", "x-gateway-model-name-rewrite": "old"}
    talk = Talk()
    talk.headers(both)
    assert b'"new"' in b"".join(part.chunk for part in talk.body() if isinstance(part, StreamedBody))

    talk = Talk(FakeDirector(aliases={"m": "configured"}))
    talk.headers(both)
    assert b'"configured"' in b"".join(part.chunk for part in talk.body() if isinstance(part, StreamedBody))


def test_every_control_header_is_removed_and_nothing_else_touched() -> None:
    talk = Talk()
    talk.headers({**dict.fromkeys(CONTROL, "v"), "cookie": "a", "x-gateway-destination-endpoint": "9.9.9.9:9"})

    head = talk.body()[0]

    assert isinstance(head, HeadersReply)
    assert head.mutation.remove_headers == tuple(sorted(CONTROL))
    assert [name for name, _ in head.mutation.set_headers] == ["x-gateway-destination-endpoint", "content-length"]


def test_a_missing_request_id_is_made_up() -> None:
    talk = Talk()

    [head] = talk.headers({"x-request-id": ""}, end=True)

    assert isinstance(head, HeadersReply)
    assert ("x-request-id", "made-up-id") in head.mutation.set_headers
    assert talk.director.requests[0].id == "made-up-id"


def test_an_id_that_names_a_peer_is_replaced() -> None:
    talk = Talk()

    [head] = talk.headers({"x-request-id": "___prefill_addr_10.0.0.1:1"}, end=True)

    assert isinstance(head, HeadersReply)
    assert ("x-request-id", "made-up-id") in head.mutation.set_headers


def test_scores_are_opt_in_and_skip_what_has_none() -> None:
    near, far, unnamed = (Endpoint(id=name, url="", address=address) for name, address in ENDPOINTS)
    table = ScoreTable(endpoints=("near", "far", "unnamed", "gone"), totals=array("d", [0.75, math.nan, 0.5, 0.1]))
    for emit, expected in ((False, ()), (True, (("10.0.0.1:1", 0.75),))):
        talk = Talk(settings=SessionSettings(emit_scores=emit), decide_at_once=False)
        talk.headers(end=True)
        request = talk.pending.pop().request
        decision = Decision(request=request, endpoint=near, alternates=(far, unnamed), table=table)
        [head] = talk.feed(Decided(decision))
        assert isinstance(head, HeadersReply)
        assert head.mutation.scores == expected


def test_fallbacks_are_opt_in() -> None:
    addresses = ["10.0.0.1:1", "10.0.0.2:2", "[fd00::1]:3", "10.0.0.4:4"]
    for count, expected in ((0, 1), (2, 3), (9, 4)):
        talk = Talk(FakeDirector(addresses), SessionSettings(fallbacks=count))
        [head] = talk.headers(end=True)
        assert isinstance(head, HeadersReply)
        assert head.mutation.destination is not None
        assert len(head.mutation.destination.split(",")) == expected
        assert head.mutation.set_headers[0][1] == head.mutation.destination


def test_an_endpoint_without_address_is_refused_and_released() -> None:
    talk = Talk(FakeDirector([""]))

    assert only_immediate(talk.headers(end=True)).status == 503
    assert talk.director.reserved == {}


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        (None, None, None),
        (("10.0.0.1",), None, {"10.0.0.1"}),
        (None, ("10.0.0.2:2",), {"10.0.0.2:2"}),
        (("10.0.0.1",), ("10.0.0.2:2",), {"10.0.0.2:2"}),
        (("10.0.0.1",), (), {"10.0.0.1"}),
        (None, (), set()),
    ],
)
def test_the_last_subset_that_names_somebody_counts(
    first: tuple[str, ...] | None, later: tuple[str, ...] | None, expected: set[str] | None
) -> None:
    talk = Talk(subset=first)
    talk.headers()
    talk.feed(RequestBody(COMPLETION, False, Context(subset=later)))
    talk.body(b"")

    assert talk.director.requests[0].subset == (None if expected is None else frozenset(expected))


def test_an_empty_subset_means_nobody_and_can_be_disabled() -> None:
    assert only_immediate(Talk(subset=()).headers(end=True)).status == 503
    [head] = Talk(settings=SessionSettings(use_subset=False), subset=()).headers(end=True)
    assert isinstance(head, HeadersReply)
