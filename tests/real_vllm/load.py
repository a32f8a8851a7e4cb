"""Clients of the gateway for the tests with real engines: a closed loop that notes the fate of every request.

The number of tokens is always known, so an answer that lacks some or has them twice is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from tests.real_vllm.server import MODEL

CHAT = "/v1/chat/completions"
# A stream that was open when its engine froze goes on afterwards, so clients wait long.
CALL_WITHIN_S = 60.0
# What a client waits after a refusal.
REFUSED_PAUSE_S = 0.2
WORDS = ("import", "class", "return", "value", "module", "object", "string", "number", "error", "file", "name", "list")


COMPLETIONS = "/v1/completions"
# Ids below are special tokens of the tiny model.
_FIRST_WORD, _LAST_WORD = 3, 4000


def prefills(count: int, tokens: int, seed: int, *, output: int = 1, stream: bool = False) -> dict[str, Any]:
    """A completion of `count` prompts nobody has cached, with `output` tokens each. It keeps an engine busy long and
    its front end hardly, which many short steps would not on two cores.
    """
    rng = random.Random(seed)
    prompts = [[rng.randint(_FIRST_WORD, _LAST_WORD) for _ in range(tokens)] for _ in range(count)]
    return {"model": MODEL, "prompt": prompts, "max_tokens": output, "ignore_eos": True, "stream": stream}


def chat(prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """A chat request for exactly `tokens` output tokens."""
    messages = [{"role": "user", "content": prompt}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": True}
    if fields.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body | fields


@dataclass(slots=True)
class Call:
    """One request and its fate: `ok`, or the status and code of an error, `error_event CODE`, `first_event CODE` (an
    error event and nothing before it), `cut` (body began and broke off), `lost` (nothing came) or `wrong` (not the
    tokens asked for).
    """

    stream: bool
    tokens: int
    sent_at: float
    first_byte_at: float | None = None
    ended_at: float = 0.0
    status: int = 0
    endpoint: str = ""
    fate: str = "lost"
    body: bytes = b""

    @property
    def failed_early(self) -> bool:
        """Failed although nothing of an answer had come."""
        return self.fate != "ok" and not self.broken_off

    @property
    def broken_off(self) -> bool:
        """Whether an answer began and did not get to its end."""
        return self.fate == "cut" or self.fate.startswith("error_event")

    def judge(self) -> None:
        """Sets the fate from an answer that came to its end."""
        if self.status != 200:
            self.fate = f"{self.status} {_error_code(self.body)}"
        elif self.stream and b'data: {"error"' in self.body:
            event = "first_event" if self.body.startswith(b'data: {"error"') else "error_event"
            self.fate = f"{event} {_error_code(_last_error(self.body))}"
        else:
            self.fate = "ok" if _output_tokens(self.body, self.stream) == self.tokens else "wrong"


def _last_error(events: bytes) -> bytes:
    return b'{"error"' + events.rpartition(b'data: {"error"')[2].partition(b"\n")[0]


def _error_code(body: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["code"])
    return "?"


def _output_tokens(body: bytes, stream: bool) -> object:
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        if not stream:
            return json.loads(body)["usage"]["completion_tokens"]
        events = body.removesuffix(b"data: [DONE]\n\n").strip().split(b"\n\n")
        whole = body.endswith(b"data: [DONE]\n\n")
        return json.loads(events[-1].removeprefix(b"data: "))["usage"]["completion_tokens"] if whole else None
    return None


class Load:
    """`concurrency` clients, half of their requests streamed. As a context manager it runs them; leaving waits for what
    is under way.
    """

    def __init__(
        self, url: str, *, concurrency: int = 8, seed: int = 1, tokens: tuple[int, int] = (8, 40), streams: float = 0.5
    ) -> None:
        self._url = url
        self._concurrency = concurrency
        self._rng = random.Random(seed)
        self._tokens = tokens
        self._streams = streams
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self.calls: list[Call] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._concurrency)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert kind is not None or not any(results), results

    async def _client(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=CALL_WITHIN_S) as client:
            while not self._stopped:
                call = await self._call(client)
                if call.status >= 400:
                    await asyncio.sleep(REFUSED_PAUSE_S)

    async def _call(self, client: httpx.AsyncClient) -> Call:
        rng = self._rng
        call = Call(rng.random() < self._streams, rng.randint(*self._tokens), time.time())
        self.calls.append(call)
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))
        try:
            await _exchange(client, call, chat(prompt, call.tokens, stream=call.stream))
        except httpx.TransportError:
            call.fate = "lost" if call.first_byte_at is None else "cut"
        call.ended_at = time.time()
        return call

    def fates(self, since: float = 0.0) -> Counter[str]:
        """How the calls that ended after a time ended."""
        return Counter(call.fate for call in self.calls if call.ended_at >= since)

    def served(self, since: float = 0.0) -> Counter[str]:
        """Calls sent after a time and answered well, by endpoint."""
        return Counter(call.endpoint for call in self.calls if call.sent_at >= since and call.fate == "ok")

    def early_failures(self) -> list[tuple[str, bool, float, bytes]]:
        """Calls that failed before anything of an answer came: fate, whether a stream, seconds, the body."""
        failed = [call for call in self.calls if call.ended_at and call.failed_early]
        return [(call.fate, call.stream, call.ended_at - call.sent_at, call.body[:300]) for call in failed]


async def _exchange(client: httpx.AsyncClient, call: Call, body: Mapping[str, Any]) -> None:
    async with client.stream("POST", CHAT, json=body) as answer:
        call.status = answer.status_code
        call.endpoint = answer.headers.get("x-waypost-endpoint", "")
        async for piece in answer.aiter_raw():
            call.first_byte_at = call.first_byte_at or time.time()
            call.body += piece
    call.judge()
