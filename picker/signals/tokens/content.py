"""The prompt inside a request body, in one of three forms whatever the API: token ids, plain text, or a conversation.

Decodes only members that belong to the prompt. Never raises on input; it refuses nothing either, since a body that
cannot be understood simply has no keys.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from picker.openai.routes import RouteKind

# About a million tokens. What is longer is not tokenised: it takes seconds, and nothing of it is in time.
MAX_TEXT_BYTES = 4 << 20


# No msgspec structs: their reprs show every field, and these fields are what must not be shown.
@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Ids:
    """A prompt given as token ids: u32, little-endian. `batch`: the first of several."""

    tokens: bytes
    batch: bool = False


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Text:
    """A prompt that is continued as it is. `exact` is False when the engine will not tokenise just this text.
    `batch`: the first of several.
    """

    text: str
    batch: bool = False
    add_special_tokens: bool = True
    exact: bool = True


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Chat:
    """A conversation, oldest message first, with what is put before it: system texts come as messages.

    `exact` is False when this is not the OpenAI chat form, or names a template or a truncation of its own. The other
    fields are arguments of chat templates.
    """

    messages: list[Any]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    exact: bool = True


Prompt = Ids | Text | Chat


class _Body(msgspec.Struct):
    """Of any type: a wrong one is the engine's to refuse."""

    messages: Any = None
    prompt: Any = None
    input: Any = None
    text: Any = None
    text_input: Any = None
    input_ids: Any = None
    token_ids: Any = None
    system: Any = None
    instructions: Any = None
    tools: Any = None
    documents: Any = None
    prompt_embeds: Any = None
    input_embeds: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    reasoning_effort: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    add_special_tokens: Any = None
    truncate_prompt_tokens: Any = None


_DECODE = msgspec.json.Decoder(_Body).decode


def read_prompt(kind: RouteKind, body: bytes) -> Prompt | None:
    """The prompt of a body for a route of that kind.

    None for kinds that reuse no prefix, for prompts the engine keeps under an id (only it knows how they begin), and
    for embeddings in place of text. Of a batch of prompts, the first.
    """
    read = _READERS.get(kind)
    if read is None:
        return None
    try:
        return read(_DECODE(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _chat(body: _Body) -> Prompt | None:
    if not isinstance(body.messages, list):
        return None
    kwargs = body.chat_template_kwargs if isinstance(body.chat_template_kwargs, dict) else None
    if body.reasoning_effort is not None:
        # vLLM hands it to the template like this.
        kwargs = {"reasoning_effort": body.reasoning_effort, **(kwargs or {})}
    return Chat(
        messages=body.messages,
        tools=_list(body.tools),
        documents=_list(body.documents),
        template_kwargs=kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message is True,
        add_special_tokens=body.add_special_tokens is True,
        exact=body.chat_template is None and body.truncate_prompt_tokens is None,
    )


def _messages(body: _Body) -> Prompt | None:
    if not isinstance(body.messages, list):
        return None
    return Chat(messages=_after(body.system, body.messages), tools=_list(body.tools), exact=False)


def _responses(body: _Body) -> Prompt | None:
    if body.previous_response_id is not None or body.conversation is not None:
        return None
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _list(body.input)
    if items is None:
        return None
    return Chat(messages=_after(body.instructions, items), tools=_list(body.tools), exact=False)


def _after(system: object, messages: list[Any]) -> list[Any]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _completion(body: _Body) -> Prompt | None:
    return None if body.prompt_embeds is not None else _text_or_ids(body, body.prompt)


def _generate(body: _Body) -> Prompt | None:
    if body.input_embeds is not None:
        return None
    members = (body.text, body.input_ids, body.prompt, body.text_input)
    return _text_or_ids(body, next((value for value in members if value is not None), None))


def _token_generate(body: _Body) -> Prompt | None:
    return _text_or_ids(body, body.token_ids)


def _text_or_ids(body: _Body, value: object) -> Prompt | None:
    batch = False
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        batch = len(value) > 1
        value = value[0]
    if isinstance(value, str):
        exact = body.truncate_prompt_tokens is None
        return Text(value, batch, add_special_tokens=body.add_special_tokens is not False, exact=exact)
    packed = pack_ids(value) if isinstance(value, list) else None
    return Ids(packed, batch) if packed else None


def pack_ids(ids: list[Any]) -> bytes | None:
    """Token ids as u32, little-endian; None when any of them is no such number."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        return None


def _list(value: object) -> list[Any] | None:
    return value if isinstance(value, list) and value else None


_READERS: dict[RouteKind, Callable[[_Body], Prompt | None]] = {
    RouteKind.CHAT: _chat,
    RouteKind.COMPLETIONS: _completion,
    RouteKind.RESPONSES: _responses,
    RouteKind.MESSAGES: _messages,
    RouteKind.TOKEN_GENERATE: _token_generate,
    RouteKind.NATIVE_GENERATE: _generate,
}
