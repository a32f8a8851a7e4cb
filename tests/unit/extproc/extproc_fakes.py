"""A director that decides by itself and notes what it is told, for tests of the ext-proc door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from picker.core.events import AttemptFailed, Event, Finished, Left
from picker.core.ledger import Eviction
from picker.core.values import Decision, Endpoint, InferenceRequest, Rejection, RejectionCode


class FakeDirector:
    """Round robin over `addresses`, within the subset; `refuse` rejects everything.

    `endpoint` are fields of all endpoints, `fields` those of single ones by address. `pools` are the pools it knows;
    `asked` are the models it was asked the target of, with the pool.
    """

    def __init__(
        self,
        addresses: Iterable[str] = ("10.0.0.1:8000",),
        *,
        refuse: RejectionCode | None = None,
        aliases: dict[str, str] | None = None,
        priorities: dict[str, int] | None = None,
        pools: Iterable[str] = (),
        endpoint: Mapping[str, Any] | None = None,
        fields: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.addresses = list(addresses)
        self.refuse = refuse
        self.aliases = aliases or {}
        self.priorities = priorities or {}
        self.pools = frozenset(pools)
        self.asked: list[tuple[str | None, str | None]] = []
        self._endpoint = dict(endpoint or {})
        self._fields = dict(fields or {})
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
        endpoints = [self._made(address) for address in allowed[first:] + allowed[:first]]
        self.reserved[request.key] = endpoints[0].address
        return Decision(request=request, endpoint=endpoints[0], alternates=tuple(endpoints[1:]))

    def _made(self, address: str) -> Endpoint:
        fields = {**self._endpoint, **self._fields.get(address, {})}
        return Endpoint(id=address, url=f"http://{address}", address=address, **fields)

    def observe(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Left | AttemptFailed):
            self.reserved.pop(event.key, None)

    def watch(self, key: int, on_evict: Callable[[Eviction], None]) -> None:
        self.watchers[key] = on_evict

    def unwatch(self, key: int) -> None:
        self.watchers.pop(key, None)

    @property
    def renames(self) -> bool:
        return bool(self.aliases)

    def pool_named(self, text: str | None) -> str | None:
        return (text or None) if self.pools else None

    def target_model(self, model: str | None, pool: str | None) -> str | None:
        self.asked.append((model, pool))
        return self.aliases.get(model) if model is not None else None

    def priority(self, objective: str | None, model: str | None, pool: str | None) -> int:
        return self.priorities.get(objective or "", 0)

    @property
    def endings(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, Finished | Left | AttemptFailed)]


def allows(subset: frozenset[str] | None, address: str) -> bool:
    host = address.rpartition(":")[0]
    return subset is None or address in subset or host in subset or host.strip("[]") in subset
