"""How often and how patiently replicas talk to Redis, and who hears of it. Values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

SECRET_BYTES = 32


class EndpointLoad(NamedTuple):
    """What replicas have under way on one endpoint: requests, their tokens, and the uncached prompt tokens that wait
    for their prefill.
    """

    requests: int = 0
    tokens: int = 0
    pending_tokens: int = 0


class PodSnapshot(msgspec.Struct, frozen=True):
    """The prefix blocks one endpoint holds, as its engine told: own keys by tier (0 GPU, 1 CPU, 2 disk).

    `instance` names the process that holds them; another process of the same endpoint holds nothing of it.
    """

    instance: str
    block_tokens: int
    tiers: Mapping[int, Sequence[int]]


class SharedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds.

    `cycle_s` is how often loads are exchanged; simulations lose 1 to 2 % of goodput at 100 ms and 25 % at 1 s.
    `lease_s` is how long a load counts that nobody renewed: it bounds what a dead replica's load does, and a replica
    whose loop stalls for less is not forgotten. `roll_call_s` is how often replicas sign the list of replicas.

    `flush_s` is how long learned prefixes are gathered and how often the others are asked for theirs. A stream keeps
    about `stream_entries` entries; a replica that begins reads those of the last `warm_s` seconds.

    A replica that knows no shared secret proposes its own after `secret_patience_s` of contact. That must be longer
    than `backoff_most_s`: after Redis lost everything, those who know the old one come first.

    `ingester` is for fleets whose engines only one replica listens to. `call_timeout_s` bounds each call: a slower
    Redis is one that is away.
    """

    cycle_s: float = 0.02
    lease_s: float = 0.5
    roll_call_s: float = 0.15
    flush_s: float = 0.05
    stream_entries: int = 8000
    # At 10,000 blocks a second, what a replica learns in 50 s.
    buffer_bytes: int = 4 * 2**20
    warm_s: float = 300.0
    secret_s: float = 1.0
    secret_patience_s: float = 3.0
    snapshot_s: float = 30.0
    snapshot_ttl_s: float = 600.0
    ingester: bool = False
    ingester_lease_s: float = 3.0
    call_timeout_s: float = 1.0
    backoff_least_s: float = 0.05
    backoff_most_s: float = 2.0


def _no_loads() -> Mapping[str, EndpointLoad]:
    return {}


def _on_loads(loads: Mapping[str, EndpointLoad]) -> None:
    pass


def _on_secret(secret: bytes) -> None:
    pass


def _on_routed(endpoint_id: str, instance: str, keys: Sequence[int]) -> None:
    pass


def _no_snapshot(endpoint_id: str) -> PodSnapshot | None:
    return None


def _on_snapshot(endpoint_id: str, snapshot: PodSnapshot, age_s: float) -> None:
    pass


def _on_delta(delta: bytes) -> None:
    pass


def _on_ingester(elected: bool) -> None:
    pass


def _on_missed(entries: int) -> None:
    pass


def _on_trouble(text: str) -> None:
    pass


class SharedHooks(msgspec.Struct, frozen=True, kw_only=True):
    """Where shared state comes from and goes to. All are called on the loop, must be quick and must not raise.

    `own_loads` is asked every cycle for what this replica has under way. `on_loads` gets the sum of all other live
    replicas whenever it changed; nothing when it is not known any more. `on_secret` gets the deployment's secret when
    it is another than the one used so far: every key made before is void. `on_routed` gets what other replicas
    learnt; `snapshot_of` is asked for the endpoints this replica writes down, `on_snapshot` gets what was written, and
    how long ago. `on_delta` gets what the ingester told, `on_ingester` whether this replica is the one, `on_missed`
    how many entries of the ingester were lost. `on_trouble` gets one line per new kind of trouble, for the log.
    """

    own_loads: Callable[[], Mapping[str, EndpointLoad]] = _no_loads
    on_loads: Callable[[Mapping[str, EndpointLoad]], None] = _on_loads
    on_secret: Callable[[bytes], None] = _on_secret
    on_routed: Callable[[str, str, Sequence[int]], None] = _on_routed
    snapshot_of: Callable[[str], PodSnapshot | None] = _no_snapshot
    on_snapshot: Callable[[str, PodSnapshot, float], None] = _on_snapshot
    on_delta: Callable[[bytes], None] = _on_delta
    on_ingester: Callable[[bool], None] = _on_ingester
    on_missed: Callable[[int], None] = _on_missed
    on_trouble: Callable[[str], None] = _on_trouble


class SharedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How sharing goes, for metrics and readiness pages; it is never a reason not to be ready.

    `connected`: loads went both ways in the last cycle. `problem` is empty when all is well. `age_s` is how old the
    view of the others' loads is, `lag_s` how old the view of their learned prefixes; infinite before the first.
    `replicas` counts the live ones, this one included. `dropped` is what others will never hear from us, in prompts
    and deltas; `missed` what we never heard from others, in entries.
    """

    connected: bool
    problem: str
    age_s: float
    lag_s: float
    replicas: int
    dropped: int
    missed: int
