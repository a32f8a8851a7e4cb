"""What the doors tell the brain about a request after its decision: step 8 of the path (observe).

Every event names the request by `key`. Observing the same end twice is harmless; observing an unknown key is too.
"""

from __future__ import annotations

import enum

import msgspec


class FailureKind(enum.StrEnum):
    """How an attempt died before the client saw a body byte."""

    CONNECT = "connect"
    RESET = "reset"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    HUNG = "hung"


class Outcome(enum.StrEnum):
    """How a request ended. CLIENT_GONE says nothing about the endpoint."""

    COMPLETED = "completed"
    CLIENT_GONE = "client_gone"
    FAILED = "failed"
    TIMEOUT = "timeout"
    REJECTED = "rejected"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts an engine reported. None means it did not say."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


class FirstByte(msgspec.Struct, frozen=True):
    """The first body byte arrived (behind Envoy without the response body: the response headers).

    `refused` says that the answer is an error: a front end can write one without a working engine.
    """

    key: int
    at: float
    refused: bool = False


# Doors tell progress at most this often per request; it only has to show life.
PROGRESS_EVERY_S = 0.2


class Progress(msgspec.Struct, frozen=True):
    """More body arrived; told at most every PROGRESS_EVERY_S."""

    key: int
    at: float


class Stalled(msgspec.Struct, frozen=True):
    """The client does not take its answer (`stalled`), or takes it again: meanwhile silence says nothing of the
    engine.
    """

    key: int
    at: float
    stalled: bool


class Served(msgspec.Struct, frozen=True):
    """The proxy says which endpoint (`ip:port`) really served; with fallbacks it may not be the one chosen."""

    key: int
    at: float
    address: str


class AttemptFailed(msgspec.Struct, frozen=True):
    """This attempt is over and the client has seen nothing of it. Releases the reservation; a new decision may
    follow.
    """

    key: int
    at: float
    kind: FailureKind
    status: int = 0


class Left(msgspec.Struct, frozen=True):
    """The door stops watching (ext-proc `response_path: leave`, or a proxy that closes at the response headers). The
    end is learnt from scrapes.
    """

    key: int
    at: float


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The request is over. `status` is what the client got, 0 when it got none."""

    key: int
    at: float
    outcome: Outcome
    status: int = 0
    usage: Usage | None = None


Event = FirstByte | Progress | Stalled | Served | AttemptFailed | Left | Finished
