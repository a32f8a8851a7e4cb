"""The models and adapters an engine lists at `/v1/models`: bytes in, names out."""

from __future__ import annotations

import msgspec

# vLLM lists the base model and every loaded adapter; hosts of thousands of adapters exist.
MAX_MODELS = 8192
MAX_NAME_CHARS = 512


class _Card(msgspec.Struct):
    id: str = ""


class _List(msgspec.Struct):
    data: list[_Card]


def read_models(body: bytes) -> frozenset[str] | None:
    """The ids of an OpenAI model list; None when it is none. Overlong ids are left out, as is what exceeds
    `MAX_MODELS`.
    """
    try:
        cards = msgspec.json.decode(body, type=_List).data
    except (msgspec.DecodeError, RecursionError):
        return None
    return frozenset(card.id for card in cards[:MAX_MODELS] if 0 < len(card.id) <= MAX_NAME_CHARS)
