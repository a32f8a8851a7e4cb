"""What both doors call: from a request body to the keys of its prompt.

Byte keys are made at once. Exact keys need token ids: from the request itself, from a tokenizer on this machine, or
from an engine, in this order, and only within the time the caller gives. What is late finishes behind and is there for
the next turn. Nothing here raises on input.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from functools import partial

import msgspec

from picker.core.prefix.keys import TOKEN_BYTES, Namespace, byte_root, chain, token_root
from picker.core.prefix.prompt import PromptKeys
from picker.openai.parse import BYTES_PER_TOKEN, ParsedBody
from picker.signals.tokens.agreement import Agreement
from picker.signals.tokens.canonical import canonical, holds_media
from picker.signals.tokens.content import Chat, Ids, Prompt, read_prompt
from picker.signals.tokens.local import LocalTokenizer
from picker.signals.tokens.remote import Asking, EngineTokens
from picker.signals.tokens.workers import Workers

# About 64 tokens, as coarse as engines' blocks get: what a chunk may miss at the end of a match is a few milliseconds
# of prefill. Half of it would double the keys a long prompt costs on the event loop and in memory.
CHUNK_BYTES = 256
# Where a prompt is cut for the index: 262,144 tokens in blocks of 16. More keys than that stall the loop for longer
# than they could save.
MAX_KEYS = 16_384
# Each takes in some megabytes of new text per second; the event loop wants a core too.
THREADS = 2
# Behind so many prompts nothing is ready within a budget of milliseconds.
WAITING = 8

_LEAST_BUDGET_S = 0.005
_MOST_BUDGET_S = 0.050
_BUDGET_SHARE = 0.1


class ReadCounts(msgspec.Struct):
    """What became of prompts that might have had exact keys, since the start. `given`, `tokenizer` and `engine` ones
    have them; `late` ones were not ready in time, `declined` ones never begun because too much was under way or no
    engine could be asked, `unknown` ones have no ids that can be known here.
    """

    given: int = 0
    tokenizer: int = 0
    engine: int = 0
    late: int = 0
    declined: int = 0
    unknown: int = 0


def token_budget_s(prefill_s: float) -> float:
    """How long waiting for exact keys may take when prefilling the prompt anew is predicted to take `prefill_s`."""
    return min(_MOST_BUDGET_S, max(_LEAST_BUDGET_S, _BUDGET_SHARE * prefill_s))


class PromptReader:
    """Reads prompts. Belongs to one event loop; `close` it.

    `tokenizers` are by the name engines know a model by, adapters included. `secret` is the fleet's, so that replicas
    agree on keys. `agreement` may switch exact keys of a model off.
    """

    __slots__ = ("_agreement", "_engines", "_secret", "_tokenizers", "_workers", "counts")

    def __init__(
        self,
        secret: bytes,
        *,
        tokenizers: Mapping[str, LocalTokenizer] | None = None,
        engines: EngineTokens | None = None,
        agreement: Agreement | None = None,
        threads: int = THREADS,
    ) -> None:
        self._secret = secret
        self._tokenizers = dict(tokenizers or {})
        self._engines = engines
        self._agreement = agreement
        self._workers = Workers(threads, WAITING)
        self.counts = ReadCounts()

    def __repr__(self) -> str:
        return f"<PromptReader {sorted(self._tokenizers)} {self._workers!r} {self._engines!r}>"

    @property
    def pending(self) -> int:
        """Prompts in the hands of local tokenizers, waiting ones included."""
        return self._workers.pending

    def read_now(
        self, body: bytes, parsed: ParsedBody, *, target_model: str | None, lora: bool, block_sizes: Collection[int]
    ) -> PromptKeys | None:
        """What can be said without waiting: byte keys, and exact keys of prompts that are token ids.

        `body` is what the engine gets and `target_model` the name it knows. None when the request has no prompt that
        could be cached under keys of ours.
        """
        found = _read(body, parsed)
        if found is None:
            return None
        return self._keys(*found, parsed, _namespace(parsed, target_model, lora), block_sizes)

    async def read(
        self,
        body: bytes,
        parsed: ParsedBody,
        *,
        target_model: str | None,
        lora: bool,
        block_sizes: Collection[int],
        budget_s: float,
    ) -> PromptKeys | None:
        """As `read_now`, with exact keys of texts too if they are known within `budget_s`.

        Never of prompts with media: images are the same placeholder ids whatever they show.
        """
        found = _read(body, parsed)
        if found is None:
            return None
        prompt, text = found
        namespace = _namespace(parsed, target_model, lora)
        keys = self._keys(prompt, text, parsed, namespace, block_sizes)
        if isinstance(prompt, Ids) or target_model is None or not block_sizes or holds_media(text):
            return keys
        asking = Asking(kind=parsed.kind, model=target_model, prompt=prompt, canonical=text, body=body)
        ids = await self._ids(asking, budget_s)
        return keys if ids is None else self._exact(keys, prompt, ids, namespace, block_sizes)

    async def close(self) -> None:
        """Gives up what is under way. Reading goes on to work, without exact keys of texts."""
        self._workers.close()
        if self._engines is not None:
            await self._engines.close()

    def _keys(
        self, prompt: Prompt, text: bytes, parsed: ParsedBody, namespace: Namespace, block_sizes: Collection[int]
    ) -> PromptKeys:
        root = byte_root(self._secret, namespace, CHUNK_BYTES)
        tokens = parsed.prompt_tokens_estimate
        per_byte = 1 / BYTES_PER_TOKEN if _is_batch(prompt) else tokens / max(1, len(text))
        keys = PromptKeys(
            learned=chain(root, memoryview(text)[: CHUNK_BYTES * MAX_KEYS], CHUNK_BYTES),
            tokens=tokens,
            chunk_tokens=CHUNK_BYTES * per_byte,
        )
        if not isinstance(prompt, Ids):
            return keys
        self.counts.given += 1
        return self._exact(keys, prompt, prompt.tokens, namespace, block_sizes)

    def _exact(
        self, keys: PromptKeys, prompt: Prompt, ids: bytes, namespace: Namespace, block_sizes: Collection[int]
    ) -> PromptKeys:
        """The same with keys of token blocks. The length of a batch stays an estimate."""
        exact = {}
        for size in block_sizes:
            step_bytes = size * TOKEN_BYTES
            root = token_root(self._secret, namespace, size)
            exact[size] = chain(root, memoryview(ids)[: step_bytes * MAX_KEYS], step_bytes)
        if _is_batch(prompt):
            return msgspec.structs.replace(keys, exact=exact)
        tokens = len(ids) // TOKEN_BYTES
        chunk_tokens = keys.chunk_tokens * tokens / max(1, keys.tokens)
        return msgspec.structs.replace(keys, exact=exact, tokens=tokens, chunk_tokens=chunk_tokens)

    async def _ids(self, asking: Asking, budget_s: float) -> bytes | None:
        tokenizer = self._tokenizers.get(asking.model)
        if self._agreement is not None and not self._agreement.trusted(asking.model):
            # The engines tokenise otherwise than the files say: only they know how.
            tokenizer = None
        if tokenizer is not None and asking.prompt.exact:
            ids = await self._in_time(self._workers.submit(partial(tokenizer.encode, asking.prompt)), budget_s)
            self.counts.tokenizer += ids is not None
            return ids
        if self._engines is None:
            self.counts.unknown += 1
            return None
        started = self._engines.start(asking)
        ids = started if isinstance(started, bytes) else await self._in_time(started, budget_s)
        self.counts.engine += ids is not None
        return ids

    async def _in_time(self, work: asyncio.Future[bytes | None] | None, budget_s: float) -> bytes | None:
        if work is None:
            self.counts.declined += 1
            return None
        # Unlike `wait_for`, this leaves the work alone when time is up or the client leaves.
        done, _ = await asyncio.wait((work,), timeout=budget_s)
        if not done:
            self.counts.late += 1
            return None
        if work.cancelled() or work.exception() is not None or work.result() is None:
            self.counts.unknown += 1
            return None
        return work.result()


def _read(body: bytes, parsed: ParsedBody) -> tuple[Prompt, bytes] | None:
    """The prompt and its canonical text."""
    prompt = read_prompt(parsed.kind, body)
    try:
        return None if prompt is None else (prompt, canonical(prompt))
    except RecursionError:
        # Nested nearly as deep as JSON may be.
        return None


def _is_batch(prompt: Prompt) -> bool:
    return not isinstance(prompt, Chat) and prompt.batch


def _namespace(parsed: ParsedBody, target_model: str | None, lora: bool) -> Namespace:
    return Namespace(lora=(target_model or "") if lora else "", salt=parsed.cache_salt or "")
