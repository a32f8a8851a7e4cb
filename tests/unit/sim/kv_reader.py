"""A naive reader of KV-cache events, for comparing what was published with what an engine holds. Slow and obvious."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import msgspec


class Content(NamedTuple):
    """What one cached block stands for: all tokens up to its end, and the namespace."""

    tokens: tuple[int, ...]
    lora: str | None
    salt: str | None


class Reader:
    """Copies per block hash (unsigned), and what each hash stands for."""

    def __init__(self) -> None:
        self.copies: Counter[int] = Counter()
        self.contents: dict[int, Content] = {}
        self.block_size = 0
        self.clears = 0
        self.ranks: set[int] = set()
        self.stored_hashes: list[int] = []

    def read(self, payload: bytes) -> None:
        """Apply one batch."""
        _, events, rank = msgspec.msgpack.decode(payload)
        self.ranks.add(rank)
        for event in events:
            self._apply(event if isinstance(event, dict) else _named(event))

    def cached_tokens(self, tokens: list[int], *, lora: str | None = None, salt: str | None = None) -> int:
        """What the engine will find: full blocks from the start, never the whole prompt."""
        held = {self.contents[key] for key in self.copies}
        size = self.block_size
        blocks = 0
        while (blocks + 1) * size < len(tokens) and Content(tuple(tokens[: (blocks + 1) * size]), lora, salt) in held:
            blocks += 1
        return blocks * size

    def _apply(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.clears += 1
            self.copies.clear()
            self.contents.clear()
            return
        assert event["medium"] == "GPU"
        hashes = [key % (1 << 64) for key in event["block_hashes"]]
        if event["type"] == "BlockRemoved":
            for key in hashes:
                self.copies[key] -= 1
                assert self.copies[key] >= 0
                if not self.copies[key]:
                    del self.copies[key]
            return
        self._store(event, hashes)

    def _store(self, event: dict[str, Any], hashes: list[int]) -> None:
        size = self.block_size = event["block_size"]
        tokens, parent, extra = event["token_ids"], event["parent_block_hash"], event.get("extra_keys")
        assert len(tokens) == len(hashes) * size
        before: tuple[int, ...] = ()
        lora, salt = event.get("lora_name"), event.get("cache_salt")
        if parent is not None:
            before, lora, inherited = self.contents[parent % (1 << 64)]
            salt = salt or inherited
        elif extra and extra[0]:
            # The adapter comes first; a salt may be spelled like it.
            others = extra[0][1:] if lora is not None else extra[0]
            salt = next(iter(others), None)
        for index, key in enumerate(hashes):
            before += tuple(tokens[index * size : (index + 1) * size])
            content = Content(before, lora, salt)
            assert self.contents.setdefault(key, content) == content, "one hash, one content"
            self.copies[key] += 1
            self.stored_hashes.append(key)


def _named(event: list[Any]) -> dict[str, Any]:
    names = {
        "BlockStored": """block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys
            group_idx kv_cache_spec_kind kv_cache_spec_sliding_window""",
        "BlockRemoved": "block_hashes medium group_idx",
        "AllBlocksCleared": "",
    }[event[0]].split()
    return {"type": event[0], **dict(zip(names, event[1:], strict=False))}
