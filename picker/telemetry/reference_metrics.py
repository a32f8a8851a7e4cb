"""The metrics page under the names of the reference endpoint pickers too, for dashboards and autoscalers that exist.

Counts finished requests in plain tables and makes families of them when somebody asks for the page; gauges of pools
come from a snapshot then, and the scheduler's durations are read off our own histogram. Differences that are meant:

* Requests count from their decision on, as there, but once: earlier attempts of one request do not.
* `fairness_id` is always `default-flow`. A model gets series of its own when an endpoint lists it or has answered for
  it other than with a 4xx; the rest is `other` and counts when it ends. Anybody can invent names.
* Scheduling includes the snapshot and the reservation; failed scheduling attempts have no model.

Not offered, since nothing here knows the figures or a request would have to pay for them: `request_size_bytes`,
`response_size_bytes`, `request_streaming_itl_seconds`, `request_processing_duration_seconds`,
`response_processing_duration_seconds`, `plugin_duration_seconds`, `plugin_data_scope_violations_total`,
`model_rewrite_decisions_total`, `datalayer_*` (see `waypost_scrape_errors_total`), `inflight_*` (see
`waypost_endpoint_inflight`), `extproc_stream*` (see `waypost_extproc_streams`), predictions and their SLOs, and what
there is no such thing for: `flow_control_*`, `prefix_indexer_*`, `kv_cache_*`, `encoder_cache_*`, `disagg_*`, `pd_*`,
`program_aware_*`. Nor the names from before 1.0, `inference_model_*`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from math import inf

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from picker.core.events import Outcome
from picker.core.ledger import Flight
from picker.core.record import RequestRecord
from picker.core.values import Snapshot
from picker.telemetry.reference_names import (
    BOUNDS,
    EPP,
    EXTENSION,
    FLOW,
    HISTOGRAMS,
    MODEL,
    OBJECTIVE,
    SCHEDULER_S,
    Measure,
)
from picker.telemetry.reference_pools import place_of, pool_gauges

# Model names with series of their own; the reference has the same bound.
NAMES_MAX = 1000
# Combinations of model, target and priority. Each name has few of them.
FLOWS_MAX = 2000
# Combinations of target model and endpoint.
ATTEMPTS_MAX = 10_000
OTHER = "other"
FAIRNESS = "default-flow"

_ERROR_CODES = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    412: "PreconditionFailed",
    429: "ResourceExhausted",
    500: "Internal",
    503: "ServiceUnavailable",
}
_ENDED_BADLY = (Outcome.FAILED, Outcome.TIMEOUT)

_FlowKey = tuple[str, str, int]
"""Label values of the model and the target model, and the priority."""
_AttemptKey = tuple[str, str]
"""Label value of the target model, and the endpoint's id; empty for the rest."""


