"""Short ways to the values the core's tests need. Times are plain seconds; nothing here reads a clock."""

from __future__ import annotations

from typing import Any

import msgspec

from picker import policies
from picker.core.datastore import Datastore, Freshness
from picker.core.health import HealthLimits
from picker.core.ledger import Deadlines
from picker.core.scheduler import Scheduler
from picker.core.updates import Replace, Scraped
from picker.core.values import Decision, Endpoint, EndpointState, InferenceRequest, Lora, Signals, Snapshot

LIMITS = HealthLimits()
FRESHNESS = Freshness(signals_s=5.0, models_s=60.0)
DEADLINES = Deadlines(first_byte_s=300.0, between_chunks_s=120.0, total_s=3600.0)


def request(key: int = 1, **fields: Any) -> InferenceRequest:
    """A streaming request received at 0 unless the fields say otherwise."""
    given: dict[str, Any] = {"id": f"request-{key}", "received_at": 0.0, "stream": True, "prompt_tokens": 10}
    return InferenceRequest(key=key, **(given | fields))


def pod(name: str = "a", **fields: Any) -> Endpoint:
    """An endpoint; its address is made from its name."""
    host = f"10.0.0.{sum(name.encode()) % 250 + 1}"
    given: dict[str, Any] = {"url": f"http://{host}:8000", "address": f"{host}:8000"}
    return Endpoint(id=name, **(given | fields))


def state(name: str = "a", *, endpoint: dict[str, Any] | None = None, **fields: Any) -> EndpointState:
    """A row of a snapshot. `kv_usage` and `lora` make signals."""
    made = {key: fields.pop(key) for key in ("kv_usage", "lora") if key in fields}
    if made:
        fields["signals"] = Signals(at=0.0, **made)
    return EndpointState(endpoint=pod(name, **(endpoint or {})), **fields)


def contract_pod(
    index: int, queue: float, kv_usage: float, *adapters: str, slots: int = 4, running: float | None = 0.0
) -> EndpointState:
    """P(idx, queue, kv, adapters...) of the endpoint-picker contract's test inventory."""
    address = f"192.168.1.{index + 1}:8000"
    signals = Signals(
        at=0.0,
        waiting=queue,
        running=running,
        kv_usage=kv_usage,
        lora=Lora(frozenset(adapters), frozenset(), slots) if adapters else Lora(slots=slots),
    )
    endpoint = Endpoint(id=f"pod-{index}", url=f"http://{address}", address=address)
    return EndpointState(endpoint=endpoint, signals=signals, waiting=queue, running=running)


def snapshot(*states: EndpointState, now: float = 1.0) -> Snapshot:
    """All rows at one instant."""
    return Snapshot(now, states)


def scheduler(policy: str = "balanced") -> Scheduler:
    """A scheduler with a built-in policy."""
    return Scheduler(policies.build(policy, policies.BUILTIN[policy]))


def datastore(*endpoints: Endpoint, **options: Any) -> Datastore:
    """A datastore with these endpoints from source `test`. Options are those of the datastore."""
    made = Datastore(**({"health": LIMITS, "freshness": FRESHNESS, "deadlines": DEADLINES} | options))
    made.apply(Replace("test", endpoints))
    return made


def scraped(name: str, at: float, **figures: Any) -> Scraped:
    """A scrape of an engine that says these figures."""
    return Scraped(name, Signals(at=at, **figures))


def row(store: Datastore, name: str, now: float) -> EndpointState:
    """The row of one endpoint."""
    return next(each for each in store.snapshot(now).states if each.endpoint.id == name)


def chosen(verdict: object) -> str:
    """The id of the endpoint a decision chose."""
    assert isinstance(verdict, Decision), verdict
    return verdict.endpoint.id


def with_fields(value: EndpointState, **fields: Any) -> EndpointState:
    """A changed copy."""
    return msgspec.structs.replace(value, **fields)
