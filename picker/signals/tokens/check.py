"""Has an engine tokenise a few samples and compares: are our ids its ids?

The samples are texts of ours, so nothing of a client is in them and the outcome may be logged.
"""

from __future__ import annotations

from typing import Any

import msgspec

from picker.core.values import Endpoint
from picker.openai.routes import RouteKind
from picker.signals.tokens.canonical import canonical
from picker.signals.tokens.content import Ids, read_prompt
from picker.signals.tokens.local import LocalTokenizer
from picker.signals.tokens.remote import Asking, EngineTokens, Way

_USER = {"role": "user", "content": "Hello, how  are you?\n\n Fine\t1234567 – naïve 漢字 🎉"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}

SAMPLES: dict[str, tuple[RouteKind, dict[str, Any]]] = {
    "completion": (RouteKind.COMPLETIONS, {"prompt": " Once upon a time,\n\tthere was 漢字 é"}),
    "chat": (RouteKind.CHAT, {"messages": [_USER]}),
    "parts": (RouteKind.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}]}),
    "turns": (
        RouteKind.CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                _USER,
                {"role": "assistant", "content": "Well."},
                {"role": "user", "content": "And you?"},
            ]
        },
    ),
    "tools": (
        RouteKind.CHAT,
        {
            "tools": [_TOOL],
            "messages": [
                _USER,
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "call00001", "content": "Rain."},
            ],
        },
    ),
}


class Comparison(msgspec.Struct, frozen=True):
    """Names of samples by what came of them. In `unknown` one side had no answer."""

    same: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def verdict(self) -> bool | None:
        """For `Agreement.compared`; None when nothing could be compared."""
        return None if not self.same and not self.different else not self.different


async def compare(tokenizer: LocalTokenizer, engines: EngineTokens, endpoint: Endpoint, model: str) -> Comparison:
    """Asks the engine's /tokenize for every sample. Never raises."""
    found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for name, (kind, members) in SAMPLES.items():
        body = msgspec.json.encode({"model": model, **members})
        prompt = read_prompt(kind, body)
        assert prompt is not None
        assert not isinstance(prompt, Ids)
        ours = tokenizer.encode(prompt)
        asking = Asking(kind=kind, model=model, prompt=prompt, canonical=canonical(prompt), body=body)
        theirs = await engines.ask(endpoint, Way.TOKENIZE, asking)
        found[None if ours is None or theirs is None else ours == theirs].append(name)
    return Comparison(tuple(found[True]), tuple(found[False]), tuple(found[None]))
