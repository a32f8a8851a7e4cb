"""Protobuf messages of the proxy to the session's values, and the session's replies to protobuf messages.

Lenient on the way in: unknown fields, modes and messages are not errors. Values go out as `raw_value` with an explicit
overwrite, because the API's default would append.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.struct_pb2 import Struct

from picker.extproc import headers as names
from picker.extproc.messages import (
    NO_CONTEXT,
    BodyMode,
    BodyReply,
    Context,
    Direction,
    HeadersReply,
    Immediate,
    Modes,
    Mutation,
    ProxyMessage,
    Reply,
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

_OVERWRITE = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_BODY_MODES = {mode.value: mode for mode in BodyMode}
_STATUS_NAMES = (":status", "status")


def decode(message: pb.ProcessingRequest) -> ProxyMessage | None:
    """One message of the proxy; None for a kind this API version does not know."""
    context = _context(message)
    match message.WhichOneof("request"):
        case "request_headers":
            head = message.request_headers
            return RequestHeaders(_headers(head.headers), head.end_of_stream, context)
        case "request_body":
            return RequestBody(message.request_body.body, message.request_body.end_of_stream, context)
        case "request_trailers":
            return RequestTrailers(context)
        case "response_headers":
            head = message.response_headers
            headers = _headers(head.headers)
            return ResponseHeaders(_status(headers), headers, head.end_of_stream, context)
        case "response_body":
            return ResponseBody(message.response_body.body, message.response_body.end_of_stream, context)
        case "response_trailers":
            return ResponseTrailers(context)
        case _:
            return None


def _headers(mapped: pb.HeaderMap) -> dict[str, str]:
    """Lower-case names to values; the first of a repeated header, and `raw_value` before `value`."""
    found: dict[str, str] = {}
    for header in mapped.headers:
        raw = header.raw_value
        found.setdefault(header.key.lower(), raw.decode("utf-8", "replace") if raw else header.value)
    return found


def _status(headers: dict[str, str]) -> int:
    status = names.first_of(headers, _STATUS_NAMES) or ""
    return int(status) if status.isascii() and status.isdigit() and len(status) == 3 else 0


def _context(message: pb.ProcessingRequest) -> Context:
    has_config, has_metadata = message.HasField("protocol_config"), message.HasField("metadata_context")
    if not (has_config or has_metadata or message.observability_mode):
        return NO_CONTEXT
    subset: tuple[str, ...] | None = None
    pool = served = None
    if has_metadata:
        namespaces = message.metadata_context.filter_metadata
        # Reading an absent key of a protobuf map adds it, so look first.
        if names.SUBSET_NAMESPACE in namespaces:
            subset = _subset(namespaces[names.SUBSET_NAMESPACE])
        if names.LB_NAMESPACE in namespaces:
            balancing = namespaces[names.LB_NAMESPACE]
            pool, served = _text(balancing, names.POOL), _text(balancing, names.SERVED)
    modes = None
    if has_config:
        config = message.protocol_config
        modes = Modes(_mode(config.request_body_mode), _mode(config.response_body_mode))
    return Context(modes=modes, observability=message.observability_mode, subset=subset, pool=pool, served=served)


def _mode(number: int) -> BodyMode:
    return _BODY_MODES.get(number, BodyMode.FULL_DUPLEX_STREAMED)


def _subset(namespace: Struct) -> tuple[str, ...] | None:
    """The hint as a list or as one string; None when the key is absent, empty for any other shape: then nobody is
    named.
    """
    if names.SUBSET not in namespace.fields:
        return None
    value = namespace.fields[names.SUBSET]
    match value.WhichOneof("kind"):
        case "string_value":
            return names.subset_entries((value.string_value,))
        case "list_value":
            elements = value.list_value.values
            return names.subset_entries(
                element.string_value for element in elements if element.HasField("string_value")
            )
        case _:
            return ()


def _text(namespace: Struct, key: str) -> str | None:
    return (namespace.fields[key].string_value or None) if key in namespace.fields else None


def encode(reply: Reply) -> pb.ProcessingResponse:
    """One reply as the proxy reads it."""
    response = pb.ProcessingResponse()
    match reply:
        case HeadersReply():
            _encode_headers(reply, response)
        case StreamedBody():
            streamed = _body(response, reply.direction).response.body_mutation.streamed_response
            streamed.body = reply.chunk
            streamed.end_of_stream = reply.end_of_stream
        case BodyReply():
            _encode_body(reply, response)
        case TrailersReply():
            trailers = response.request_trailers if _is_request(reply.direction) else response.response_trailers
            trailers.SetInParent()
            _put_metadata(response, Mutation(destination=reply.destination))
        case Immediate():
            immediate = response.immediate_response
            immediate.status.code = reply.status
            _put_headers(immediate.headers, reply.headers)
            immediate.body = reply.body
            immediate.details = reply.details
    return response


def _is_request(direction: Direction) -> bool:
    return direction is Direction.REQUEST


def _body(response: pb.ProcessingResponse, direction: Direction) -> pb.BodyResponse:
    return response.request_body if _is_request(direction) else response.response_body


def _encode_headers(reply: HeadersReply, response: pb.ProcessingResponse) -> None:
    head = response.request_headers if _is_request(reply.direction) else response.response_headers
    head.response.SetInParent()
    _put_mutation(head.response, reply.mutation)
    _put_metadata(response, reply.mutation)


def _encode_body(reply: BodyReply, response: pb.ProcessingResponse) -> None:
    common = _body(response, reply.direction).response
    common.SetInParent()
    if reply.body is not None:
        if reply.body:
            common.body_mutation.body = reply.body
        else:
            common.body_mutation.clear_body = True
    _put_mutation(common, reply.mutation)
    _put_metadata(response, reply.mutation)


def _put_mutation(common: pb.CommonResponse, mutation: Mutation) -> None:
    if mutation.set_headers:
        _put_headers(common.header_mutation, mutation.set_headers)
    if mutation.remove_headers:
        common.header_mutation.remove_headers.extend(mutation.remove_headers)
    if mutation.destination is not None:
        common.clear_route_cache = True


def _put_headers(mutation: pb.HeaderMutation, headers: Iterable[tuple[str, str]]) -> None:
    for name, value in headers:
        option = mutation.set_headers.add()
        option.append_action = _OVERWRITE
        option.header.key = name
        option.header.raw_value = value.encode("utf-8", "replace")


def _put_metadata(response: pb.ProcessingResponse, mutation: Mutation) -> None:
    if mutation.destination is None:
        return
    fields = response.dynamic_metadata.fields[names.LB_NAMESPACE].struct_value.fields
    fields[names.DESTINATION].string_value = mutation.destination
    if mutation.scores:
        scores = fields[names.SCORES].struct_value.fields
        for address, score in mutation.scores:
            scores[address].number_value = score
