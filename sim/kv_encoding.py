"""KV-cache events as bytes, the way four generations of engines write them. Pure.

Written from the description of the formats and shared with no reader of them. A batch is always the array
``[unix seconds, events, data-parallel rank]`` in MessagePack; what an event looks like:

* vLLM 0.24 and later (as captured from 0.32): maps with a ``type``; one removal per block;
* vLLM 0.22: arrays that begin with the type, all positions filled;
* SGLang 0.5.23: maps, hashes as signed integers, the salt in a field of its own, consecutive removals in one event;
* SGLang 0.5.10 to 0.5.19: arrays, one event per page, and neither adapter nor salt on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from sim.prefix import CacheChange, Removed, Stored

EngineName = Literal["vllm", "sglang"]
Encoding = Literal["map", "array"]

_MEDIUM: Final = "GPU"
_GROUP: Final = 0
_KIND: Final = "full_attention"
_encode: Final = msgspec.msgpack.Encoder().encode


class KvEncoder:
    """Turns the cache changes of one scheduler step into the payload of one message.

    ``lora_ids`` are the numbers that vLLM tells beside the names of adapters.
    """

    def __init__(
        self, engine: EngineName, encoding: Encoding, *, block_size: int, rank: int, lora_ids: Mapping[str, int]
    ) -> None:
        self._block_size = block_size
        self._rank = rank
        self._lora_ids = lora_ids
        forms: dict[tuple[EngineName, Encoding], Callable[[Sequence[CacheChange]], list[Any]]] = {
            ("vllm", "map"): self._vllm_maps,
            ("vllm", "array"): self._vllm_arrays,
            ("sglang", "map"): self._sglang_maps,
            ("sglang", "array"): self._sglang_arrays,
        }
        self._events = forms[engine, encoding]

    def batch(self, changes: Sequence[CacheChange], *, unix_s: float) -> bytes:
        """The payload for ``changes``, in their order."""
        return _encode([unix_s, self._events(changes), self._rank])

    def _vllm_maps(self, changes: Sequence[CacheChange]) -> list[Any]:
        events: list[Any] = []
        for change in changes:
            if isinstance(change, Removed):
                events.append(
                    {"type": "BlockRemoved", "block_hashes": [change.key], "medium": _MEDIUM, "group_idx": _GROUP}
                )
            elif isinstance(change, Stored):
                events.append(
                    {
                        "type": "BlockStored",
                        "block_hashes": change.keys,
                        "parent_block_hash": change.parent,
                        "token_ids": change.tokens.tolist(),
                        "block_size": self._block_size,
                        "lora_id": self._lora_id(change),
                        "medium": _MEDIUM,
                        "lora_name": change.lora,
                        "extra_keys": _extra_keys(change),
                        "group_idx": _GROUP,
                        "kv_cache_spec_kind": _KIND,
                    }
                )
            else:
                events.append({"type": "AllBlocksCleared"})
        return events

    def _vllm_arrays(self, changes: Sequence[CacheChange]) -> list[Any]:
        events: list[Any] = []
        for change in changes:
            if isinstance(change, Removed):
                events.append(("BlockRemoved", [change.key], _MEDIUM, _GROUP))
            elif isinstance(change, Stored):
                tokens, lora_id = change.tokens.tolist(), self._lora_id(change)
                head = ("BlockStored", change.keys, change.parent, tokens, self._block_size, lora_id, _MEDIUM)
                events.append((*head, change.lora, _extra_keys(change), _GROUP, _KIND, None))
            else:
                events.append(("AllBlocksCleared",))
        return events

    def _sglang_maps(self, changes: Sequence[CacheChange]) -> list[Any]:
        events: list[Any] = []
        removals: list[int] | None = None
        for change in changes:
            if isinstance(change, Removed):
                if removals is None:
                    removals = []
                    events.append({"type": "BlockRemoved", "block_hashes": removals, "medium": _MEDIUM})
                removals.append(_signed(change.key))
                continue
            removals = None
            if isinstance(change, Stored):
                event = {
                    "type": "BlockStored",
                    "block_hashes": [_signed(key) for key in change.keys],
                    "parent_block_hash": _signed_or_none(change.parent),
                    "token_ids": change.tokens.tolist(),
                    "block_size": self._block_size,
                    "lora_id": None,
                    "medium": _MEDIUM,
                }
                optional = {"cache_salt": change.cache_salt, "lora_name": change.lora}
                events.append(event | {name: value for name, value in optional.items() if value is not None})
            else:
                events.append({"type": "AllBlocksCleared"})
        return events

    def _sglang_arrays(self, changes: Sequence[CacheChange]) -> list[Any]:
        events: list[Any] = []
        for change in changes:
            if isinstance(change, Removed):
                events.append(("BlockRemoved", [_signed(change.key)], _MEDIUM))
            elif isinstance(change, Stored):
                parent, size = change.parent, self._block_size
                for index, key in enumerate(change.keys):
                    tokens = change.tokens[index * size : (index + 1) * size].tolist()
                    head = ("BlockStored", [_signed(key)], _signed_or_none(parent))
                    events.append((*head, tokens, size, None, _MEDIUM))
                    parent = key
            else:
                events.append(("AllBlocksCleared",))
        return events

    def _lora_id(self, change: Stored) -> int | None:
        return None if change.lora is None else self._lora_ids[change.lora]


def _extra_keys(change: Stored) -> list[list[str] | None]:
    """Per block what its hash covers beside tokens: the adapter everywhere, the salt in the first block of a prompt."""
    everywhere = [change.lora] if change.lora is not None else None
    keys: list[list[str] | None] = [everywhere] * len(change.keys)
    if change.parent is None and change.cache_salt is not None:
        keys[0] = [*(everywhere or ()), change.cache_salt]
    return keys


def _signed(key: int) -> int:
    return key - (1 << 64) if key >> 63 else key


def _signed_or_none(key: int | None) -> int | None:
    return None if key is None else _signed(key)
