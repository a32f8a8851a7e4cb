"""A mirror of one kind of object: list, watch, and what to do when either breaks.

Owns the protocol with the API server and its pauses, and nothing of what the objects mean. It keeps no objects: whoever
reads the events does. A list that comes again is complete, so that readers lose what they missed the deletion of. While
the API server is away nothing is said, and what was said stays.

The protocol is from "Kubernetes API Concepts" (efficient detection of changes). Versions of objects are opaque texts
there: they are handed back, and never compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from random import Random
from typing import Generic, Protocol

import msgspec

from picker.sources.kubernetes.backoff import Backoff
from picker.sources.kubernetes.decode import Decoder
from picker.sources.kubernetes.failure import NOT_UNDERSTOOD, UNREACHABLE, ApiFailure
from picker.sources.kubernetes.objects import Changed, Gone, Listed, T

# 500 objects to a page, and clusters end at 150,000 pods; more is a server that hands out pages for ever.
PAGES_MAX = 400
# A server that asks for more than this is not worth a blind spot.
RETRY_AFTER_MAX_S = 120.0
# Refusals that say nothing about the version asked for: the watch goes on where it was. After any other a list tells.
PASSING = frozenset({UNREACHABLE, 401, 429, 502, 503})


class Api(Protocol):
    """The part of the API client that is used here."""

    async def get(self, path: str, params: Mapping[str, str], *, timeout_s: float) -> bytes | ApiFailure:
        """The body of a 200, read within `timeout_s`."""

    def watch(
        self, path: str, params: Mapping[str, str], *, timeout_s: float, idle_s: float
    ) -> AsyncGenerator[bytes | ApiFailure, None]:
        """The lines of a watch. The first one is empty: the server has accepted it. A failure comes last; without one
        the server ended the watch in good order. It ends after `timeout_s`, or when nothing came for `idle_s`.
        """


class ReflectorSettings(msgspec.Struct, frozen=True):
    """Sizes and times of one reflector, seconds.

    Watches are asked to last `watch_least_s` to `watch_most_s`, different ones, so that they do not all come back at
    once. API servers send bookmarks about once a minute; `idle_s` without a byte means that nobody is there.
    """

    page_objects: int = 500
    list_timeout_s: float = 60.0
    watch_least_s: float = 240.0
    watch_most_s: float = 300.0
    # How long a watch may outlive the time it was given.
    margin_s: float = 30.0
    idle_s: float = 150.0
    # A watch that lived this long was a success: the next failure is a new one.
    lasted_s: float = 10.0
    # Between the starts of watches that the server ends at once, again and again.
    watch_apart_s: float = 1.0
    # Between questions for a kind that the server does not serve.
    absent_s: float = 60.0
    backoff_least_s: float = 0.25
    backoff_most_s: float = 30.0


class Reflector(Generic[T]):
    """Follows the objects at `path` (`/api/v1/namespaces/default/pods`) that the selectors match.

    `optional` is for kinds that clusters need not have: when the server does not serve it, or does not let us see it
    from the start, there are none. `on_trouble` is told one line per kind of trouble, for the log.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        kind: type[T],
        *,
        clock: Callable[[], float],
        on_trouble: Callable[[str], None],
        field_selector: str = "",
        label_selector: str = "",
        optional: bool = False,
        settings: ReflectorSettings | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: Random | None = None,
    ) -> None:
        self._api = api
        self._path = path
        self._decoder = Decoder(kind)
        self._clock = clock
        self._on_trouble = on_trouble
        selectors = {"fieldSelector": field_selector, "labelSelector": label_selector}
        self._selectors = {name: text for name, text in selectors.items() if text}
        self._optional = optional
        self._settings = settings or ReflectorSettings()
        self._sleep = sleep
        self._rng = rng or Random()
        self._backoff = Backoff(
            least_s=self._settings.backoff_least_s,
            most_s=self._settings.backoff_most_s,
            uniform=self._rng.uniform,
        )
        # Where the watch goes on; empty when only a list helps.
        self._version = ""
        self._pause_s = 0.0
        self._told_all = False
        # What the log was told: statuses, until a watch lasted again; kinds of odd things, for ever.
        self._complained: set[int] = set()
        self._wondered: set[str] = set()
        self.heard_at: float | None = None
        """When the API server last told anything of this kind, on the given clock."""
        self.problem = ""
        """Why nothing new can be known, empty when all is well."""
        self.present: bool | None = None
        """Whether the API server serves this kind; None until it said."""

    def __repr__(self) -> str:
        return f"<Reflector {self._path} {'in trouble' if self.problem else 'well'}>"

    async def events(self) -> AsyncGenerator[Listed[T] | Changed[T] | Gone[T], None]:
        """What exists, and then every change; `Listed` again whenever changes may have been missed.

        Iterate it once. It never ends by itself and raises nothing; closing it closes the connection.
        """
        while True:
            if self._pause_s > 0:
                await self._sleep(self._pause_s)
                self._pause_s = 0.0
            if not self._version:
                listed = await self._list()
                if listed is not None:
                    self._told_all = True
                    yield listed
                continue
            async with aclosing(self._watch(self._version)) as changes:
                async for change in changes:
                    yield change

    # -- list ----------------------------------------------------------------------------------------------------------

    async def _list(self) -> Listed[T] | None:
        """All objects, in pages of one moment; None when they cannot be had now."""
        params = {**self._selectors, "limit": str(self._settings.page_objects)}
        objects: list[T] = []
        for _ in range(PAGES_MAX):
            body = await self._api.get(self._path, params, timeout_s=self._settings.list_timeout_s)
            page = body if isinstance(body, ApiFailure) else self._decoder.page(body)
            if isinstance(page, ApiFailure):
                return self._unlisted(page)
            self._hear()
            self._odd("object", page.odd)
            objects += page.objects
            if not page.more:
                self.present = True
                self._version = page.version
                return Listed(tuple(objects))
            params["continue"] = page.more
        return self._unlisted(ApiFailure(NOT_UNDERSTOOD, f"the list has more than {PAGES_MAX} pages"))

    def _unlisted(self, failure: ApiFailure) -> Listed[T] | None:
        """What a failed list says: for an optional kind, perhaps that there is nothing."""
        if failure.status == 404:
            was, self.present = self.present, False
            if self._optional:
                self._hear()
                self._backoff.reset()
                self._pause_s = self._settings.absent_s * self._rng.uniform(0.75, 1.25)
                return None if was is False else Listed(())
        self._pause_after(failure)
        self._complain(failure)
        # Without the right to see it the API server does not even say whether the kind exists.
        return Listed(()) if self._optional and failure.status == 403 and not self._told_all else None

    # -- watch ---------------------------------------------------------------------------------------------------------

    async def _watch(self, version: str) -> AsyncGenerator[Changed[T] | Gone[T], None]:
        """Changes after `version`, until the watch ends for whatever reason."""
        settings = self._settings
        asked_s = int(self._rng.uniform(settings.watch_least_s, settings.watch_most_s))
        params = {
            **self._selectors,
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(asked_s),
        }
        began = self._clock()
        failure: ApiFailure | None = None
        lines = self._api.watch(self._path, params, timeout_s=asked_s + settings.margin_s, idle_s=settings.idle_s)
        async with aclosing(lines):
            async for line in lines:
                told = self._decoder.line(line) if isinstance(line, bytes) and line else line
                if isinstance(told, ApiFailure):
                    failure = told
                    break
                self._hear()
                if isinstance(told, bytes):
                    continue
                self._version = told.version or self._version
                self._odd("object" if told.event else "event", told.odd)
                if told.event is not None:
                    yield told.event
        self._watch_ended(failure, self._clock() - began)

    def _watch_ended(self, failure: ApiFailure | None, lived_s: float) -> None:
        lasted = lived_s >= self._settings.lasted_s
        if lasted:
            self._backoff.reset()
            self._complained.clear()
        if failure is None:
            self._pause_s = max(0.0, self._settings.watch_apart_s * self._rng.uniform(0.75, 1.25) - lived_s)
        elif failure.expired:
            self._version = ""
            # A version that is too old as soon as it was listed would make us list for ever.
            self._pause_s = 0.0 if lasted else self._backoff.next()
        else:
            self._version = self._version if failure.status in PASSING else ""
            self._pause_after(failure)
            # Connections break; only one that keeps breaking is a trouble.
            if failure.status != UNREACHABLE or not lasted:
                self._complain(failure)

    # -- what is wrong -------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        self.heard_at = self._clock()
        self.problem = ""

    def _pause_after(self, failure: ApiFailure) -> None:
        wanted_s = min(failure.retry_after_s or 0.0, RETRY_AFTER_MAX_S)
        self._pause_s = max(self._backoff.next(), wanted_s)

    def _complain(self, failure: ApiFailure) -> None:
        self.problem = f"{self._path}: {_meaning(failure)}"
        if failure.status not in self._complained:
            self._complained.add(failure.status)
            self._on_trouble(self.problem)

    def _odd(self, kind: str, text: str) -> None:
        if text and kind not in self._wondered:
            self._wondered.add(kind)
            self._on_trouble(f"{self._path}: {text}")


def _meaning(failure: ApiFailure) -> str:
    match failure.status:
        case 401:
            advice = "the API server does not accept our credentials"
        case 403:
            advice = "not allowed; grant get, list and watch on it (RBAC)"
        case 404:
            advice = "the API server does not serve it; is its CustomResourceDefinition installed?"
        case 429 | 503:
            advice = "the API server is overloaded or starting"
        case _:
            return failure.message
    return f"{advice}: {failure.message}"
