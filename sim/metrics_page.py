"""The ``/metrics`` page of a simulated engine: names, types and labels of vLLM 0.32, numbers of the physics.

Reads the engine and writes text; changes nothing and knows no clock but what it is given. The help texts are ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from sim.physics import Engine
from sim.requests import Emission

CONTENT_TYPE: Final = b"text/plain; version=1.0.0; charset=utf-8"
MAX_LORA_SERIES: Final = 64

_FIRST_TOKEN_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))[:16]

_SUCCESS_REASONS: Final = ("stop", "length", "abort", "error", "repetition")
_CONFIG: Final[Mapping[str, str]] = {
    "_block_size_resolved": "True",
    "cache_dtype": "auto",
    "cache_hit_alignment_tokens": "None",
    "enable_mamba_shared_prefix_checkpoint": "False",
    "enable_prefix_caching": "True",
    "gpu_memory_utilization": "0.92",
    "hash_block_size": "None",
    "is_attention_free": "False",
    "kv_cache_dtype_skip_layers": "[]",
    "kv_cache_layout": "None",
    "kv_cache_memory_bytes": "None",
    "kv_offloading_backend": "native",
    "kv_offloading_size": "None",
    "kv_sharing_fast_prefill": "False",
    "mamba_block_size": "None",
    "mamba_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "mamba_page_size_padded": "None",
    "mamba_ssm_cache_dtype": "float32",
    "num_cpu_blocks": "None",
    "num_gpu_blocks_override": "None",
    "prefix_cache_retention_interval": "0",
    "prefix_caching_hash_algo": "sha256",
    "prefix_match_unit": "None",
    "replayssm_buffer_len": "16",
    "skip_page_size_padded": "None",
    "sliding_window": "None",
    "swa_bounded_replay": "True",
    "use_kda_recoverssm": "False",
    "use_replayssm": "False",
    "user_specified_block_size": "False",
}


def number(value: float) -> str:
    """A sample value as the Python Prometheus client prints it: from 1e6 on with an exponent."""
    text = repr(float(value))
    point = text.find(".")
    if value > 0 and point > 6:
        digits = (text[0] + "." + text[1:point] + text[point + 1 :]).rstrip("0.")
        return f"{digits}e+{point - 1:02d}"
    return text


def label_set(labels: Mapping[str, str]) -> str:
    """``a="1",b="2"`` in alphabetical order, escaped."""
    pairs = []
    for name in sorted(labels):
        value = labels[name].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{value}"')
    return ",".join(pairs)


class Histogram:
    """Counts per bucket, sum and number of observations. ``bounds`` ascend; the last bucket is +Inf."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, *, times: int = 1) -> None:
        """Add ``times`` observations of the same value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Meter:
    """What the page needs beyond the engine's own counters: histograms, adapters seen, the start time (unix, s)."""

    def __init__(self, *, started_at_s: float, max_loras: int | None = None) -> None:
        self.started_at_s = started_at_s
        self.max_loras = max_loras
        self.first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token = Histogram(_PER_TOKEN_S)
        self.per_output_token = Histogram(_PER_TOKEN_S)
        self.total = Histogram(_REQUEST_S)
        self.queue = Histogram(_REQUEST_S)
        self.inference = Histogram(_REQUEST_S)
        self.prefill = Histogram(_REQUEST_S)
        self.decode = Histogram(_REQUEST_S)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        # Old label combinations stay on the page, as in the real engine: the newest timestamp is the true one.
        self.lora_series: dict[tuple[str, str], float] = {}

    def observe(self, emission: Emission) -> None:
        """Add what one emission tells."""
        if emission.first:
            self.first_token.observe(emission.since_last_s)
        elif emission.count:
            self.inter_token.observe(emission.since_last_s / emission.count, times=emission.count)
        summary = emission.summary
        if summary is None:
            return
        self.total.observe(summary.total_s)
        self.queue.observe(summary.queue_s)
        self.inference.observe(summary.total_s - summary.queue_s)
        self.prefill.observe(summary.first_token_s - summary.queue_s)
        self.decode.observe(summary.total_s - summary.first_token_s)
        self.prompt_tokens.observe(summary.prompt_tokens)
        self.generation_tokens.observe(summary.generated_tokens)
        if summary.generated_tokens > 1:
            gap = (summary.total_s - summary.first_token_s) / (summary.generated_tokens - 1)
            self.per_output_token.observe(gap)

    def note_loras(self, engine: Engine, unix_s: float) -> None:
        """Remember which adapters run and wait now."""
        if self.max_loras is None:
            return
        series = (",".join(engine.running_loras), ",".join(engine.waiting_loras))
        self.lora_series[series] = unix_s
        while len(self.lora_series) > MAX_LORA_SERIES:
            del self.lora_series[min(self.lora_series, key=self.lora_series.__getitem__)]


