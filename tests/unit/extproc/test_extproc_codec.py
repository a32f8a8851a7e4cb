"""Protobuf in, values out, and back."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from hypothesis import given
from hypothesis import strategies as st

from picker.extproc import headers as names
from picker.extproc.codec import decode, encode
from picker.extproc.messages import (
    NO_CONTEXT,
    BodyMode,
    BodyReply,
    Context,
    Direction,
    HeadersReply,
    Hidden,
    Immediate,
    Modes,
    Mutation,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamedBody,
    TrailersReply,
)
from protos import ext_proc_pb2 as pb

REQUEST, RESPONSE = Direction.REQUEST, Direction.RESPONSE
DESTINATION = "x-gateway-destination-endpoint"


def message(**fields: Any) -> pb.ProcessingRequest:
    return ParseDict(fields, pb.ProcessingRequest())


def head(*pairs: tuple[str, str, bytes], end: bool = False) -> pb.HttpHeaders:
    made = pb.HttpHeaders(end_of_stream=end)
    for key, value, raw in pairs:
        made.headers.headers.add(key=key, value=value, raw_value=raw)
    return made


def with_metadata(namespace: str, fields: dict[str, Any]) -> pb.ProcessingRequest:
    made = message(requestBody={})
    made.metadata_context.filter_metadata[namespace].update(fields)
    return made


def test_header_names_are_lower_case_raw_values_win_and_the_first_counts() -> None:
    event = decode(
        pb.ProcessingRequest(
            request_headers=head(
                ("Hi", "no", b"mom"), ("PLAIN", "value", b""), ("hi", "", b"again"), ("bad", "", b"\xff\xfe"), end=True
            )
        )
    )

    assert isinstance(event, RequestHeaders)
    assert event.headers == {"hi": "mom", "plain": "value", "bad": "��"}
    assert event.end_of_stream
    assert event.context is NO_CONTEXT


@pytest.mark.parametrize(
    ("pair", "status"),
    [
        ((":status", "", b"503"), 503),
        (("status", "200", b""), 200),
        ((":status", "", b"abc"), 0),
        ((":status", "", b"-12"), 0),
        ((":status", "", "²²²".encode()), 0),
        (("x", "", b""), 0),
    ],
)
def test_status(pair: tuple[str, str, bytes], status: int) -> None:
    event = decode(pb.ProcessingRequest(response_headers=head(pair)))
    assert isinstance(event, ResponseHeaders)
    assert event.status == status


def test_every_kind_of_message() -> None:
    assert decode(message(requestBody={"body": "YQ==", "endOfStream": True})) == RequestBody(b"a", True)
    assert decode(message(responseBody={"body": "YQ=="})) == ResponseBody(b"a", False)
    assert decode(message(requestTrailers={})) == RequestTrailers()
    assert decode(message(responseTrailers={})) == ResponseTrailers()
    assert decode(message()) is None


def test_modes_come_with_the_first_message() -> None:
    event = decode(
        message(requestHeaders={}, protocolConfig={"requestBodyMode": "BUFFERED", "responseBodyMode": "NONE"})
    )
    assert event is not None
    assert event.context == Context(modes=Modes(BodyMode.BUFFERED, BodyMode.NONE))

    everything_default = decode(message(requestHeaders={}, protocolConfig={}))
    assert everything_default is not None
    assert everything_default.context.modes == Modes(BodyMode.NONE, BodyMode.NONE)

    grpc = decode(message(requestHeaders={}, protocolConfig={"requestBodyMode": "GRPC"}))
    assert grpc is not None
    assert grpc.context.modes == Modes(BodyMode.FULL_DUPLEX_STREAMED, BodyMode.NONE)


def test_observability() -> None:
    event = decode(message(requestHeaders={}, observabilityMode=True))
    assert event is not None
    assert event.context.observability


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["10.0.0.1:8000", "10.0.0.2"], ("10.0.0.1:8000", "10.0.0.2")),
        ("10.0.0.1:8000,10.0.0.2", ("10.0.0.1:8000", "10.0.0.2")),
        (" 10.0.0.2:8080 ,  , 10.0.0.3:8080 ", ("10.0.0.2:8080", "10.0.0.3:8080")),
        (["10.0.0.1,10.0.0.2", " 10.0.0.3 "], ("10.0.0.1", "10.0.0.2", "10.0.0.3")),
        (["[FD00:0::1]:80", "fd00:0:0::2", "[fd00::3]"], ("[fd00::1]:80", "fd00::2", "fd00::3")),
        ([], ()),
        ("", ()),
        (5, ()),
        ([None, 5, "10.0.0.1"], ("10.0.0.1",)),
    ],
)
def test_subset(value: object, expected: tuple[str, ...]) -> None:
    event = decode(with_metadata("envoy.lb.subset_hint", {names.SUBSET: value}))
    assert event is not None
    assert event.context.subset == expected


def test_no_subset_is_not_an_empty_one() -> None:
    for made in (
        with_metadata("envoy.lb.subset_hint", {"other": "x"}),
        with_metadata("other", {names.SUBSET: ["10.0.0.1"]}),
    ):
        event = decode(made)
        assert event is not None
        assert event.context.subset is None


def test_served_endpoint() -> None:
    event = decode(with_metadata("envoy.lb", {"x-gateway-destination-endpoint-served": "10.0.0.1:80"}))
    assert event is not None
    assert event.context.served == "10.0.0.1:80"
    for fields in ({}, {"x-gateway-destination-endpoint-served": ""}, {DESTINATION: "x"}):
        event = decode(with_metadata("envoy.lb", fields))
        assert event is not None
        assert event.context.served is None


def test_a_pick_is_header_and_metadata() -> None:
    mutation = Mutation(
        set_headers=((DESTINATION, "[::1]:80"),), remove_headers=("x-slo-ttft-ms",), destination="[::1]:80"
    )
    assert MessageToDict(encode(HeadersReply(REQUEST, mutation))) == {
        "requestHeaders": {
            "response": {
                "headerMutation": {
                    "setHeaders": [
                        {
                            "header": {"key": DESTINATION, "rawValue": "Wzo6MV06ODA="},
                            "appendAction": "OVERWRITE_IF_EXISTS_OR_ADD",
                        }
                    ],
                    "removeHeaders": ["x-slo-ttft-ms"],
                },
                "clearRouteCache": True,
            }
        },
        "dynamicMetadata": {"envoy.lb": {DESTINATION: "[::1]:80"}},
    }


def test_scores_ride_next_to_the_destination() -> None:
    mutation = Mutation(destination="1.2.3.4:5", scores=(("1.2.3.4:5", 0.75), ("[::1]:5", 0.5)))
    assert MessageToDict(encode(HeadersReply(REQUEST, mutation)).dynamic_metadata) == {
        "envoy.lb": {DESTINATION: "1.2.3.4:5", names.SCORES: {"1.2.3.4:5": 0.75, "[::1]:5": 0.5}}
    }


def test_plain_continuations() -> None:
    assert MessageToDict(encode(HeadersReply(REQUEST))) == {"requestHeaders": {"response": {}}}
    assert MessageToDict(encode(HeadersReply(RESPONSE))) == {"responseHeaders": {"response": {}}}
    assert MessageToDict(encode(BodyReply(REQUEST))) == {"requestBody": {"response": {}}}
    assert MessageToDict(encode(BodyReply(RESPONSE))) == {"responseBody": {"response": {}}}
    assert MessageToDict(encode(TrailersReply(REQUEST))) == {"requestTrailers": {}}
    assert MessageToDict(encode(TrailersReply(RESPONSE))) == {"responseTrailers": {}}
    assert MessageToDict(encode(TrailersReply(REQUEST, "1.2.3.4:5"))) == {
        "requestTrailers": {},
        "dynamicMetadata": {"envoy.lb": {DESTINATION: "1.2.3.4:5"}},
    }


def test_bodies() -> None:
    new = encode(BodyReply(REQUEST, b"new", Mutation(destination="1.2.3.4:5")))
    assert new.request_body.response.body_mutation.body == b"new"
    assert new.request_body.response.clear_route_cache
    assert encode(BodyReply(RESPONSE, b"")).response_body.response.body_mutation.clear_body
    immediate = encode(Immediate(status=429, headers=(("retry-after", "1"),), body=b"{}", details="waypost_x"))
    assert MessageToDict(immediate) == {
        "immediateResponse": {
            "status": {"code": 429},
            "headers": {
                "setHeaders": [
                    {
                        "header": {"key": "retry-after", "rawValue": "MQ=="},
                        "appendAction": "OVERWRITE_IF_EXISTS_OR_ADD",
                    }
                ]
            },
            "body": "e30=",
            "details": "waypost_x",
        }
    }


@given(chunk=st.binary(max_size=300), end=st.booleans(), direction=st.sampled_from(Direction))
def test_streamed_chunks_round_trip(chunk: bytes, end: bool, direction: Direction) -> None:
    wire = encode(StreamedBody(direction, chunk, end)).SerializeToString()
    read = pb.ProcessingResponse.FromString(wire)
    reply = read.request_body if direction is REQUEST else read.response_body
    mutation = reply.response.body_mutation
    assert mutation.WhichOneof("mutation") == "streamed_response"
    assert (mutation.streamed_response.body, mutation.streamed_response.end_of_stream) == (chunk, end)


@given(wire=st.binary(max_size=200))
def test_any_parsable_message_decodes(wire: bytes) -> None:
    try:
        made = pb.ProcessingRequest.FromString(wire)
    except Exception:
        return
    decode(made)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"x-waypost-pool": "ns/a"}, Context(pool="ns/a")),
        ({"x-waypost-pool": ""}, Context()),
        ({"x-waypost-pool": 7}, Context()),
        ({"x-waypost-pool": ["ns/a"]}, Context()),
        ({"x-waypost-pool": None}, Context()),
        (
            {"x-waypost-pool": "a", "x-gateway-destination-endpoint-served": "10.0.0.1:1"},
            Context(pool="a", served="10.0.0.1:1"),
        ),
        ({"unrelated": "ns/a"}, Context()),
    ],
)
def test_the_pool_is_read_beside_who_served(fields: dict[str, Any], expected: Context) -> None:
    event = decode(with_metadata("envoy.lb", fields))
    assert event is not None
    assert event.context == expected


def test_a_pool_of_another_namespace_is_none() -> None:
    event = decode(with_metadata("envoy.lb.subset_hint", {"x-waypost-pool": "ns/a"}))
    assert event is not None
    assert event.context == Context()


def test_paths_and_keys_are_overwritten_on_the_wire() -> None:
    mutation = Mutation(set_headers=((":path", "/openai/v1/x?a=b"), ("authorization", Hidden("Bearer s3cret"))))
    [path, key] = encode(HeadersReply(REQUEST, mutation)).request_headers.response.header_mutation.set_headers

    assert (path.header.key, path.header.raw_value) == (":path", b"/openai/v1/x?a=b")
    assert (key.header.key, key.header.raw_value) == ("authorization", b"Bearer s3cret")
    assert {path.append_action, key.append_action} == {pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD}
    assert "s3cret" not in repr(mutation)


def test_headers_of_a_response_are_changed_without_touching_its_route() -> None:
    answer = encode(HeadersReply(RESPONSE, Mutation(set_headers=(("x", "1"),)))).response_headers.response

    assert [option.header.raw_value for option in answer.header_mutation.set_headers] == [b"1"]
    assert not answer.clear_route_cache
