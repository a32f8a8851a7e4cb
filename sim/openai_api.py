"""Chat completions, completions and embeddings: bodies in, bodies out, in vLLM's form.

Decodes only the fields the simulation needs; unknown ones are ignored, as the engine does.
"""

from __future__ import annotations

import base64
import random
import struct
from typing import Any, Final

import msgspec

from sim.answers import ApiError, Ask, Usage, bad_request, decode_as, encode_json
from sim.requests import FinishReason
from sim.tokens import Tokens, as_tokens, chat_tokens, encode, no_tokens

EMBEDDING_SIZE: Final = 64
_DONE: Final = b"data: [DONE]\n\n"


class StreamOptions(msgspec.Struct, frozen=True):
    """``stream_options`` of a request."""

    include_usage: bool | None = None


class Message(msgspec.Struct, frozen=True):
    """One chat message; parts without text (images, audio) count as nothing."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content or ())


class _Common(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    cache_salt: str | None = None

    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def ask(self, tokens: Tokens[int], max_tokens: int | None) -> Ask | ApiError:
        if self.n is not None and self.n != 1:
            return bad_request("This simulated engine makes one choice per request: n must be 1.", "n")
        if max_tokens is not None and max_tokens < 1:
            return bad_request(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
        return Ask(
            tokens=tokens,
            model=self.model,
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
            stream=bool(self.stream),
            cache_salt=self.cache_salt,
        )


class ChatBody(_Common, frozen=True, kw_only=True):
    """What is read of a chat completion request."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    def prompt(self) -> Tokens[int]:
        """The tokens that the chat template makes of it. Tools and template arguments change them."""
        given = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        settings = {name: value for name, value in given.items() if value}
        return chat_tokens(
            ((message.role, message.text()) for message in self.messages),
            settings=encode_json(settings).decode() if settings else "",
            add_generation_prompt=self.add_generation_prompt,
        )


# msgspec cannot tell list[str] from list[int] in one union, so prompts are read loosely and checked by ``_prompts``.
class CompletionBody(_Common, frozen=True, kw_only=True):
    """What is read of a completion request. ``prompt``: a text, token ids, or a list of one of these."""

    prompt: str | list[Any]


