"""The models and adapters an engine lists at `/v1/models`: bytes in, names out."""

from __future__ import annotations

import msgspec

# vLLM lists the base model and every loaded adapter; hosts of thousands of adapters exist.
MAX_MODELS = 8192
MAX_NAME_CHARS = 512


class Listing(msgspec.Struct, frozen=True):
    """All names an engine takes, and those among them that are LoRA adapters of another."""

    models: frozenset[str]
    adapters: frozenset[str] = frozenset()


class _Card(msgspec.Struct):
    id: str = ""
    parent: object = None


class _List(msgspec.Struct):
    data: list[_Card]


def read_models(body: bytes) -> Listing | None:
    """The ids of an OpenAI model list; None when it is none. Overlong ids are left out, as is what exceeds
    `MAX_MODELS`. vLLM and SGLang name the base model of an adapter as its `parent`.
    """
    try:
        cards = msgspec.json.decode(body, type=_List).data
    except (msgspec.DecodeError, RecursionError):
        return None
    known = [card for card in cards[:MAX_MODELS] if 0 < len(card.id) <= MAX_NAME_CHARS]
    return Listing(
        models=frozenset(card.id for card in known),
        adapters=frozenset(card.id for card in known if isinstance(card.parent, str)),
    )
