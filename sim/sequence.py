"""One request inside a simulated engine: how far it is computed, which blocks it holds, what it will say.

Owned and changed by ``sim.physics.Engine`` only. Pure: no clock, and its words follow from seed and prompt alone.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from sim.prefix import Stored, chain_keys, root_key
from sim.profiles import Profile
from sim.requests import FinishReason, Request
from sim.tokens import as_tokens, no_tokens, said

_SPEECH_RANGE: Final = (1 << 48) - 1


class Sequence:
    """The state of one request.

    ``known`` tokens exist (prompt and generated), ``computed`` of them have their KV; decoding means that all but the
    last are computed. ``blocks`` lists the held blocks in order; the first ``published`` of them are in the prefix
    cache under ``keys``. ``tokens`` has prompt and answer, or nothing when the prompt came as block hashes.
    """

    __slots__ = (
        "admitted",
        "admitted_at",
        "blocks",
        "burst",
        "cached",
        "computed",
        "emitted",
        "finish_reason",
        "first_at",
        "generated",
        "keys",
        "known",
        "last_at",
        "limit",
        "live",
        "planned",
        "preemptions",
        "prompt_tokens",
        "published",
        "request",
        "root",
        "speech_at",
        "started",
        "tokens",
    )

    def __init__(self, request: Request, *, profile: Profile, seed: int) -> None:
        size = profile.block_size
        self.request = request
        self.known = self.prompt_tokens = request.prompt_length
        self.root = root_key(request.lora, request.cache_salt)
        if request.token_ids is not None:
            # A copy: the answer is appended to it.
            self.tokens = as_tokens(request.token_ids)[:]
            self.keys = chain_keys(self.tokens, block_size=size, parent=self.root)
            content = (*self.keys[-1:], crc32(self.tokens[len(self.keys) * size :]))
        else:
            self.tokens = no_tokens()
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
        self.blocks: list[int] = []
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
        self.tokens += said(self.speech_at, count)
        self.speech_at += count
        if len(self.tokens) // block_size > len(self.keys):
            parent = self.keys[-1] if self.keys else self.root
            self.keys += chain_keys(self.tokens[len(self.keys) * block_size :], block_size=block_size, parent=parent)

    def stored(self, start: int, stop: int, block_size: int) -> Stored:
        """What the prefix cache gained when blocks ``start`` to ``stop`` of this sequence were published."""
        return Stored(
            keys=self.keys[start:stop],
            parent=self.keys[start - 1] if start else None,
            tokens=self.tokens[start * block_size : stop * block_size],
            lora=self.request.lora,
            cache_salt=self.request.cache_salt,
        )
