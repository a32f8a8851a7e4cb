"""What endpoints that tell nothing are believed to hold: the prompts routed there, forgotten as an engine would.

Per endpoint it keeps the keys of the rendered text's chunks by last use, as many as its cache is believed to have
room for. Responses correct the belief: an engine that had to compute a prefix anew has lost everything that was used
no later than that prefix, so what was used since is more than fits.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf

import msgspec

from picker.core.prefix.prompt import Match, PromptKeys
from picker.core.prefix.recent import Recent

# What an engine is believed to hold when it does not say: half a million tokens, the reference picker's 31,250 blocks
# of 16.
CAPACITY_TOKENS = 500_000
# A belief never falls below one long prompt, and never rises above twice what the engine declared: what an offloading
# engine adds in host memory is not known, and more is hardly worth a wrong route.
CAPACITY_MIN_TOKENS = 4096
CAPACITY_RATIO_MAX = 2.0
# One right answer about the older half of a full list raises the belief by this much; a wrong one lowers it to what was
# used since, and at least by this much, because some of that was used after the engine had looked.
CAPACITY_GROWTH = 1.02
CAPACITY_SHRINK = 0.95
# Routed less than this before, a prefix may still be being computed: that it was not there proves nothing.
SETTLED_S = 2.0
# A chunk is not a whole number of tokens, and engines reuse whole blocks.
TOLERANCE_CHUNKS = 2
TOLERANCE_RATIO = 0.1
# Prompts this short say little about how many tokens a chunk has.
RATIO_MIN_CHUNKS = 8
RATIO_GAIN = 0.1
# Expectations remembered per endpoint until the response tells: more than any engine runs at once.
EXPECTED_MAX = 1024
# More than is dropped at once when a list is too long: dropping must be faster than adding.
DROP_SPARE = 64


class Expectation(msgspec.Struct, frozen=True):
    """What was believed of one prompt when it was routed: so many chunks, the last of them unused since `used_at`."""

    chunks: int
    used_at: float
    routed_at: float


class Belief:
    """What one endpoint is believed to hold. `chunk_tokens` is what the first prompt said until responses tell."""

    __slots__ = (
        "_declared_tokens",
        "capacity_tokens",
        "chunk_tokens",
        "expected",
        "limit_chunks",
        "lost_until",
        "recent",
    )

    def __init__(self) -> None:
        self.recent = Recent()
        self.capacity_tokens = float(CAPACITY_TOKENS)
        self.chunk_tokens = 0.0
        self.expected: dict[int, Expectation] = {}
        self.limit_chunks = 0
        self.lost_until = -inf
        self._declared_tokens = 0

    def declare(self, tokens: int) -> None:
        """Takes the engine's word for its size. Said again, it does not undo what responses taught."""
        if tokens != self._declared_tokens:
            self._declared_tokens = tokens
            self.capacity_tokens = float(max(tokens, CAPACITY_MIN_TOKENS))

    def clear(self) -> None:
        """Another process is there now: it holds nothing."""
        self.recent.clear()
        self.expected.clear()
        self.lost_until = -inf

    def use(self, keys: PromptKeys, max_chunks: int, now: float) -> None:
        """A prompt was routed there; at most `max_chunks` are remembered."""
        chain = keys.learned
        chunks = self.recent.depth(chain)
        used_at = self.recent.used_at(chain[chunks - 1]) if chunks else None
        while len(self.expected) >= EXPECTED_MAX:
            del self.expected[next(iter(self.expected))]
        self.expected[chain[-1]] = Expectation(chunks, now if used_at is None else used_at, now)
        self.recent.touch(chain, now)
        self.chunk_tokens = self.chunk_tokens or keys.chunk_tokens
        self.trim(2 * len(chain) + DROP_SPARE, max_chunks)

    def trim(self, budget: int, max_chunks: int) -> None:
        """Forgets what does not fit, in there or in `max_chunks`, and what was lost; up to `budget` chunks each."""
        fits = int(self.capacity_tokens / self.chunk_tokens) if self.chunk_tokens else max_chunks
        self.limit_chunks = min(max_chunks, fits)
        self.recent.drop_oldest(min(budget, len(self.recent) - self.limit_chunks))
        if self.lost_until > -inf and self.recent.drop_until(self.lost_until, budget):
            self.lost_until = -inf
            kept_tokens = len(self.recent) * self.chunk_tokens
            believed_tokens = min(self.capacity_tokens * CAPACITY_SHRINK, kept_tokens)
            self.capacity_tokens = max(CAPACITY_MIN_TOKENS, believed_tokens)

    def learn(self, keys: PromptKeys, prompt_tokens: int, cached_tokens: int | None, now: float) -> None:
        """A response told how long the prompt was and how much of it was there."""
        tokens_per_chunk = keys.chunk_tokens * prompt_tokens / keys.tokens
        if len(keys.learned) >= RATIO_MIN_CHUNKS:
            self.chunk_tokens += RATIO_GAIN * (tokens_per_chunk - self.chunk_tokens)
        expected = self.expected.pop(keys.learned[-1], None)
        if cached_tokens is None or expected is None:
            return
        predicted = expected.chunks * tokens_per_chunk
        tolerance = TOLERANCE_CHUNKS * tokens_per_chunk + TOLERANCE_RATIO * predicted
        if cached_tokens < predicted - tolerance:
            if expected.routed_at - expected.used_at >= SETTLED_S:
                self.lost_until = max(self.lost_until, expected.used_at)
        elif len(self.recent) >= self.limit_chunks and (
            cached_tokens > predicted + tolerance or self._is_old(expected, now)
        ):
            self._grow()

    def _is_old(self, expected: Expectation, now: float) -> bool:
        """Whether the prefix was about to be forgotten: that it was there tells something about the size."""
        oldest = self.recent.oldest_at()
        return expected.chunks > 0 and oldest is not None and expected.used_at - oldest < (now - oldest) / 2

    def _grow(self) -> None:
        limit = CAPACITY_RATIO_MAX * (self._declared_tokens or CAPACITY_TOKENS)
        self.capacity_tokens = min(limit, self.capacity_tokens * CAPACITY_GROWTH)


