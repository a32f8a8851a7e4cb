"""What is known of a prompt when its request is decided: its keys. Values only; the text is never kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class PromptKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of one prompt, from its beginning.

    `exact` has keys of token blocks by block size in tokens, as many as there are whole blocks; empty when the token
    ids are not known. `learned` has keys of chunks of the rendered text. `tokens` is the prompt's length, exact where
    `exact` is not empty; `chunk_tokens` is about how many of them one chunk stands for.
    """

    exact: Mapping[int, Sequence[int]] = {}
    learned: Sequence[int] = ()
    tokens: int = 0
    chunk_tokens: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there is any key: a prompt shorter than a block has none, and nothing of it is ever cached."""
        return bool(self.learned) or any(self.exact.values())


class Match(msgspec.Struct, frozen=True):
    """How much of a prompt one endpoint holds, in tokens from the beginning, all tiers together; `slow` of them in the
    memory of the host or on disk. `exact` when the engine told it, otherwise it is what we sent there.
    """

    tokens: int
    slow: int = 0
    exact: bool = False
