"""What a publisher holds, computed the slow way: counts per copy, and keys from whole prompts. Shares nothing with the
code under test but the definition of keys.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import msgspec

from picker.core.prefix.keys import Namespace, chain, token_root

SECRET = b"test secret"
TIERS = {None: 0, "GPU": 0, "CPU": 1, "CPU_PINNED": 1, "STORAGE": 2, "DISK": 2}
FIELDS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
LATER_FIELDS = (*FIELDS, "extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
REMOVED_FIELDS = ("block_hashes", "medium", "group_idx")

Prompt = tuple[str, str, int, tuple[int, ...]]
"""Adapter, salt, block size, all tokens to the end of the block."""


def key(prompt: Prompt) -> int:
    """Our key of the last block of a prompt, without shortcuts."""
    lora, salt, size, tokens = prompt
    return chain(token_root(SECRET, Namespace(lora, salt), size), array("I", tokens).tobytes(), 4 * size)[-1]


class Naive:
    """Text-only events of dense groups."""

    def __init__(self) -> None:
        self.copies: Counter[tuple[int, int, int]] = Counter()
        self.prompts: dict[tuple[int, int], Prompt] = {}

    def batch(self, payload: bytes) -> None:
        for event in msgspec.msgpack.decode(payload)[1]:
            self.event(event if isinstance(event, dict) else named(event))

    def event(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.copies.clear()
            self.prompts.clear()
            return
        tier, group = TIERS[event.get("medium")], event.get("group_idx") or 0
        if event["type"] == "BlockRemoved":
            for name in event["block_hashes"]:
                self.copies[tier, group, u64(name)] -= self.copies[tier, group, u64(name)] > 0
        else:
            self.store(event, tier, group)

    def store(self, event: dict[str, Any], tier: int, group: int) -> None:
        size, hashes = event["block_size"], [u64(name) for name in event["block_hashes"]]
        if size:
            parent = event.get("parent_block_hash")
            if parent is None:
                lora = event.get("lora_name") or ""
                salts = [k for k in ((event.get("extra_keys") or [None])[0] or []) if isinstance(k, str) and k != lora]
                before: Prompt = (lora, salts[0] if salts else "", size, ())
            else:
                known = self.prompts.get((group, u64(parent)))
                if known is None or not self.is_held(group, u64(parent)):
                    return
                before = known
            for number, name in enumerate(hashes):
                tokens = before[3] + tuple(event["token_ids"][: (number + 1) * size])
                self.prompts[group, name] = (*before[:3], tokens)
        for name in hashes:
            if size or self.is_held(group, name):
                self.copies[tier, group, name] += 1

    def is_held(self, group: int, name: int) -> bool:
        return any(self.copies[tier, group, name] for tier in range(3))

    def held(self) -> tuple[set[int], set[int], set[int]]:
        """Keys by tier."""
        found: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        for (tier, group, name), count in self.copies.items():
            if count:
                found[tier].add(key(self.prompts[group, name]))
        return found


def u64(name: int | bytes) -> int:
    return name % 2**64 if isinstance(name, int) else int.from_bytes(name[-8:], "big")


def named(event: list[Any]) -> dict[str, Any]:
    """A positional event as a map."""
    fields = LATER_FIELDS if event[0] == "BlockStored" else REMOVED_FIELDS
    return {"type": event[0], **dict(zip(fields, event[1:], strict=False))}


def positional(event: dict[str, Any]) -> list[Any]:
    """A map as the engines up to vLLM 0.23 wrote it."""
    fields = {"BlockStored": LATER_FIELDS, "BlockRemoved": REMOVED_FIELDS, "AllBlocksCleared": ()}[event["type"]]
    return [event["type"], *(event.get(name) for name in fields)]