class Learned:
    """The beliefs of all endpoints, by endpoint id. `max_chunks` bounds them together."""

    def __init__(self, max_chunks: int) -> None:
        self._max_chunks = max_chunks
        self._beliefs: dict[str, Belief] = {}

    def __len__(self) -> int:
        """Chunks remembered of all endpoints."""
        return sum(len(belief.recent) for belief in self._beliefs.values())

    def belief(self, endpoint_id: str) -> Belief | None:
        """What one endpoint is believed to hold, None when nothing was ever routed there or declared by it."""
        return self._beliefs.get(endpoint_id)

    def declare(self, endpoint_id: str, tokens: int) -> None:
        """The engine says that its cache has room for so many tokens."""
        self._of(endpoint_id).declare(tokens)

    def forget(self, endpoint_id: str) -> None:
        """The endpoint is gone."""
        self._beliefs.pop(endpoint_id, None)

    def clear(self) -> None:
        """Forgets what was routed anywhere; what was learnt of the endpoints' sizes stays."""
        for belief in self._beliefs.values():
            belief.clear()

    def restarted(self, endpoint_id: str) -> None:
        """The endpoint is another process now. How large its cache is and what a chunk has stays."""
        belief = self._beliefs.get(endpoint_id)
        if belief is not None:
            belief.clear()

    def lookup(self, keys: PromptKeys, known: Collection[str]) -> dict[str, Match]:
        """What each endpoint but the `known` is believed to hold of a prompt; those that hold nothing are left out."""
        chain = keys.learned
        most = max(0, keys.tokens - 1)
        found: dict[str, Match] = {}
        for endpoint_id, belief in self._beliefs.items():
            depth = 0 if endpoint_id in known else belief.recent.depth(chain)
            tokens = min(most, int(depth * keys.chunk_tokens))
            if tokens:
                found[endpoint_id] = Match(tokens)
        return found

    def routed(self, endpoint_id: str, keys: PromptKeys, now: float) -> None:
        """A prompt was routed there, and will be in its cache."""
        if keys.learned:
            belief = self._of(endpoint_id)
            belief.use(keys, self._max_chunks // len(self._beliefs), now)

    def observed(
        self, endpoint_id: str, keys: PromptKeys, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        """A response told; see `Belief.learn`."""
        belief = self._beliefs.get(endpoint_id)
        if belief is not None and keys.learned and keys.tokens > 0 and prompt_tokens > 0:
            belief.learn(keys, prompt_tokens, cached_tokens, now)

    def tick(self, budget: int) -> None:
        """Forgets what is too much or lost, up to `budget` chunks per endpoint."""
        for belief in self._beliefs.values():
            belief.trim(budget, self._max_chunks // len(self._beliefs))

    def _of(self, endpoint_id: str) -> Belief:
        belief = self._beliefs.get(endpoint_id)
        if belief is None:
            belief = self._beliefs[endpoint_id] = Belief()
        return belief
