"""Chat templates as Hugging Face tokenizers carry them, filled in the way vLLM fills them.

Needs jinja2. The template comes from the operator's model directory and runs in jinja2's sandbox; what clients send are
only values for it. The contract of templates is that of `apply_chat_template` in transformers (environment, filters,
`continue_final_message`), the shape of messages that of vLLM's chat preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from picker.signals.tokens.content import Chat

_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking"))
_OWN_ARGUMENTS = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
_PROBE = "waypost-probe"
# Put behind the message to be continued to find where it ends. Templates look for this very text, so it is theirs.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class Unrenderable(Exception):
    """This conversation has no text known to be the engine's. Carries nothing of it."""


class ChatTemplate:
    """One compiled template. Safe to use from several threads."""

    __slots__ = ("_special", "_template", "_wraps_texts", "source")

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """`special_tokens` are values such as `bos_token` that templates refer to. Raises `jinja2.TemplateError` for a
        template that does not compile.
        """
        self.source = source
        self._template = _environment().from_string(source)
        self._special = dict(special_tokens)
        self._wraps_texts = self._takes_parts()

    def render(self, chat: Chat) -> str:
        """The text the engine tokenises. Raises Unrenderable."""
        if not chat.exact or (chat.continue_final_message and chat.add_generation_prompt):
            raise Unrenderable
        kwargs = {**self._special, **(chat.template_kwargs or {})}
        if not _OWN_ARGUMENTS.isdisjoint(kwargs):
            raise Unrenderable
        try:
            messages = [_message(message, wrap=self._wraps_texts) for message in chat.messages]
            if chat.continue_final_message:
                _mark_end(messages)
            text = self._template.render(
                messages=messages,
                tools=None if chat.tools is None else [_tool(tool) for tool in chat.tools],
                documents=chat.documents,
                add_generation_prompt=chat.add_generation_prompt,
                **kwargs,
            )
        except Exception:
            # A template may raise anything about any input, and its message may quote the prompt.
            raise Unrenderable from None
        return _cut_at_mark(text) if chat.continue_final_message else text

    def _takes_parts(self) -> bool:
        """Whether messages must come as lists of parts. vLLM reads it off the template's syntax, this tries it."""
        try:
            text = self._template.render(
                messages=[{"role": "user", "content": [{"type": "text", "text": _PROBE}]}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except Exception:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text


def _message(message: Any, *, wrap: bool) -> dict[str, Any]:
    role = message["role"]
    out: dict[str, Any] = {"role": role, "content": _content(message.get("content"), wrap=wrap)}
    if role == "assistant":
        if message.get("tool_calls"):
            out["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        reasoning = message.get("reasoning", message.get("reasoning_content"))
        if reasoning is not None:
            out["reasoning"] = out["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        out["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        out["tools"] = message.get("tools")
    if isinstance(message.get("name"), str):
        out["name"] = message["name"]
    return out


def _content(content: Any, *, wrap: bool) -> str | list[dict[str, str]]:
    parts = [content] if isinstance(content, str) else content or []
    texts = [_text(part) for part in parts]
    return [{"type": "text", "text": text} for text in texts] if wrap else "\n".join(texts)


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    # What media become is up to the engine's processor of this model.
    if part["type"] not in _TEXT_PARTS:
        raise Unrenderable
    text = part["thinking"] if part["type"] == "thinking" else part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise Unrenderable
    return text


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments come as JSON text; templates expect an object."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if not isinstance(arguments, dict | list):
        function["arguments"] = json.loads(arguments) if arguments else {}
    return {**call, "function": function}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as vLLM's schema writes it out: these members first and in this order, there or not."""
    function = tool["function"]
    known = {name: function.get(name) for name in ("name", "description", "parameters")}
    return {"type": tool.get("type", "function"), **tool, "function": {**known, **function}}


def _mark_end(messages: list[dict[str, Any]]) -> None:
    last = messages[-1]
    if isinstance(last["content"], str):
        last["content"] += _CONTINUE_MARK
    else:
        last["content"][-1]["text"] += _CONTINUE_MARK


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_MARK.rstrip())
    if at < 0:
        raise Unrenderable
    # Where the template has trimmed the mark, it would have trimmed the end of the message too.
    return text[:at] if text.startswith(_CONTINUE_MARK, at) else text[:at].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError


def _now(form: str) -> str:
    """Local time, as in the engines: run them and this in one time zone where a template prints the date."""
    return datetime.now().strftime(form)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model said, for training. Here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 - as the extension protocol has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
