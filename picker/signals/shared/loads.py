"""The exchange of loads: writes what this replica has under way, reads the same of all others, adds theirs up.

Vectors are absolute and leased, so nothing counts twice and a dead replica's load disappears. Owns the list of
replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from picker.signals.shared.formats import Vector, endpoint_hash, pack_rows, pack_vector, sum_rows, unpack_vector
from picker.signals.shared.link import Command, Link, Trouble, trouble_in
from picker.signals.shared.names import Identity, Names, is_replica
from picker.signals.shared.settings import SharedHooks, SharedSettings

# More replicas than a fleet of 1,000 engines needs.
REPLICAS_MAX = 64
# A replica whose load was not there for so long is struck off the list. It signs again when it comes back.
FORGET_S = 10.0


class _Heard(msgspec.Struct):
    """The newest vector of a replica, and when it was last seen there."""

    raw: bytes
    vector: Vector
    at: float


class LoadExchange:
    """One `step` is one cycle. `clock` is monotonic, `wall` Unix time, both in seconds."""

    def __init__(
        self,
        link: Link,
        names: Names,
        identity: Identity,
        *,
        settings: SharedSettings,
        hooks: SharedHooks,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._link = link
        self._names = names
        self._identity = identity
        self._settings = settings
        self._hooks = hooks
        self._clock = clock
        self._wall = wall
        self._endpoints: dict[int, str] = {}
        self._sequence = 0
        self._rows = b""
        self._written_at = -math.inf
        self._rolled_at = -math.inf
        self._members: tuple[str, ...] = ()
        self._missing_since: dict[str, float] = {}
        self._heard: dict[str, _Heard] = {}
        self._told: dict[str, Vector] | None = {}
        self.read_at = -math.inf
        """When the others' loads were last asked for with success."""

    @property
    def others(self) -> tuple[str, ...]:
        """The other replicas that live."""
        return tuple(self._heard)

    def follow(self, endpoint_ids: Iterable[str]) -> None:
        """Which endpoints exist here; loads of others mean nothing to us."""
        self._endpoints = {endpoint_hash(name): name for name in endpoint_ids}
        self._told = None

    async def step(self) -> float | Trouble:
        """Writes what is due, reads the others; seconds until the next time."""
        began = self._clock()
        rolls = began - self._rolled_at >= self._settings.roll_call_s
        members = self._members
        reads: list[Command] = [("MGET", *map(self._names.load, members))] if members else []
        writes, rows = self._writes(began, rolls)
        # A longer wait would outlast the lease of what was read last. Where nothing was, there is time to connect.
        timeout_s = self._settings.call_timeout_s
        if began - self.read_at < self._settings.lease_s:
            timeout_s = min(timeout_s, self._settings.lease_s)
        replies = await self._link.ask(*reads, *writes, timeout_s=timeout_s) if reads or writes else []
        now = self._clock()
        if isinstance(replies, Trouble):
            self._age(now)
            return replies
        if reads and isinstance(replies[0], list):
            self._read(members, replies[0], now)
            self.read_at = began
        trouble = trouble_in(replies)
        if trouble:
            self._age(now)
            return trouble
        if replies:
            self.read_at = began
        if rows is not None:
            self._rows, self._written_at = rows, began
        if rolls:
            self._rolled_at = began
            self._enroll(replies[-1])
        return self._pause(now - began, newcomers=members != self._members)

    def _writes(self, now: float, rolls: bool) -> tuple[list[Command], bytes | None]:
        """What to write, the rows among it (None when they need no writing), and the question who is there."""
        commands: list[Command] = []
        rows: bytes | None = pack_rows(self._hooks.own_loads())
        if rows == self._rows and now - self._written_at < self._settings.lease_s / 3:
            rows = None
        if rows is not None:
            self._sequence += 1
            vector = pack_vector(self._identity.epoch, self._sequence, rows)
            key = self._names.load(self._identity.replica)
            commands.append(("SET", key, vector, "PX", int(self._settings.lease_s * 1000)))
        if rolls:
            gone = [name for name, since in self._missing_since.items() if now - since > FORGET_S]
            if gone:
                commands.append(("ZREM", self._names.replicas, *gone))
            # The score only says whom to leave out where there are too many: clocks need not agree.
            commands.append(("ZADD", self._names.replicas, int(self._wall()), self._identity.replica))
            commands.append(("ZRANGE", self._names.replicas, 0, REPLICAS_MAX - 1, "REV"))
        return commands, rows

    def _enroll(self, listed: Any) -> None:
        names = [name.decode(errors="replace") for name in listed if isinstance(name, bytes)]
        members = tuple(name for name in names if is_replica(name) and name != self._identity.replica)
        if set(members) == set(self._members):
            return
        self._members = members
        self._missing_since = {name: at for name, at in self._missing_since.items() if name in members}
        self._heard = {name: heard for name, heard in self._heard.items() if name in members}
        self._tell()

    def _read(self, members: Sequence[str], values: Sequence[Any], now: float) -> None:
        """Takes in the others' vectors. An older one beside a newer one is a dying process, or a late command."""
        for name, value in zip(members, values, strict=False):
            heard = self._heard.get(name)
            if heard is not None and value == heard.raw:
                heard.at = now
                continue
            vector = unpack_vector(value)
            if vector is None:
                self._missing_since.setdefault(name, now)
                self._heard.pop(name, None)
                continue
            self._missing_since.pop(name, None)
            if heard is None or now - heard.at > self._settings.lease_s or _order(vector) >= _order(heard.vector):
                self._heard[name] = _Heard(value, vector, now)
        self._tell()

    def _age(self, now: float) -> None:
        """Nothing could be read: what is known ends with its lease."""
        if now - self.read_at > self._settings.lease_s:
            self._heard.clear()
            self._missing_since.clear()
        self._tell()

    def _tell(self) -> None:
        """Tells the sum when it is another."""
        vectors = {name: heard.vector for name, heard in self._heard.items()}
        before, self._told = self._told, vectors
        if before is None or not _same_rows(before, vectors):
            self._hooks.on_loads(sum_rows(vectors.values(), self._endpoints))

    def _pause(self, took_s: float, *, newcomers: bool) -> float:
        alone_s = min(self._settings.lease_s / 3, self._settings.roll_call_s)
        period_s = self._settings.cycle_s if self._heard or newcomers else alone_s
        # A Redis that takes longer than the cycle is not asked without end.
        return max(period_s - took_s, self._settings.cycle_s / 4)


def _order(vector: Vector) -> tuple[int, int]:
    return vector.epoch, vector.sequence


def _same_rows(before: dict[str, Vector], after: dict[str, Vector]) -> bool:
    """Whether nobody's load changed; vectors that were read once are the same objects."""
    if before.keys() != after.keys():
        return False
    return all(vector is after[name] or vector.rows == after[name].rows for name, vector in before.items())