class EmbeddingBody(msgspec.Struct, frozen=True):
    """What is read of an embedding request. ``input``: a text, token ids, or a list of either."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: str | None = None


decode_chat: Final = msgspec.json.Decoder(ChatBody).decode
_completion: Final = msgspec.json.Decoder(CompletionBody).decode
_embedding: Final = msgspec.json.Decoder(EmbeddingBody).decode


def read_chat(body: bytes) -> tuple[Ask, bool] | ApiError:
    """A chat request and whether it wants usage in the stream."""
    chat = decode_as(decode_chat, body)
    if isinstance(chat, ApiError):
        return chat
    limit = chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
    ask = chat.ask(chat.prompt(), limit)
    return ask if isinstance(ask, ApiError) else (ask, chat.include_usage())


def read_completion(body: bytes) -> tuple[Ask, bool] | ApiError:
    """A completion request and whether it wants usage in the stream. One prompt per request."""
    completion = decode_as(_completion, body)
    if isinstance(completion, ApiError):
        return completion
    prompts = _prompts(completion.prompt)
    if prompts is None or len(prompts) != 1:
        return bad_request("prompt must be one text or one list of token ids.", "prompt")
    limit = 16 if completion.max_tokens is None else completion.max_tokens
    ask = completion.ask(prompts[0], limit)
    return ask if isinstance(ask, ApiError) else (ask, completion.include_usage())


def _prompts(value: str | list[Any]) -> list[Tokens[int]] | None:
    """Tokens of a text, several texts, one list of ids or several; None when it is none of these."""
    if isinstance(value, str):
        return [encode(value)]
    try:
        if set(map(type, value)) == {int}:
            return [as_tokens(value)]
        return [encode(item) if isinstance(item, str) else as_tokens(item) for item in value]
    except (OverflowError, TypeError):
        return None


class ChatAnswer:
    """A chat completion, whole or as chunks. The fixed part of a chunk is made once per request."""

    __slots__ = ("_created", "_id", "_include_usage", "_model", "_start")

    def __init__(self, response_id: str, *, model: str, created: int, include_usage: bool) -> None:
        self._id = response_id
        self._model = model
        self._created = created
        self._include_usage = include_usage
        self._start = _event_start(response_id, "chat.completion.chunk", created, model)

    def opening(self) -> list[bytes]:
        choice = (
            b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        )
        return [self._start + choice + b"}\n\n"]

    def piece(self, text: str, reason: FinishReason | None) -> list[bytes]:
        # Generated words need no JSON escapes.
        return [
            b'%b"choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b,"token_ids":null}]}\n\n'
            % (self._start, text.encode(), _quoted(reason))
        ]

    def closing(self, text: str, reason: FinishReason, usage: Usage) -> list[bytes]:
        return _with_usage(self.piece(text, reason), self._start, usage if self._include_usage else None)

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "tool_calls": [],
            "reasoning": None,
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        return _whole(self._id, "chat.completion", self._created, self._model, choice, usage)


class CompletionAnswer:
    """A text completion, whole or as chunks."""

    __slots__ = ("_created", "_id", "_include_usage", "_model", "_start")

    def __init__(self, response_id: str, *, model: str, created: int, include_usage: bool) -> None:
        self._id = response_id
        self._model = model
        self._created = created
        self._include_usage = include_usage
        self._start = _event_start(response_id, "text_completion", created, model)

    def opening(self) -> list[bytes]:
        return []

    def piece(self, text: str, reason: FinishReason | None) -> list[bytes]:
        return [
            b'%b"choices":[{"index":0,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":null}]}\n\n'
            % (self._start, text.encode(), _quoted(reason))
        ]

    def closing(self, text: str, reason: FinishReason, usage: Usage) -> list[bytes]:
        return _with_usage(self.piece(text, reason), self._start, usage if self._include_usage else None)

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        return _whole(self._id, "text_completion", self._created, self._model, choice, usage)


def _event_start(response_id: str, kind: str, created: int, model: str) -> bytes:
    head = {"id": response_id, "object": kind, "created": created, "model": model}
    return b"data: " + encode_json(head)[:-1] + b","


def _quoted(reason: FinishReason | None) -> bytes:
    return b"null" if reason is None else b'"%b"' % reason.encode()


def _with_usage(events: list[bytes], start: bytes, usage: Usage | None) -> list[bytes]:
    if usage is not None:
        events.append(start + b'"choices":[],"usage":' + encode_json(usage.openai()) + b"}\n\n")
    events.append(_DONE)
    return events


def _whole(response_id: str, kind: str, created: int, model: str, choice: dict[str, Any], usage: Usage) -> bytes:
    return encode_json(
        {
            "id": response_id,
            "object": kind,
            "created": created,
            "model": model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage.openai(),
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        }
    )


class EmbeddingAnswer:
    """Embeddings: one unit-free vector per input, drawn from the input's tokens."""

    __slots__ = ("_base64", "_id", "_inputs", "_model")

    def __init__(self, response_id: str, *, model: str, inputs: list[Tokens[int]], as_base64: bool) -> None:
        self._id = response_id
        self._model = model
        self._inputs = inputs
        self._base64 = as_base64

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector(tokens)}
            for index, tokens in enumerate(self._inputs)
        ]
        counts = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt, "completion_tokens": 0}
        return encode_json({"id": self._id, "object": "list", "model": self._model, "data": data, "usage": counts})

    def opening(self) -> list[bytes]:
        return []

    def piece(self, text: str, reason: FinishReason | None) -> list[bytes]:
        return []

    def closing(self, text: str, reason: FinishReason, usage: Usage) -> list[bytes]:
        return []

    def _vector(self, tokens: Tokens[int]) -> list[float] | str:
        rng = random.Random(hash(tuple(tokens)))
        vector = [round(rng.uniform(-1, 1), 6) for _ in range(EMBEDDING_SIZE)]
        if not self._base64:
            return vector
        return base64.b64encode(struct.pack(f"<{EMBEDDING_SIZE}f", *vector)).decode()


def read_embedding(body: bytes) -> tuple[Ask, list[Tokens[int]], bool] | ApiError:
    """An embedding request as one prefill over all inputs, the inputs, and whether vectors go out as base64."""
    embedding = decode_as(_embedding, body)
    if isinstance(embedding, ApiError):
        return embedding
    inputs = _prompts(embedding.input)
    if not inputs:
        return bad_request("input must be text or token ids.", "input")
    joined = no_tokens()
    for tokens in inputs:
        joined += tokens
    return Ask(tokens=joined, model=embedding.model, max_tokens=0), inputs, embedding.encoding_format == "base64"
