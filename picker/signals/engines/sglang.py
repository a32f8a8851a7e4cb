"""SGLang, started with `--enable-metrics`. Names as read in 0.5.23.

With priority scheduling there is one series per priority and one with `priority=""`, which is the total. Every
tensor-parallel rank may publish its own copy. `prompt_tokens_total` and `generation_tokens_total` move only when a
request ends, which says nothing about a long answer; `realtime_tokens_total` moves with every batch (in some versions
only at each log interval, 40 decode steps). Older versions lack it, and then progress is unknown.
"""

from __future__ import annotations

from picker.signals.engine import Engine, Figure

ENGINE = Engine(
    name="sglang",
    metrics_path="/metrics",
    families=(("sglang:",),),
    waiting=(Figure("sglang:num_queue_reqs", where={"priority": ""}),),
    running=(Figure("sglang:num_running_reqs", where={"priority": ""}),),
    kv_usage=(Figure("sglang:token_usage", where={"priority": ""}),),
    block_tokens=(Figure("sglang:page_size"), Figure("sglang:cache_config_info", label="page_size")),
    blocks=(Figure("sglang:num_pages"), Figure("sglang:cache_config_info", label="num_pages")),
    progress=(Figure("sglang:realtime_tokens_total"),),
    # 40 steps of the slowest models, at 10 a second.
    progress_lag_s=4.0,
    copies=("tp_rank", "pp_rank", "moe_ep_rank"),
)
