"""A toy tokeniser, a toy chat template and the words that simulated models say.

Four UTF-8 bytes are one token (its id is their value in memory order, the last one padded with zero bytes), so
encoding costs almost nothing, is reversible, and a longer text keeps the tokens of the text it extends. Generated
words are four bytes long too: a client that sends an answer back in the next turn gets the same token ids again, so
the prefix cache behaves as with a real chat. Every part of a chat is encoded by itself, see ``chat_tokens``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

BYTES_PER_TOKEN: Final = 4
TOKEN_LIMIT: Final = 1 << 32
#: Token ids in a compact form: copying, slicing and hashing them never touches single integers.
Tokens = array
_TYPE: Final = "I"

_WORDS: Final = (
    "the and for are but not you all any can had her was one our out day get has him his how man new now old see two "
    "way who boy did its let put say she too use air ask bed big box buy car cat cup cut dog eat egg end eye far few "
    "fly fun ice job key law leg lie"
)
WORDS: Final = tuple(" " + word for word in _WORDS.split())
SPEECH_TOKENS: Final = 1 << 14


def as_tokens(token_ids: Sequence[int]) -> Tokens[int]:
    """Token ids as an array. Raises OverflowError or TypeError unless each is an integer in [0, 2**32)."""
    return token_ids if isinstance(token_ids, array) else array(_TYPE, token_ids)


def no_tokens() -> Tokens[int]:
    """An empty array of tokens."""
    return array(_TYPE)


def encode(text: str) -> Tokens[int]:
    """Token ids of ``text``: one per four UTF-8 bytes, the last one padded with zero bytes."""
    raw = text.encode("utf-8", "replace")
    return array(_TYPE, raw + bytes(-len(raw) % BYTES_PER_TOKEN))


def decode(tokens: Tokens[int]) -> str:
    """The text of ``tokens``."""
    return tokens.tobytes().replace(b"\0", b"").decode("utf-8", "replace")


@lru_cache(maxsize=64)
def _role_marker(role: str) -> Tokens[int]:
    return encode(f"\x01{role}\x02")


def chat_tokens(
    messages: Iterable[tuple[str, str]], *, settings: str = "", add_generation_prompt: bool = True
) -> Tokens[int]:
    """The prompt of a chat: every (role, text) behind a marker, then the marker of the assistant's answer.

    ``settings``: what else the template is given (tools, its arguments), rendered before the messages.
    """
    tokens = no_tokens()
    if settings:
        tokens += _role_marker("settings")
        tokens += encode(settings)
    for role, text in messages:
        tokens += _role_marker(role)
        tokens += encode(text)
    if add_generation_prompt:
        tokens += _role_marker("assistant")
    return tokens


def _speech() -> Tokens[int]:
    # A linear congruential generator (Knuth's constants) over the words; only its top six bits are any good.
    state, words = 1, []
    for _ in range(SPEECH_TOKENS):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        words.append(WORDS[state >> 58])
    return encode("".join(words))


_SPEECH: Final = _speech()


def said(start: int, count: int) -> Tokens[int]:
    """``count`` tokens of the endless speech that all simulated models quote, from position ``start`` on."""
    at = start % SPEECH_TOKENS
    words = _SPEECH[at : at + count]
    while len(words) < count:
        words += _SPEECH[: count - len(words)]
    return words
