"""What a client is told when no attempt brought an answer: the brain's refusals and failures as error answers."""

from __future__ import annotations

from picker.core.events import FailureKind
from picker.core.values import Rejection, RejectionCode
from picker.director import Failure
from picker.openai import errors
from picker.openai.errors import ApiError


def verdict(result: Failure | Rejection, stored_id: str | None, *, attempts: int) -> ApiError:
    """The error for what a dispatch ended with. `stored_id` is the response the request builds upon."""
    if isinstance(result, Rejection):
        return _of_rejection(result, stored_id or "")
    retried = attempts > 1
    if result.kind is FailureKind.CONNECT:
        return errors.upstream_unreachable(retried=retried)
    if result.kind in (FailureKind.TIMEOUT, FailureKind.HUNG):
        return errors.upstream_timeout(retried=retried)
    return errors.upstream_reset(retried=retried)


def _of_rejection(rejection: Rejection, stored_id: str) -> ApiError:
    match rejection.code:
        case RejectionCode.MODEL_NOT_FOUND:
            return errors.model_not_found(rejection.request.model or "")
        case RejectionCode.RESPONSE_GONE:
            return errors.response_gone(stored_id)
        case RejectionCode.SATURATED:
            return errors.saturated()
        case RejectionCode.NO_ENDPOINTS:
            return errors.no_endpoints()
        case RejectionCode.SUBSET_EMPTY:
            return errors.subset_empty()
        case RejectionCode.NO_READY_ENDPOINTS:
            return errors.no_ready_endpoints()
