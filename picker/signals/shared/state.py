"""The state that replicas share, as one object: `SharedState` is all that the rest of Waypost sees of Redis.

It runs a few loops, each with its own pauses after trouble, so that one that suffers does not hold up the others.
Nothing a request does waits for them: what requests tell goes into bounded buffers, what they read is kept by the
hooks' owners.

Session stickiness is not here on purpose: the home of a session is found by rendezvous hashing over the endpoints,
which all replicas know, so there is nothing to share.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from random import Random

from picker.signals.shared.formats import RoutedPrompt, pack_keys, pack_routed, secret_tag, unpack_keys, unpack_routed
from picker.signals.shared.ingester import Election
from picker.signals.shared.journal import JournalReader, JournalWriter, Stream
from picker.signals.shared.link import Kind, Link, Trouble
from picker.signals.shared.loads import LoadExchange
from picker.signals.shared.names import Identity, Names, is_replica
from picker.signals.shared.secret import SecretKeeper
from picker.signals.shared.settings import SECRET_BYTES, SharedHooks, SharedSettings, SharedStatus
from picker.signals.shared.snapshots import SnapshotKeeper

# A prompt's first keys say most: others see its end as not cached. 65,000 tokens in blocks of 16.
PROMPT_KEYS_MAX = 4096
# What a goodbye may take of the time a process has to end.
_GOODBYE_S = 0.25
# The same trouble is news again after this long.
COMPLAIN_AGAIN_S = 60.0
# There are a dozen texts; those of bugs may vary.
_COMPLAINTS_MAX = 64
_LOADS = "loads"
Step = Callable[[], Awaitable[float | Trouble]]


class SharedState:
    """One replica's part in the shared state. One per process; `start` needs a running loop, `close` may be called
    twice. As a context manager it does both.

    `url`: see `address.FORMS`. `username` and `password` go before those in the URL. `prefix` tells deployments in one
    Redis apart. `replica` is the name of this replica, a random one when empty; two that live at the same time must
    not share one. Raises ValueError for a bad URL, prefix or name. `clock` is monotonic, `wall` Unix time, in seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        hooks: SharedHooks,
        prefix: str = "waypost",
        replica: str = "",
        username: str = "",
        password: str = "",
        settings: SharedSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: Random | None = None,
    ) -> None:
        replica = replica or secrets.token_hex(8)
        if not is_replica(replica):
            raise ValueError("a replica's name must be 1 to 64 letters, digits, '.', '_' or '-'")
        self._settings = settings = settings or SharedSettings()
        self._hooks = hooks
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or Random()
        self._names = names = Names(prefix)
        self.identity = Identity(replica, int(wall() * 1000))
        self._link = link = Link(url, timeout_s=settings.call_timeout_s, username=username, password=password)
        self._secret = SecretKeeper(
            link, names, secrets.token_bytes(SECRET_BYTES), settings=settings, clock=clock, on_adopt=self._adopt
        )
        self._tag = secret_tag(self._secret.secret)
        self._loads = LoadExchange(link, names, self.identity, settings=settings, hooks=hooks, clock=clock, wall=wall)
        self._snapshots = SnapshotKeeper(
            link,
            names,
            replica,
            settings=settings,
            hooks=hooks,
            others=lambda: self._loads.others,
            tag=lambda: self._tag,
            ready=lambda: self._secret.shared,
            wall=wall,
        )
        self._election = Election(
            link, names, self.identity, settings=settings, on_change=hooks.on_ingester, clock=clock
        )
        routed, deltas = self._stream(names.routed), self._stream(names.deltas)
        self._routed_out: JournalWriter[RoutedPrompt] = JournalWriter(routed, join=pack_routed)
        self._routed_in = JournalReader(routed, apply=self._apply_routed, on_missed=lambda entries: None)
        self._deltas_out: JournalWriter[bytes] = JournalWriter(deltas, join=b"".join)
        self._deltas_in = JournalReader(deltas, apply=hooks.on_delta, on_missed=hooks.on_missed)
        self._tasks: list[asyncio.Task[None]] = []
        self._troubles: dict[str, Trouble] = {}
        # What the log has been told, and when.
        self._complained: dict[str, float] = {}

    def _stream(self, key: str) -> Stream:
        return Stream(
            link=self._link,
            key=key,
            sender=self.identity.sender,
            tag=lambda: self._tag,
            ready=lambda: self._secret.shared,
            alone=lambda: not self._loads.others,
            clock=self._clock,
            entries_max=self._settings.stream_entries,
            buffer_bytes=self._settings.buffer_bytes,
            pause_s=self._settings.flush_s,
            warm_s=self._settings.warm_s,
        )

    def __repr__(self) -> str:
        state = "connected" if self.connected else "not connected"
        return f"<SharedState {self.identity.replica} {state} [{len(self._loads.others)} others]>"

    async def __aenter__(self) -> SharedState:
        self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # -- what the rest of Waypost uses -----------------------------------------------------------------------------

    @property
    def secret(self) -> bytes:
        """The secret to make keys with, 32 bytes: our own until the shared one is known."""
        return self._secret.secret

    @property
    def connected(self) -> bool:
        """Whether loads went both ways in the last cycle."""
        return self._loads.read_at > -math.inf and _LOADS not in self._troubles and bool(self._tasks)

    @property
    def age_s(self) -> float:
        """How old the view of the others' loads is; infinite before the first one."""
        return self._clock() - self._loads.read_at

    @property
    def elected(self) -> bool:
        """Whether this replica is the ingester."""
        return self._election.elected

    def follow(self, endpoint_ids: Iterable[str]) -> None:
        """Says which endpoints exist. To be called whenever that changed; others' loads are told for these only."""
        endpoint_ids = tuple(endpoint_ids)
        self._loads.follow(endpoint_ids)
        self._snapshots.follow(endpoint_ids)

    def tell_routed(self, endpoint_id: str, instance: str, keys: Sequence[int]) -> None:
        """Tells the others that a prompt with these keys was sent to an endpoint. Never waits."""
        if keys:
            packed = pack_keys(keys[:PROMPT_KEYS_MAX])
            self._routed_out.tell(RoutedPrompt(endpoint_id, instance, packed), len(packed))

    def tell_delta(self, delta: bytes) -> None:
        """Tells the others what an engine told. Ignored when this replica is not the ingester. Never waits."""
        if self.elected:
            self._deltas_out.tell(delta, len(delta))

    async def load_snapshots(self, instances: Mapping[str, str]) -> int:
        """Hands what is written about these endpoints (id to instance) to `on_snapshot`; returns how many there were.

        Worth doing after `on_secret`, or at the start when the secret stays: snapshots of another secret do not count.
        """
        return await self._snapshots.load(instances)

    def status(self) -> SharedStatus:
        """How sharing goes."""
        return SharedStatus(
            connected=self.connected,
            problem=next(iter(self._troubles.values())).text if self._troubles else "",
            age_s=self.age_s,
            lag_s=self._clock() - self._routed_in.caught_up_at,
            replicas=len(self._loads.others) + 1,
            dropped=self._routed_out.dropped + self._deltas_out.dropped,
            missed=self._routed_in.missed + self._deltas_in.missed,
        )

    # -- its life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to share. Does not wait for Redis."""
        if self._tasks:
            return
        steps: dict[str, Step] = {
            _LOADS: self._loads.step,
            "secret": self._secret.step,
            "routed out": self._routed_out.step,
            "routed in": self._routed_in.step,
            "snapshots": self._snapshots.step,
        }
        if self._settings.ingester:
            steps |= {
                "ingester": self._election.step,
                "deltas out": self._deltas_out.step,
                "deltas in": self._deltas_in.step,
            }
        self._tasks = [
            asyncio.create_task(self._keep(name, step), name=f"shared {name}") for name, step in steps.items()
        ]

    async def close(self) -> None:
        """Ends all loops, takes this replica's load away, and disconnects. Bounded by `call_timeout_s`."""
        well = self.connected
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            if well:
                await self._goodbye()
        finally:
            await self._link.close()

    async def _goodbye(self) -> None:
        name = self.identity.replica
        await self._link.ask(
            ("DEL", self._names.load(name)), ("ZREM", self._names.replicas, name), timeout_s=_GOODBYE_S
        )
        await self._election.resign(timeout_s=_GOODBYE_S)

    async def _keep(self, name: str, step: Step) -> None:
        """One loop: steps and pauses, until cancelled."""
        settings = self._settings
        limit_s = settings.backoff_least_s
        while True:
            outcome = await self._contained(step)
            if not isinstance(outcome, Trouble):
                limit_s = settings.backoff_least_s
                self._troubles.pop(name, None)
                await self._sleep(outcome)
                continue
            self._troubles[name] = outcome
            self._complain(outcome.text)
            # Jittered, so that replicas do not all come back to a Redis that just started.
            limit_s = min(settings.backoff_most_s, limit_s * 2)
            await self._sleep(self._rng.uniform(settings.backoff_least_s, limit_s))

    def _complain(self, text: str) -> None:
        now = self._clock()
        if now - self._complained.get(text, -math.inf) > COMPLAIN_AGAIN_S:
            if len(self._complained) >= _COMPLAINTS_MAX:
                self._complained.clear()
            self._complained[text] = now
            self._hooks.on_trouble(text)

    async def _contained(self, step: Step) -> float | Trouble:
        try:
            return await step()
        except Exception as error:
            # A bug, here or in a hook. Sharing must not stop for ever because of it, nor without a word.
            return Trouble(Kind.ODD, f"a bug: {type(error).__name__}: {error}")

    def _adopt(self) -> None:
        """Another secret: what was gathered goes out under the old one's tag, and what others told is read again."""
        self._routed_out.seal()
        self._deltas_out.seal()
        self._tag = secret_tag(self._secret.secret)
        self._routed_in.rewind()
        self._deltas_in.rewind()
        self._hooks.on_secret(self._secret.secret)

    def _apply_routed(self, body: bytes) -> None:
        for prompt in unpack_routed(body) or ():
            keys = unpack_keys(prompt.keys)
            if keys:
                self._hooks.on_routed(prompt.endpoint_id, prompt.instance, keys)
