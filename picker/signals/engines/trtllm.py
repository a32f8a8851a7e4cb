"""TensorRT-LLM (`trtllm-serve`). Prometheus text is at `/prometheus/metrics`; `/metrics` is JSON.

The queue gauges need `return_perf_metrics` and `enable_iter_perf_stats`; without them the page has no load and
routing uses in-flight counts. Its token counters move only when a request ends, so there is no progress figure.
"""

from __future__ import annotations

from picker.signals.engine import Engine, Figure

ENGINE = Engine(
    name="trtllm",
    metrics_path="/prometheus/metrics",
    families=(("trtllm_",),),
    waiting=(Figure("trtllm_num_requests_waiting"),),
    running=(Figure("trtllm_num_requests_running"),),
    kv_usage=(Figure("trtllm_kv_cache_utilization"),),
    block_tokens=(Figure("trtllm_kv_cache_tokens_per_block"),),
    blocks=(Figure("trtllm_kv_cache_max_blocks"),),
)