class _Page:
    """Collects the lines of one page."""

    def __init__(self, base: Mapping[str, str], created_at_s: float) -> None:
        self.base = base
        self.lines: list[str] = []
        self._created = number(created_at_s)

    def gauge(self, name: str, text: str, series: Iterable[tuple[Mapping[str, str], float]]) -> None:
        self._family(name, "gauge", text)
        for labels, value in series:
            self._sample(name, label_set({**self.base, **labels}), number(value))

    def counter(self, name: str, text: str, series: Iterable[tuple[Mapping[str, str], float]]) -> None:
        rendered = [(label_set({**self.base, **labels}), value) for labels, value in series]
        self._family(name + "_total", "counter", text)
        for labels_text, value in rendered:
            self._sample(name + "_total", labels_text, number(value))
        self._family(name + "_created", "gauge", text)
        for labels_text, _ in rendered:
            self._sample(name + "_created", labels_text, self._created)

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        self._family(name, "histogram", text)
        running = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            running += count
            le = "+Inf" if bound == float("inf") else number(bound)
            self._sample(name + "_bucket", label_set({**self.base, "le": le}), number(running))
        base = label_set(self.base)
        self._sample(name + "_count", base, number(running))
        self._sample(name + "_sum", base, number(histogram.total))
        self._family(name + "_created", "gauge", text)
        self._sample(name + "_created", base, self._created)

    def _family(self, name: str, kind: str, text: str) -> None:
        self.lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")

    def _sample(self, name: str, labels: str, value: str) -> None:
        self.lines.append(f"{name}{{{labels}}} {value}\n")


class Gauges(msgspec.Struct, frozen=True):
    """What the front end believes about the engine. All zero when the engine has stopped reporting."""

    running: int = 0
    capacity_waiting: int = 0
    deferred_waiting: int = 0
    kv_usage: float = 0.0

    @classmethod
    def of(cls, engine: Engine) -> Gauges:
        """The true values."""
        return cls(engine.running, engine.waiting - engine.deferred, engine.deferred, engine.kv_usage)


def render(engine: Engine, meter: Meter, *, model: str, gauges: Gauges) -> bytes:
    """The whole page, UTF-8."""
    page = _Page({"engine": "0", "model_name": model}, meter.started_at_s)
    _render_gauges(page, gauges)
    _render_counters(page, engine)
    _render_unusual(page, engine, meter, model)
    _render_histograms(page, meter)
    start = (
        "# HELP process_start_time_seconds Start of the process, unix time in seconds.\n"
        "# TYPE process_start_time_seconds gauge\n"
        f"process_start_time_seconds {number(meter.started_at_s)}\n"
    )
    return (start + "".join(page.lines)).encode()


def _render_gauges(page: _Page, gauges: Gauges) -> None:
    waiting = gauges.capacity_waiting + gauges.deferred_waiting
    page.gauge("vllm:num_requests_running", "Requests in the batch.", [({}, gauges.running)])
    page.gauge("vllm:num_requests_waiting", "Requests in the queue.", [({}, waiting)])
    page.gauge(
        "vllm:num_requests_waiting_by_reason",
        "Requests in the queue, by what they wait for.",
        [
            ({"reason": "capacity"}, gauges.capacity_waiting),
            ({"reason": "deferred"}, gauges.deferred_waiting),
        ],
    )
    states = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
    page.gauge(
        "vllm:engine_sleep_state", "Sleep state.", [({"sleep_state": state}, on) for state, on in states.items()]
    )
    page.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", [({}, gauges.kv_usage)])


