"""SGLang, started with `--enable-metrics`. Names as read in 0.5.23.

With priority scheduling there is one series per priority and one with `priority=""`, which is the total. Every
tensor-parallel rank may publish its own copy. `prompt_tokens_total` and `generation_tokens_total` move only when a
request ends, which says nothing about a long answer; `realtime_tokens_total` moves with the batches. Before 0.5.6 it
is missing, and then progress is unknown.
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
    copies=("tp_rank", "pp_rank", "moe_ep_rank"),
)
