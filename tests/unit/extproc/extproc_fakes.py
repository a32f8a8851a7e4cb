"""A director that decides by itself and notes what it is told, for tests of the ext-proc door."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from picker.core.events import AttemptFailed, Event, Finished, Left
from picker.core.ledger import Eviction
from picker.core.values import Decision, Endpoint, InferenceRequest, Rejection, RejectionCode


class FakeDirector:
    """Round robin over `addresses`, within the subset; `refuse` rejects everything."""

    def __init__(
        self,
        addresses: Iterable[str] = ("10.0.0.1:8000",),
        *,
        refuse: RejectionCode | None = None,
        aliases: dict[str, str] | None = None,
    ) -> None:
        self.addresses = list(addresses)
        self.refuse = refuse
        self.aliases = aliases or {}
        self.requests: list[InferenceRequest] = []
        self.events: list[Event] = []
        self.watchers: dict[int, Callable[[Eviction], None]] = {}
        self.reserved: dict[int, str] = {}
        self._keys = 0

    def new_key(self) -> int:
        self._keys += 1
        return self._keys

    def decide(self, request: InferenceRequest) -> Decision | Rejection:
        self.requests.append(request)
        if self.refuse is not None:
            return Rejection(request=request, code=self.refuse, message="refused")
        allowed = [address for address in self.addresses if allows(request.subset, address)]
        if not allowed:
            return Rejection(request=request, code=RejectionCode.SUBSET_EMPTY, message="nobody")
        first = len(self.requests) % len(allowed)
        endpoints = [Endpoint(id=a, url=f"http://{a}", address=a) for a in allowed[first:] + allowed[:first]]
        self.reserved[request.key] = endpoints[0].address
        return Decision(request=request, endpoint=endpoints[0], alternates=tuple(endpoints[1:]))

    def observe(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Left | AttemptFailed):
            self.reserved.pop(event.key, None)

    def watch(self, key: int, on_evict: Callable[[Eviction], None]) -> None:
        self.watchers[key] = on_evict

    def unwatch(self, key: int) -> None:
        self.watchers.pop(key, None)

    def target_model(self, model: str | None) -> str | None:
        return self.aliases.get(model) if model is not None else None

    @property
    def endings(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, Finished | Left | AttemptFailed)]


def allows(subset: frozenset[str] | None, address: str) -> bool:
    host = address.rpartition(":")[0]
    return subset is None or address in subset or host in subset or host.strip("[]") in subset
