"""Writes a LoRA adapter with random weights for the tiny model, in the layout of PEFT. Run by vLLM's own Python.

python make_adapter.py MODEL_DIRECTORY ADAPTER_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file  # type: ignore[import-not-found]

RANK = 8
MODULES = ("q_proj", "v_proj")


def main(model: Path, adapter: Path) -> None:
    """Writes the adapter; the same at every call."""
    torch.manual_seed(1)
    shape = json.loads((model / "config.json").read_text())
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    outputs = {"q_proj": heads * head, "v_proj": shape["num_key_value_heads"] * head}
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden)
            weights[f"{name}.lora_B.weight"] = torch.randn(outputs[module], RANK)
    adapter.mkdir(parents=True, exist_ok=True)
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(MODULES),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
