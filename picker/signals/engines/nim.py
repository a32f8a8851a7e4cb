"""NVIDIA NIM for LLMs: vLLM's figures without a prefix, at `/v1/metrics`, written in every engine step."""

from __future__ import annotations

from picker.signals.engine import Engine, Figure

ENGINE = Engine(
    name="nim",
    metrics_path="/v1/metrics",
    families=(("num_requests_running{", "num_requests_running "), ("gpu_cache_usage_perc", "num_request_max")),
    waiting=(Figure("num_requests_waiting"),),
    running=(Figure("num_requests_running"),),
    kv_usage=(Figure("gpu_cache_usage_perc"), Figure("kv_cache_usage_perc")),
    progress=(Figure("prompt_tokens_total"), Figure("generation_tokens_total")),
)
