"""Endpoints that do not change while the process runs: `--to URL` and the list in the configuration."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable

from picker.config import EndpointEntry
from picker.core.updates import Replace, SourceUpdate
from picker.sources.endpoints import endpoint_of
from picker.sources.source import SourceStatus

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A user or password is let through to the check that refuses it without repeating it.
_BARE = re.compile(r"(?:[^/\s]*@)?(?:\[[^\]/@?#]*\]|[^\[\]/:@?#\s]+)(?::\d+)?(?:/.*)?")
_API_PATH = re.compile(r"([a-z]+://[^/?#]+)/(?:v1/?)?", re.IGNORECASE)


def usual_url(text: str) -> str:
    """A `--to` argument as people type it, as the URL the configuration wants.

    A bare `host:port` gets `http://`, and the `/v1` that OpenAI clients have in their base URL goes. Anything else
    is left as it is, for the configuration to refuse where it can say why.
    """
    text = text.strip()
    if not _SCHEME.match(text) and _BARE.fullmatch(text):
        text = f"http://{text}"
    api = _API_PATH.fullmatch(text)
    return api[1] if api else text


class StaticSource:
    """The endpoints of some validated entries, said once. Their ids differ; the configuration sees to it."""

    name = "static"

    def __init__(self, entries: Iterable[EndpointEntry]) -> None:
        self._endpoints = tuple(endpoint_of(entry) for entry in entries)

    def __repr__(self) -> str:
        return f"<StaticSource [{len(self._endpoints)} endpoints]>"

    def status(self) -> SourceStatus:
        """Nothing is behind it that could be away."""
        return SourceStatus()

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """One `Replace`, then nothing more."""
        yield Replace(self.name, self._endpoints)
