"""Snapshots: which blocks every endpoint holds, written down so that a replica that begins knows them at once.

One replica writes per endpoint. Owns who that is, and when. Entries of another secret or instance mean nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import msgspec
from xxhash import xxh3_64_intdigest

from picker.signals.shared.formats import pack_snapshot, pack_tiers, unpack_snapshot
from picker.signals.shared.link import Link, Trouble
from picker.signals.shared.names import Names
from picker.signals.shared.settings import SharedHooks, SharedSettings

# 2 MiB: four million tokens in blocks of 16, several times what one GPU server holds.
KEYS_MAX = 262_144
# Between two writes, so that they never take the loop for themselves.
_APART_LEAST_S = 0.01


def owner_of(endpoint_id: str, replicas: Iterable[str]) -> str:
    """Which replica writes an endpoint down: rendezvous hashing, so that few move when a replica comes or goes."""
    return max(replicas, key=lambda replica: (xxh3_64_intdigest(f"{replica} {endpoint_id}".encode()), replica))


class SnapshotKeeper:
    """Writes the snapshots that are this replica's, and loads them. `wall` is Unix time in seconds."""

    def __init__(
        self,
        link: Link,
        names: Names,
        replica: str,
        *,
        settings: SharedSettings,
        hooks: SharedHooks,
        others: Callable[[], tuple[str, ...]],
        tag: Callable[[], bytes],
        ready: Callable[[], bool],
        wall: Callable[[], float],
    ) -> None:
        self._link = link
        self._names = names
        self._replica = replica
        self._settings = settings
        self._hooks = hooks
        self._others = others
        self._tag = tag
        self._ready = ready
        self._wall = wall
        self._endpoints: tuple[str, ...] = ()
        self._round: deque[str] = deque()
        self._pause_s = settings.snapshot_s
        # What was last written, as digests.
        self._written: dict[str, int] = {}

    def follow(self, endpoint_ids: Iterable[str]) -> None:
        """Which endpoints exist."""
        self._endpoints = tuple(endpoint_ids)

    async def step(self) -> float | Trouble:
        """Writes one snapshot that is due; seconds until the next. A round takes `snapshot_s`."""
        if not self._round:
            self._begin_round()
        if not self._round or not self._ready():
            return self._pause_s
        endpoint_id = self._round[0]
        trouble = await self._write(endpoint_id)
        if trouble:
            return trouble
        if self._round and self._round[0] == endpoint_id:
            self._round.popleft()
        return self._pause_s

    def _begin_round(self) -> None:
        replicas = (self._replica, *self._others())
        own = [name for name in self._endpoints if owner_of(name, replicas) == self._replica]
        self._written = {name: self._written[name] for name in own if name in self._written}
        self._round.extend(own)
        self._pause_s = max(_APART_LEAST_S, self._settings.snapshot_s / max(1, len(own)))

    async def _write(self, endpoint_id: str) -> Trouble | None:
        snapshot = self._hooks.snapshot_of(endpoint_id)
        if snapshot is None:
            return None
        key, ttl_ms = self._names.snapshot(endpoint_id), int(self._settings.snapshot_ttl_s * 1000)
        tag, tiers = self._tag(), pack_tiers(snapshot, KEYS_MAX)
        digest = _digest((tag, snapshot.instance, snapshot.block_tokens, tiers))
        if self._written.get(endpoint_id) == digest:
            renewed = await self._link.all_of(("PEXPIRE", key, ttl_ms))
            if isinstance(renewed, Trouble):
                return renewed
            if renewed == [1]:
                return None
        data = pack_snapshot(tag, self._wall(), snapshot, tiers)
        written = await self._link.all_of(("SET", key, data, "PX", ttl_ms))
        if isinstance(written, Trouble):
            return written
        self._written[endpoint_id] = digest
        return None

    async def load(self, instances: Mapping[str, str]) -> int:
        """Hands over what is known of these endpoints, given with their instances; how many were found. Stops when
        Redis does not answer.
        """
        found = 0
        for endpoint_id, instance in instances.items():
            replies = await self._link.all_of(("GET", self._names.snapshot(endpoint_id)))
            if isinstance(replies, Trouble):
                return found
            read = unpack_snapshot(replies[0], self._tag(), instance)
            if read is not None:
                found += 1
                self._hooks.on_snapshot(endpoint_id, read[0], max(0.0, self._wall() - read[1]))
        return found


def _digest(parts: object) -> int:
    return xxh3_64_intdigest(msgspec.msgpack.encode(parts))
