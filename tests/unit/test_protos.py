"""Our wire definition against the field numbers of Envoy 1.40's ext_proc v3 API, and the rules that keep it apart."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from google.protobuf.descriptor import Descriptor

from protos import PROCESS, PROCESS_METHOD, SERVICE, ext_proc_pb2

# Facts of Envoy's API: message -> field -> number. A field left out is one nobody here needs.
NUMBERS: Mapping[str, Mapping[str, int]] = {
    "ProcessingRequest": {
        "request_headers": 2,
        "response_headers": 3,
        "request_body": 4,
        "response_body": 5,
        "request_trailers": 6,
        "response_trailers": 7,
        "metadata_context": 8,
        "attributes": 9,
        "observability_mode": 10,
        "protocol_config": 11,
    },
    "ProcessingResponse": {
        "request_headers": 1,
        "response_headers": 2,
        "request_body": 3,
        "response_body": 4,
        "request_trailers": 5,
        "response_trailers": 6,
        "immediate_response": 7,
        "dynamic_metadata": 8,
        "mode_override": 9,
        "override_message_timeout": 10,
        "streamed_immediate_response": 11,
    },
    "ProtocolConfiguration": {
        "request_body_mode": 1,
        "response_body_mode": 2,
        "send_body_without_waiting_for_header_response": 3,
    },
    "HttpHeaders": {"headers": 1, "end_of_stream": 3},
    "HttpBody": {"body": 1, "end_of_stream": 2, "end_of_stream_without_message": 3, "grpc_message_compressed": 4},
    "HttpTrailers": {"trailers": 1},
    "HeadersResponse": {"response": 1},
    "BodyResponse": {"response": 1},
    "TrailersResponse": {"header_mutation": 1},
    "CommonResponse": {"status": 1, "header_mutation": 2, "body_mutation": 3, "trailers": 4, "clear_route_cache": 5},
    "ImmediateResponse": {"status": 1, "headers": 2, "body": 3, "grpc_status": 4, "details": 5},
    "StreamedImmediateResponse": {"headers_response": 1, "body_response": 2, "trailers_response": 3},
    "GrpcStatus": {"status": 1},
    "HttpStatus": {"code": 1},
    "HeaderMutation": {"set_headers": 1, "remove_headers": 2},
    "BodyMutation": {"body": 1, "clear_body": 2, "streamed_response": 3},
    "StreamedBodyResponse": {
        "body": 1,
        "end_of_stream": 2,
        "end_of_stream_without_message": 3,
        "grpc_message_compressed": 4,
    },
    "HeaderMap": {"headers": 1},
    "HeaderValue": {"key": 1, "value": 2, "raw_value": 3},
    "HeaderValueOption": {"header": 1, "append": 2, "append_action": 3, "keep_empty_value": 4},
    "Metadata": {"filter_metadata": 1},
    "ProcessingMode": {
        "request_header_mode": 1,
        "response_header_mode": 2,
        "request_body_mode": 3,
        "response_body_mode": 4,
        "request_trailer_mode": 5,
        "response_trailer_mode": 6,
    },
}
BODY_MODES = {"NONE": 0, "STREAMED": 1, "BUFFERED": 2, "BUFFERED_PARTIAL": 3, "FULL_DUPLEX_STREAMED": 4, "GRPC": 5}

MESSAGES: Mapping[str, Descriptor] = ext_proc_pb2.DESCRIPTOR.message_types_by_name


def test_table_covers_every_message() -> None:
    assert set(MESSAGES) == set(NUMBERS)


@pytest.mark.parametrize("message", sorted(NUMBERS))
def test_field_numbers_are_envoys(message: str) -> None:
    assert {field.name: field.number for field in MESSAGES[message].fields} == NUMBERS[message]


def test_enum_numbers_are_envoys() -> None:
    assert dict(ext_proc_pb2.ProcessingMode.BodySendMode.items()) == BODY_MODES
    assert dict(ext_proc_pb2.ProcessingMode.HeaderSendMode.items()) == {"DEFAULT": 0, "SEND": 1, "SKIP": 2}
    assert ext_proc_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD == 2
    assert ext_proc_pb2.CommonResponse.CONTINUE_AND_REPLACE == 1


def test_package_is_our_own() -> None:
    assert ext_proc_pb2.DESCRIPTOR.package == "waypost.extproc.v3"
    assert f"/{SERVICE}/{PROCESS}" == PROCESS_METHOD


def test_bytes_of_a_destination_answer() -> None:
    """The bytes, put together by hand: tag = number * 8 + wire type."""
    answer = ext_proc_pb2.ProcessingResponse()
    common = answer.request_headers.response
    common.clear_route_cache = True
    option = common.header_mutation.set_headers.add()
    option.header.key = "k"
    option.header.raw_value = b"v"
    option.append_action = ext_proc_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

    header = b"\x0a\x01k" + b"\x1a\x01v"
    set_header = b"\x0a" + bytes([len(header)]) + header + b"\x18\x02"
    mutation = b"\x0a" + bytes([len(set_header)]) + set_header
    inner = b"\x12" + bytes([len(mutation)]) + mutation + b"\x28\x01"
    outer = b"\x0a" + bytes([len(inner)]) + inner

    assert answer.SerializeToString() == b"\x0a" + bytes([len(outer)]) + outer


def test_unknown_fields_are_skipped() -> None:
    newer = b"\x62\x02\x08\x01" + b"\x50\x01"  # field 12, a message we do not know; then observability_mode

    assert ext_proc_pb2.ProcessingRequest.FromString(newer).observability_mode
