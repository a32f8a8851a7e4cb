"""Keeps the last requests an engine received, for tests to look at. Bounded by number and by bytes."""

from __future__ import annotations

import base64
from collections import deque
from typing import Any, Final

from sim.http1 import HttpRequest

MAX_RECORDED_BYTES: Final = 32 << 20


class Recorder:
    """The last ``limit`` requests, at most 32 MiB of bodies."""

    __slots__ = ("_bytes", "_limit", "_requests", "total")

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit = limit
        self._bytes = 0
        self._requests: deque[HttpRequest] = deque()

    def note(self, request: HttpRequest) -> None:
        """Keep one more, forget the oldest ones beyond the bounds."""
        self.total += 1
        self._requests.append(request)
        self._bytes += len(request.body)
        while self._requests and (len(self._requests) > self._limit or self._bytes > MAX_RECORDED_BYTES):
            self._bytes -= len(self._requests.popleft().body)

    def forget(self) -> None:
        """Drop everything and count from zero."""
        self.total = self._bytes = 0
        self._requests.clear()

    def as_json(self) -> list[dict[str, Any]]:
        """Oldest first: method, path, query, headers (pairs in order) and body, text or else ``body_base64``."""
        return [_as_json(request) for request in self._requests]


def _as_json(request: HttpRequest) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers],
    }
    try:
        shown["body"] = request.body.decode()
    except UnicodeDecodeError:
        shown["body"] = None
        shown["body_base64"] = base64.b64encode(request.body).decode()
    return shown
