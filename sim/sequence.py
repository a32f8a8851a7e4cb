"""One request inside a simulated engine: how far it is computed, which blocks it holds, what it will say.

Owned and changed by ``sim.physics.Engine`` only. Pure: no clock, and its words follow from seed and prompt alone.
"""

from __future__ import annotations

from typing import Final

from sim.prefix import block_key, chain_keys
from sim.profiles import Profile
from sim.requests import FinishReason, Request
from sim.tokens import as_tokens, no_tokens, said

_KEY_RANGE: Final = (1 << 63) - 1
_SPEECH_RANGE: Final = (1 << 48) - 1


def _text_key(text: str) -> int:
    """A key of a short text that is equal in every process (``hash`` of a str is not)."""
    return int.from_bytes(text.encode(), "big") % _KEY_RANGE


class Sequence:
    """The state of one request.

    ``known`` tokens exist (prompt and generated), ``computed`` of them have their KV; decoding means that all but the
    last are computed. ``held`` lists the blocks in order: a content key, or None for a private block.
    """

    __slots__ = (
        "admitted",
        "admitted_at",
        "burst",
        "cached",
        "computed",
        "emitted",
        "finish_reason",
        "first_at",
        "generated",
        "held",
        "keys",
        "known",
        "last_at",
        "limit",
        "live",
        "output",
        "planned",
        "preemptions",
        "prompt_tokens",
        "published",
        "request",
        "root",
        "speech_at",
        "started",
        "tail",
    )

    def __init__(self, request: Request, *, profile: Profile, seed: int) -> None:
        size = profile.block_size
        self.request = request
        self.known = self.prompt_tokens = request.prompt_length
        self.root = hash((_text_key(request.lora or ""), _text_key(request.cache_salt or "")))
        self.tail = self.output = no_tokens()
        if request.token_ids is not None:
            tokens = as_tokens(request.token_ids)
            self.keys = chain_keys(tokens, block_size=size, root=self.root)
            self.tail = tokens[len(self.keys) * size :]
            self.output = no_tokens()
            content = (*self.keys[-1:], block_key(self.root, self.tail.tobytes()))
        else:
            full = min(len(request.block_hashes), self.known // size)
            self.keys = [hash((self.root, block)) for block in request.block_hashes[:full]]
            content = (self.known, *self.keys[-1:])
        # Where in the common speech the answer begins, and how long it would be.
        self.speech_at = hash((seed, self.root, content)) & _SPEECH_RANGE
        natural = profile.natural_tokens // 2 + 1 + (self.speech_at >> 16) % max(1, profile.natural_tokens)
        stops = not request.ignore_eos and natural <= request.max_tokens
        self.limit = natural if stops else request.max_tokens
        self.finish_reason: FinishReason = "stop" if stops or request.max_tokens == 0 else "length"
        self.computed = self.generated = self.emitted = self.cached = 0
        self.planned = self.burst = self.published = self.preemptions = 0
        self.held: list[int | None] = []
        self.live = True
        self.admitted = self.started = False
        self.admitted_at = self.first_at = request.arrived_at_s
        self.last_at = request.arrived_at_s

    @property
    def decoding(self) -> bool:
        """The next step gives a token without any prefill."""
        return self.generated > 0 and self.known - self.computed == 1

    def generate(self, count: int, block_size: int) -> None:
        """Append ``count`` generated tokens; full blocks of them get content keys like any prompt."""
        self.generated += count
        self.known += count
        if self.request.token_ids is None:
            return
        words = said(self.speech_at, count)
        self.speech_at += count
        self.output += words
        self.tail += words
        while len(self.tail) >= block_size:
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(block_key(parent, self.tail[:block_size].tobytes()))
            del self.tail[:block_size]
