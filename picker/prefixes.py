"""Everything that makes routing by prefixes work, put together: the index, what feeds it, and the keys of requests.

Owns the worker that hears KV-cache events, the follower that finds them, the reader of prompts and the check of its
tokenizers; starts and stops them. It chooses nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from picker.config import IndexSection
from picker.core.prefix.index import PrefixIndex
from picker.core.values import Endpoint, Snapshot, Standing
from picker.prompts import Engines, Prompts
from picker.signals.kv.discover import KvPorts
from picker.signals.kv.events import KvEvents, KvHooks
from picker.signals.kv.follow import KvFollower, Store
from picker.signals.kv.messages import Facts
from picker.signals.tokens.local import LoadProblem, LocalTokenizer, load_tokenizers
from picker.signals.tokens.reader import PromptReader
from picker.signals.tokens.remote import EngineTokens
from picker.signals.tokens.selfcheck import SelfCheck
from picker.telemetry.prefix_metrics import PrefixFigures
from picker.upstream.client import Upstream

# Token ids of texts seen: about 16 million tokens for each of the two caches.
CACHE_BYTES = 64 * 2**20
SECRET_BYTES = 16

OnTrouble = Callable[[str, str], None]
"""What it is about (an endpoint, a model, the worker) and what is wrong."""


class Fleet(Store, Protocol):
    """The part of the datastore used here."""

    @property
    def adapters(self) -> frozenset[str]:
        """The LoRA adapters that engines list."""


class Prefixes:
    """One per process. `prompts` is None when the configuration switches the index off."""

    def __init__(self, section: IndexSection, *, clock: Callable[[], float], on_trouble: OnTrouble) -> None:
        self.index = PrefixIndex(max_keys=section.blocks)
        self._engines = Engines()
        self.prompts = Prompts(self._engines) if section.enabled else None
        self._section = section
        self._clock = clock
        self._on_trouble = on_trouble
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._events: KvEvents | None = None
        self._restart: Callable[[], Awaitable[None]] | None = None
        self._heard: dict[str, int] = {}
        self._asks: EngineTokens | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Prefixes {self.index!r}>"

    async def start(
        self,
        upstream: Upstream,
        store: Fleet,
        *,
        recognised: Callable[[], Mapping[str, str]],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        """Begins to listen. `recognised` names the engine of each endpoint that is known."""
        section = self._section
        self._restart = partial(self.start, upstream, store, recognised=recognised, snapshot=snapshot)
        if self.prompts is None:
            return
        asks = self._asks = EngineTokens(
            upstream, lambda model: _servers(snapshot(), model), clock=self._clock, cache_bytes=CACHE_BYTES
        )
        tokenizers = await self._tokenizers()
        check = SelfCheck(
            tokenizers, asks, heard=self._heard, snapshot=snapshot, clock=self._clock, on_trouble=self._on_trouble
        )
        if tokenizers:
            self._run(check.run(), "tokenizer check")
        reader = PromptReader(
            self._secret,
            tokenizers=tokenizers,
            engines=asks if section.ask_engines else None,
            agreement=check.agreement,
        )
        self.prompts.begin(reader, lambda: store.adapters)
        if section.kv_events == "off":
            return
        follower = KvFollower(
            self.index,
            self._listen,
            upstream,
            store,
            ports=KvPorts(port=section.kv_events_port or 0, replay_port=section.kv_replay_port or 0),
            engines=recognised,
            clock=self._clock,
            on_facts=self._on_facts,
            on_trouble=self._on_trouble,
        )
        self._run(follower.run(), "kv events")

    async def close(self) -> None:
        """Ends the worker and what is under way."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._events is not None:
            await self._events.close()
            self._events = None
        if self.prompts is not None:
            await self.prompts.close()
        if self._asks is not None:
            await self._asks.close()

    async def use(self, secret: bytes) -> None:
        """Makes keys with another secret from now on: everything known under the old one is void."""
        self._secret = secret
        if self._restart is not None:
            await self.close()
            self.index.clear()
            await self._restart()

    def figures(self) -> PrefixFigures:
        """What metrics show."""
        return PrefixFigures(
            index=self.index.statistics,
            events=lambda: {} if self._events is None else msgspec.structs.asdict(self._events.stats().total),
            prompts=lambda: {} if self.prompts is None else self.prompts.counts,
        )

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_trouble(task.get_name(), f"ended: {error!r}")

    def _listen(self, hooks: KvHooks) -> KvEvents:
        self._events = KvEvents(secret=self._secret, hooks=hooks, clock=self._clock)
        self._events.start()
        return self._events

    async def _tokenizers(self) -> dict[str, LocalTokenizer]:
        if not self._section.tokenizers:
            return {}
        loaded = await asyncio.to_thread(load_tokenizers, self._section.tokenizers, CACHE_BYTES)
        for model, found in loaded.items():
            if isinstance(found, LoadProblem):
                self._on_trouble(model, found.message)
        return {model: found for model, found in loaded.items() if isinstance(found, LocalTokenizer)}

    def _on_facts(self, endpoint_id: str, facts: Facts | None) -> None:
        if facts is None:
            self._heard.pop(endpoint_id, None)
            self._engines.forget(endpoint_id)
            return
        self._heard[endpoint_id] = facts.publisher
        if facts.block_tokens or endpoint_id not in self._engines.block_tokens:
            # A cache that was emptied gets blocks of the same size again.
            self._engines.block_tokens[endpoint_id] = facts.block_tokens
        self._engines.loras[endpoint_id] = facts.loras


def _servers(snapshot: Snapshot, model: str) -> Sequence[Endpoint]:
    """Who is known to serve a model: others have no business with its prompts."""
    return [
        state.endpoint
        for state in snapshot.states
        if state.standing is Standing.READY and state.models is not None and model in state.models
    ]
