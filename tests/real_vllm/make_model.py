"""Makes a tiny language model with random weights, for `setup.sh`: `python make_model.py DIR`, in vLLM's environment.

It owns the model's shape and tokenizer and needs no network. The weights are spread wider than usual and the output
layer has its own, because a model with the usual ones answers every prompt alike.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # type: ignore[import-not-found]

PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 4096
CONTEXT_TOKENS = 8192
CORPUS_FILES = 80
CORPUS_FILE_CHARS = 20_000
CHAT_TEMPLATE = (
    "{% for m in messages %}" + BEGIN + "{{ m['role'] }}\n{{ m['content'] }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + BEGIN + "assistant\n{% endif %}"
)


def corpus() -> Iterator[str]:
    """Text to learn a vocabulary from: Python's own library is everywhere and the same in every release."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:CORPUS_FILES]:
        yield path.read_text(encoding="utf-8", errors="ignore")[:CORPUS_FILE_CHARS]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template: every text can be encoded."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=CONTEXT_TOKENS
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any) -> Any:
    """A Qwen2 of two layers and half a million weights, the same at every call."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(shape).to(torch.bfloat16)


def main(directory: str) -> None:
    """Writes tokenizer and model."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    make_model(tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    main(sys.argv[1])
