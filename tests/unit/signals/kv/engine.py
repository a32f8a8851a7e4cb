"""A simulated engine's cache that tells what it does in events, for histories. It knows nothing of who listens."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from tests.unit.signals.kv.naive import Naive, positional

SIZE = 4
LORAS = ("", "", "", "sql")
SALTS = ("", "", "tenant-a")


class Engine:
    """Blocks of chained prompts in a cache. Physical copies are evicted leaf first or not, as the dice say. `truth` is
    what it holds, by the naive model.
    """

    def __init__(self, rng: Random, *, arrays: bool = False, groups: int = 1) -> None:
        self.rng, self.arrays, self.groups = rng, arrays, groups
        self.truth = Naive()
        self.number = 0
        self.sent: list[tuple[int, bytes]] = []
        self._names: dict[tuple[object, ...], int] = {}
        self._paths: dict[int, tuple[object, ...]] = {}

    def step(self) -> tuple[int, bytes]:
        """One batch of a few events."""
        events = []
        for _ in range(self.rng.randrange(1, 4)):
            events.append(self._event())
            self.truth.event(events[-1])
        written = [positional(event) for event in events] if self.arrays else events
        payload = msgspec.msgpack.encode([self.rng.random(), written, 0])
        self.sent.append((self.number, payload))
        self.number += 1
        return self.sent[-1]

    def replay(self, start: int, keeps: int) -> list[tuple[int, bytes]]:
        """What the replay socket answers, of a buffer of `keeps` batches."""
        return [item for item in self.sent[max(0, len(self.sent) - keeps) :] if item[0] >= start]

    def _event(self) -> dict[str, Any]:
        held = [name for name, count in self.truth.copies.items() if count]
        dice = self.rng.random()
        if dice < 0.03:
            return {"type": "AllBlocksCleared"}
        if dice < 0.45 and held:
            tier, group, name = self.rng.choice(held)
            return {"type": "BlockRemoved", "block_hashes": [name], "medium": _MEDIA[tier], "group_idx": group}
        if dice < 0.55 and held:
            _, group, name = self.rng.choice(held)
            return self._stored([name], None, [], 0, group, "CPU", "", "")
        return self._prefill(held)

    def _prefill(self, held: list[tuple[int, int, int]]) -> dict[str, Any]:
        """A chunk of a prompt: from the start, or after a block that is there. Few prompts, so that copies happen."""
        group = self.rng.randrange(self.groups)
        parents = [name for _, of, name in held if of == group]
        lora, salt = self.rng.choice(LORAS), self.rng.choice(SALTS)
        parent = self.rng.choice(parents) if parents and self.rng.random() < 0.6 else None
        path = (lora, salt) if parent is None else self._paths[parent]
        hashes, tokens = [], []
        for _ in range(self.rng.randrange(1, 4)):
            block = [self.rng.randrange(3) for _ in range(SIZE)]
            path = (*path, tuple(block))
            hashes.append(self._name(path))
            tokens += block
        return self._stored(hashes, parent, tokens, SIZE, group, "GPU", str(path[0]), str(path[1]))

    def _name(self, path: tuple[object, ...]) -> int:
        name = self._names.setdefault(path, self.rng.getrandbits(64))
        self._paths[name] = path
        return name

    def _stored(
        self,
        hashes: list[int],
        parent: int | None,
        tokens: list[int],
        size: int,
        group: int,
        medium: str,
        lora: str,
        salt: str,
    ) -> dict[str, Any]:
        first = [text for text in (lora, salt if parent is None else "") if text]
        rest = [[lora] if lora else None] * (len(hashes) - 1)
        return {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": tokens,
            "block_size": size,
            "lora_id": 1 if lora else None,
            "medium": medium,
            "lora_name": lora or None,
            "extra_keys": [first or None, *rest] if lora or first else None,
            "group_idx": group,
            "kv_cache_spec_kind": "full_attention",
        }


_MEDIA = ("GPU", "CPU", "STORAGE")
