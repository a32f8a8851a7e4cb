"""vLLM. Names as seen on 0.32, with the names of earlier versions behind them.

`num_requests_waiting_by_reason` splits `num_requests_waiting` and must not be added to it. Token counters move in
every engine step.
"""

from __future__ import annotations

from picker.signals.engine import Engine, Figure

ENGINE = Engine(
    name="vllm",
    metrics_path="/metrics",
    families=(("vllm:",),),
    waiting=(Figure("vllm:num_requests_waiting"),),
    running=(Figure("vllm:num_requests_running"),),
    kv_usage=(Figure("vllm:kv_cache_usage_perc"), Figure("vllm:gpu_cache_usage_perc")),
    block_tokens=(Figure("vllm:cache_config_info", label="block_size"),),
    blocks=(Figure("vllm:cache_config_info", label="num_gpu_blocks"),),
    progress=(Figure("vllm:prompt_tokens_total"), Figure("vllm:generation_tokens_total")),
    lora="vllm:lora_requests_info",
)
