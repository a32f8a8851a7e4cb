"""From a parsed request to one with the keys of its prompt: what both doors await before they ask for a decision.

Knows which block sizes and adapters the engines use, and how long waiting for exact keys is worth it. It decides
nothing, and a prompt never leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from picker.core.pace import PREFILL_PRIOR_S_PER_TOKEN
from picker.core.values import InferenceRequest
from picker.openai.parse import ParsedBody
from picker.signals.tokens.reader import PromptReader, token_budget_s


class Engines(msgspec.Struct):
    """What was heard of the engines' caches: sizes of blocks in tokens, and names of adapters, by endpoint id."""

    block_tokens: dict[str, tuple[int, ...]] = {}
    loras: dict[str, tuple[str, ...]] = {}

    def sizes(self) -> frozenset[int]:
        """All block sizes in use; a fleet has one or two."""
        return frozenset(size for sizes in self.block_tokens.values() for size in sizes)

    def forget(self, endpoint_id: str) -> None:
        """An endpoint is gone, or is heard no more."""
        self.block_tokens.pop(endpoint_id, None)
        self.loras.pop(endpoint_id, None)


class Prompts:
    """Gives requests their keys, once it has a reader."""

    def __init__(self, engines: Engines) -> None:
        self._reader: PromptReader | None = None
        self._engines = engines
        self._adapters: Callable[[], frozenset[str]] = frozenset

    def __repr__(self) -> str:
        return f"<Prompts {self._reader!r}>"

    def begin(self, reader: PromptReader, adapters: Callable[[], frozenset[str]] = frozenset) -> None:
        """From now on prompts are read; `close` closes the reader. `adapters` are the LoRA adapters engines list."""
        self._reader = reader
        self._adapters = adapters

    @property
    def counts(self) -> Mapping[str, int]:
        """How often exact keys were had, and why not."""
        return {} if self._reader is None else msgspec.structs.asdict(self._reader.counts)

    async def keyed(self, request: InferenceRequest, body: bytes, parsed: ParsedBody) -> InferenceRequest:
        """The request with the keys of its prompt, and with the prompt's true length where its tokens are known."""
        if self._reader is None:
            return request
        target = request.target_model or request.model
        keys = await self._reader.read(
            body,
            parsed,
            target_model=target,
            lora=target in self._adapters() or any(target in names for names in self._engines.loras.values()),
            block_sizes=self._engines.sizes(),
            budget_s=token_budget_s(request.prompt_tokens * PREFILL_PRIOR_S_PER_TOKEN),
        )
        if keys is None:
            return request
        tokens = keys.tokens if keys.exact else request.prompt_tokens
        return msgspec.structs.replace(request, keys=keys, prompt_tokens=tokens)

    async def close(self) -> None:
        """Gives up what is under way."""
        # Requests that come meanwhile go without keys: a closed reader takes no work.
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()
