"""`python -m bench.prompt_keys`: CPU that the keys of a prompt cost, by size and by what is known already.

Trains a tokenizer on the sources of the standard library, unless `--tokenizer` names a model directory. Asking engines
is not measured: their CPU is theirs, ours is two small HTTP messages. CPU time of the whole process, best and median of
the runs; wall time on a shared machine says little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import tokenizers
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from picker.core.prefix.keys import chain
from picker.openai.parse import BadRequest, ParsedBody, parse_body
from picker.openai.routes import match_suffix
from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.content import Chat, read_prompt
from picker.signals.tokens.local import LoadProblem, LocalTokenizer, load_tokenizer
from picker.signals.tokens.reader import PromptReader

_SIZES_BYTES = (1_000, 32_000, 400_000)
_TURN_BYTES = 2_000
_NEW_BYTES = 500
_RUNS = 15
_BLOCKS = frozenset((16,))
_TEXT_CHUNK_BYTES = 64
_CACHE_BYTES = 64 << 20
_VOCABULARY = 32_000
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As GPT-4's tokenizer and those after it cut texts, less the rules for English contractions.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sources() -> str:
    """Some megabytes of text that is on every machine."""
    directory = Path(os.__file__).parent
    return "\n".join(path.read_text("utf-8", errors="ignore") for path in sorted(directory.glob("*.py")))


def train(directory: Path, text: str) -> Path:
    """A model directory with a tokenizer of a usual size."""
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(text.splitlines(keepends=True), trainer)
    made.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(_TEMPLATE)
    return directory


def chat(text: str, size_bytes: int, *, more: str = "") -> tuple[bytes, ParsedBody]:
    """A conversation of about that size, and `more` as its last message."""
    turns = [text[start : start + _TURN_BYTES] for start in range(0, size_bytes, _TURN_BYTES)]
    turns[-1] = turns[-1][: size_bytes - _TURN_BYTES * (len(turns) - 1)]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)
    ]
    if more:
        messages.append({"role": "user", "content": more})
    body = json.dumps({"model": "m", "messages": messages}).encode()
    parsed = parse_body(match_suffix("/v1/chat/completions"), body)
    assert not isinstance(parsed, BadRequest)
    return body, parsed


async def cpu_ms(run: Callable[[int], Awaitable[object]]) -> tuple[float, float]:
    """(best, median) CPU milliseconds of a run; each gets its number."""
    taken = []
    for number in range(_RUNS):
        began = time.process_time()
        await run(number)
        taken.append((time.process_time() - began) * 1e3)
    return min(taken), statistics.median(taken)


def tokenizer_in(directory: Path) -> LocalTokenizer:
    """A tokenizer with an empty cache. Ends the process with a message if it cannot be loaded."""
    loaded = load_tokenizer(directory, IdCache(_CACHE_BYTES))
    if isinstance(loaded, LoadProblem):
        raise SystemExit(loaded.message)
    return loaded


async def rows(directory: Path, text: str, size_bytes: int) -> list[tuple[str, float, float]]:
    """(kind of keys, best ms, median ms) for prompts of one size."""
    request = chat(text, size_bytes)
    turns = [chat(text, size_bytes, more=text[-(n + 1) * _NEW_BYTES :][:_NEW_BYTES]) for n in range(_RUNS)]
    fresh = [PromptReader(b"", tokenizers={"m": tokenizer_in(directory)}) for _ in range(_RUNS)]
    warm = fresh[0]
    template = tokenizer_in(directory)

    async def bytes_only(_: int) -> None:
        assert warm.read_now(*request, target_model="m", lora=False, block_sizes=_BLOCKS) is not None

    async def rendered(_: int) -> None:
        prompt = read_prompt(request[1].kind, request[0])
        assert isinstance(prompt, Chat)
        assert chain(1, (template.text(prompt) or "").encode(), _TEXT_CHUNK_BYTES) is not None

    async def exact(reader: PromptReader, asked: tuple[bytes, ParsedBody]) -> None:
        keys = await reader.read(*asked, target_model="m", lora=False, block_sizes=_BLOCKS, budget_s=60.0)
        assert keys is not None
        assert keys.exact

    try:
        return [
            ("bytes", *await cpu_ms(bytes_only)),
            ("text of the template, no tokenizer", *await cpu_ms(rendered)),
            ("exact, nothing seen before", *await cpu_ms(lambda n: exact(fresh[n], request))),
            (f"exact, next turn of {_NEW_BYTES} bytes", *await cpu_ms(lambda n: exact(warm, turns[n]))),
            ("exact, seen before", *await cpu_ms(lambda _: exact(warm, request))),
        ]
    finally:
        for reader in fresh:
            await reader.close()


async def measure(directory: Path, text: str) -> Table:
    """All sizes."""
    table = Table("prompt", "keys", "best ms", "median ms", title="CPU per prompt")
    for size_bytes in _SIZES_BYTES:
        for name, best_ms, median_ms in await rows(directory, text, size_bytes):
            table.add_row(f"{size_bytes // 1000} KB", name, f"{best_ms:.3f}", f"{median_ms:.3f}")
    table.caption = f"messages cached one by one: {tokenizer_in(directory).splits}"
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.prompt_keys", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a model directory with tokenizer.json")
    chosen = parser.parse_args()
    text = sources()
    with tempfile.TemporaryDirectory(prefix="waypost-bench-") as made:
        directory = chosen.tokenizer or train(Path(made), text)
        Console().print(asyncio.run(measure(directory, text)))


if __name__ == "__main__":
    main()
