"""What a client is told when no attempt brought an answer: the brain's refusals and failures as error answers."""

from __future__ import annotations

from picker.core.events import FailureKind
from picker.core.values import Rejection
from picker.director import Failure
from picker.openai import errors
from picker.openai.errors import ApiError
from picker.openai.rejections import error_of


def verdict(result: Failure | Rejection, stored_id: str | None, *, attempts: int) -> ApiError:
    """The error for what a dispatch ended with. `stored_id` is the response the request builds upon."""
    if isinstance(result, Rejection):
        return error_of(result, stored_id=stored_id or "")
    retried = attempts > 1
    if result.kind is FailureKind.CONNECT:
        return errors.upstream_unreachable(retried=retried)
    if result.kind in (FailureKind.TIMEOUT, FailureKind.HUNG):
        return errors.upstream_timeout(retried=retried)
    return errors.upstream_reset(retried=retried)