class _Buckets:
    """A histogram's numbers. Not its children of prometheus_client: two families show them, in sums too."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: _Buckets) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def show(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        family.add_metric(labels, list(zip(_edges(self.bounds), accumulate(self.counts), strict=True)), self.total)


class _Flow:
    """What was counted for one model, target and priority. `told` is the highest count of requests ever shown."""

    __slots__ = ("errors", "measures", "requests", "told")

    def __init__(self) -> None:
        self.requests = 0
        self.told = 0
        self.errors: Tally[str] = Tally()
        self.measures: dict[Measure, _Buckets] = {}

    def observe(self, measure: Measure, value: float) -> None:
        buckets = self.measures.get(measure)
        if buckets is None:
            buckets = self.measures[measure] = _Buckets(BOUNDS[measure])
        buckets.observe(value)


class _InFlight:
    """Requests in flight. `running` are all of them; `requests` and `attempts` those that will be recorded yet, under
    the labels they have already.
    """

    __slots__ = ("attempts", "requests", "running")

    def __init__(self) -> None:
        self.running: Tally[_FlowKey] = Tally()
        self.requests: Tally[_FlowKey] = Tally()
        self.attempts: Tally[_AttemptKey] = Tally()


class ReferenceMetrics(Collector):
    """Takes finished requests and shows everything. `flights` are the requests in flight, `pools` all pools there are
    (`namespace/name`), `decisions` and `rejections` our own metrics of those.
    """

    def __init__(
        self,
        *,
        snapshot: Callable[[], Snapshot],
        flights: Callable[[], Iterable[Flight]],
        pools: Callable[[], Sequence[str]],
        decisions: Histogram,
        rejections: Counter,
        version: str,
    ) -> None:
        self._snapshot = snapshot
        self._flights = flights
        self._pools = pools
        self._decisions = decisions
        self._rejections = rejections
        self._version = version
        self._names: set[str] = set()
        self._flows: dict[_FlowKey, _Flow] = {}
        self._attempts: Tally[_AttemptKey] = Tally()
        self._attempts_told: dict[_AttemptKey, int] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families are not known before they are asked for."""
        return []

    # -- counting ------------------------------------------------------------------------------------------------------

    def record(self, record: RequestRecord) -> None:
        """Takes in one finished request."""
        chosen, status = record.endpoint, record.status
        answered = chosen is not None and record.outcome != Outcome.CLIENT_GONE and not 400 <= status < 500
        flow = self._flow(self._key(record.model, record.target_model, record.priority, admit=answered))
        code = error_code(record)
        if code:
            flow.errors[code] += 1
        if chosen is None:
            return
        flow.requests += 1
        self._attempts[self._attempt_key(record.target_model or record.model, chosen)] += 1
        if record.first_byte_s is not None and status < 400:
            flow.observe(Measure.TTFT_STREAM if record.stream else Measure.TTFT_WHOLE, record.first_byte_s)
        if record.outcome == Outcome.COMPLETED:
            flow.observe(Measure.DURATION, record.duration_s)
        self._record_usage(record, flow)

    def _record_usage(self, record: RequestRecord, flow: _Flow) -> None:
        usage = record.usage
        if usage is None:
            return
        if usage.prompt_tokens:
            flow.observe(Measure.INPUT_TOKENS, usage.prompt_tokens)
        if usage.cached_tokens is not None:
            flow.observe(Measure.CACHED_TOKENS, usage.cached_tokens)
        output = usage.output_tokens
        if not output:
            return
        flow.observe(Measure.OUTPUT_TOKENS, output)
        if record.outcome != Outcome.COMPLETED:
            return
        flow.observe(Measure.NTPOT, record.duration_s / output)
        if record.stream and record.first_byte_s is not None and output > 1:
            flow.observe(Measure.TPOT, (record.duration_s - record.first_byte_s) / (output - 1))

    def _label(self, name: str | None, *, admit: bool) -> str:
        if not name or name in self._names:
            return name or ""
        if not admit or len(self._names) >= NAMES_MAX or len(name) > 256:
            return OTHER
        self._names.add(name)
        return name

    def _key(self, model: str | None, target: str | None, priority: int, *, admit: bool) -> _FlowKey:
        label = self._label(model, admit=admit)
        # A client's name for a model is as good as the model it stands for.
        key = label, self._label(target, admit=admit) if target is not None else label, priority
        return key if key in self._flows or len(self._flows) < FLOWS_MAX else (OTHER, OTHER, 0)

    def _flow(self, key: _FlowKey) -> _Flow:
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow()
        return flow

    def _attempt_key(self, target: str | None, endpoint_id: str) -> _AttemptKey:
        key = self._label(target, admit=False), endpoint_id
        return key if key in self._attempts or len(self._attempts) < ATTEMPTS_MAX else (OTHER, "")

    # -- showing -------------------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """All families, as of now. Requests may end between two families, but not before the first one."""
        snapshot = self._snapshot()
        flying = self._in_flight(snapshot)
        attempts = self._attempts_shown(snapshot, flying)
        yield from self._requests(flying)
        yield from self._histograms()
        yield from self._scheduler(attempts)
        yield from pool_gauges(snapshot, self._pools())

    def _in_flight(self, snapshot: Snapshot) -> _InFlight:
        """A model some endpoint lists gets its series before its first request has ended."""
        served = frozenset[str]().union(*(state.models for state in snapshot.states if state.models))
        flying = _InFlight()
        for flight in self._flights():
            request = flight.request
            target = request.target_model or request.model
            key = self._key(request.model, request.target_model, request.priority, admit=target in served)
            self._flow(key)
            flying.running[key] += 1
            if flight.left or OTHER in key:
                continue
            attempt = self._attempt_key(target, flight.endpoint_id)
            self._attempts.setdefault(attempt, 0)
            flying.requests[key] += 1
            flying.attempts[attempt] += 1
        return flying

    def _requests(self, flying: _InFlight) -> Iterator[Metric]:
        text, error_text, running_text = "Requests an endpoint was chosen for.", "Requests that failed.", "In flight."
        total = CounterMetricFamily(f"{EPP}request", text, labels=FLOW)
        older_total = CounterMetricFamily(f"{OBJECTIVE}request", text, labels=(*MODEL, "priority"))
        errors = CounterMetricFamily(f"{EPP}request_error", error_text, labels=(*FLOW, "error_code"))
        older_errors = CounterMetricFamily(f"{OBJECTIVE}request_error", error_text, labels=(*MODEL, "error_code"))
        gauge = GaugeMetricFamily(f"{EPP}request_running", running_text, labels=FLOW)
        older_gauge = GaugeMetricFamily(f"{OBJECTIVE}running_requests", running_text, labels=MODEL[:1])
        all_errors: Tally[tuple[str, str, str]] = Tally()
        all_running: Tally[str] = Tally()
        for key, flow in self._flows.items():
            model, target, priority = key
            labels = _labels(key)
            # A request that moves to another series must not make a counter go back: that would read as a restart.
            flow.told = max(flow.told, flow.requests + flying.requests[key])
            total.add_metric(labels, flow.told)
            older_total.add_metric((model, target, str(priority)), flow.told)
            gauge.add_metric(labels, flying.running[key])
            all_running[model] += flying.running[key]
            for code, count in flow.errors.items():
                errors.add_metric((*labels, code), count)
                all_errors[model, target, code] += count
        for error_labels, count in all_errors.items():
            older_errors.add_metric(error_labels, count)
        for model, count in all_running.items():
            if model:
                older_gauge.add_metric((model,), count)
        yield from (total, older_total, errors, older_errors, gauge, older_gauge)

    def _histograms(self) -> Iterator[Metric]:
        for names in HISTOGRAMS:
            family = HistogramMetricFamily(f"{EPP}{names.name}", names.text, labels=names.labels)
            sums: dict[tuple[str, str], _Buckets] = {}
            for key, flow in self._flows.items():
                for measure, streaming in names.measures:
                    buckets = flow.measures.get(measure)
                    if buckets is not None:
                        buckets.show(family, (*_labels(key), *streaming))
                        sums.setdefault(key[:2], _Buckets(names.bounds)).add(buckets)
            yield family
            if names.older:
                older = HistogramMetricFamily(names.older, names.text, labels=MODEL)
                for labels, buckets in sums.items():
                    buckets.show(older, labels)
                yield older

    def _scheduler(self, attempts: Mapping[tuple[str, ...], int]) -> Iterator[Metric]:
        failures = sum(_values(self._rejections, "_total").values())
        counts = {float(bound): count for bound, count in _values(self._decisions, "_bucket").items()}
        buckets = [*zip(_edges(SCHEDULER_S), (counts[bound] for bound in (*SCHEDULER_S, inf)), strict=True)]
        total_s = _values(self._decisions, "_sum")[""]
        for prefix, endpoint_label in ((EPP, "endpoint_name"), (EXTENSION, "pod_name")):
            family = CounterMetricFamily(
                f"{prefix}scheduler_attempts",
                "Decisions that chose an endpoint, and that chose none.",
                labels=("status", "target_model_name", endpoint_label, "namespace", "port"),
            )
            for labels, count in attempts.items():
                family.add_metric(("success", *labels), count)
            family.add_metric(("failure", "", "", "", ""), failures)
            yield family
            durations = HistogramMetricFamily(f"{prefix}scheduler_e2e_duration_seconds", "Making a decision.")
            durations.add_metric((), buckets, total_s)
            yield durations
            info = GaugeMetricFamily(f"{prefix}info", "Always 1; what this is.", labels=("commit", "build_ref"))
            info.add_metric(("", f"waypost-{self._version}"), 1)
            yield info

    def _attempts_shown(self, snapshot: Snapshot, flying: _InFlight) -> dict[tuple[str, ...], int]:
        """Successful attempts by label values. Forgets those of endpoints that are gone."""
        endpoints = {state.endpoint.id: state.endpoint for state in snapshot.states}
        shown: Tally[tuple[str, ...]] = Tally()
        for key in list(self._attempts):
            target, endpoint_id = key
            if endpoint_id and endpoint_id not in endpoints:
                del self._attempts[key]
                self._attempts_told.pop(key, None)
                continue
            count = max(self._attempts_told.get(key, 0), self._attempts[key] + flying.attempts[key])
            self._attempts_told[key] = count
            place = place_of(endpoints[endpoint_id]) if endpoint_id else ("", "", "")
            shown[target, *place] += count
        return shown


