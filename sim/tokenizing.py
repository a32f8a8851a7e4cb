"""Text to token ids and back: ``/tokenize``, ``/detokenize`` and the ``/render`` routes, in vLLM's form.

What they answer is what a generation with the same fields would compute and cache.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec

from sim.answers import ApiError, Ask, bad_request, decode_as, encode_json, model_not_found
from sim.openai_api import ChatBody, decode_chat, read_chat, read_completion
from sim.tokens import TOKEN_LIMIT, as_tokens, decode, encode


class TokenizeBody(msgspec.Struct, frozen=True):
    """What is read of a tokenise request with a prompt; one with messages is read as a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None


class DetokenizeBody(msgspec.Struct, frozen=True):
    """What is read of a detokenise request."""

    tokens: list[int]
    model: str | None = None


class Renderer(Protocol):
    """What the two render routes call."""

    def __call__(
        self, body: bytes, request_id: str, *, models: frozenset[str], default_model: str
    ) -> bytes | ApiError: ...


_tokenize: Final = msgspec.json.Decoder(TokenizeBody).decode
_detokenize: Final = msgspec.json.Decoder(DetokenizeBody).decode


def tokenize(body: bytes, *, models: frozenset[str], max_model_len: int) -> bytes | ApiError:
    """The answer of ``/tokenize``, for a prompt or a chat. 404 for a model that is not in ``models``."""
    wanted: TokenizeBody | ChatBody | ApiError = decode_as(_tokenize, body)
    if isinstance(wanted, TokenizeBody) and wanted.messages is not None:
        wanted = decode_as(decode_chat, body)
    if isinstance(wanted, ApiError):
        return wanted
    if wanted.model is not None and wanted.model not in models:
        return model_not_found(wanted.model)
    if isinstance(wanted, ChatBody):
        tokens = wanted.prompt()
    elif wanted.prompt is not None:
        tokens = encode(wanted.prompt)
    else:
        return bad_request("prompt or messages is needed.", "prompt")
    return encode_json(
        {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens.tolist(), "token_strs": None}
    )


def detokenize(body: bytes) -> bytes | ApiError:
    """The answer of ``/detokenize``."""
    wanted = decode_as(_detokenize, body)
    if isinstance(wanted, ApiError):
        return wanted
    if any(not 0 <= token < TOKEN_LIMIT for token in wanted.tokens):
        return bad_request("token ids must be in the vocabulary.", "tokens")
    return encode_json({"prompt": decode(as_tokens(wanted.tokens))})


def render_chat(body: bytes, request_id: str, *, models: frozenset[str], default_model: str) -> bytes | ApiError:
    """The answer of ``/v1/chat/completions/render``: one prepared request."""
    rendered = _rendered(read_chat(body), request_id, models, default_model)
    return rendered if isinstance(rendered, ApiError) else encode_json(rendered)


def render_completion(body: bytes, request_id: str, *, models: frozenset[str], default_model: str) -> bytes | ApiError:
    """The answer of ``/v1/completions/render``: a list with the prepared request."""
    rendered = _rendered(read_completion(body), request_id, models, default_model)
    return rendered if isinstance(rendered, ApiError) else encode_json([rendered])


def _rendered(
    read: tuple[Ask, bool] | ApiError, request_id: str, models: frozenset[str], default_model: str
) -> dict[str, Any] | ApiError:
    if isinstance(read, ApiError):
        return read
    ask, _ = read
    if ask.model is not None and ask.model not in models:
        return model_not_found(ask.model)
    return {
        "request_id": request_id,
        "token_ids": ask.tokens.tolist(),
        "features": None,
        "sampling_params": {"max_tokens": ask.max_tokens, "ignore_eos": ask.ignore_eos},
        "model": ask.model or default_model,
        "stream": ask.stream,
        "cache_salt": ask.cache_salt,
        "priority": 0,
        "kv_transfer_params": None,
    }
