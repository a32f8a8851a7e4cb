"""Asks every engine that is heard whether it tokenises as we do, once per model, and again while it does not.

Feeds `Agreement` and says once by name what is wrong. What follows from a disagreement is the reader's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from math import inf

from picker.core.values import Endpoint, Snapshot, Standing
from picker.signals.tokens.agreement import Agreement
from picker.signals.tokens.check import Comparison, compare
from picker.signals.tokens.local import LocalTokenizer
from picker.signals.tokens.remote import EngineTokens

# How often it is looked at who has not been asked yet.
LOOK_S = 1.0
# Who disagrees, or could not answer, is asked again: another engine may take its place unnoticed.
AGAIN_S = 60.0

OnTrouble = Callable[[str, str], None]
"""The model and what is wrong."""


class SelfCheck:
    """Compares in the background, one engine at a time: it is in no hurry, and engines have better things to do.

    `heard` are the endpoints whose caches are known exactly, each with a number that changes when the engine is
    another one. `agreement` has the outcome. `on_trouble` is told once per model as long as anybody disagrees.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, LocalTokenizer],
        asks: EngineTokens,
        *,
        heard: Mapping[str, int],
        snapshot: Callable[[], Snapshot],
        clock: Callable[[], float],
        on_trouble: OnTrouble,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.agreement = Agreement(self._disagrees)
        self._tokenizers = tokenizers
        self._asks = asks
        self._heard = heard
        self._snapshot = snapshot
        self._clock = clock
        self._on_trouble = on_trouble
        self._sleep = sleep
        self._due_at: dict[str, dict[str, float]] = {}
        self._known: dict[str, int] = {}
        self._found = Comparison()
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<SelfCheck [{len(self._known)} engines] {self.agreement!r}>"

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._forget_others()
            for endpoint, model in self._whom():
                await self._check(endpoint, model)
            await self._sleep(LOOK_S)

    def _forget_others(self) -> None:
        """Forgets engines that are gone, or are others now."""
        for endpoint_id, number in tuple(self._known.items()):
            if self._heard.get(endpoint_id) != number:
                self.agreement.forget(endpoint_id)
                del self._known[endpoint_id], self._due_at[endpoint_id]
        self._warned -= {model for model in self._warned if self.agreement.trusted(model)}

    def _whom(self) -> list[tuple[Endpoint, str]]:
        """Who is to be asked about which model. Without its list of models an engine could only be asked in vain."""
        now = self._clock()
        return [
            (state.endpoint, model)
            for state in self._snapshot().states
            if state.standing is Standing.READY and state.models and state.endpoint.id in self._heard
            for model in state.models & self._tokenizers.keys()
            if now >= self._due_at.get(state.endpoint.id, {}).get(model, 0.0)
        ]

    async def _check(self, endpoint: Endpoint, model: str) -> None:
        number = self._heard.get(endpoint.id)
        found = await compare(self._tokenizers[model], self._asks, endpoint, model)
        if number is None or self._heard.get(endpoint.id) != number:
            return
        self._known[endpoint.id] = number
        self._due_at.setdefault(endpoint.id, {})[model] = inf if found.verdict else self._clock() + AGAIN_S
        self._found = found
        if found.verdict is not None:
            self.agreement.compared(endpoint.id, model, found.verdict)

    def _disagrees(self, model: str, endpoint_id: str) -> None:
        if model not in self._warned:
            self._warned.add(model)
            samples = ", ".join(self._found.different)
            self._on_trouble(
                model, f"{endpoint_id} makes other tokens of samples ({samples}); its tokenizer is not used"
            )
