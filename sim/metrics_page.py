"""The ``/metrics`` page of a simulated vLLM: names, types and labels of vLLM 0.32, numbers of the physics.

Reads the engine and writes text; changes nothing and knows no clock but what it is given. The help texts are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sim.exposition import Page
from sim.meter import Gauges, Meter
from sim.physics import Engine

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


def render(engine: Engine, meter: Meter, *, model: str, gauges: Gauges, rank: int = 0) -> bytes:
    """The whole page, UTF-8. ``rank`` is the data-parallel rank, the label ``engine``."""
    page = Page({}, meter.started_at_s)
    page.gauge("process_start_time_seconds", "Start of the process, unix time.", [({}, meter.started_at_s)])
    page.base = {"engine": str(rank), "model_name": model}
    _render_gauges(page, gauges)
    _render_counters(page, engine)
    _render_unusual(page, engine, meter, model)
    _render_histograms(page, meter)
    return page.rendered()


def _render_gauges(page: Page, gauges: Gauges) -> None:
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


def _render_counters(page: Page, engine: Engine) -> None:
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


def _render_unusual(page: Page, engine: Engine, meter: Meter, model: str) -> None:
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
        "engine": base["engine"],
        "kv_cache_max_concurrency": str(round(profile.kv_tokens / profile.max_model_len, 2)),
        "kv_cache_size_tokens": str(profile.kv_tokens),
        "num_gpu_blocks": str(profile.kv_blocks),
    }
    page.gauge("vllm:cache_config_info", "The cache configuration, as labels.", [(config, 1)])
    page.base = base


def _render_histograms(page: Page, meter: Meter) -> None:
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
