"""Has the events of every endpoint heard whose engine publishes some, for as long as it exists.

Finds out where an endpoint publishes, again and again since engines restart on other ports, and keeps the index and
the worker in step. It decodes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol

from picker.core.prefix.deltas import BadDelta, Op, Record, unpack
from picker.core.prefix.index import PrefixIndex
from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.getter import Answer, Getter
from picker.signals.kv.discover import KvPorts, discover
from picker.signals.kv.events import KvHooks
from picker.signals.kv.messages import Facts, Spec

# Engines whose events are understood.
PUBLISHERS = frozenset({"vllm", "sglang"})
# How often the fleet is looked at, an endpoint asked where it publishes, and asked again when it does not answer.
FOLLOW_S = 0.2
ASK_S = 5.0
RETRY_S = 3.0
ASK_TIMEOUT_S = 2.0
ASK_BYTES = 2**20
# Questions under way: a fleet that starts at once takes its turn.
PLACES = 16


class Events(Protocol):
    """The part of `KvEvents` used here."""

    def subscribe(self, publisher: int, spec: Spec) -> bool: ...

    def unsubscribe(self, publisher: int) -> None: ...


class Store(Protocol):
    """The part of the datastore used here."""

    def endpoints(self) -> tuple[Endpoint, ...]: ...


@dataclass(slots=True)
class _Heard:
    """One endpoint. `address` is where it publishes, as far as is known; `publisher` is 0 while it is not heard."""

    endpoint: Endpoint
    due_at: float = 0.0
    address: str = ""
    publisher: int = 0
    spec: Spec | None = None
    asking: asyncio.Task[None] | None = None


class KvFollower:
    """Follows the store's endpoints once their engines are recognised.

    `listen` begins to listen; it is called when the first publisher was found, since most fleets have none. `on_facts`
    is told block sizes and adapters by endpoint id; None when an endpoint is heard no more. `on_trouble` gets what a
    person may want to know, once per endpoint and text.
    """

    def __init__(
        self,
        index: PrefixIndex,
        listen: Callable[[KvHooks], Events],
        getter: Getter,
        store: Store,
        *,
        ports: KvPorts,
        engines: Callable[[], Mapping[str, str]],
        clock: Callable[[], float],
        on_facts: Callable[[str, Facts | None], None],
        on_trouble: Callable[[str, str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: Random | None = None,
    ) -> None:
        self._index = index
        self._listen = listen
        self._events: Events | None = None
        self._getter = getter
        self._store = store
        self._ports = ports
        self._engines = engines
        self._clock = clock
        self._on_facts = on_facts
        self._on_trouble = on_trouble
        self._sleep = sleep
        self._rng = rng or Random()
        self._heard: dict[str, _Heard] = {}
        self._by_publisher: dict[int, _Heard] = {}
        self._by_address: dict[str, dict[str, _Heard]] = {}
        self._told: dict[str, str] = {}
        self._places = asyncio.Semaphore(PLACES)
        self._asking: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<KvFollower [{len(self._by_publisher)} of {len(self._heard)} heard]>"

    async def run(self) -> None:
        """Until cancelled; nothing is heard or known any more then."""
        try:
            while True:
                self._look()
                await self._sleep(FOLLOW_S)
        finally:
            for name in tuple(self._heard):
                self._leave(name)
            await asyncio.gather(*self._asking, return_exceptions=True)

    # -- what the worker says --------------------------------------------------------------------------------------

    def _delta(self, delta: bytes) -> None:
        """Of a publisher's blocks."""
        try:
            # Messages are shorter than one slice of the index's work.
            self._index.apply(self._watched(delta))
        except BadDelta as error:
            self._say("worker", str(error))
            # Whose changes are lost is not known: all are heard anew.
            for heard in tuple(self._by_publisher.values()):
                self._hear(heard, None)
                self._ask_soon(heard)

    def _watched(self, delta: bytes) -> Iterator[Record]:
        """Its records. Who went silent may come back at another port."""
        for record in unpack(delta):
            heard = self._by_publisher.get(record.publisher) if record.op is Op.OFFLINE else None
            if heard is not None:
                self._ask_soon(heard)
            yield record

    def _facts(self, facts: Facts) -> None:
        """What it learnt of a publisher."""
        heard = self._by_publisher.get(facts.publisher)
        if heard is not None:
            self._index.sized(heard.endpoint.id, facts.block_tokens)
            self._on_facts(heard.endpoint.id, facts)

    def _trouble(self, publisher: int, reason: str) -> None:
        """A publisher cannot be heard, or the worker (0) ended."""
        heard = self._by_publisher.get(publisher)
        if heard is not None:
            self._say(heard.endpoint.id, reason)
            # Another try belongs to the next question.
            self._hear(heard, None)
        elif not publisher:
            self._say("worker", reason)

    # -- endpoints -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        engines, now = self._engines(), self._clock()
        wanted = {each.id: each for each in self._store.endpoints() if engines.get(each.id) in PUBLISHERS}
        for name in [name for name in self._heard if name not in wanted]:
            self._leave(name)
        for name, endpoint in wanted.items():
            heard = self._heard.get(name)
            if heard is None:
                heard = self._heard[name] = _Heard(endpoint)
            elif (heard.endpoint.url, heard.endpoint.instance) != (endpoint.url, endpoint.instance):
                # Another process: nothing that the one before told, or tells yet, is true of it.
                self._stop(heard)
                heard.due_at = now
            heard.endpoint = endpoint
            if now >= heard.due_at and (heard.asking is None or heard.asking.done()):
                heard.asking = asyncio.create_task(self._ask(heard))
                self._asking.add(heard.asking)
                heard.asking.add_done_callback(self._asking.discard)

    def _leave(self, name: str) -> None:
        self._stop(self._heard.pop(name))
        self._told.pop(name, None)

    def _stop(self, heard: _Heard) -> None:
        """Neither asks nor hears it any more."""
        if heard.asking is not None:
            heard.asking.cancel()
            heard.asking = None
        self._move(heard, "")
        self._hear(heard, None)

    async def _ask(self, heard: _Heard) -> None:
        endpoint = heard.endpoint
        siblings = sum(1 for each in self._store.endpoints() if each.pod and each.pod == endpoint.pod)

        async def get(url: str) -> Answer | ProbeFailure:
            async with self._places:
                return await self._getter.get(endpoint, url, timeout_s=ASK_TIMEOUT_S, limit_bytes=ASK_BYTES)

        found = await discover(endpoint, get, self._ports, siblings=max(1, siblings))
        pause_s = RETRY_S if isinstance(found, ProbeFailure) else ASK_S
        heard.due_at = self._clock() + pause_s * self._rng.uniform(0.8, 1.2)
        if isinstance(found, ProbeFailure):
            return
        if len(found) > 1:
            # Nobody can choose among the ranks behind one port, so what one of them holds says little.
            self._say(endpoint.id, f"{len(found)} data-parallel ranks behind one port; their events are not used")
        spec = found[0].spec if len(found) == 1 else None
        self._move(heard, "" if spec is None else spec.endpoint)
        sharing = self._by_address.get(heard.address, {})
        if len(sharing) < 2:
            self._hear(heard, spec)
            return
        # One of them at most publishes there; where engines do not tell, it is what is usual on their host.
        for name, each in sharing.items():
            self._say(name, f"several endpoints would publish at {heard.address}; their events are not used")
            self._hear(each, None)

    def _ask_soon(self, heard: _Heard) -> None:
        heard.due_at = min(heard.due_at, self._clock() + RETRY_S)

    def _move(self, heard: _Heard, address: str) -> None:
        """From now on it is known to publish at `address`; empty: nowhere."""
        if address == heard.address:
            return
        left = self._by_address.get(heard.address, {})
        left.pop(heard.endpoint.id, None)
        for each in left.values():
            self._ask_soon(each)
        if not left:
            self._by_address.pop(heard.address, None)
        heard.address = address
        if address:
            self._by_address.setdefault(address, {})[heard.endpoint.id] = heard

    def _hear(self, heard: _Heard, spec: Spec | None) -> None:
        """From now on at `spec`; None: no more."""
        name = heard.endpoint.id
        publisher = self._index.bind(name, heard.endpoint.instance) if spec is not None else 0
        if (publisher, spec) == (heard.publisher, heard.spec):
            return
        if heard.publisher and heard.publisher != publisher:
            self._by_publisher.pop(heard.publisher, None)
            if self._events is not None:
                self._events.unsubscribe(heard.publisher)
        if spec is not None and not self._listening().subscribe(publisher, spec):
            self._say(name, "too many engines publish events; its events are not used")
            publisher, spec = 0, None
        if spec is None:
            self._index.unbind(name)
            self._on_facts(name, None)
        else:
            self._by_publisher[publisher] = heard
        heard.publisher, heard.spec = publisher, spec

    def _listening(self) -> Events:
        if self._events is None:
            hooks = KvHooks(on_delta=self._delta, on_facts=self._facts, on_trouble=self._trouble)
            self._events = self._listen(hooks)
        return self._events

    def _say(self, what: str, text: str) -> None:
        if self._told.get(what) != text:
            self._told[what] = text
            self._on_trouble(what, text)
