"""The engines whose metrics are understood: one small table per file, and nothing but tables.

The order is the order of recognition: engines that pass another's metrics through (Triton with its vLLM backend, a
vLLM-based NIM) show the names of the engine that does the work, so that engine comes first. NIM's bare names are the
weakest evidence and come last.
"""

from __future__ import annotations

from collections.abc import Mapping

from picker.signals.engine import Engine
from picker.signals.engines import nim, sglang, triton, trtllm, vllm

BUILTIN: Mapping[str, Engine] = {
    table.name: table for table in (vllm.ENGINE, sglang.ENGINE, trtllm.ENGINE, triton.ENGINE, nim.ENGINE)
}


def identify(page: bytes) -> Engine | None:
    """The engine that wrote this page; None when no engine's families are on it."""
    return next((engine for engine in BUILTIN.values() if engine.wrote(page)), None)
