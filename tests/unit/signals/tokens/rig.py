"""Tokenizers trained on the spot, model directories around them, and requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from picker.openai.parse import ParsedBody, parse_body
from picker.openai.routes import RouteKind, match_suffix
from picker.signals.tokens.content import Prompt, read_prompt

ROOT = Path(__file__).resolve().parents[4]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

PATHS = {
    RouteKind.CHAT: "/v1/chat/completions",
    RouteKind.COMPLETIONS: "/v1/completions",
    RouteKind.MESSAGES: "/v1/messages",
    RouteKind.RESPONSES: "/v1/responses",
    RouteKind.NATIVE_GENERATE: "/generate",
    RouteKind.TOKEN_GENERATE: "/inference/v1/generate",
    RouteKind.EMBEDDINGS: "/v1/embeddings",
}

# The parts of real templates that go wrong first: tools, tool calls, defaults, white space, arguments.
CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + call.function.name + ' ' + call.function.arguments.items() | list | string }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


def corpus() -> str:
    """A hundred kilobytes of text that is there anyway."""
    return "\n".join((ROOT / name).read_text("utf-8") for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"))


def byte_level(*, vocab: int = 1500, bos: bool = False, nfc: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE, as most open models have it."""
    made = tokenizers.Tokenizer(models.BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    _train(made, vocab, pre_tokenizers.ByteLevel.alphabet())
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], made.token_to_id(SPECIAL[0]))]
        )
    return made


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2: a space is put before the text, but only before its first piece."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    _train(made, 1500, [])
    return made


def _train(made: tokenizers.Tokenizer, vocab: int, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus().splitlines(keepends=True), trainer)


def save(
    directory: Path, tokenizer: tokenizers.Tokenizer, *, template: str = CHATML, config: Mapping[str, Any] | None = None
) -> Path:
    """A model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config or {"eos_token": SPECIAL[2]}))
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def request(kind: RouteKind, **members: Any) -> tuple[bytes, ParsedBody]:
    """A body and what the doors make of it."""
    body = json.dumps({"model": "tiny", **members}, ensure_ascii=False).encode()
    parsed = parse_body(match_suffix(PATHS[kind]), body, strict=False)
    assert isinstance(parsed, ParsedBody)
    return body, parsed


def prompt(kind: RouteKind, **members: Any) -> Prompt:
    """The prompt of such a body."""
    found = read_prompt(kind, request(kind, **members)[0])
    assert found is not None
    return found


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **members: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **members}


def is_prefix(shorter: Sequence[int], longer: Sequence[int]) -> bool:
    return list(longer[: len(shorter)]) == list(shorter)
