"""From the API server's bytes to values: pages of a list, lines of a watch. Pure, and never raises for what it reads.

An object that cannot be read does not exist here, in a list as in a watch, so that both tell the same.
"""

from __future__ import annotations

from typing import Generic

import msgspec

from picker.sources.kubernetes.failure import DECODE_ERRORS, NOT_UNDERSTOOD, ApiFailure, one_line
from picker.sources.kubernetes.objects import Changed, Gone, Meta, Object, RawList, Status, T, WatchEvent


class Page(msgspec.Struct, Generic[T], frozen=True):
    """One page of a list. `more` asks for the next one, empty on the last; `odd` says why objects were left out."""

    objects: tuple[T, ...]
    version: str
    more: str
    odd: str


class Told(msgspec.Struct, Generic[T], frozen=True):
    """One line of a watch: the change, if any, and the version from which to go on, empty when it did not move.

    `odd` says what was wrong with the line, empty when nothing was.
    """

    event: Changed[T] | Gone[T] | None = None
    version: str = ""
    odd: str = ""


class _Some(Object, frozen=True):
    """An object of any kind."""

    metadata: Meta


class Decoder(Generic[T]):
    """Reads objects of one kind."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._list = msgspec.json.Decoder(RawList)
        self._line = msgspec.json.Decoder(WatchEvent)
        self._object = msgspec.json.Decoder(kind)
        self._some = msgspec.json.Decoder(_Some)
        self._status = msgspec.json.Decoder(Status)

    def page(self, body: bytes) -> Page[T] | ApiFailure:
        """A page of a list, without the objects that cannot be read."""
        try:
            raw = self._list.decode(body)
        except DECODE_ERRORS as error:
            return _nonsense("a list", error)
        if not raw.metadata.resource_version:
            return ApiFailure(NOT_UNDERSTOOD, "the list has no resourceVersion")
        objects: list[T] = []
        odd = ""
        for item in raw.items or ():
            try:
                objects.append(self._object.decode(item))
            except DECODE_ERRORS as error:
                odd = f"an object in the list cannot be read: {one_line(str(error))}"
        return Page(tuple(objects), raw.metadata.resource_version, raw.metadata.more or "", odd)

    def line(self, line: bytes) -> Told[T] | ApiFailure:
        """A line of a watch; the failure is what the server says in an ERROR, or a line of which nothing is known."""
        try:
            event = self._line.decode(line)
        except DECODE_ERRORS as error:
            return _nonsense("a line of the watch", error)
        match event.type:
            case "ADDED" | "MODIFIED" | "DELETED":
                return self._change(event)
            case "BOOKMARK":
                return self._bookmark(event)
            case "ERROR":
                return self._error(event)
            case other:
                return Told(odd=f"the watch has an event of the unknown type {one_line(other)!r}")

    def _change(self, event: WatchEvent) -> Told[T] | ApiFailure:
        try:
            found = self._object.decode(event.object)
        except DECODE_ERRORS as error:
            return self._odd_change(event, error)
        version = found.metadata.resource_version
        return Told(Gone(found) if event.type == "DELETED" else Changed(found), version)

    def _odd_change(self, event: WatchEvent, error: Exception) -> Told[T] | ApiFailure:
        try:
            meta = self._some.decode(event.object).metadata
        except DECODE_ERRORS:
            return _nonsense("an object of the watch", error)
        return Told(
            Gone(self._kind(metadata=meta)),
            meta.resource_version,
            f"an object of the watch cannot be read: {one_line(str(error))}",
        )

    def _bookmark(self, event: WatchEvent) -> Told[T] | ApiFailure:
        try:
            return Told(version=self._some.decode(event.object).metadata.resource_version)
        except DECODE_ERRORS as error:
            return _nonsense("a bookmark", error)

    def _error(self, event: WatchEvent) -> ApiFailure:
        try:
            status = self._status.decode(event.object)
        except DECODE_ERRORS as error:
            return _nonsense("an error of the watch", error)
        message = one_line(status.message or status.reason or "the watch ended with an error")
        code = status.code if 400 <= status.code < 600 else NOT_UNDERSTOOD
        return ApiFailure(code, message, reason=one_line(status.reason or ""))


def _nonsense(what: str, error: Exception) -> ApiFailure:
    return ApiFailure(NOT_UNDERSTOOD, one_line(f"{what} cannot be read: {error}"))
