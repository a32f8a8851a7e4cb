"""The ``/metrics`` page of a simulated SGLang: names, types and labels of SGLang 0.5.23, numbers of the physics.

Only the families that routers and dashboards read. SGLang counts prompts, answers and requests when a request ends;
``realtime_tokens`` moves with every step. Bucket bounds are those of the vLLM page. The help texts are ours.
"""

from __future__ import annotations

from sim.exposition import Page
from sim.meter import Gauges, Meter
from sim.physics import Engine


def render(engine: Engine, meter: Meter, *, model: str, gauges: Gauges, rank: int = 0) -> bytes:
    """The whole page, UTF-8. ``rank`` is the data-parallel rank, told from 1 on."""
    labels = {"model_name": model, "engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
    if rank:
        labels["dp_rank"] = str(rank)
    page = Page(labels, None)
    _render_gauges(page, engine, gauges)
    _render_counters(page, engine, meter)
    for name, text, histogram in (
        ("time_to_first_token_seconds", "Time to the first token.", meter.first_token),
        ("inter_token_latency_seconds", "Time between tokens.", meter.inter_token),
        ("e2e_request_latency_seconds", "Time from arrival to end.", meter.total),
        ("queue_time_seconds", "Time in the queue.", meter.queue),
        ("request_time_per_output_token_seconds", "Mean time per token of a request.", meter.per_output_token),
    ):
        page.histogram("sglang:" + name, text, histogram)
    return page.rendered()


def _render_gauges(page: Page, engine: Engine, gauges: Gauges) -> None:
    profile, pool = engine.profile, engine.pool
    queries = engine.prefix_queries_total
    used = round(gauges.kv_usage * profile.kv_tokens)
    cached = pool.idle * profile.block_size
    values = {
        "num_running_reqs": (gauges.running, "Requests in the batch."),
        "num_queue_reqs": (gauges.capacity_waiting + gauges.deferred_waiting, "Requests in the queue."),
        "token_usage": (gauges.kv_usage, "Share of the KV cache in use, 0 to 1."),
        "full_token_usage": (gauges.kv_usage, "The same for full attention."),
        "num_used_tokens": (used, "KV cache tokens in use."),
        "kv_evictable_tokens": (cached, "Tokens cached and not in use."),
        "kv_available_tokens": (profile.kv_tokens - used - cached, "Tokens neither in use nor cached."),
        "cache_hit_rate": (engine.prefix_hits_total / queries if queries else 0, "Share of prompt tokens cached."),
        "max_total_num_tokens": (profile.kv_tokens, "Size of the KV cache in tokens."),
        "page_size": (profile.block_size, "Tokens per page."),
        "num_pages": (profile.kv_blocks, "Pages of the KV cache."),
        "context_len": (profile.max_model_len, "Longest context."),
    }
    for name, (value, text) in values.items():
        page.gauge("sglang:" + name, text, [({}, value)])


def _render_counters(page: Page, engine: Engine, meter: Meter) -> None:
    ended = sum(meter.prompt_tokens.counts)
    page.counter("sglang:prompt_tokens", "Prompt tokens of ended requests.", [({}, meter.prompt_tokens.total)])
    page.counter(
        "sglang:generation_tokens", "Generated tokens of ended requests.", [({}, meter.generation_tokens.total)]
    )
    cached = engine.prefix_hits_total
    page.counter("sglang:cached_tokens", "Cached prompt tokens.", [({"cache_source": "device"}, cached)])
    page.counter("sglang:num_requests", "Ended requests.", [({}, ended)])
    page.counter("sglang:num_aborted_requests", "Aborted requests.", [({}, engine.aborted_total)])
    modes = {
        "prefill_compute": max(0, engine.prompt_tokens_total - cached),
        "prefill_cache": cached,
        "decode": engine.generation_tokens_total,
    }
    series = [({"mode": mode}, count) for mode, count in modes.items()]
    page.counter("sglang:realtime_tokens", "Tokens of every step, by origin.", series)
