"""Texts to token ids with a tokenizer, piece by piece: a piece seen before is not tokenised again.

A special token splits the text before anything else happens, so the ids of the pieces between special tokens are
those of the whole. That holds for byte-level BPE but not for every tokenizer, so it is tried when the encoder is made
and left alone where it fails. Meant for threads: nothing here waits, and the tokenizer releases the interpreter's lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from xxhash import xxh3_128_intdigest

from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.content import pack_ids

# Texts around a special token that would show a tokenizer that looks across it.
_TRIALS = (
    "",
    " ",
    "\n",
    "\n\nA",
    "Hello world",
    " leading",
    "trailing ",
    "\u0301e\u0301",
    "漢字🎉",
    "x1 23\t",
    "...\r\n",
)
_LETTER = "a"


class Encoding(Protocol):
    """What came of a text."""

    @property
    def ids(self) -> list[int]: ...


class TextTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode_batch_fast(self, texts: list[str], /, *, add_special_tokens: bool) -> Sequence[Encoding]:
        """Ids of each text, without offsets."""


class Encoder:
    """One tokenizer and the cache of its ids. `splits` says whether pieces are cached apart."""

    __slots__ = ("_after", "_before", "_cache", "_seed", "_special", "_tokenizer", "splits")

    def __init__(self, tokenizer: TextTokenizer, special_tokens: Iterable[str], cache: IdCache, *, seed: int) -> None:
        """`special_tokens` are the texts to split at; none of them may be part of another added token. Encoders that
        share a cache need different seeds.
        """
        self._tokenizer = tokenizer
        self._cache = cache
        self._seed = seed
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.splits = self._special is not None and self._pieces_add_up(longest_first)
        self._before, self._after = self._affixes()

    def __repr__(self) -> str:
        return f"<Encoder splits={self.splits} {self._cache!r}>"

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes | None:
        """The ids of `text` (u32, little-endian); None when the tokenizer cannot say."""
        pieces = self._split(text) if self.splits else [text]
        ids = [self._piece(piece) for piece in pieces if piece]
        if add_special_tokens:
            if self._before is None:
                return None
            ids = [self._before, *ids, self._after]
        return b"".join(ids)

    def _split(self, text: str) -> list[str]:
        """Special tokens and what is between them, nothing left out."""
        assert self._special is not None
        pieces: list[str] = []
        end = 0
        for match in self._special.finditer(text):
            pieces += (text[end : match.start()], match.group())
            end = match.end()
        pieces.append(text[end:])
        return pieces

    def _piece(self, piece: str) -> bytes:
        digest = xxh3_128_intdigest(piece.encode(), self._seed)
        ids = self._cache.get(digest)
        if ids is None:
            ids = self._ids(piece)
            self._cache.put(digest, ids)
        return ids

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> bytes:
        found = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        packed = pack_ids(found)
        assert packed is not None
        return packed

    def _pieces_add_up(self, special: list[str]) -> bool:
        for token in special:
            for before in _TRIALS:
                text = token.join((before, *_TRIALS)) + token + token
                if self._ids(text) != b"".join(self._ids(piece) for piece in self._split(text) if piece):
                    return False
        return True

    def _affixes(self) -> tuple[bytes | None, bytes]:
        """What the tokenizer puts before and after a prompt by itself, or None if it does more than that."""
        bare, dressed = self._ids(_LETTER), self._ids(_LETTER, add_special_tokens=True)
        before, found, after = dressed.partition(bare)
        return (before, after) if found and len(before) % 4 == 0 else (None, b"")
