"""How often and how patiently endpoints are asked, and what the wiring code wants to hear about it. Values only."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class ScrapeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds.

    `busy_s` between the starts of two scrapes where there is work or trouble; 200 ms with `timeout_s` of 600 ms lets
    two probes in a row fail within 1.6 s. `idle_s` otherwise: there is nothing to correct, and new work is seen
    within `busy_s` by our own counts. `jitter` is the share by which each interval varies, so that a fleet is not
    scraped in phase. After `patience` failures in a row the pauses double up to `trouble_s`, so that dead endpoints
    do not take the places of live ones; `concurrency` is the number of places.
    """

    busy_s: float = 0.2
    idle_s: float = 1.0
    trouble_s: float = 2.0
    timeout_s: float = 0.6
    jitter: float = 0.1
    patience: int = 5
    concurrency: int = 64
    models_s: float = 15.0
    models_timeout_s: float = 2.0
    models_retry_s: float = 1.0
    detect_s: float = 5.0
    detect_max_s: float = 300.0
    follow_s: float = 0.05
    page_bytes: int = 4 * 2**20
    models_bytes: int = 2**20


def _no_scrape(endpoint_id: str, seconds: float, ok: bool) -> None:
    pass


def _no_engine(endpoint_id: str, engine: str) -> None:
    pass


def _no_trouble(endpoint_id: str, kind: str, message: str) -> None:
    pass


class ScrapeHooks(msgspec.Struct, frozen=True, kw_only=True):
    """Called by the scraper, for metrics and logs. They must be quick and must not raise.

    `on_scrape` after every scrape or liveness probe, with its duration in seconds; `on_engine` when an engine was
    recognised or changed; `on_trouble` once per endpoint and kind of bug (an unexpected exception), with its text.
    """

    on_scrape: Callable[[str, float, bool], None] = _no_scrape
    on_engine: Callable[[str, str], None] = _no_engine
    on_trouble: Callable[[str, str, str], None] = _no_trouble
