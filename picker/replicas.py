"""This replica among others: what it tells them through Redis and what it takes from them. Off without a Redis.

Owns the shared state and its translation to the brain's terms. It decides nothing, and no request waits for it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence

from picker.config import IndexSection
from picker.core.datastore import Datastore
from picker.core.prefix.prompt import PromptKeys
from picker.core.values import Endpoint
from picker.prefixes import Prefixes
from picker.signals.shared.settings import EndpointLoad, SharedHooks, SharedStatus
from picker.signals.shared.state import SharedState


class Replicas:
    """One per process with `index.backend: redis`. Raises ValueError for a URL that is none."""

    def __init__(
        self,
        section: IndexSection,
        store: Datastore,
        prefixes: Prefixes,
        *,
        clock: Callable[[], float],
        on_trouble: Callable[[str], None],
    ) -> None:
        assert section.redis_url is not None
        self._store = store
        self._prefixes = prefixes
        self._clock = clock
        self._changing: asyncio.Task[None] | None = None
        self._state = SharedState(
            section.redis_url.get_secret_value(),
            prefix=section.redis_prefix,
            hooks=SharedHooks(
                own_loads=self._own_loads,
                on_loads=self._on_loads,
                on_secret=self._on_secret,
                on_routed=self._on_routed,
                on_trouble=on_trouble,
            ),
            clock=clock,
        )

    def __repr__(self) -> str:
        return f"<Replicas {self._state!r}>"

    @property
    def secret(self) -> bytes:
        """What keys are made with: ours until the shared one is known."""
        return self._state.secret

    def start(self) -> None:
        """Begins to share; does not wait for Redis."""
        self._state.start()

    async def close(self) -> None:
        """Takes this replica's load away and disconnects."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.gather(self._changing, return_exceptions=True)
        await self._state.close()

    def follow(self) -> None:
        """The endpoints changed."""
        self._state.follow(endpoint.id for endpoint in self._store.endpoints())

    def routed(self, endpoint: Endpoint, keys: PromptKeys) -> None:
        """A prompt was sent somewhere: the others learn it too."""
        self._state.tell_routed(endpoint.id, endpoint.instance, keys.learned)

    def status(self) -> SharedStatus:
        """How sharing goes."""
        return self._state.status()

    def figures(self) -> Mapping[str, float]:
        """For metrics, by name. Infinite ages are left out."""
        status = self._state.status()
        found = {
            "connected": float(status.connected),
            "replicas": status.replicas,
            "age_seconds": status.age_s,
            "lag_seconds": status.lag_s,
            "dropped": status.dropped,
            "missed": status.missed,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _own_loads(self) -> Mapping[str, EndpointLoad]:
        return {
            name: EndpointLoad(
                len(load.flights),
                load.tokens,
                sum(
                    flight.request.uncached_tokens_at(name)
                    for flight in load.flights.values()
                    if flight.first_byte_at is None
                ),
            )
            for name, load in self._store.ledger.loads()
        }

    def _on_loads(self, loads: Mapping[str, EndpointLoad]) -> None:
        self._store.set_others({name: (load.requests, load.tokens) for name, load in loads.items()})

    def _on_routed(self, endpoint_id: str, instance: str, keys: Sequence[int]) -> None:
        endpoint = self._store.endpoint(endpoint_id)
        if endpoint is not None and endpoint.instance == instance:
            self._store.prefixes.routed(endpoint_id, PromptKeys(learned=keys), self._clock())

    def _on_secret(self, secret: bytes) -> None:
        if self._changing is not None:
            self._changing.cancel()
        self._changing = asyncio.create_task(self._prefixes.use(secret), name="another secret")
