"""Every metric Waypost exports, in one place: prefix `waypost_`, base units, bounded labels.

The objects here are called on the hot path, so children of labelled metrics are looked up once and kept. It reads no
state of its own: gauges of endpoints are collected from a snapshot when somebody asks for the page.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.core.ledger import Flight
from picker.core.values import EndpointState, Snapshot, Standing
from picker.telemetry.prefix_metrics import PrefixCollector, PrefixFigures
from picker.telemetry.reference_metrics import ReferenceMetrics

# A label that clients can choose takes at most this many values, the rest is `other` (the reference caps models alike).
MODELS_MAX = 1000

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_FIRST_BYTE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120, 300)
# Holds the bounds of the reference's scheduler metric, which is read off it.
_DECISION = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class ModelMetrics:
    """The children of one model label, looked up once."""

    __slots__ = ("_requests", "cached_tokens", "codes", "duration_s", "first_byte_s", "output_tokens", "prompt_tokens")

    def __init__(self, metrics: Metrics, label: str) -> None:
        self._requests = metrics.requests
        self.duration_s = metrics.request_duration_s.labels(label)
        self.first_byte_s = metrics.first_byte_s.labels(label)
        self.prompt_tokens = metrics.tokens.labels(label, "prompt")
        self.output_tokens = metrics.tokens.labels(label, "output")
        self.cached_tokens = metrics.tokens.labels(label, "cached")
        self.codes: dict[int, Counter] = {}

    def count(self, label: str, status: int) -> None:
        """Counts one finished request; status 0 means that the client got none."""
        child = self.codes.get(status)
        if child is None:
            child = self.codes[status] = self._requests.labels(label, str(status))
        child.inc()


class Metrics:
    """All metrics of one process, in a registry of their own so that tests may have several."""

    def __init__(self, version: str) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter("waypost_requests", "Requests finished.", ["model", "code"], registry=registry)
        self.request_duration_s = Histogram(
            "waypost_request_duration_seconds",
            "From receiving a request to its end.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_byte_s = Histogram(
            "waypost_time_to_first_token_seconds",
            "From receiving a request to the first body byte of its answer (for streams: the first token).",
            ["model"],
            buckets=_FIRST_BYTE,
            registry=registry,
        )
        self.tokens = Counter("waypost_tokens", "Tokens engines reported.", ["model", "kind"], registry=registry)
        self.decision_s = Histogram(
            "waypost_decision_duration_seconds",
            "Snapshot, scheduling and reservation.",
            buckets=_DECISION,
            registry=registry,
        )
        self.selected = Counter(
            "waypost_endpoint_selected", "Decisions for an endpoint.", ["endpoint"], registry=registry
        )
        self.rejections = Counter(
            "waypost_rejections", "Requests nobody was chosen for.", ["reason"], registry=registry
        )
        self.attempts_failed = Counter(
            "waypost_attempts_failed",
            "Attempts that ended before the first byte.",
            ["endpoint", "kind"],
            registry=registry,
        )
        self.evictions = Counter("waypost_evictions", "Requests given up by the brain.", ["reason"], registry=registry)
        self.standing_changes = Counter(
            "waypost_endpoint_standing_changes",
            "Changes of an endpoint's standing.",
            ["endpoint", "standing"],
            registry=registry,
        )
        self.scrape_s = Histogram(
            "waypost_scrape_duration_seconds", "Successful scrapes.", buckets=_FIRST_BYTE, registry=registry
        )
        self.scrape_errors = Counter("waypost_scrape_errors", "Failed scrapes.", ["endpoint"], registry=registry)
        self.bodies_bytes = Gauge("waypost_request_bodies_bytes", "Request bodies held in memory.", registry=registry)
        self.extproc_streams = Gauge("waypost_extproc_streams", "Open ext-proc streams.", registry=registry)
        self.disconnects = Counter(
            "waypost_client_disconnects", "Clients that left before their answer ended.", registry=registry
        )
        info = Gauge(
            "waypost_build_info", "Always 1; the version is the label.", ["version", "python"], registry=registry
        )
        info.labels(version, platform.python_version()).set(1)
        self.reference: ReferenceMetrics | None = None
        self._version = version
        self._models: dict[str, tuple[str, ModelMetrics]] = {}
        self._selected: dict[str, Counter] = {}

    def model(self, name: str | None) -> tuple[str, ModelMetrics]:
        """The label value and the children for a model; beyond MODELS_MAX names everything is `other`."""
        key = name or ""
        found = self._models.get(key)
        if found is None:
            label = key if len(self._models) < MODELS_MAX and len(key) <= 256 else "other"
            found = self._models.get(label) or (label, ModelMetrics(self, label))
            if len(self._models) <= MODELS_MAX:
                self._models[label] = found
        return found

    def chosen(self, endpoint_id: str) -> None:
        """Counts a decision for an endpoint."""
        child = self._selected.get(endpoint_id)
        if child is None:
            child = self._selected[endpoint_id] = self.selected.labels(endpoint_id)
        child.inc()

    def forget(self, endpoint_ids: Iterable[str]) -> None:
        """Drops the series of endpoints that are gone, so that pods that come and go do not grow the page for ever."""
        gone = frozenset(endpoint_ids)
        for name in gone:
            self._selected.pop(name, None)
        for metric in (self.selected, self.attempts_failed, self.standing_changes, self.scrape_errors):
            for name in gone:
                metric.remove_by_labels({"endpoint": name})

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Exports the endpoints' gauges, taken from a snapshot whenever the page is asked for."""
        self.registry.register(_EndpointCollector(snapshot))

    def watch_prefixes(self, figures: PrefixFigures) -> None:
        """Exports what is known of the engines' caches."""
        self.registry.register(PrefixCollector(figures))

    def watch_replicas(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Exports how sharing with other replicas goes: `waypost_shared_*`."""
        self.registry.register(_SharedCollector(figures))

    def watch_sources(self, ages_s: Callable[[], Mapping[str, float]]) -> None:
        """Exports how long ago each source that listens to something last heard of it."""
        self.registry.register(_SourceCollector(ages_s))

    def show_reference(
        self,
        snapshot: Callable[[], Snapshot],
        flights: Callable[[], Iterable[Flight]],
        pools: Callable[[], Sequence[str]],
    ) -> None:
        """Has the page say what it can under the names of the reference pickers too."""
        self.reference = ReferenceMetrics(
            snapshot=snapshot,
            flights=flights,
            pools=pools,
            decisions=self.decision_s,
            rejections=self.rejections,
            version=self._version,
        )
        self.registry.register(self.reference)


class _EndpointCollector(Collector):
    """Gauges of all endpoints as of one snapshot."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield _family("waypost_endpoint_waiting", "Requests waiting, estimated.", snapshot, lambda s: s.waiting)
        yield _family("waypost_endpoint_running", "Requests running, estimated.", snapshot, lambda s: s.running)
        yield _family("waypost_endpoint_inflight", "Our requests in flight.", snapshot, lambda s: s.in_flight)
        yield _family("waypost_endpoint_inflight_tokens", "Our tokens there.", snapshot, lambda s: s.in_flight_tokens)
        yield _family(
            "waypost_endpoint_kv_usage_ratio",
            "KV cache in use.",
            snapshot,
            lambda s: s.signals.kv_usage if s.signals is not None else None,
        )
        yield _family(
            "waypost_signal_age_seconds",
            "Age of the last scrape.",
            snapshot,
            lambda s: snapshot.now - s.signals.at if s.signals is not None else None,
        )
        standing = GaugeMetricFamily("waypost_endpoints", "Endpoints by standing.", labels=["standing"])
        for value in Standing:
            standing.add_metric([value.value], sum(state.standing is value for state in snapshot.states))
        yield standing


class _SharedCollector(Collector):
    """The state of what replicas share."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for name, value in self._figures().items():
            yield GaugeMetricFamily(f"waypost_shared_{name}", f"Shared state of replicas: {name}.", value=value)


class _SourceCollector(Collector):
    """The age of what each source says, in seconds."""

    def __init__(self, ages_s: Callable[[], Mapping[str, float]]) -> None:
        self._ages_s = ages_s

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "waypost_source_sync_age_seconds", "Since the source was last heard of.", labels=["source"]
        )
        for source, age_s in self._ages_s().items():
            family.add_metric([source], age_s)
        yield family


def _family(
    name: str, text: str, snapshot: Snapshot, read: Callable[[EndpointState], float | None]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["endpoint"])
    for state in snapshot.states:
        value = read(state)
        if value is not None:
            family.add_metric([state.endpoint.id], value)
    return family
