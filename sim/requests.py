"""What goes into a simulated engine and what comes out: plain values, shared by the HTTP server and by replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from sim.tokens import Tokens

FinishReason = Literal["stop", "length"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation.

    The prompt is given as ``token_ids``, or as ``block_hashes`` and ``prompt_tokens``. A block hash names the content
    of a block *and of all blocks before it* (as in published traces), covers ``Profile.block_size`` tokens, and there
    are ``ceil(prompt_tokens / block_size)`` of them; the last one counts only when its block is full. Requests given
    by hashes produce counts without token ids, and their answers never enter the prefix cache.

    ``max_tokens`` 0 means prefill only (embeddings). ``every_token`` False asks for two emissions, the first token
    and the end, instead of one per step. ``arrived_at_s`` is where the waiting time and the TTFT are counted from.
    """

    id: str
    arrived_at_s: float
    max_tokens: int
    token_ids: Sequence[int] | None = None
    block_hashes: Sequence[int] = ()
    prompt_tokens: int = 0
    ignore_eos: bool = False
    lora: str | None = None
    cache_salt: str | None = None
    every_token: bool = True

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt, at least 1."""
        return max(1, len(self.token_ids) if self.token_ids is not None else self.prompt_tokens)


class Refused(msgspec.Struct, frozen=True):
    """Why ``Engine.submit`` did not take a request. ``overloaded``: the limit on queued requests; ``too_long``: it can
    never fit the context or the KV cache; ``duplicate``: the id is in use."""

    reason: Literal["overloaded", "too_long", "duplicate"]
    message: str


class Summary(msgspec.Struct, frozen=True):
    """How one finished request went. Times in seconds, sizes in tokens."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    preemptions: int


class Emission(msgspec.Struct, frozen=True):
    """What one step gave one request.

    ``count`` new tokens (``token_ids`` has them when the prompt was token ids), ``at_s`` the end of the step,
    ``since_last_s`` the time since the previous emission of this request, or since the arrival when ``first``.
    ``finish_reason`` and ``summary`` are set on the last emission of a request and only there.
    """

    request_id: str
    at_s: float
    since_last_s: float
    count: int
    token_ids: Tokens[int]
    first: bool
    finish_reason: FinishReason | None = None
    summary: Summary | None = None
