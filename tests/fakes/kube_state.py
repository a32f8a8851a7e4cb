"""What a fake API server knows: objects by kind, one counter of versions, and a history that can be compacted."""

from __future__ import annotations

import asyncio
import bisect
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Key = tuple[str, str]
"""Namespace (empty for nodes) and name."""

OLD = "inference.networking.x-k8s.io"


@dataclass(frozen=True)
class Kind:
    """One kind of object that is served."""

    group: str
    version: str
    plural: str
    singular: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


KINDS = {
    "pods": Kind("", "v1", "pods", "Pod"),
    "nodes": Kind("", "v1", "nodes", "Node", namespaced=False),
    "inferencepools": Kind("inference.networking.k8s.io", "v1", "inferencepools", "InferencePool"),
    "inferencepools.x": Kind(OLD, "v1alpha2", "inferencepools", "InferencePool"),
    "inferencemodels.x": Kind(OLD, "v1alpha2", "inferencemodels", "InferenceModel"),
    "inferenceobjectives": Kind("llm-d.ai", "v1alpha2", "inferenceobjectives", "InferenceObjective"),
    "inferenceobjectives.x": Kind(OLD, "v1alpha2", "inferenceobjectives", "InferenceObjective"),
    "inferencemodelrewrites": Kind("llm-d.ai", "v1alpha2", "inferencemodelrewrites", "InferenceModelRewrite"),
    "inferencemodelrewrites.x": Kind(OLD, "v1alpha2", "inferencemodelrewrites", "InferenceModelRewrite"),
}
"""Names for tests; `.x` is the older group."""


@dataclass(frozen=True)
class Change:
    """One step of the history: an object before and after, None where it did not exist."""

    version: int
    kind: str
    key: Key
    before: Json | None
    after: Json | None


@dataclass(frozen=True)
class Scope:
    """What a list or watch asked for."""

    kind: str
    namespace: str
    labels: str = ""
    fields: str = ""

    def wants(self, found: Json | None) -> bool:
        if found is None or (self.namespace and found["metadata"].get("namespace") != self.namespace):
            return False
        labels = found["metadata"].get("labels") or {}
        return all(test(labels) for test in _label_tests(self.labels)) and all(
            test(found) for test in _field_tests(self.fields)
        )


@dataclass(eq=False)
class Watcher:
    """One running watch and what it has still to be sent."""

    scope: Scope
    version: int
    queue: asyncio.Queue[tuple[str, Json] | bytes | None] = field(default_factory=asyncio.Queue)
    """Events, raw bytes, or None: the end."""
    cut: bool = False
    """Break off in the middle of the next line."""
    mangle: bool = False
    """Send half of the next line as if it were whole."""
    mute: bool = False
    """Send nothing any more, and do not end either."""

    def take(self, change: Change) -> None:
        event = _event(self.scope, change)
        if event is not None:
            self.queue.put_nowait(event)


def _event(scope: Scope, change: Change) -> tuple[str, Json] | None:
    """The change as the watcher sees it: what leaves its selection is deleted for it."""
    if change.kind != scope.kind:
        return None
    was, now = scope.wants(change.before), scope.wants(change.after)
    if now and change.after is not None:
        return ("MODIFIED" if was else "ADDED"), change.after
    if was and change.before is not None:
        gone = copy.deepcopy(change.after if change.after is not None else change.before)
        gone["metadata"]["resourceVersion"] = str(change.version)
        return "DELETED", gone
    return None


