"""Microseconds per body for parsing, in-place edits and usage scanning: medians at 1 KB, 32 KB and 400 KB.

Run as `python -m bench.openai_bodies`. One process, no I/O; figures are for this machine only.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

from picker.openai.edit import remove_members, remove_members_within, set_string
from picker.openai.parse import parse_body
from picker.openai.rewrite import restore_model
from picker.openai.routes import allowed, match_suffix
from picker.openai.usage import UsageScanner, usage_from_json

SIZES = (("1 KB", 1_000), ("32 KB", 32_000), ("400 KB", 400_000))
REPEATS = 15
TARGET_S = 0.01


def chat_body(size_bytes: int) -> bytes:
    """A conversation of about `size_bytes`: prose with quotes and line ends, turns of 600 characters."""
    turn = ('She said "go on" and listed:\n- one, two;\n- three [four] {five}.\n' * 10)[:600]
    turns = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": turn[: size_bytes - 200]}
        for i in range(max(1, size_bytes // 640))
    ]
    body = {"model": "base-8b", "messages": turns, "stream": True, "max_tokens": 256, "temperature": 0.2}
    return json.dumps({**body, "seed": 2**70, "nvext": {"dp_rank": 1, "annotations": []}, "user": "u-1"}).encode()


def ids_body(size_bytes: int) -> bytes:
    """A completion request whose prompt is a list of token ids."""
    return json.dumps({"model": "base-8b", "prompt": [31_337] * (size_bytes // 7), "max_tokens": 1}).encode()


def median_us(call: Callable[[], object]) -> float:
    """Median microseconds of `call` over a few batches of about `TARGET_S` each."""
    begin = time.perf_counter()
    call()
    once_s = max(time.perf_counter() - begin, 1e-7)
    count = max(1, int(TARGET_S / once_s))
    batches = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        batches.append((time.perf_counter() - begin) / count)
    return statistics.median(batches) * 1e6


def by_size() -> dict[str, list[float]]:
    """Row name -> medians in the order of SIZES."""
    rows: dict[str, list[float]] = {}
    for _, size_bytes in SIZES:
        chat, ids = chat_body(size_bytes), ids_body(size_bytes)
        duplicated = b'{"model":"x",' + chat[1:]
        answer = json.dumps(
            {
                "id": "c-1",
                "model": "base-8b",
                "choices": [{"message": {"role": "assistant", "content": "word " * (size_bytes // 5)}}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 9},
            }
        ).encode()
        cases: dict[str, Callable[[], object]] = {
            "parse chat": partial(parse_body, "/v1/chat/completions", chat),
            "parse token ids": partial(parse_body, "/v1/completions", ids),
            "set model": partial(set_string, chat, "model", "base-8b-v2"),
            "set model, key twice": partial(set_string, duplicated, "model", "base-8b-v2"),
            "remove 2 members": partial(remove_members, chat, ("user", "seed")),
            "remove within nvext": partial(remove_members_within, chat, "nvext", ("dp_rank",)),
            "usage of an answer": partial(usage_from_json, answer),
            "restore model": partial(restore_model, answer, "base-8b", "alias"),
        }
        for name, call in cases.items():
            rows.setdefault(name, []).append(median_us(call))
    return rows


def small() -> dict[str, float]:
    """Row name -> median microseconds of calls that do not depend on a body size."""
    delta = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"delta":{"content":" word"}}]}\n\n'
    final = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}\n\n'
    scanner = UsageScanner()
    return {
        "allowed path": median_us(partial(allowed, "/v1/chat/completions")),
        "suffix match": median_us(partial(match_suffix, "/team-a/v1/chat/completions?x=1")),
        "scan one delta event": median_us(partial(scanner.feed, delta)),
        "scan one usage event": median_us(partial(scanner.feed, final)),
    }


def main() -> None:
    """Print both tables."""
    print(f"{'median us per call':<24}" + "".join(f"{label:>10}" for label, _ in SIZES))
    for name, medians in by_size().items():
        print(f"{name:<24}" + "".join(f"{value:>10.1f}" for value in medians))
    for name, value in small().items():
        print(f"{name:<24}{value:>10.2f}")
    one_string = json.dumps({"model": "m", "prompt": "x" * 2_000_000}).encode()
    print(f"{'set model, 2 MB string':<24}{median_us(partial(set_string, one_string, 'model', 'n')):>10.1f}")


if __name__ == "__main__":
    main()
