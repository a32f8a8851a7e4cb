"""Triton Inference Server, alone or with the TensorRT-LLM backend. Metrics have their own port (8002): `metrics_url`.

`nv_inference_exec_count` is a counter, although it is sometimes read as running requests. Nothing on the page moves
during an answer.
"""

from __future__ import annotations

from picker.signals.engine import Engine, Figure

ENGINE = Engine(
    name="triton",
    metrics_path="/metrics",
    families=(("nv_trt_llm_", "nv_inference_"),),
    waiting=(
        Figure("nv_trt_llm_request_metrics", where={"request_type": "waiting"}),
        Figure("nv_inference_pending_request_count"),
    ),
    running=(Figure("nv_trt_llm_request_metrics", where={"request_type": "scheduled"}),),
    kv_usage=(Figure("nv_trt_llm_kv_cache_block_metrics", where={"kv_cache_block_type": "fraction"}),),
    block_tokens=(Figure("nv_trt_llm_kv_cache_block_metrics", where={"kv_cache_block_type": "tokens_per"}),),
    blocks=(Figure("nv_trt_llm_kv_cache_block_metrics", where={"kv_cache_block_type": "max"}),),
)
