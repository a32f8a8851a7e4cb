"""Names: of this replica, and of the keys in Redis."""

from __future__ import annotations

import re

import msgspec

_REPLICA = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Identity(msgspec.Struct, frozen=True):
    """Which replica this is, and which life of it: a restart has a higher epoch."""

    replica: str
    epoch: int

    @property
    def sender(self) -> str:
        """Names this life in the streams."""
        return f"{self.replica}.{self.epoch:x}"


def is_replica(name: str) -> bool:
    """Whether a replica may be called so: 1 to 64 letters, digits, dots, underscores and dashes."""
    return _REPLICA.fullmatch(name) is not None


class Names:
    """The keys of one deployment.

    The prefix is a hash tag: a cluster keeps all of them on one node, so that one round trip reads several. That node
    has a few hundred commands a second to do for each replica; a cluster gives failover here, not room.

    Raises ValueError for a prefix that is not made of 1 to 64 letters, digits, dots, colons, underscores and dashes.
    """

    def __init__(self, prefix: str) -> None:
        if _PREFIX.fullmatch(prefix) is None:
            raise ValueError("the prefix of shared keys must be 1 to 64 letters, digits, '.', ':', '_' or '-'")
        self._tag = f"{{{prefix}}}"
        self.secret = f"{self._tag}:secret"
        self.replicas = f"{self._tag}:replicas"
        self.routed = f"{self._tag}:routed"
        self.deltas = f"{self._tag}:deltas"
        self.ingester = f"{self._tag}:ingester"

    def load(self, replica: str) -> str:
        """The load vector of one replica."""
        return f"{self._tag}:load:{replica}"

    def snapshot(self, endpoint_id: str) -> str:
        """The blocks of one endpoint."""
        return f"{self._tag}:snap:{endpoint_id}"
