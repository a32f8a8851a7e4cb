"""The one thing signals need from the network: GET. The upstream client offers it; tests bring their own."""

from __future__ import annotations

from typing import Protocol

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint


class Answer(Protocol):
    """What came back, whatever its status."""

    @property
    def status(self) -> int: ...

    @property
    def body(self) -> bytes: ...


class Getter(Protocol):
    """GETs with the TLS context and API key of the endpoint."""

    async def get(
        self, endpoint: Endpoint, url: str, *, timeout_s: float, limit_bytes: int = ...
    ) -> Answer | ProbeFailure:
        """The answer, or why none came (REFUSED or TIMEOUT). Never raises for trouble on the network."""
