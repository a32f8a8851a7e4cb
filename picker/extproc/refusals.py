"""Why an exchange ends with an answer of ours, and that answer.

Statuses, codes and shapes come from `picker.openai.errors`. An ext-proc picker never says 404 for a model: it does
not know what every engine serves, and a proxy in front may route the model elsewhere.
"""

from __future__ import annotations

import msgspec

from picker.core.events import FailureKind, Outcome
from picker.core.ledger import Eviction
from picker.core.values import Rejection, RejectionCode
from picker.extproc.headers import REQUEST_ID
from picker.extproc.messages import Immediate
from picker.openai import errors
from picker.openai.errors import ApiError
from picker.openai.parse import BadRequest
from picker.openai.rejections import error_of
from picker.openai.routes import match_suffix


class Refusal(msgspec.Struct, frozen=True):
    """The error, and how the books close if a decision was already made: a FailureKind blames the endpoint."""

    error: ApiError
    ending: Outcome | FailureKind = Outcome.REJECTED


def immediate(refusal: Refusal, path: str, request_id: str) -> Immediate:
    """The answer in the shape the client of this path reads."""
    error = refusal.error
    shown_id = (REQUEST_ID, request_id)
    return Immediate(
        status=error.status,
        headers=(*errors.error_headers(error), *((shown_id,) if request_id else ())),
        body=errors.render_error(error, dialect=match_suffix(path).dialect, request_id=request_id or None),
        details=f"waypost_{error.code}",
    )


def bad_request(bad: BadRequest) -> Refusal:
    """400: the body cannot be understood."""
    return Refusal(bad.error())


def body_too_long(limit_bytes: int) -> Refusal:
    """413: one body over its limit."""
    return Refusal(errors.request_too_large(limit_bytes))


def cannot_rewrite() -> Refusal:
    """400: a streamed body with trailers leaves no message that could carry the new body."""
    return Refusal(errors.bad_request("the model name of a streamed body with trailers cannot be rewritten"))


def rejected(rejection: Rejection) -> Refusal:
    """The director chose nobody."""
    if rejection.code is RejectionCode.MODEL_NOT_FOUND:
        # Behind a proxy there are routes we do not see, so this door never says that a model does not exist.
        return Refusal(errors.no_ready_endpoints())
    return Refusal(error_of(rejection, stored_id=rejection.request.pinned or ""))


def no_address() -> Refusal:
    """503: the chosen endpoint has no IP address yet, and a proxy needs one."""
    return Refusal(errors.no_ready_endpoints("the chosen endpoint has no known address"), Outcome.FAILED)


def overloaded(reason: str, retry_after_ms: int) -> Refusal:
    """429: the picker has no room for the exchange."""
    return Refusal(errors.saturated(reason, retry_after_ms=retry_after_ms))


def slow_client() -> Refusal:
    """408: the request body did not arrive within the deadline of the exchange."""
    message = "the request body did not arrive in time"
    return Refusal(ApiError(status=408, code="request_timeout", type="invalid_request_error", message=message))


def slow_decision() -> Refusal:
    """503: no decision within the deadline of the exchange."""
    return Refusal(errors.no_ready_endpoints("no endpoint was found in time"), Outcome.TIMEOUT)


def evicted(reason: Eviction) -> Refusal:
    """The brain gave the request up. A pod that hangs or is lost is worth another try at once; after a passed deadline
    the client decides.
    """
    if reason is Eviction.UNREACHABLE:
        lost = errors.upstream_unreachable("the model server is out of reach")
        return Refusal(msgspec.structs.replace(lost, status=503, should_retry=True), FailureKind.CONNECT)
    if reason is not Eviction.HUNG:
        return Refusal(errors.upstream_timeout(), FailureKind.TIMEOUT)
    hung = errors.no_ready_endpoints("the model server stopped working on this request")
    return Refusal(
        msgspec.structs.replace(hung, code="upstream_hung", should_retry=True, dropped_reason=None), FailureKind.HUNG
    )
