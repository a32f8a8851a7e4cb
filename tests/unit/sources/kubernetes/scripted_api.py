"""An API server that is a script, a clock that only sleeping moves, and a reflector between them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from random import Random
from typing import Any

import msgspec

from picker.sources.kubernetes.failure import ApiFailure
from picker.sources.kubernetes.objects import Changed, Gone, Listed, Pod
from picker.sources.kubernetes.reflector import Reflector

PATH = "/api/v1/namespaces/default/pods"
Event = Listed[Pod] | Changed[Pod] | Gone[Pod]


class Clock:
    """Seconds that pass in sleeps, and in watches whose script has a number."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class ScriptedApi:
    """Answers each list with the next of `lists`, each watch with the next of `watches`; then it is silent.

    A number in a watch is seconds that pass.
    """

    def __init__(
        self,
        lists: Sequence[bytes | ApiFailure] = (),
        watches: Sequence[Sequence[bytes | ApiFailure | float]] = (),
    ) -> None:
        self.clock = Clock()
        self.exhausted = asyncio.Event()
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.watch_times: list[tuple[float, float]] = []
        self.open = 0
        self._lists = deque(lists)
        self._watches = deque(watches)

    @property
    def words(self) -> list[str]:
        """What was asked for in which order: "list", "list+TOKEN" or "watch@VERSION"."""
        return [
            f"watch@{params['resourceVersion']}"
            if what == "watch"
            else "+".join(("list", *filter(None, [params.get("continue")])))
            for what, params in self.asked
        ]

    async def get(self, path: str, params: Mapping[str, str], *, timeout_s: float) -> bytes | ApiFailure:
        assert path == PATH
        if not self._lists:
            await self._silence()
        self.asked.append(("list", dict(params)))
        return self._lists.popleft()

    async def watch(
        self, path: str, params: Mapping[str, str], *, timeout_s: float, idle_s: float
    ) -> AsyncGenerator[bytes | ApiFailure, None]:
        assert path == PATH
        self.asked.append(("watch", dict(params)))
        self.watch_times.append((timeout_s, idle_s))
        self.open += 1
        try:
            if not self._watches:
                await self._silence()
            for item in self._watches.popleft():
                if isinstance(item, float):
                    self.clock.now += item
                else:
                    yield item
        finally:
            self.open -= 1

    async def _silence(self) -> None:
        self.exhausted.set()
        await asyncio.Event().wait()


class Followed:
    """A reflector that ran through a script."""

    def __init__(self, api: ScriptedApi, **options: Any) -> None:
        self.api = api
        self.events: list[Event] = []
        self.troubles: list[str] = []
        self.reflector: Reflector[Pod] = Reflector(
            api,
            PATH,
            Pod,
            clock=api.clock,
            on_trouble=self.troubles.append,
            sleep=api.clock.sleep,
            rng=Random(7),
            **options,
        )

    @property
    def slept(self) -> list[float]:
        return self.api.clock.slept

    @property
    def told(self) -> list[str]:
        """The events in short: "=a,b" for a list, "+a" for a change, "-a" for a deletion."""
        return [_short(event) for event in self.events]

    async def run(self) -> Followed:
        task = asyncio.create_task(self._follow())
        exhausted = asyncio.create_task(self.api.exhausted.wait())
        async with asyncio.timeout(10):
            await asyncio.wait((task, exhausted), return_when=asyncio.FIRST_COMPLETED)
        exhausted.cancel()
        task.cancel()
        done = await asyncio.gather(task, exhausted, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) or each is True for each in done), done
        assert self.api.open == 0
        return self

    async def _follow(self) -> None:
        async with aclosing(self.reflector.events()) as events:
            async for event in events:
                self.events.append(event)


async def follow(
    lists: Sequence[bytes | ApiFailure] = (),
    watches: Sequence[Sequence[bytes | ApiFailure | float]] = (),
    **options: Any,
) -> Followed:
    """A reflector after all of the script."""
    return await Followed(ScriptedApi(lists, watches), **options).run()


def _short(event: Event) -> str:
    if isinstance(event, Listed):
        return "=" + ",".join(found.metadata.name for found in event.objects)
    return ("+" if isinstance(event, Changed) else "-") + event.object.metadata.name


# -- what API servers send ---------------------------------------------------------------------------------------------

ACCEPTED = b""


def pod(name: str, version: str = "1") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", "resourceVersion": version}}


def page(*names: str, version: str = "10", more: str = "") -> bytes:
    meta = {"resourceVersion": version, **({"continue": more} if more else {})}
    return msgspec.json.encode({"kind": "PodList", "metadata": meta, "items": [pod(name) for name in names]})


def line(event: str, found: object) -> bytes:
    return msgspec.json.encode({"type": event, "object": found})


def added(name: str, version: str) -> bytes:
    return line("ADDED", pod(name, version))


def modified(name: str, version: str) -> bytes:
    return line("MODIFIED", pod(name, version))


def deleted(name: str, version: str) -> bytes:
    return line("DELETED", pod(name, version))


def bookmark(version: str) -> bytes:
    return line("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": version, "creationTimestamp": None}})


def error(code: int, reason: str = "", message: str = "no") -> bytes:
    return line("ERROR", {"kind": "Status", "code": code, "reason": reason, "message": message})
