"""One byte text per prompt, such that the next turn of a conversation continues the text of the turn before.

This is our own text, not what an engine reads: it only has to be the same for the same prompt, and to diverge where
prompts diverge. No tokenizer, no template. Never raises on what JSON can hold.
"""

from __future__ import annotations

from typing import Any

import msgspec
from xxhash import xxh3_128_hexdigest

from picker.signals.tokens.content import Chat, Ids, Prompt, Text

# Bytes that UTF-8 never contains: no client can imitate the structure in a text. Nothing is closed, so that a message
# that is continued, or followed by another, extends the text.
_MESSAGE = b"\xff"
_CONTENT = b"\xfe"
_MEMBER = b"\xfd"
_MEDIA = b"\xfc"
_TOOLS = b"\xfb"

_SYSTEM_ROLES = ("system", "developer")
_MEDIA_TYPES = ("image", "audio", "video", "file", "document")
# Marks where a provider should cache; clients move it from turn to turn.
_IGNORED = frozenset(("role", "content", "type", "cache_control"))

_json = msgspec.json.Encoder().encode


def canonical(prompt: Prompt) -> bytes:
    """The byte text of a prompt. Texts and ids are themselves; a conversation begins with its system messages and
    its tools, where most chat templates put them.
    """
    if isinstance(prompt, Ids):
        return prompt.tokens
    if isinstance(prompt, Text):
        return prompt.text.encode()
    return _conversation(prompt)


def holds_media(text: bytes) -> bool:
    """Whether the conversation with this canonical text has images or other media in it."""
    return _MEDIA in text


def _conversation(chat: Chat) -> bytes:
    out: list[bytes] = []
    messages = chat.messages
    first = 0
    while first < len(messages) and _role(messages[first]) in _SYSTEM_ROLES:
        _message(messages[first], out)
        first += 1
    if chat.tools is not None:
        out += (_TOOLS, _json(chat.tools))
    for message in messages[first:]:
        _message(message, out)
    return b"".join(out)


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None


def _message(message: object, out: list[bytes]) -> None:
    """A message, or an item of a Responses input that has a type instead of a role."""
    out.append(_MESSAGE)
    if not isinstance(message, dict):
        out.append(_json(message))
        return
    role = message.get("role") or message.get("type")
    out += (role.encode() if isinstance(role, str) else _json(role), _CONTENT)
    _content(message.get("content"), out)
    for name in sorted(message.keys() - _IGNORED):
        value = message[name]
        if value is not None:
            out += (_MEMBER, name.encode(), _CONTENT)
            _content(value, out)


def _content(content: Any, out: list[bytes]) -> None:
    """A text, or parts of which texts are joined as vLLM joins them; media count by a digest."""
    if isinstance(content, str):
        out.append(content.encode())
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if index:
                out.append(b"\n")
            _part(part, out)
    elif content is not None:
        out.append(_json(content))


def _part(part: Any, out: list[bytes]) -> None:
    if isinstance(part, str):
        out.append(part.encode())
        return
    if not isinstance(part, dict):
        out.append(_json(part))
        return
    kind = part.get("type")
    kind = kind if isinstance(kind, str) else ""
    text = part.get("text")
    if any(name in kind for name in _MEDIA_TYPES):
        out += (_MEDIA, kind.encode(), _CONTENT, xxh3_128_hexdigest(_json(_lasting(part))).encode())
    elif isinstance(text, str):
        out.append(text.encode())
    elif kind == "tool_result":
        out += (_MEMBER, _json(part.get("tool_use_id")), _CONTENT)
        _content(part.get("content"), out)
    else:
        out.append(_json(_lasting(part)))


def _lasting(part: dict[str, Any]) -> dict[str, Any]:
    """Without the mark that moves."""
    return {name: value for name, value in part.items() if name != "cache_control"} if "cache_control" in part else part
