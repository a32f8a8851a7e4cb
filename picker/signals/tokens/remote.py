"""Token ids from the engines themselves: vLLM's render endpoints, which say exactly what would be prefilled, and
/tokenize, which vLLM and SGLang have.

Asks one engine per prompt and remembers who cannot answer. The network comes in as a `Poster`.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from xxhash import xxh3_128_intdigest

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.openai.routes import RouteKind, target_path
from picker.signals.getter import Answer
from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.content import MAX_TEXT_BYTES, Chat, Text, pack_ids

# An answer that late still fills the cache; longer means that the engine has other worries.
TIMEOUT_S = 2.0
# A million tokens as JSON, and what a render endpoint adds.
ANSWER_LIMIT_BYTES = 16 << 20
# Tokenising competes with serving in the engine's front end.
MAX_ASKING = 8
# An engine without the endpoint may be replaced by one that has it; trouble passes sooner.
_PAUSE_S = 10.0
_LONGEST_PAUSE_S = 300.0
_NEVER_STATUSES = frozenset((401, 403, 404, 405, 501))
# A refusal of this one prompt, or of all prompts of its kind: no client may silence an engine for long.
_REFUSED_PAUSE_S = 1.0
# Endpoints come and go; who asks that many at once has other problems than a forgotten pause.
_MAX_REMEMBERED = 4096

_RENDER_PATHS = {
    RouteKind.CHAT: "/v1/chat/completions/render",
    RouteKind.COMPLETIONS: "/v1/completions/render",
    RouteKind.MESSAGES: "/v1/messages/render",
    RouteKind.RESPONSES: "/v1/responses/render",
}
_TOKENIZE_KINDS = frozenset((RouteKind.CHAT, RouteKind.COMPLETIONS, RouteKind.NATIVE_GENERATE))


class Poster(Protocol):
    """POSTs JSON with the TLS context and API key of the endpoint."""

    async def post(
        self, endpoint: Endpoint, url: str, body: bytes, *, timeout_s: float, limit_bytes: int = ...
    ) -> Answer | ProbeFailure:
        """The answer, or why none came (REFUSED or TIMEOUT). Never raises for trouble on the network."""


class Way(enum.Enum):
    """How an engine can be asked."""

    RENDER = "render"
    TOKENIZE = "tokenize"


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for. `body` is the request as the engine would get it, `model` the name it knows, `canonical` the
    prompt's canonical text.
    """

    kind: RouteKind
    model: str
    prompt: Text | Chat
    canonical: bytes
    body: bytes

    def __repr__(self) -> str:
        return f"<Asking {self.kind.value}>"


class _Rendered(msgspec.Struct):
    token_ids: list[int]


class _Tokenized(msgspec.Struct):
    tokens: list[int]


class _Pause(msgspec.Struct):
    until: float
    length_s: float


