"""Which engine a pod runs, as far as labels say. Who does not say is asked later, elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

UNKNOWN = "auto"

_LABELS = (
    "llm-d.ai/engine-type",
    "inference.networking.k8s.io/engine-type",
    "model.aibrix.ai/engine",
    "alibabacloud.com/inference_backend",
    "alibabacloud.com/inference-backend",
    # Seen in manifests for Alibaba Cloud; unverified.
    "inference-backend",
)
_NAMES = {
    "vllm": "vllm",
    "sglang": "sglang",
    **dict.fromkeys(("trtllm", "trt-llm", "trtllm-serve", "tensorrt-llm"), "trtllm"),
    "nim": "nim",
}


def engine_of(labels: Mapping[str, str], *told: str) -> str:
    """A name of the engine tables: from the pod's labels, else the first that is `told`, else `auto`."""
    for label in _LABELS:
        name = _named(labels.get(label, ""))
        if name:
            return name
    # The NIM operator writes this on every pod of a NIMService.
    if labels.get("app.kubernetes.io/part-of") == "nim-service":
        return "nim"
    return next(filter(None, told), UNKNOWN)


def _named(value: str) -> str:
    value = value.strip().lower()
    return "triton" if value.startswith("triton") else _NAMES.get(value, "")