def _render_counters(page: _Page, engine: Engine) -> None:
    cached = engine.prefix_hits_total
    page.counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", [({}, engine.prefix_queries_total)])
    page.counter("vllm:prefix_cache_hits", "Prompt tokens found cached.", [({}, cached)])
    page.counter("vllm:external_prefix_cache_queries", "Prompt tokens looked up outside.", [({}, 0)])
    page.counter("vllm:external_prefix_cache_hits", "Prompt tokens found outside.", [({}, 0)])
    page.counter("vllm:num_preemptions", "Preemptions.", [({}, engine.preemptions_total)])
    page.counter("vllm:prompt_tokens", "Prompt tokens of requests past prefill.", [({}, engine.prompt_tokens_total)])
    sources = {
        "local_compute": max(0, engine.prompt_tokens_total - cached),
        "local_cache_hit": cached,
        "external_kv_transfer": 0,
    }
    page.counter(
        "vllm:prompt_tokens_by_source", "Prompt tokens, by origin.", [({"source": s}, n) for s, n in sources.items()]
    )
    page.counter("vllm:prompt_tokens_cached", "Prompt tokens not computed.", [({}, cached)])
    page.counter("vllm:generation_tokens", "Generated tokens.", [({}, engine.generation_tokens_total)])
    finished: dict[str, int] = dict.fromkeys(_SUCCESS_REASONS, 0)
    # Aborts are not counted here: the real engine leaves its abort series at 0 too.
    finished |= dict(engine.finished_total.items())
    page.counter(
        "vllm:request_success",
        "Finished requests, by reason.",
        [({"finished_reason": reason}, count) for reason, count in finished.items()],
    )


def _render_unusual(page: _Page, engine: Engine, meter: Meter, model: str) -> None:
    """Families with labels of their own."""
    profile = engine.profile
    base, page.base = page.base, {"model_name": model}
    rejections = {"max_num_queued_reqs": engine.rejected_total, "max_num_queued_tokens": 0}
    page.counter(
        "vllm:admission_rejections",
        "Requests refused at the door.",
        [({"reason": r}, n) for r, n in rejections.items()],
    )
    page.base = {}
    if meter.max_loras is not None:
        series = [
            ({"max_lora": str(meter.max_loras), "running_lora_adapters": run, "waiting_lora_adapters": wait}, at)
            for (run, wait), at in meter.lora_series.items()
        ]
        page.gauge("vllm:lora_requests_info", "Adapters in use; the value is a unix time.", series)
    config = {
        **_CONFIG,
        "block_size": str(profile.block_size),
        "effective_attention_block_size": str(profile.block_size),
        "engine": "0",
        "kv_cache_max_concurrency": str(round(profile.kv_tokens / profile.max_model_len, 2)),
        "kv_cache_size_tokens": str(profile.kv_tokens),
        "num_gpu_blocks": str(profile.kv_blocks),
    }
    page.gauge("vllm:cache_config_info", "The cache configuration, as labels.", [(config, 1)])
    page.base = base


def _render_histograms(page: _Page, meter: Meter) -> None:
    for name, text, histogram in (
        ("request_prompt_tokens", "Prompt tokens per request.", meter.prompt_tokens),
        ("request_generation_tokens", "Generated tokens per request.", meter.generation_tokens),
        ("time_to_first_token_seconds", "Time to the first token.", meter.first_token),
        ("inter_token_latency_seconds", "Time between tokens.", meter.inter_token),
        ("request_time_per_output_token_seconds", "Mean time per token of a request.", meter.per_output_token),
        ("e2e_request_latency_seconds", "Time from arrival to end.", meter.total),
        ("request_queue_time_seconds", "Time in the queue.", meter.queue),
        ("request_inference_time_seconds", "Time in the batch.", meter.inference),
        ("request_prefill_time_seconds", "Time from admission to the first token.", meter.prefill),
        ("request_decode_time_seconds", "Time from the first token to the end.", meter.decode),
    ):
        page.histogram("vllm:" + name, text, histogram)
