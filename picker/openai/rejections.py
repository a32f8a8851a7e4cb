"""What a client is told when the brain chose nobody: one table for both doors."""

from __future__ import annotations

from picker.core.values import Rejection, RejectionCode
from picker.openai import errors
from picker.openai.errors import ApiError


def error_of(rejection: Rejection, *, stored_id: str) -> ApiError:
    """The error answer for a rejection. `stored_id` is the stored response the request asked for, if any."""
    match rejection.code:
        case RejectionCode.MODEL_NOT_FOUND:
            return errors.model_not_found(rejection.request.model or "")
        case RejectionCode.RESPONSE_GONE:
            return errors.response_gone(stored_id)
        case RejectionCode.SATURATED:
            return errors.saturated()
        case RejectionCode.NO_ENDPOINTS:
            return errors.no_endpoints()
        case RejectionCode.POOL_NOT_FOUND:
            return errors.pool_not_found()
        case RejectionCode.SUBSET_EMPTY:
            return errors.subset_empty()
        case RejectionCode.NO_READY_ENDPOINTS:
            return errors.no_ready_endpoints()
