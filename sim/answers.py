"""What every API of the simulated engine shares: what was asked, errors in vLLM's form, and the shape of an answer.

Values and formatting only; sockets and the physics are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec

from sim.requests import FinishReason
from sim.tokens import Tokens

encode_json = msgspec.json.Encoder().encode
T = TypeVar("T")


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One generation as the client asked for it. ``max_tokens`` None: up to the end of the context."""

    tokens: Tokens[int]
    model: str | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    stream: bool = False
    cache_salt: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one finished generation. ``cached`` is None when the engine does not tell it."""

    prompt: int
    completion: int
    cached: int | None

    def openai(self) -> dict[str, Any]:
        """As in chat completions and completions."""
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": None if self.cached is None else {"cached_tokens": self.cached},
        }


class ApiError(msgspec.Struct, frozen=True):
    """An error answer in vLLM's words. A refusal, not an exception."""

    status: int
    kind: str
    message: str
    param: str | None = None

    def body(self) -> bytes:
        """The JSON body of the OpenAI-style routes."""
        error: dict[str, Any] = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return encode_json({"error": error})

    def anthropic_body(self) -> bytes:
        """The JSON body of ``/v1/messages``."""
        kind = {400: "invalid_request_error", 404: "not_found_error", 503: "overloaded_error"}.get(self.status)
        return encode_json({"type": "error", "error": {"type": kind or "api_error", "message": self.message}})


class Overloaded(ApiError, frozen=True):
    """The refusal of a full queue: no ``param``, no Retry-After."""

    def body(self) -> bytes:
        """The three fields that vLLM sends here."""
        return encode_json({"error": {"message": self.message, "type": self.kind, "code": self.status}})


OVERLOADED = Overloaded(
    503, "Service Unavailable", "The engine is currently busy and cannot accept new requests. Please try again later."
)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400: a field has a value that cannot be served."""
    return ApiError(400, "BadRequestError", message, param)


def model_not_found(model: str) -> ApiError:
    """404: neither the base model nor an adapter has this name."""
    return ApiError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")


def decode_as(decode: Callable[[bytes], T], body: bytes) -> T | ApiError:
    """Decode a JSON body; a syntax error, a missing or a mistyped field becomes a 400."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        return ApiError(400, "Bad Request", str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return ApiError(400, "Bad Request", f"JSON decode error: {error}")


class Answer(Protocol):
    """How one generation is written down. Events are whole SSE events, each one HTTP chunk.

    ``opening`` comes with the first token, ``piece`` for every step that made text, ``closing`` at the end; ``whole``
    is the body when the client did not ask for a stream.
    """

    def opening(self) -> list[bytes]: ...

    def piece(self, text: str, reason: FinishReason | None) -> list[bytes]: ...

    def closing(self, text: str, reason: FinishReason, usage: Usage) -> list[bytes]: ...

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes: ...
