"""The secret of the keys: one for all replicas of a deployment, found or put into Redis.

Owns which secret is in use. A replica without Redis works with one of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from picker.signals.shared.link import Kind, Link, Trouble, trouble_in, trouble_of
from picker.signals.shared.names import Names
from picker.signals.shared.settings import SECRET_BYTES, SharedSettings

# Between questions while nobody has put one yet.
_SOON_S = 0.1


class SecretKeeper:
    """Looks after the secret. `on_adopt` is told when another one takes the place of ours.

    Who knows the shared secret puts it back as soon as it is missing. Who only has its own waits for a while before it
    proposes it: a replica that is new must not change everybody's keys because Redis was flushed.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        own: bytes,
        *,
        settings: SharedSettings,
        clock: Callable[[], float],
        on_adopt: Callable[[], None],
    ) -> None:
        self._link = link
        self._key = names.secret
        self._settings = settings
        self._clock = clock
        self._on_adopt = on_adopt
        self._missed_since: float | None = None
        self.secret = own
        self.shared = False
        """Whether others use it too, as far as we know."""

    def __repr__(self) -> str:
        return f"<SecretKeeper {'shared' if self.shared else 'alone'}>"

    async def step(self) -> float | Trouble:
        """One look; seconds until the next."""
        now = self._clock()
        waited = self._missed_since is not None and now - self._missed_since >= self._settings.secret_patience_s
        puts = self.shared or waited
        put = [("SET", self._key, self.secret, "NX")] if puts else []
        replies = await self._link.ask(*put, ("GET", self._key))
        if isinstance(replies, Trouble):
            self._missed_since = None
            return replies
        found = replies[-1]
        if isinstance(found, Exception):
            self._missed_since = None
            return trouble_of(found)
        if found is None:
            if self._missed_since is None:
                self._missed_since = now
            return trouble_in(replies[:-1]) or _SOON_S
        self._missed_since = None
        if not isinstance(found, bytes) or len(found) != SECRET_BYTES:
            return Trouble(Kind.ODD, "what lies under the secret's key is not a secret of ours")
        self.shared = True
        if found != self.secret:
            self.secret = found
            self._on_adopt()
        return self._settings.secret_s
