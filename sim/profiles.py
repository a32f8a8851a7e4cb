"""Named engine profiles: what one model costs on one accelerator.

The numbers are plausible, not measured: they follow from published memory sizes, bandwidths and half of the peak
compute rates. They are here so that pods differ from one another the way real ones do.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Capacities and costs of one engine. All times are seconds, all sizes tokens unless the name says blocks.

    A step takes ``step_s + prefill_token_s * p + context_token_s * sum(p_i * ctx_i) + sequence_s * decoding
    + resident_token_s * resident`` seconds, for ``p`` prefill tokens, ``ctx_i`` the mean context of each prefill
    chunk, ``decoding`` sequences that get one token and ``resident`` KV tokens which those read.
    """

    name: str
    step_s: float
    prefill_token_s: float
    context_token_s: float
    sequence_s: float
    resident_token_s: float
    kv_blocks: int
    block_size: int = 16
    max_model_len: int = 131_072
    max_num_batched_tokens: int = 2_048
    max_num_seqs: int = 256
    #: Decode tokens that one step makes per sequence. Above 1 only where time plays no part.
    tokens_per_step: int = 1
    #: Mean length of an answer that ends by itself; the length is drawn from half to one and a half times this.
    natural_tokens: int = 192
    #: Relative half width of a uniform noise on every step time.
    jitter: float = 0.0

    @property
    def kv_tokens(self) -> int:
        """KV capacity in tokens."""
        return self.kv_blocks * self.block_size

    def sped_up(self, speed: float) -> Profile:
        """The same engine with all times divided by ``speed``. Raises ValueError unless ``speed`` is positive."""
        if not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        return msgspec.structs.replace(
            self,
            step_s=self.step_s / speed,
            prefill_token_s=self.prefill_token_s / speed,
            context_token_s=self.context_token_s / speed,
            sequence_s=self.sequence_s / speed,
            resident_token_s=self.resident_token_s / speed,
        )

    def with_block_size(self, block_size: int) -> Profile:
        """The same KV memory cut into blocks of ``block_size`` tokens (traces name blocks of 512 tokens)."""
        return msgspec.structs.replace(self, block_size=block_size, kv_blocks=max(1, self.kv_tokens // block_size))


def _tokens(count: int) -> int:
    return count // 16


# 8B: 16 GB of weights, 128 KiB of KV per token, one card. 32B: 64 GB of weights, 256 KiB of KV per token, two cards.
PROFILES: Final[dict[tuple[str, str], Profile]] = {
    ("8B", "L40S"): Profile(
        name="8B-L40S",
        step_s=22e-3,
        prefill_token_s=120e-6,
        context_token_s=4.5e-9,
        sequence_s=30e-6,
        resident_token_s=187e-9,
        kv_blocks=_tokens(185_000),
    ),
    ("8B", "A100"): Profile(
        name="8B-A100",
        step_s=11e-3,
        prefill_token_s=85e-6,
        context_token_s=3.5e-9,
        sequence_s=25e-6,
        resident_token_s=82e-9,
        kv_blocks=_tokens(400_000),
    ),
    ("8B", "H100"): Profile(
        name="8B-H100",
        step_s=7e-3,
        prefill_token_s=35e-6,
        context_token_s=1.5e-9,
        sequence_s=20e-6,
        resident_token_s=52e-9,
        kv_blocks=_tokens(400_000),
        max_num_batched_tokens=8_192,
    ),
    ("32B", "L40S"): Profile(
        name="32B-2xL40S",
        step_s=48e-3,
        prefill_token_s=240e-6,
        context_token_s=6e-9,
        sequence_s=40e-6,
        resident_token_s=190e-9,
        kv_blocks=_tokens(62_000),
        max_model_len=40_960,
    ),
    ("32B", "A100"): Profile(
        name="32B-2xA100",
        step_s=24e-3,
        prefill_token_s=155e-6,
        context_token_s=4.5e-9,
        sequence_s=35e-6,
        resident_token_s=90e-9,
        kv_blocks=_tokens(275_000),
    ),
    ("32B", "H100"): Profile(
        name="32B-2xH100",
        step_s=14e-3,
        prefill_token_s=65e-6,
        context_token_s=2e-9,
        sequence_s=30e-6,
        resident_token_s=56e-9,
        kv_blocks=_tokens(275_000),
        max_num_batched_tokens=8_192,
    ),
}

# No physics at all: a backend for benchmarks of what stands before it. Large blocks keep hashing cheap.
INSTANT: Final = Profile(
    name="instant",
    step_s=0.0,
    prefill_token_s=0.0,
    context_token_s=0.0,
    sequence_s=0.0,
    resident_token_s=0.0,
    kv_blocks=65_536,
    block_size=256,
    max_num_batched_tokens=1 << 20,
    max_num_seqs=1_024,
    tokens_per_step=1 << 20,
)

# One token per sequence every 5 ms whatever the load: streams with a known number of chunks for benchmarks.
PACED: Final = msgspec.structs.replace(INSTANT, name="paced", step_s=5e-3, tokens_per_step=1)

ACCELERATORS: Final = ("L40S", "A100", "H100", "instant", "paced")


def profile_for(model: str, accelerator: str) -> Profile:
    """The profile of a model name on an accelerator; a name that contains ``32b`` is the 32B model, any other the 8B.

    Accelerators are case-insensitive: L40S, A100, H100, and the two for benchmarks, ``instant`` and ``paced``.
    Raises ValueError for an unknown one.
    """
    wanted = accelerator.lower()
    if wanted == "instant":
        return INSTANT
    if wanted == "paced":
        return PACED
    size = "32B" if "32b" in model.lower() else "8B"
    for (profile_size, name), profile in PROFILES.items():
        if profile_size == size and name.lower() == wanted:
            return profile
    raise ValueError(f"unknown accelerator {accelerator!r}: choose from {', '.join(ACCELERATORS)}")
