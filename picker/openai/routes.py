"""Which paths are inference calls, and of which kind.

Two readings of one table: the gateway's allow-list (`allowed`, exact paths) and the picker's suffix match
(`match_suffix`, which never refuses); and where an engine has the path (`target_path`). It must not parse bodies or
know about endpoints.
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

_MAX_PATH_CHARS = 2_048
_MAX_SUFFIX_SEGMENTS = 3
_API = "/v1/"
# KServe's runtimes serve the API below this, and their clients ask for it there.
_TWIN_PREFIX = "/openai"


class Dialect(StrEnum):
    """Whose error shape the client of a route understands."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class RouteKind(StrEnum):
    """What a request asks for; decides which body fields are wanted."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    RESPONSE_STATE = "response_state"
    CONVERSATIONS = "conversations"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    SCORE = "score"
    CLASSIFY = "classify"
    POOLING = "pooling"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    TRANSCRIPTIONS = "transcriptions"
    TRANSLATIONS = "translations"
    SPEECH = "speech"
    IMAGES = "images"
    TOKEN_GENERATE = "token_generate"
    NATIVE_GENERATE = "native_generate"
    MODELS = "models"
    PASSTHROUGH = "passthrough"


class Route(msgspec.Struct, frozen=True):
    """One row of the table, or a match of it.

    `name` is the canonical path and safe as a metric label (never contains ids). `generates` says that the engine
    will decode tokens. `resource_id` is the response id of a stateful Responses call, or the model of /v1/models/{id}.
    """

    kind: RouteKind
    name: str
    methods: tuple[str, ...] = ("POST",)
    dialect: Dialect = Dialect.OPENAI
    generates: bool = False
    resource_id: str | None = None


PASSTHROUGH_ROUTE = Route(RouteKind.PASSTHROUGH, "passthrough", methods=("GET", "POST", "PUT", "PATCH", "DELETE"))
_MODELS_ROUTE = Route(RouteKind.MODELS, "/v1/models", methods=("GET",))
_MODEL_ROUTE = Route(RouteKind.MODELS, "/v1/models/{model}", methods=("GET",))
_RESPONSE_ROUTE = Route(RouteKind.RESPONSE_STATE, "/v1/responses/{id}", methods=("GET", "DELETE"))
_CANCEL_ROUTE = Route(RouteKind.RESPONSE_STATE, "/v1/responses/{id}/cancel", methods=("POST",))

# suffix, kind, prefixes under which engines serve it, does it decode tokens
_ROWS: tuple[tuple[str, RouteKind, tuple[str, ...], bool], ...] = (
    ("chat/completions", RouteKind.CHAT, ("/v1/",), True),
    ("chat/completions/batch", RouteKind.CHAT, ("/v1/",), True),
    ("chat/completions/render", RouteKind.CHAT, ("/v1/",), False),
    ("completions", RouteKind.COMPLETIONS, ("/v1/",), True),
    ("completions/render", RouteKind.COMPLETIONS, ("/v1/",), False),
    ("responses", RouteKind.RESPONSES, ("/v1/",), True),
    ("embeddings", RouteKind.EMBEDDINGS, ("/v1/",), False),
    ("messages", RouteKind.MESSAGES, ("/v1/",), True),
    ("messages/render", RouteKind.MESSAGES, ("/v1/",), False),
    ("messages/count_tokens", RouteKind.MESSAGES, ("/v1/",), False),
    ("rerank", RouteKind.RERANK, ("/", "/v1/", "/v2/"), False),
    ("score", RouteKind.SCORE, ("/", "/v1/"), False),
    ("classify", RouteKind.CLASSIFY, ("/", "/v1/"), False),
    ("pooling", RouteKind.POOLING, ("/", "/v1/"), False),
    ("tokenize", RouteKind.TOKENIZE, ("/", "/v1/"), False),
    ("detokenize", RouteKind.DETOKENIZE, ("/", "/v1/"), False),
    ("audio/transcriptions", RouteKind.TRANSCRIPTIONS, ("/v1/",), True),
    ("audio/translations", RouteKind.TRANSLATIONS, ("/v1/",), True),
    ("audio/speech", RouteKind.SPEECH, ("/v1/",), True),
    ("images/generations", RouteKind.IMAGES, ("/v1/",), False),
    ("inference/v1/generate", RouteKind.TOKEN_GENERATE, ("/",), True),
)
_GENERATE_ROUTE = Route(RouteKind.NATIVE_GENERATE, "/generate", generates=True)
_CONVERSATIONS_ROUTE = Route(RouteKind.CONVERSATIONS, "/v1/conversations")

# Dots are allowed, but an id of dots only would walk up the path on the engine.
_RESPONSE_ID = re.compile(r"(?!\.+\Z)[A-Za-z0-9_.:\-]{1,128}\Z")
_MODEL_ID = re.compile(r"[A-Za-z0-9_.:@%+\-/]{1,512}\Z")


def _dialect(kind: RouteKind) -> Dialect:
    return Dialect.ANTHROPIC if kind is RouteKind.MESSAGES else Dialect.OPENAI


def _exact_table() -> dict[str, Route]:
    table = {
        prefix + suffix: Route(kind, prefix + suffix, dialect=_dialect(kind), generates=generates)
        for suffix, kind, prefixes, generates in _ROWS
        for prefix in prefixes
    }
    table[_GENERATE_ROUTE.name] = _GENERATE_ROUTE
    table[_MODELS_ROUTE.name] = _MODELS_ROUTE
    return table


def _suffix_table() -> dict[str, Route]:
    table: dict[str, Route] = {}
    for suffix, kind, prefixes, generates in _ROWS:
        prefix = "/v1/" if "/v1/" in prefixes else prefixes[0]
        table[suffix] = Route(kind, prefix + suffix, dialect=_dialect(kind), generates=generates)
    table["models"] = _MODELS_ROUTE
    table["conversations"] = _CONVERSATIONS_ROUTE
    return table


ALLOWED: dict[str, Route] = _exact_table()
_SUFFIXES: dict[str, Route] = _suffix_table()
_DEFAULT_ROUTE = _SUFFIXES["completions"]


def allowed(path: str) -> Route | None:
    """Gateway: the route of a path on the allow-list, or None (answer 404).

    `path` must be the path as it will be sent upstream, still percent-encoded and without the query string, so that
    an encoded slash or `..` cannot name another route on the engine. Check the method against `Route.methods`.
    `/openai/v1/...` is the same as `/v1/...`.
    """
    path = target_path(path, "")
    route = ALLOWED.get(path)
    if route is not None:
        return route
    if path.startswith("/v1/responses/"):
        return _response_state(path[14:])
    if path.startswith("/v1/models/") and _MODEL_ID.match(path, 11) and ".." not in path:
        return msgspec.structs.replace(_MODEL_ROUTE, resource_id=path[11:])
    return None


def target_path(path: str, prefix: str) -> str:
    """Where an engine that serves its API below `prefix` has `path` (with or without a query string).

    `/v1/...` goes below the prefix; `/openai/v1/...`, and what is below the prefix already, count as `/v1/...`. Other
    paths are no part of that API and stay. `prefix` is empty, or begins with a slash and does not end with one.
    """
    if prefix and path.startswith(prefix + _API):
        return path
    if path.startswith(_TWIN_PREFIX + _API):
        path = path[len(_TWIN_PREFIX) :]
    return prefix + path if prefix and path.startswith(_API) else path


def match_suffix(path: str) -> Route:
    """Picker: the route whose name is the longest suffix (whole segments) of `path`; passthrough when none is.

    The query string and a trailing slash are ignored. An empty path means completions, as the reference picker reads
    it. Never refuses: an unknown path belongs to somebody else's API, and is routed on load alone.
    """
    if not path:
        return _DEFAULT_ROUTE
    bare = path[:_MAX_PATH_CHARS].partition("?")[0]
    if bare == _GENERATE_ROUTE.name:
        return _GENERATE_ROUTE
    segments = bare.rstrip("/").rsplit("/", _MAX_SUFFIX_SEGMENTS)[1:]
    for first in range(len(segments)):
        route = _SUFFIXES.get("/".join(segments[first:]))
        if route is not None:
            return route
    for back in (2, 3):
        if len(segments) >= back and segments[-back] == "responses":
            state = _response_state("/".join(segments[1 - back :]))
            if state is not None:
                return state
    return PASSTHROUGH_ROUTE


def _response_state(rest: str) -> Route | None:
    """`rest` is what follows `responses/`: an id, or an id and `/cancel`."""
    ident, slash, verb = rest.partition("/")
    if not _RESPONSE_ID.match(ident):
        return None
    if not slash:
        return msgspec.structs.replace(_RESPONSE_ROUTE, resource_id=ident)
    return msgspec.structs.replace(_CANCEL_ROUTE, resource_id=ident) if verb == "cancel" else None
