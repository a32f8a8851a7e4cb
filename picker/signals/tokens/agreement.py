"""Whether our token ids are the engines': evidence per endpoint, and one verdict per model.

A template or a tokenizer that differs from the engine's gives keys that match nothing, which looks like empty caches
everywhere. So exact keys are used only as long as nothing speaks against them. A state machine; time comes in.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

# Prompts one endpoint was sent and whose first block it has not told of; more would only prove the same.
_MAX_WAITING = 8
# A prefill of that length and the way of its event, on a busy engine.
PATIENCE_S = 60.0
# One may be lost on the way, or have been cached behind our back.
_MISSES_TO_DISAGREE = 5
# Of a first block, in tokens: what longer blocks have beyond it proves no more.
_SAMPLE_TOKENS = 256
_TOKEN_BYTES = 4
# Far more than a fleet has; names of models and endpoints come and go.
_MAX_ENDPOINTS = 4096
_MAX_MODELS = 64

OnDisagreement = Callable[[str, str], None]
"""Called with the model and the endpoint, once for each endpoint that disagrees: somebody should be told."""


class _Sent(msgspec.Struct):
    model: str
    sample: bytes
    late_at: float

    def __repr__(self) -> str:
        return f"<_Sent {self.model!r}>"


class _Evidence(msgspec.Struct):
    """`agrees` None: nothing is known yet."""

    agrees: bool | None = None
    misses: int = 0


class _Endpoint(msgspec.Struct):
    waiting: list[_Sent] = []
    models: dict[str, _Evidence] = {}


class Agreement:
    """Collects evidence. All calls on the event loop, none of them waits."""

    __slots__ = ("_against", "_endpoints", "_on_disagreement")

    def __init__(self, on_disagreement: OnDisagreement) -> None:
        self._on_disagreement = on_disagreement
        self._endpoints: dict[str, _Endpoint] = {}
        self._against: dict[str, set[str]] = {}

    def __repr__(self) -> str:
        return f"<Agreement [{len(self._endpoints)} endpoints | against: {sorted(self._against)}]>"

    def trusted(self, model: str) -> bool:
        """Whether exact keys for that model mean anything: no endpoint disagrees."""
        return model not in self._against

    def compared(self, endpoint: str, model: str, same: bool) -> None:
        """Somebody had both sides tokenise the same. The last word so far."""
        evidence = self._evidence(self._of(endpoint), model)
        if evidence is None:
            return
        against = self._against.setdefault(model, set())
        if same:
            against.discard(endpoint)
        elif endpoint not in against:
            against.add(endpoint)
            self._on_disagreement(model, endpoint)
        if not against:
            del self._against[model]
        evidence.agrees = same
        evidence.misses = 0

    def routed(self, endpoint: str, model: str, ids: bytes, now: float) -> None:
        """A prompt goes to an endpoint of which the index says that it holds nothing of it, so that its first block
        must be heard of. `ids` are ours: u32, little-endian, as many of them as there are.
        """
        about = self._of(endpoint)
        # Once it was right, caches that outlive our view of them explain a miss better than another tokenizer.
        if len(about.waiting) < _MAX_WAITING and self._open(about, model):
            about.waiting.append(_Sent(model, ids[: _SAMPLE_TOKENS * _TOKEN_BYTES], now + PATIENCE_S))

    def stored(self, endpoint: str, block: bytes, now: float) -> None:
        """The endpoint told of a first block (one without a parent): its ids, u32, little-endian."""
        about = self._of(endpoint)
        sample = block[: _SAMPLE_TOKENS * _TOKEN_BYTES]
        for model in {sent.model for sent in about.waiting if sample and sent.sample.startswith(sample)}:
            self.compared(endpoint, model, True)
        waiting = [sent for sent in about.waiting if self._open(about, sent.model)]
        about.waiting = [sent for sent in waiting if now < sent.late_at]
        for sent in waiting:
            # Prompts shorter than a block are never told of.
            if sent.late_at <= now and len(sent.sample) >= len(sample):
                self._missed(endpoint, about, sent.model)

    def forget(self, endpoint: str) -> None:
        """The endpoint is gone, or has restarted and may be another."""
        about = self._endpoints.pop(endpoint, None)
        for model in about.models if about is not None else ():
            against = self._against.get(model, set())
            against.discard(endpoint)
            if not against:
                self._against.pop(model, None)

    def _missed(self, endpoint: str, about: _Endpoint, model: str) -> None:
        evidence = self._evidence(about, model)
        if evidence is None or evidence.agrees is not None:
            return
        evidence.misses += 1
        if evidence.misses >= _MISSES_TO_DISAGREE:
            self.compared(endpoint, model, False)

    def _open(self, about: _Endpoint, model: str) -> bool:
        evidence = about.models.get(model)
        return evidence is None or evidence.agrees is None

    def _evidence(self, about: _Endpoint, model: str) -> _Evidence | None:
        evidence = about.models.get(model)
        if evidence is None and len(about.models) < _MAX_MODELS:
            evidence = about.models[model] = _Evidence()
        return evidence

    def _of(self, endpoint: str) -> _Endpoint:
        about = self._endpoints.get(endpoint)
        if about is None:
            if len(self._endpoints) >= _MAX_ENDPOINTS:
                self.forget(next(iter(self._endpoints)))
            about = self._endpoints[endpoint] = _Endpoint()
        return about
