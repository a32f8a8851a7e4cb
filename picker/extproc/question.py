"""From the head and the body of a request to what the scheduler wants to know, and to the body the engine shall get.

Pure. Refuses only what the contract wants refused; anything else is the engine's to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from picker.core.values import InferenceRequest
from picker.extproc import headers as names
from picker.openai.edit import EditError
from picker.openai.fleet import safe_request_id
from picker.openai.parse import BYTES_PER_TOKEN, BadRequest, ParsedBody, parse_body
from picker.openai.rewrite import rewrite_model
from picker.openai.routes import Route, RouteKind, match_suffix


class Meanings(Protocol):
    """What the names in requests stand for; the director knows."""

    @property
    def renames(self) -> bool:
        """Whether any model may have to be renamed."""

    def pool_named(self, text: str | None) -> str | None:
        """The pool of that name; None where there is no choice to make."""

    def target_model(self, model: str | None, pool: str | None) -> str | None:
        """What the engines call a model, None when it keeps its name. May draw, so it is asked once per request."""

    def priority(self, objective: str | None, model: str | None, pool: str | None) -> int:
        """The priority of a request by its objective or model."""


# Kinds whose APIs demand a model. Engines accept the others without one.
_NEEDS_MODEL = frozenset(
    (RouteKind.CHAT, RouteKind.COMPLETIONS, RouteKind.RESPONSES, RouteKind.MESSAGES, RouteKind.EMBEDDINGS)
)


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What the request headers told."""

    headers: Mapping[str, str]
    id: str
    path: str
    route: Route
    received_at: float

    @property
    def encoded(self) -> bool:
        """Whether the body is compressed, so that it cannot be read here."""
        return self.headers.get("content-encoding", "identity") not in ("", "identity")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What was read of a body. `body` is what the engine shall get; `target_model` None: under the name it came
    with.
    """

    model: str | None = None
    target_model: str | None = None
    parsed: ParsedBody | None = None
    body: bytes | None = None
    body_bytes: int = 0


def read_head(headers: Mapping[str, str], now: float, new_id: Callable[[], str]) -> Head:
    """The head of a request; `new_id` is asked when there is no id, or one that must not reach an engine."""
    path = names.first_of(headers, names.PATHS) or ""
    sent_id = headers.get(names.REQUEST_ID, "")
    return Head(
        headers=headers,
        id=sent_id if safe_request_id(sent_id) else new_id(),
        path=path,
        route=match_suffix(path),
        received_at=now,
    )


def read_nothing(head: Head) -> Question:
    """The question when the body is not known (yet): only a header can name a model."""
    return Question(target_model=names.first_of(head.headers, names.MODEL_REWRITE))


def read_body(head: Head, body: bytes, meanings: Meanings, pool: str | None) -> Question | BadRequest:
    """Reads a whole body and puts the target model into it, in place. A body that names no model has none renamed."""
    if head.encoded:
        return Question(body=body, body_bytes=len(body))
    wanted = names.first_of(head.headers, names.MODEL_REWRITE)
    require_model = head.route.kind in _NEEDS_MODEL and wanted is None
    kind = head.headers.get("content-type")
    parsed = parse_body(head.route, body, kind, strict=False, require_model=require_model)
    if isinstance(parsed, BadRequest):
        return parsed
    target = (meanings.target_model(parsed.model, pool) if parsed.model is not None else None) or wanted
    question = Question(model=parsed.model, parsed=parsed, body=body, body_bytes=len(body))
    if target is None or target == parsed.model or not (parsed.is_json or parsed.model_spans):
        return question
    try:
        return msgspec.structs.replace(question, target_model=target, body=rewrite_model(body, parsed, target))
    except EditError:
        return BadRequest("the model name in the body cannot be rewritten", param="model")


def read_part(head: Head, body: bytes) -> Question:
    """Reads what it can of a body that may be cut off; it is never changed."""
    parsed = None if head.encoded else parse_body(head.route, body, head.headers.get("content-type"), strict=False)
    if isinstance(parsed, ParsedBody):
        return Question(model=parsed.model, parsed=parsed, body=body, body_bytes=len(body))
    return Question(body=body, body_bytes=len(body))


def inference_request(
    head: Head,
    question: Question,
    meanings: Meanings,
    *,
    key: int,
    subset: tuple[str, ...] | None,
    pool: str | None,
    sees_body: bool,
) -> InferenceRequest:
    """The question in the scheduler's terms."""
    parsed = question.parsed
    objective = names.first_of(head.headers, names.OBJECTIVE)
    decodes = head.route.generates or head.route.kind is RouteKind.PASSTHROUGH
    limit = parsed.max_tokens if parsed is not None else None
    return InferenceRequest(
        key=key,
        id=head.id,
        received_at=head.received_at,
        path=head.path,
        model=question.model,
        target_model=question.target_model,
        stream=parsed is not None and parsed.stream,
        prompt_tokens=parsed.prompt_tokens_estimate
        if parsed is not None
        else -(-question.body_bytes // BYTES_PER_TOKEN),
        max_output_tokens=limit if decodes else 0,
        session=names.first_of(head.headers, names.SESSION) or (parsed.session_hint if parsed is not None else None),
        subset=None if subset is None else frozenset(subset),
        pool=pool,
        objective=objective,
        priority=meanings.priority(objective, question.model, pool),
        sees_body=sees_body,
    )
