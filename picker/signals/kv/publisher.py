"""What one publisher (one engine process, one data-parallel rank) holds in its cache, block by block. No I/O, no clock.

Maps the engine's hashes to our own keys, computed from the token ids in the events, and counts copies: an engine tells
every physical copy it makes and drops, and a block is gone with its last copy. Out come changes of the set of keys per
tier. The order of batches is somebody else's business.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import msgspec

from picker.core.prefix.deltas import Tier
from picker.core.prefix.keys import TOKEN_BYTES, chain, token_root
from picker.signals.kv.decode import (
    BlockRemoved,
    BlockStored,
    EventError,
    decode_batch,
    folded,
    token_bytes,
)
from picker.signals.kv.extras import Apart, apart, block_seed
from picker.signals.kv.messages import Counts

# Groups whose cached blocks are a prefix without holes. None and `unknown` come from engines that do not tell.
DENSE_KINDS = frozenset({None, "", "unknown", "full_attention", "mla_attention", "sink_full_attention"})
# About 400 MB in the worker. An accelerator with 2 million tokens in blocks of 16 has 131,072.
MAX_BLOCKS = 2**21
# Engines have a handful of cache groups; each costs a few dictionaries.
MAX_GROUPS = 64
# Hosts of thousands of adapters exist; the names are only reported.
MAX_LORAS = 1024
# Salts are as many as tenants. A root costs a microsecond to make again.
_MAX_ROOTS = 4096

GroupName = tuple[int | None, int]


def tier_of(medium: str | None, locality: str | None = None) -> Tier:
    """The tier of a medium; disk is also what is farther away or not known."""
    if locality == "REMOTE":
        return Tier.DISK
    if not medium or medium == "GPU":
        return Tier.GPU
    name = medium.upper()
    return Tier.GPU if name == "GPU" else Tier.CPU if name.startswith("CPU") else Tier.DISK


class Change(msgspec.Struct, frozen=True, gc=False):
    """Keys that came to or went from one tier; in order, a key may occur in several changes."""

    added: bool
    tier: Tier
    keys: array[int]


class _Group:
    """One cache group with one block size: key by engine hash, per tier, and copies beyond the first."""

    __slots__ = ("block_tokens", "copies", "keys")

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.keys: tuple[dict[int, int], ...] = tuple({} for _ in Tier)
        self.copies: tuple[dict[int, int], ...] = tuple({} for _ in Tier)

    def find(self, block_hash: int) -> int | None:
        for keys in self.keys:
            key = keys.get(block_hash)
            if key is not None:
                return key
        return None


class Publisher:
    """The blocks of one publisher. The public attributes may be read at any time; `complete` says that nothing it
    holds is unknown to us: its history is known from the start or from its last clearing on.
    """

    def __init__(self, secret: bytes, *, max_blocks: int = MAX_BLOCKS) -> None:
        self.counts = Counts()
        self.loras: tuple[str, ...] = ()
        self.complete = False
        self._secret = secret
        self._max_blocks = max_blocks
        self._groups: dict[GroupName, _Group] = {}
        self._held: tuple[set[int], ...] = tuple(set() for _ in Tier)
        # A key may stand for several hashes: hashes that look ahead, groups of equal block size.
        self._shared: tuple[dict[int, int], ...] = tuple({} for _ in Tier)
        self._blocks = 0
        self._changes: list[Change] = []
        self._told = False
        self._cleared = False
        self._roots: dict[tuple[str, str, int], int] = {}

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """Block sizes in use, ascending."""
        return tuple(sorted({group.block_tokens for group in self._groups.values()}))

    def held(self, tier: Tier) -> Iterable[int]:
        """The keys held in one tier."""
        return self._held[tier]

    def apply(self, payload: bytes | memoryview) -> bool:
        """One batch. False if it is malformed; nothing of it was applied then, and what it told is lost. A malformed
        store inside is only counted: what is not known to be there does no harm.
        """
        try:
            batch = decode_batch(payload)
        except EventError:
            self.counts.malformed += 1
            return False
        self.counts.batches += 1
        self.counts.ignored += batch.unknown
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._stored(event)
            elif isinstance(event, BlockRemoved):
                self._removed(event)
            else:
                self.clear(complete=True)
        return True

    def clear(self, *, complete: bool) -> None:
        """It dropped everything (`complete`), or what it holds is not known any more."""
        self.complete = complete
        if self._told:
            self._cleared = True
        self._told = False
        self._groups.clear()
        for tier in Tier:
            self._held[tier].clear()
            self._shared[tier].clear()
        self._blocks = 0
        self._changes.clear()

    def take(self) -> tuple[bool, list[Change]]:
        """What changed since the last call: whether everything was cleared, then the changes after that."""
        cleared, changes = self._cleared, self._changes
        self._cleared, self._changes = False, []
        return cleared, changes

    # -- stored ------------------------------------------------------------------------------------------------------

    def _stored(self, event: BlockStored) -> None:
        hashes = [folded(block_hash) for block_hash in event.block_hashes]
        counts, size = self.counts, event.block_size
        sliding = event.spec_kind in (None, "", "unknown") and event.spec_window
        if event.spec_kind not in DENSE_KINDS or sliding or not hashes:
            counts.skipped += len(hashes)
            return
        if self._blocks + len(hashes) > self._max_blocks:
            counts.refused += len(hashes)
            return
        tier = tier_of(event.medium, event.locality)
        if size <= 0:
            self._stored_by_hash(event.group_idx, tier, hashes)
            return
        try:
            tokens = token_bytes(event.token_ids)
            group = self._group(event.group_idx, size)
            if group is None or len(tokens) != len(hashes) * size * TOKEN_BYTES:
                # Partial blocks, or spans with holes: which blocks are missing is not told.
                counts.skipped += len(hashes)
                return
            keys = self._keys(event, group, tokens)
        except EventError:
            counts.malformed += 1
            return
        if keys is None:
            counts.orphans += len(hashes)
        else:
            self._add(group, tier, hashes, keys)

    def _stored_by_hash(self, group_idx: int | None, tier: Tier, hashes: Sequence[int]) -> None:
        """Offloaded blocks are announced without tokens: they are those known by the same hash elsewhere."""
        for block_hash in hashes:
            for group in self._groups_of(group_idx):
                key = group.find(block_hash)
                if key is not None:
                    self._add_one(group, tier, block_hash, key)
                    break
            else:
                self.counts.orphans += 1

    def _group(self, group_idx: int | None, size: int) -> _Group | None:
        """The group an event belongs to, by its number, else by its block size. None for a partial block: smaller
        than those the group had before. A larger one shows that what the group had before were partial ones.
        """
        name = (None, size) if group_idx is None else (group_idx, 0)
        group = self._groups.get(name)
        if group is not None and group.block_tokens < size:
            self._drop(group)
            del self._groups[name]
            group = None
        if group is None and len(self._groups) < MAX_GROUPS:
            group = self._groups[name] = _Group(size)
        return group if group is not None and group.block_tokens == size else None

    def _keys(self, event: BlockStored, group: _Group, tokens: bytes) -> list[int] | None:
        """Our keys of the event's blocks; None when their parent is not known. Raises EventError."""
        said = apart(event)
        if event.parent_block_hash is None:
            seed = self._root(said, group.block_tokens)
        else:
            found = group.find(folded(event.parent_block_hash))
            if found is None:
                return None
            seed = found
        step = group.block_tokens * TOKEN_BYTES
        if not said.blocks:
            return chain(seed, tokens, step)
        keys: list[int] = []
        for number in range(len(tokens) // step):
            extras = said.blocks[number] if number < len(said.blocks) else ()
            if extras:
                seed = block_seed(seed, extras)
            keys += chain(seed, tokens[number * step : (number + 1) * step], step)
            seed = keys[-1]
        return keys

    def _root(self, said: Apart, size: int) -> int:
        name = (said.namespace.lora, said.namespace.salt, size)
        root = self._roots.get(name)
        if root is None:
            if len(self._roots) >= _MAX_ROOTS:
                self._roots.clear()
            root = self._roots[name] = token_root(self._secret, said.namespace, size)
            if said.namespace.lora and len(self.loras) < MAX_LORAS:
                self.loras = tuple(sorted({*self.loras, said.namespace.lora}))
        return root

    def _add(self, group: _Group, tier: Tier, hashes: list[int], keys: list[int]) -> None:
        known, held = group.keys[tier], self._held[tier]
        unique = set(hashes)
        if len(unique) == len(keys) and known.keys().isdisjoint(unique) and held.isdisjoint(keys):
            known.update(zip(hashes, keys, strict=True))
            held.update(keys)
            self._blocks += len(keys)
            self.counts.stored += len(keys)
            self._changed(True, tier, keys)
            return
        for block_hash, key in zip(hashes, keys, strict=True):
            self._add_one(group, tier, block_hash, key)

    def _add_one(self, group: _Group, tier: Tier, block_hash: int, key: int) -> None:
        known = group.keys[tier]
        before = known.get(block_hash)
        self.counts.stored += 1
        if before == key:
            group.copies[tier][block_hash] = group.copies[tier].get(block_hash, 0) + 1
            return
        if before is not None:
            # Engines whose hashes do not chain name different prefixes alike. The last one told counts.
            self._forget(group, tier, block_hash, before)
        known[block_hash] = key
        self._blocks += 1
        if key in self._held[tier]:
            self._shared[tier][key] = self._shared[tier].get(key, 0) + 1
        else:
            self._held[tier].add(key)
            self._changed(True, tier, (key,))

    # -- removed -----------------------------------------------------------------------------------------------------

    def _removed(self, event: BlockRemoved) -> None:
        tier = tier_of(event.medium, event.locality)
        groups = self._groups_of(event.group_idx)
        for block_hash in map(folded, event.block_hashes):
            for group in groups:
                key = group.keys[tier].get(block_hash)
                if key is not None:
                    self._remove(group, tier, block_hash, key)
                    break

    def _groups_of(self, group_idx: int | None) -> Sequence[_Group]:
        """Where an event without a block size may belong: its group, or any when it names none."""
        if group_idx is None:
            return tuple(self._groups.values())
        group = self._groups.get((group_idx, 0))
        return () if group is None else (group,)

    def _remove(self, group: _Group, tier: Tier, block_hash: int, key: int) -> None:
        self.counts.removed += 1
        copies = group.copies[tier]
        if copies:
            more = copies.get(block_hash, 0)
            if more > 1:
                copies[block_hash] = more - 1
                return
            if more:
                del copies[block_hash]
                return
        self._forget(group, tier, block_hash, key)

    def _forget(self, group: _Group, tier: Tier, block_hash: int, key: int) -> None:
        """The last copy known by this hash is gone."""
        group.copies[tier].pop(block_hash, None)
        del group.keys[tier][block_hash]
        self._blocks -= 1
        shared = self._shared[tier]
        if shared and key in shared:
            if shared[key] > 1:
                shared[key] -= 1
            else:
                del shared[key]
            return
        self._held[tier].discard(key)
        self._changed(False, tier, (key,))

    def _drop(self, group: _Group) -> None:
        for tier in Tier:
            for block_hash, key in tuple(group.keys[tier].items()):
                self._forget(group, tier, block_hash, key)

    def _changed(self, added: bool, tier: Tier, keys: Iterable[int]) -> None:
        self._told = True
        last = self._changes[-1] if self._changes else None
        if last is None or last.added is not added or last.tier != tier:
            last = Change(added, tier, array("Q"))
            self._changes.append(last)
        last.keys.extend(keys)
