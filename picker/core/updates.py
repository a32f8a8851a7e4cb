"""What sources and signals tell the datastore. Values only; `picker.core.datastore` says what each one changes."""

from __future__ import annotations

import enum

import msgspec

from picker.core.rules import Objective, Rewrite
from picker.core.values import Endpoint, Signals


class Replace(msgspec.Struct, frozen=True):
    """This is everything the source knows: endpoints of the same source that are missing here are gone."""

    source: str
    endpoints: tuple[Endpoint, ...]


class Upsert(msgspec.Struct, frozen=True):
    """One endpoint appeared or changed."""

    source: str
    endpoint: Endpoint


class Remove(msgspec.Struct, frozen=True):
    """One endpoint is gone."""

    source: str
    endpoint_id: str


EndpointUpdate = Replace | Upsert | Remove


class RulesChanged(msgspec.Struct, frozen=True):
    """These are all objectives and rewrites the source knows; `rewrites` in order of precedence."""

    source: str
    objectives: tuple[Objective, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()


SourceUpdate = EndpointUpdate | RulesChanged


class ProbeFailure(enum.StrEnum):
    """Why a scrape brought nothing. REFUSED and TIMEOUT say the host may be gone; HTTP and PARSE come from a live
    front end.
    """

    REFUSED = "refused"
    TIMEOUT = "timeout"
    HTTP = "http"
    PARSE = "parse"


class Scraped(msgspec.Struct, frozen=True):
    """One scrape succeeded; `signals.at` is when it was sent."""

    endpoint_id: str
    signals: Signals


class ScrapeFailed(msgspec.Struct, frozen=True):
    """One scrape failed. `sent_at` is when it was sent, `at` when it was given up."""

    endpoint_id: str
    sent_at: float
    at: float
    kind: ProbeFailure


class Alive(msgspec.Struct, frozen=True):
    """An endpoint without metrics answered a probe of another path."""

    endpoint_id: str
    at: float


class ModelsListed(msgspec.Struct, frozen=True):
    """The engine's own list of models, as of `at`; `adapters` are those of them that are LoRA adapters."""

    endpoint_id: str
    at: float
    models: frozenset[str]
    adapters: frozenset[str] = frozenset()


SignalUpdate = Scraped | ScrapeFailed | Alive | ModelsListed
