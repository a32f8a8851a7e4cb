"""Gauges of pools under the names of the reference endpoint pickers, from one snapshot.

Averages are over the endpoints that tell something fresh and are not out of rotation; without any there is no sample
rather than an old or a zero one. Deviations are those of a sample (n - 1), as there; nothing is rounded. Endpoints
outside pools make a pool without a name, and pools of one name in two namespaces are named with their namespace.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from urllib.parse import urlsplit

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from picker.core.values import Endpoint, EndpointState, Signals, Snapshot, Standing
from picker.telemetry.reference_names import EPP, POOL

_FIGURES: tuple[tuple[str, str, Callable[[Signals], float | None]], ...] = (
    ("kv_cache_utilization", "KV cache in use", lambda signals: signals.kv_usage),
    ("queue_size", "Requests waiting", lambda signals: signals.waiting),
    ("running_requests", "Requests running", lambda signals: signals.running),
)


def pool_gauges(snapshot: Snapshot, pools: Sequence[str]) -> Iterator[Metric]:
    """All gauges of `pools` (`namespace/name`) and of the pools endpoints are in."""
    named = _by_name(snapshot, pools)
    for figure, text, read in _FIGURES:
        means: dict[tuple[str, ...], float] = {}
        deviations: dict[tuple[str, ...], float] = {}
        for pool, states in named.items():
            told = [read(state.signals) for state in states if state.signals and state.standing is not Standing.OUT]
            known = [value for value in told if value is not None]
            if known:
                means[pool,] = mean = sum(known) / len(known)
                deviations[pool,] = sqrt(sum((value - mean) ** 2 for value in known) / max(1, len(known) - 1))
        yield _gauges(f"{EPP}average_{figure}", f"{text}, mean of a pool.", ("name",), means)
        yield _gauges(f"{POOL}average_{figure}", f"{text}, mean of a pool.", ("name",), means)
        yield _gauges(f"{EPP}std_dev_{figure}", f"{text}, standard deviation in a pool.", ("name",), deviations)
    ready: dict[tuple[str, ...], float] = {(pool,): _count(states) for pool, states in named.items()}
    yield _gauges(f"{EPP}ready_endpoints", "Endpoints that are ready.", ("name",), ready)
    yield _gauges(f"{POOL}ready_pods", "Endpoints that are ready.", ("name",), ready)
    queues: dict[tuple[str, ...], float] = {
        (pool, _server(state.endpoint)): state.signals.waiting
        for pool, states in named.items()
        for state in states
        if state.signals is not None and state.signals.waiting is not None
    }
    text = "Requests waiting at an endpoint."
    yield _gauges(f"{EPP}per_endpoint_queue_size", text, ("name", "model_server_endpoint"), queues)
    yield _gauges(f"{POOL}per_pod_queue_size", text, ("name", "model_server_pod"), queues)


def place_of(endpoint: Endpoint) -> tuple[str, str, str]:
    """Pod (its id if it is none), namespace and port."""
    pod, namespace = _pod(endpoint), endpoint.pool.rpartition("/")[0]
    return pod or endpoint.id, namespace, str(urlsplit(endpoint.url).port or "")


def _by_name(snapshot: Snapshot, pools: Sequence[str]) -> dict[str, list[EndpointState]]:
    by_pool: dict[str, list[EndpointState]] = {pool: [] for pool in pools}
    for state in snapshot.states:
        by_pool.setdefault(state.endpoint.pool, []).append(state)
    names = {pool: pool.rpartition("/")[2] for pool in by_pool}
    uses = Tally(names.values())
    return {name if uses[name] == 1 else pool: by_pool[pool] for pool, name in names.items()}


def _count(states: Sequence[EndpointState]) -> int:
    return sum(state.standing is Standing.READY for state in states)


def _gauges(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _server(endpoint: Endpoint) -> str:
    pod = _pod(endpoint)
    return f"{pod}-rank-{endpoint.rank}" if pod else endpoint.id


def _pod(endpoint: Endpoint) -> str:
    return endpoint.pod.rpartition("/")[2]
