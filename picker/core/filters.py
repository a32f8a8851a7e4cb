"""The built-in filters: who must not serve a request.

Each is a pure function of the request and the rows it is given. A filter that would leave nobody says so; whether
that is final is part of each filter's meaning, written in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from picker.core.plugins import Filter
from picker.core.values import EndpointState, InferenceRequest, RejectionCode, Role, Standing

Verdicts = Sequence[str | None]

_ONE_STAGE = {Role.PREFILL: "prefill only", Role.ENCODE: "encode only"}


class PinnedFilter(msgspec.Struct, frozen=True):
    """Keeps only the endpoint that holds the state a request asks for. Final: nobody else can answer."""

    name: str = "pinned"
    refusal: RejectionCode = RejectionCode.RESPONSE_GONE

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects all but the pinned endpoint; keeps all when none is pinned."""
        if request.pinned is None:
            return [None] * len(states)
        return [None if state.endpoint.id == request.pinned else "does not hold the response" for state in states]


class PoolFilter(msgspec.Struct, frozen=True):
    """Keeps the endpoints of the pool a request asks for. Final: other pools serve other purposes."""

    name: str = "pool"
    refusal: RejectionCode = RejectionCode.POOL_NOT_FOUND

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints outside `request.pool`; keeps all when any pool will do."""
        pool = request.pool
        if pool is None:
            return [None] * len(states)
        return [None if state.endpoint.pool == pool else "in another pool" for state in states]


class SubsetFilter(msgspec.Struct, frozen=True):
    """Keeps the endpoints the proxy allows: `ip:port` matches exactly, a bare `ip` matches all its ports. Final, as
    the contract demands.
    """

    name: str = "subset"
    refusal: RejectionCode = RejectionCode.SUBSET_EMPTY

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints outside `request.subset`; keeps all when there is none."""
        subset = request.subset
        if subset is None:
            return [None] * len(states)
        return [None if _allowed(state.endpoint.address, subset) else "not in the proxy's subset" for state in states]


def _allowed(address: str, subset: frozenset[str]) -> bool:
    if address in subset:
        return bool(address)
    host = address.rpartition(":")[0]
    return bool(host) and (host in subset or host.strip("[]") in subset)


class RoleFilter(msgspec.Struct, frozen=True):
    """Keeps endpoints that can serve a whole request: a prefill-only or encode-only server cannot. Final."""

    name: str = "role"
    refusal: RejectionCode = RejectionCode.NO_READY_ENDPOINTS

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints of role prefill or encode."""
        return [_ONE_STAGE.get(state.endpoint.role) for state in states]


class HealthFilter(msgspec.Struct, frozen=True):
    """Keeps the ready; when nobody is ready, the degraded; never those that are out. Final."""

    name: str = "health"
    refusal: RejectionCode = RejectionCode.NO_READY_ENDPOINTS

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects by standing, with the standing's own reason."""
        best = Standing.READY if any(state.standing is Standing.READY for state in states) else Standing.DEGRADED
        return [None if state.standing is best else state.standing_reason or state.standing.value for state in states]


class TriedFilter(msgspec.Struct, frozen=True):
    """Removes endpoints that already failed this request. Final: the director ends its attempts then."""

    name: str = "tried"
    refusal: RejectionCode = RejectionCode.NO_READY_ENDPOINTS

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints in `request.tried`."""
        if not request.tried:
            return [None] * len(states)
        return ["failed this request" if state.endpoint.id in request.tried else None for state in states]


class ModelFilter(msgspec.Struct, frozen=True):
    """Keeps endpoints that serve the model, and those whose models are unknown.

    When nobody who is not out serves it, that is final only for requests with `strict_model`; otherwise all stay and
    the engine answers.
    """

    name: str = "model"
    refusal: RejectionCode = RejectionCode.MODEL_NOT_FOUND

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints whose known models do not include the target model."""
        model = request.target_model or request.model
        if not model:
            return [None] * len(states)
        verdicts: list[str | None] = [
            None if state.models is None or model in state.models else "does not serve the model" for state in states
        ]
        if request.strict_model or _anybody_left(states, verdicts):
            return verdicts
        return [None] * len(states)


def _anybody_left(states: Sequence[EndpointState], verdicts: Verdicts) -> bool:
    pairs = zip(states, verdicts, strict=True)
    return any(verdict is None and state.standing is not Standing.OUT for state, verdict in pairs)


class LabelFilter(msgspec.Struct, frozen=True):
    """Keeps endpoints that carry all the given labels. Final."""

    labels: Mapping[str, str] = {}
    name: str = "label"
    refusal: RejectionCode = RejectionCode.NO_READY_ENDPOINTS

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints that miss a label or carry another value."""
        wanted = self.labels.items()
        return [None if wanted <= state.endpoint.labels.items() else "label mismatch" for state in states]


class SaturationFilter(msgspec.Struct, frozen=True):
    """Removes endpoints over a queue depth or KV usage. When all are over, all stay, unless `shed` makes it a 429.

    The defaults are those of the reference saturation detector: 5 waiting requests, 0.8 of the KV cache.
    """

    queue_depth: float = 5.0
    kv_usage: float = 0.8
    shed: bool = False
    name: str = "saturation"
    refusal: RejectionCode = RejectionCode.SATURATED

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects saturated endpoints. Unknown figures count as not saturated."""
        verdicts = [self._verdict(state) for state in states]
        if not self.shed and None not in verdicts:
            return [None] * len(states)
        return verdicts

    def _verdict(self, state: EndpointState) -> str | None:
        if (state.waiting or 0.0) > self.queue_depth:
            return "queue over limit"
        kv_usage = state.signals.kv_usage if state.signals is not None else None
        return "KV cache over limit" if (kv_usage or 0.0) > self.kv_usage else None


class LoraFilter(msgspec.Struct, frozen=True):
    """Removes endpoints that would have to evict an adapter to serve this one, while another endpoint need not."""

    name: str = "lora"
    refusal: RejectionCode = RejectionCode.NO_READY_ENDPOINTS

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Verdicts:
        """Rejects endpoints whose adapter slots are full without the wanted one; keeps all when that would leave
        nobody.
        """
        model = request.target_model or request.model or ""
        verdicts = [self._verdict(model, state) for state in states]
        return verdicts if None in verdicts else [None] * len(states)

    def _verdict(self, model: str, state: EndpointState) -> str | None:
        lora = state.signals.lora if state.signals is not None else None
        if lora is None or not lora.slots or model in lora.running or model in lora.waiting:
            return None
        return "adapter slots full" if len(lora.running | lora.waiting) >= lora.slots else None


BUILTIN: Mapping[str, Callable[..., Filter]] = {
    "pinned": PinnedFilter,
    "pool": PoolFilter,
    "subset": SubsetFilter,
    "role": RoleFilter,
    "model": ModelFilter,
    "health": HealthFilter,
    "tried": TriedFilter,
    "label": LabelFilter,
    "saturation": SaturationFilter,
    "lora": LoraFilter,
}

# What no policy may switch off: breaking one of these sends a request where it cannot be served.
# Tried comes before health, so that after a failure of the only ready endpoint a degraded one gets its chance.
ALWAYS: tuple[str, ...] = ("pinned", "pool", "subset", "role", "model", "tried", "health")


def build(name: str, params: Mapping[str, Any] | None = None) -> Filter:
    """The filter of that name. Raises KeyError for an unknown name, TypeError for unknown parameters."""
    return BUILTIN[name](**(params or {}))
