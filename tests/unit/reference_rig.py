"""Metrics with the reference pickers' names on, over rows, flights and finished requests that a test makes up."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from picker.core.events import Outcome
from picker.core.ledger import Flight
from picker.core.record import RequestRecord
from picker.core.values import EndpointState, Signals, Standing
from picker.telemetry.logs import configure
from picker.telemetry.metrics import Metrics
from picker.telemetry.requests import record_request
from tests.unit.core.builders import request, snapshot, state

MODEL = {"model_name": "m", "target_model_name": "m"}
FLOW = {**MODEL, "fairness_id": "default-flow", "priority": "0"}


class Rig:
    """Metrics with the reference's names on, over rows and flights a test sets."""

    def __init__(self, *rows: EndpointState, pools: tuple[str, ...] = ()) -> None:
        self.rows = rows
        self.flights: list[Flight] = []
        self.log = configure("error", style="json", stream=io.StringIO())
        self.metrics = Metrics("1.2.3")
        self.metrics.show_reference(lambda: snapshot(*self.rows), lambda: self.flights, lambda: pools)

    def finish(self, **fields: Any) -> None:
        """One finished request, good unless told otherwise."""
        given: dict[str, Any] = {"id": "r", "path": "/v1/chat/completions", "status": 200, "outcome": Outcome.COMPLETED}
        given |= {"duration_s": 1.0, "model": "m", "endpoint": "a", "attempts": 1}
        record_request(RequestRecord(**(given | fields)), self.metrics, self.log)

    def fly(self, model: str = "m", endpoint: str = "a", *, left: bool = False, **fields: Any) -> Flight:
        """One request in flight."""
        flight = Flight(request(model=model, **fields), endpoint, 10, 0.0, 0.0, left=left)
        self.flights.append(flight)
        return flight

    @property
    def page(self) -> str:
        return generate_latest(self.metrics.registry).decode()

    def families(self) -> Iterator[Any]:
        return (family for family in parse(self.page) if not family.name.startswith("waypost_"))

    def value(self, sample_name: str, /, **labels: str) -> float | None:
        """A sample of the page as the official parser reads it."""
        found = [
            sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == sample_name and sample.labels == labels
        ]
        assert len(found) <= 1, "one series twice"
        return found[0] if found else None


def pod(
    name: str, pool: str = "ns/p", *, rank: int = 0, standing: Standing = Standing.READY, **told: Any
) -> EndpointState:
    return state(
        f"{pool}/{name}-{rank}",
        endpoint={"pool": pool, "pod": name, "rank": rank},
        standing=standing,
        signals=Signals(at=0.0, **told) if told else None,
    )
