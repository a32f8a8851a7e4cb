"""Everything the datastore keeps about one endpoint. Mutable, and touched by nobody else."""

from __future__ import annotations

from picker.core.health import EndpointHealth, HealthLimits
from picker.core.pace import Pace
from picker.core.values import Endpoint, EndpointState, Signals, Standing


class EndpointRecord:
    """One endpoint: what it is, how it is, and the row that shows it, None when it has to be built again."""

    __slots__ = (
        "adapters",
        "cold_at",
        "counter_at",
        "endpoint",
        "health",
        "models",
        "models_at",
        "others",
        "pace",
        "row",
        "signals",
        "source",
        "standing",
        "standing_at",
    )

    def __init__(self, endpoint: Endpoint, source: str, limits: HealthLimits) -> None:
        self.endpoint = endpoint
        self.source = source
        self.health = EndpointHealth(limits)
        self.signals: Signals | None = None
        self.models: frozenset[str] | None = None
        self.adapters: frozenset[str] = frozenset()
        self.models_at = 0.0
        self.counter_at = 0.0
        self.cold_at = 0.0
        self.others = (0, 0)
        self.pace = Pace()
        self.row: EndpointState | None = None
        self.standing = Standing.READY
        self.standing_at = 0.0