class KubeState:
    """Everything that is in etcd, so to speak."""

    def __init__(self) -> None:
        self.version = 1000
        self.compacted = 1000
        self.served = set(KINDS)
        self.watchers: set[Watcher] = set()
        self._objects: dict[str, dict[Key, Json]] = {name: {} for name in KINDS}
        self._history: list[Change] = []
        self._pages: dict[str, tuple[int, list[Json]]] = {}
        self._page_number = 0

    # -- writes --------------------------------------------------------------------------------------------------------

    def put(self, kind: str, namespace: str, found: Json) -> Json:
        """Creates or replaces an object; the server's part of the metadata is filled in."""
        after = copy.deepcopy(found)
        meta = after.setdefault("metadata", {})
        key = (namespace, meta["name"])
        if KINDS[kind].namespaced:
            meta["namespace"] = namespace
        before = self._objects[kind].get(key)
        self.version += 1
        kept = before["metadata"] if before is not None else {}
        meta.setdefault("uid", kept.get("uid", f"uid-{self.version}"))
        meta.setdefault("creationTimestamp", kept.get("creationTimestamp", "2026-01-01T00:00:00Z"))
        meta["resourceVersion"] = str(self.version)
        self._objects[kind][key] = after
        self._publish(Change(self.version, kind, key, before, after))
        return after

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Deletes an object; KeyError when there is none."""
        before = self._objects[kind].pop((namespace, name))
        self.version += 1
        self._publish(Change(self.version, kind, (namespace, name), before, None))

    def compact(self) -> None:
        """Forgets the history: versions before now, and lists that wait for their next page, have expired."""
        self._history.clear()
        self._pages.clear()
        self.compacted = self.version

    def withdraw(self, kind: str) -> None:
        """The definition is deleted: its objects go, watches end, and the server does not know the kind any more."""
        for namespace, name in list(self._objects[kind]):
            self.delete(kind, namespace, name)
        self.served.discard(kind)
        for watcher in self.watchers:
            if watcher.scope.kind == kind:
                watcher.queue.put_nowait(None)

    def _publish(self, change: Change) -> None:
        self._history.append(change)
        for watcher in self.watchers:
            watcher.take(change)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def objects(self, kind: str) -> dict[Key, Json]:
        """The truth about one kind."""
        return self._objects[kind]

    def select(self, scope: Scope) -> list[Json]:
        """What a list shows, in the order of keys."""
        return [found for _, found in sorted(self._objects[scope.kind].items()) if scope.wants(found)]

    def page(self, scope: Scope, limit: int, token: str) -> tuple[list[Json], int, str] | None:
        """Objects, the version they are of, and the token for the rest; None when the token has expired."""
        if token:
            if token not in self._pages:
                return None
            version, rest = self._pages.pop(token)
        else:
            version, rest = self.version, self.select(scope)
        if not limit or len(rest) <= limit:
            return rest, version, ""
        self._page_number += 1
        more = f"page-{self._page_number}"
        self._pages[more] = (version, rest[limit:])
        return rest[:limit], version, more

    def watch(self, scope: Scope, version: int | None) -> Watcher | None:
        """A watcher that is sent everything after `version`, or everything there is; None when that has expired."""
        if version is None:
            watcher = Watcher(scope, self.version)
            for found in self.select(scope):
                watcher.queue.put_nowait(("ADDED", found))
        elif version < self.compacted:
            return None
        else:
            watcher = Watcher(scope, version)
            start = bisect.bisect_right(self._history, version, key=lambda change: change.version)
            for change in self._history[start:]:
                watcher.take(change)
        self.watchers.add(watcher)
        return watcher


# -- selectors ---------------------------------------------------------------------------------------------------------

_SET = re.compile(r"\s*([\w./-]+)\s+(in|notin)\s+\(([^)]*)\)\s*")


def _label_tests(text: str) -> Iterator[Callable[[Json], bool]]:
    for part in re.split(r",(?![^(]*\))", text) if text else ():
        yield _label_test(part.strip())


def _label_test(part: str) -> Callable[[Json], bool]:
    if found := _SET.fullmatch(part):
        key, word, values = found[1], found[2], {value.strip() for value in found[3].split(",")}
        if word == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if "!=" in part:
        key, value = (side.strip() for side in part.split("!=", 1))
        return lambda labels: labels.get(key) != value
    if "=" in part:
        key, value = (side.strip() for side in re.split("==?", part, maxsplit=1))
        return lambda labels: labels.get(key) == value
    if part.startswith("!"):
        return lambda labels: part[1:].strip() not in labels
    return lambda labels: part in labels


def _field_tests(text: str) -> Iterator[Callable[[Json], bool]]:
    for part in text.split(",") if text else ():
        path, value = re.split("==?", part.strip(), maxsplit=1)
        yield lambda found, path=path, value=value: _at(found, path) == value  # type: ignore[misc]


def _at(found: Json, path: str) -> Any:
    for name in path.split("."):
        found = (found or {}).get(name)  # type: ignore[assignment]
    return found