def error_code(record: RequestRecord) -> str:
    """The reference's word for how a request failed; empty when it did not, or its client left.

    Once an endpoint was chosen the failure is the model server's, unless our door refused the request after that.
    """
    outcome, status = record.outcome, record.status
    if outcome == Outcome.CLIENT_GONE:
        return ""
    if record.endpoint is not None and outcome != Outcome.REJECTED:
        return "ModelServerError" if outcome in _ENDED_BADLY or status >= 400 else ""
    if status in _ERROR_CODES:
        return _ERROR_CODES[status]
    if 400 <= status < 500:
        return "BadRequest"
    return "Unknown" if status >= 500 or outcome != Outcome.COMPLETED else ""


def _labels(key: _FlowKey) -> tuple[str, ...]:
    model, target, priority = key
    return model, target, FAIRNESS, str(priority)


def _values(metric: Counter | Histogram, ending: str) -> dict[str, float]:
    """The samples of one kind by their only label's value, empty without one."""
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in metric.collect()
        for sample in family.samples
        if sample.name.endswith(ending)
    }


@cache
def _edges(bounds: tuple[float, ...]) -> list[str]:
    """The bounds of buckets as Go's client writes them, and infinity: rules compare these texts."""
    texts: Iterable[str] = map(floatToGoString, (*bounds, inf))
    return [text.removesuffix(".0") for text in texts]