class EngineTokens:
    """Asks engines. `engines` lists those that serve a model; the clock is monotonic, in seconds."""

    __slots__ = ("_asking", "_cache", "_clock", "_closed", "_engines", "_pauses", "_poster", "_turn", "declined")

    def __init__(
        self,
        poster: Poster,
        engines: Callable[[str], Sequence[Endpoint]],
        *,
        clock: Callable[[], float],
        cache_bytes: int,
    ) -> None:
        self._poster = poster
        self._engines = engines
        self._clock = clock
        self._cache = IdCache(cache_bytes)
        self._pauses: dict[tuple[str, Way], _Pause] = {}
        self._turn = itertools.count()
        self._asking: set[asyncio.Task[bytes | None]] = set()
        self._closed = False
        self.declined = 0

    def __repr__(self) -> str:
        return f"<EngineTokens [{len(self._asking)} asking | {self.declined} declined] {self._cache!r}>"

    def start(self, asking: Asking) -> asyncio.Task[bytes | None] | bytes | None:
        """The ids if they are known already, a task that gets them, or None when nobody can be asked now.

        The task never raises. Who gives up waiting leaves it alone: it fills the cache.
        """
        digest = _digest(asking)
        known = self._cache.get(digest)
        if known is not None:
            return known
        too_long = len(asking.canonical) > MAX_TEXT_BYTES
        found = None if self._closed or too_long else self._whom(asking)
        if found is None:
            return None
        if len(self._asking) >= MAX_ASKING:
            self.declined += 1
            return None
        task = asyncio.create_task(self._ask(digest, asking, *found))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return task

    async def ask(self, endpoint: Endpoint, way: Way, asking: Asking) -> bytes | None:
        """The ids that this engine gives in this way (u32, little-endian), None when it gives none. No cache."""
        path = _RENDER_PATHS[asking.kind] if way is Way.RENDER else "/tokenize"
        url = endpoint.url + target_path(path, endpoint.path_prefix)
        question = asking.body if way is Way.RENDER else _tokenize_body(asking)
        answer = await self._poster.post(endpoint, url, question, timeout_s=TIMEOUT_S, limit_bytes=ANSWER_LIMIT_BYTES)
        status = 0 if isinstance(answer, ProbeFailure) else answer.status
        ids = None if isinstance(answer, ProbeFailure) or status != 200 else _ids(way, answer.body)
        self._remember((endpoint.url, way), status, answered=ids is not None)
        return ids

    async def close(self) -> None:
        """Ends all questions under way."""
        self._closed = True
        tasks = tuple(self._asking)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, digest: int, asking: Asking, endpoint: Endpoint, way: Way) -> bytes | None:
        ids = await self.ask(endpoint, way, asking)
        if ids is not None:
            self._cache.put(digest, ids)
        return ids

    def _whom(self, asking: Asking) -> tuple[Endpoint, Way] | None:
        """An engine that may know, in turn; rendering first, because it leaves nothing to be guessed."""
        engines = self._engines(asking.model)
        ways = [Way.RENDER] if asking.kind in _RENDER_PATHS else []
        if asking.kind in _TOKENIZE_KINDS and asking.prompt.exact:
            ways.append(Way.TOKENIZE)
        first = next(self._turn)
        now = self._clock()
        for way in ways:
            for step in range(len(engines)):
                endpoint = engines[(first + step) % len(engines)]
                pause = self._pauses.get((endpoint.url, way))
                if pause is None or pause.until <= now:
                    return endpoint, way
        return None

    def _remember(self, who: tuple[str, Way], status: int, *, answered: bool) -> None:
        last = self._pauses.pop(who, None)
        if answered:
            return
        if status in _NEVER_STATUSES:
            length_s = _LONGEST_PAUSE_S
        elif 400 <= status < 500:
            length_s = _REFUSED_PAUSE_S
        else:
            length_s = _PAUSE_S if last is None else min(max(_PAUSE_S, 2 * last.length_s), _LONGEST_PAUSE_S)
        while len(self._pauses) >= _MAX_REMEMBERED:
            self._pauses.pop(next(iter(self._pauses)))
        self._pauses[who] = _Pause(self._clock() + length_s, length_s)


def _tokenize_body(asking: Asking) -> bytes:
    prompt = asking.prompt
    question: dict[str, Any] = {"model": asking.model, "add_special_tokens": prompt.add_special_tokens}
    if isinstance(prompt, Text):
        question["prompt"] = prompt.text
    else:
        question["messages"] = prompt.messages
        question["add_generation_prompt"] = prompt.add_generation_prompt
        question["continue_final_message"] = prompt.continue_final_message
        if prompt.tools is not None:
            question["tools"] = prompt.tools
        if prompt.template_kwargs is not None:
            question["chat_template_kwargs"] = prompt.template_kwargs
    return msgspec.json.encode(question)


def _ids(way: Way, body: bytes) -> bytes | None:
    try:
        if way is Way.TOKENIZE:
            return pack_ids(msgspec.json.decode(body, type=_Tokenized).tokens)
        # Completions are rendered to one answer per prompt.
        rendered = msgspec.json.decode(body, type=_Rendered | list[_Rendered])
        first = rendered[0] if isinstance(rendered, list) else rendered
        return pack_ids(first.token_ids)
    except (msgspec.MsgspecError, ValueError, IndexError, RecursionError):
        return None


def _digest(asking: Asking) -> int:
    """Of all that the ids depend on."""
    prompt = asking.prompt
    flags: tuple[object, ...] = (asking.kind.value, asking.model, prompt.add_special_tokens)
    if isinstance(prompt, Chat):
        flags += (prompt.add_generation_prompt, prompt.continue_final_message, prompt.template_kwargs, prompt.documents)
    return xxh3_128_intdigest(msgspec.msgpack.encode(flags) + asking.canonical)
