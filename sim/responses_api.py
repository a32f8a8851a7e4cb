"""The stateful Responses API and Anthropic's Messages API of the simulated engine: just enough of both.

A response lives in the engine that made it: ids are unknown everywhere else and after a restart.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from sim.answers import ApiError, Ask, Usage, bad_request, decode_as, encode_json
from sim.openai_api import Message
from sim.requests import FinishReason
from sim.tokens import chat_tokens

MAX_STORED_RESPONSES: Final = 1_024
Status = Literal["queued", "in_progress", "completed", "incomplete", "cancelled"]


class ResponsesBody(msgspec.Struct, frozen=True):
    """What is read of a Responses request."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    background: bool | None = None
    ignore_eos: bool | None = None


class MessagesBody(msgspec.Struct, frozen=True):
    """What is read of an Anthropic Messages request."""

    messages: list[Message]
    max_tokens: int
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None


_responses: Final = msgspec.json.Decoder(ResponsesBody).decode
_messages: Final = msgspec.json.Decoder(MessagesBody).decode


class StoredResponse:
    """One response and the conversation that led to it."""

    __slots__ = ("created", "history", "model", "on_cancel", "previous", "response_id", "result", "status")

    def __init__(self, *, model: str, created: int, previous: str | None, history: list[tuple[str, str]]) -> None:
        self.response_id = f"resp_{uuid.uuid4().hex}"
        self.model = model
        self.created = created
        self.previous = previous
        self.history = history
        self.status: Status = "in_progress"
        self.result: tuple[str, Usage] | None = None
        #: Ends the generation; None once there is nothing to end.
        self.on_cancel: Callable[[], None] | None = None

    def finish(self, text: str, reason: FinishReason, usage: Usage) -> None:
        """The answer is complete, or cut at its limit."""
        self.result = (text, usage)
        self.on_cancel = None
        self.status = "completed" if reason == "stop" else "incomplete"
        self.history = [*self.history, ("assistant", text)]

    def cancel(self) -> None:
        """Nothing more will come. Finished responses stay as they are."""
        if self.status in ("queued", "in_progress"):
            self.status = "cancelled"
        self.on_cancel = None

    def as_json(self) -> dict[str, Any]:
        """The response object."""
        shown: dict[str, Any] = {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "model": self.model,
            "output": [],
            "previous_response_id": self.previous,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": None,
        }
        if self.result is not None:
            text, usage = self.result
            shown["output"] = [self.item(text, "completed")]
            shown["usage"] = {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached or 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            }
        return shown

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        """The one output item; without text its content is still empty."""
        return {
            "id": "msg_" + self.response_id.removeprefix("resp_"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [_text_part(text)],
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponseStore:
    """The responses of one engine, at most ``MAX_STORED_RESPONSES``; the least recently used ones are forgotten."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    def get(self, response_id: str) -> StoredResponse | ApiError:
        """The response, or the engine's 404."""
        stored = self._stored.get(response_id)
        if stored is None:
            message = f"Response with id '{response_id}' not found."
            return ApiError(404, "invalid_request_error", message, "response_id")
        self._stored.move_to_end(response_id)
        return stored

    def add(self, stored: StoredResponse) -> None:
        """Keep a new response."""
        self._stored[stored.response_id] = stored
        while len(self._stored) > MAX_STORED_RESPONSES:
            self._stored.popitem(last=False)


class ResponsesAsk(msgspec.Struct, frozen=True):
    """A generation together with the response it will become."""

    ask: Ask
    stored: StoredResponse
    background: bool


def read_responses(body: bytes, store: ResponseStore, *, default_model: str, created: int) -> ResponsesAsk | ApiError:
    """A Responses request as a generation over the whole conversation. 404 for an unknown previous response."""
    wanted = decode_as(_responses, body)
    if isinstance(wanted, ApiError):
        return wanted
    if wanted.max_output_tokens is not None and wanted.max_output_tokens < 1:
        return bad_request("max_output_tokens must be at least 1.", "max_output_tokens")
    history: list[tuple[str, str]] = []
    if wanted.previous_response_id is not None:
        previous = store.get(wanted.previous_response_id)
        if isinstance(previous, ApiError):
            return previous
        history = list(previous.history)
    if wanted.instructions:
        history.append(("system", wanted.instructions))
    if isinstance(wanted.input, str):
        history.append(("user", wanted.input))
    else:
        history += [(str(item.get("role", "user")), _item_text(item)) for item in wanted.input]
    ask = Ask(
        tokens=chat_tokens(history),
        model=wanted.model,
        max_tokens=wanted.max_output_tokens,
        ignore_eos=bool(wanted.ignore_eos),
        stream=bool(wanted.stream),
    )
    stored = StoredResponse(
        model=wanted.model or default_model, created=created, previous=wanted.previous_response_id, history=history
    )
    return ResponsesAsk(ask, stored, bool(wanted.background))


def _item_text(item: dict[str, Any]) -> str:
    content = item.get("content", "")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


class ResponsesAnswer:
    """A response object, or its stream of typed events."""

    __slots__ = ("_sequence", "_stored", "_text")

    def __init__(self, stored: StoredResponse) -> None:
        self._stored = stored
        self._sequence = 0
        self._text: list[str] = []

    def opening(self) -> list[bytes]:
        shown = self._stored.as_json()
        item = self._stored.item(None, "in_progress")
        return [
            self._event("response.created", {"response": shown}),
            self._event("response.in_progress", {"response": shown}),
            self._event("response.output_item.added", {"output_index": 0, "item": item}),
            self._event("response.content_part.added", {**self._place(), "part": _text_part("")}),
        ]

    def piece(self, text: str, reason: FinishReason | None) -> list[bytes]:
        self._text.append(text)
        return [self._event("response.output_text.delta", {**self._place(), "delta": text, "logprobs": []})]

    def closing(self, text: str, reason: FinishReason, usage: Usage) -> list[bytes]:
        events = self.piece(text, reason)
        full = "".join(self._text)
        self._stored.finish(full, reason, usage)
        item = self._stored.item(full, "completed")
        last = "response.completed" if reason == "stop" else "response.incomplete"
        return [
            *events,
            self._event("response.output_text.done", {**self._place(), "text": full, "logprobs": []}),
            self._event("response.content_part.done", {**self._place(), "part": _text_part(full)}),
            self._event("response.output_item.done", {"output_index": 0, "item": item}),
            self._event(last, {"response": self._stored.as_json()}),
        ]

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        self._stored.finish(text, reason, usage)
        return encode_json(self._stored.as_json())

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._stored.item(None, "")["id"], "output_index": 0, "content_index": 0}

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        data = encode_json({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def read_messages(body: bytes) -> Ask | ApiError:
    """An Anthropic Messages request as a generation."""
    wanted = decode_as(_messages, body)
    if isinstance(wanted, ApiError):
        return wanted
    if wanted.max_tokens < 1:
        return bad_request("max_tokens must be at least 1.", "max_tokens")
    history = [(message.role, message.text()) for message in wanted.messages]
    if wanted.system:
        history.insert(0, ("system", _item_text({"content": wanted.system})))
    return Ask(
        tokens=chat_tokens(history),
        model=wanted.model,
        max_tokens=wanted.max_tokens,
        ignore_eos=bool(wanted.ignore_eos),
        stream=bool(wanted.stream),
    )


class MessagesAnswer:
    """An Anthropic message, whole or as its stream of events."""

    __slots__ = ("_id", "_model", "_prompt_tokens")

    def __init__(self, message_id: str, *, model: str, prompt_tokens: int) -> None:
        self._id = message_id
        self._model = model
        self._prompt_tokens = prompt_tokens

    def opening(self) -> list[bytes]:
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        block = {"type": "text", "text": ""}
        return [
            _anthropic_event("message_start", {"message": self._message([], None, usage)}),
            _anthropic_event("content_block_start", {"index": 0, "content_block": block}),
        ]

    def piece(self, text: str, reason: FinishReason | None) -> list[bytes]:
        delta = {"type": "text_delta", "text": text}
        return [_anthropic_event("content_block_delta", {"index": 0, "delta": delta})]

    def closing(self, text: str, reason: FinishReason, usage: Usage) -> list[bytes]:
        delta = {"stop_reason": _stop_reason(reason), "stop_sequence": None}
        return [
            *self.piece(text, reason),
            _anthropic_event("content_block_stop", {"index": 0}),
            _anthropic_event("message_delta", {"delta": delta, "usage": {"output_tokens": usage.completion}}),
            _anthropic_event("message_stop", {}),
        ]

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        counts = {"input_tokens": usage.prompt, "output_tokens": usage.completion}
        return encode_json(self._message([{"type": "text", "text": text}], _stop_reason(reason), counts))

    def _message(self, content: list[dict[str, str]], stop: str | None, usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._model,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": usage,
        }


def _stop_reason(reason: FinishReason) -> str:
    return "end_turn" if reason == "stop" else "max_tokens"


def _anthropic_event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **fields}))
