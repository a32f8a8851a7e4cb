"""The cheapest model server there can be: canned answers from asyncio Protocols, so that it costs next to nothing.

Run as `python -m bench.backend`; prints its ports on one line and serves until SIGTERM or SIGINT. It parses no JSON and
models no engine: `sim` does that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools
import uvloop

MODEL = "bench-model"
_SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
# A body names `stream` with or without a space behind the colon; nothing else in our load does.
_STREAM_MARKS = (b'"stream":true', b'"stream": true')


@dataclass(frozen=True, slots=True, kw_only=True)
class Canned:
    """Everything the backend says, ready to be written. `events` are whole HTTP chunks; the last one ends the body."""

    answer: bytes
    events: tuple[bytes, ...]
    pages: dict[bytes, bytes]
    not_found: bytes


def canned(*, chunks: int, tokens: int = 16, model: str = MODEL) -> Canned:
    """Answers for `model`: a chat completion of `tokens` words, a stream of `chunks` events and the pages of a vLLM."""
    completion = {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "word " * tokens}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 256, "completion_tokens": tokens, "total_tokens": 256 + tokens},
    }
    models = {"object": "list", "data": [{"id": model, "object": "model", "created": 1, "owned_by": "bench"}]}
    return Canned(
        answer=_response(json.dumps(completion).encode()),
        events=_events(chunks, model),
        pages={
            b"/v1/models": _response(json.dumps(models).encode()),
            b"/version": _response(b'{"version": "0.32.0"}'),
            b"/health": _response(b"", kind=b"text/plain"),
            b"/metrics": _response(_metrics(model).encode(), kind=b"text/plain; version=0.0.4; charset=utf-8"),
        },
        not_found=_response(b'{"error": {"message": "not found"}}', status=b"404 Not Found"),
    )


def _response(body: bytes, *, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body)


def _events(chunks: int, model: str) -> tuple[bytes, ...]:
    def event(delta: dict[str, str], reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        head = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": model}
        return b"data: %b\n\n" % json.dumps({**head, "choices": [choice]}).encode()

    bodies = [event({"content": f" word{number}"}, None) for number in range(chunks - 1)]
    last = event({}, "stop") + b"data: [DONE]\n\n"
    return (*(_chunk(body) for body in bodies), _chunk(last) + b"0\r\n\r\n")


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def _metrics(model: str) -> str:
    label = f'{{engine="0",model_name="{model}"}}'
    gauges = {"num_requests_running": 1.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.05}
    counters = {"prompt_tokens_total": 256.0, "generation_tokens_total": 64.0}
    lines = []
    for name, value in gauges.items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{label} {value}"]
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name} counter", f"vllm:{name}{label} {value}"]
    info = '{block_size="16",engine="0",num_gpu_blocks="8192"}'
    lines += ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{info} 1.0"]
    return "\n".join(lines) + "\n"


class Backend(asyncio.Protocol):
    """One connection. Keep-alive, one request at a time."""

    def __init__(self, said: Canned, *, interval_s: float) -> None:
        self._said = said
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.Handle | None = None
        self._path = b""
        self._stream = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By type, not isinstance: uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.close()

    def on_message_begin(self) -> None:
        self._path, self._stream, self._tail = b"", False, b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        if not self._stream:
            # The mark may be split between two reads.
            window = self._tail + body
            self._stream = any(mark in window for mark in _STREAM_MARKS)
            self._tail = window[-len(_STREAM_MARKS[1]) :]

    def on_message_complete(self) -> None:
        if self._transport is None:
            return
        if self._stream:
            self._transport.write(_SSE_HEAD)
            self._send_event(0)
        elif self._parser.get_method() == b"POST":
            self._transport.write(self._said.answer)
        else:
            path = self._path.partition(b"?")[0]
            self._transport.write(self._said.pages.get(path, self._said.not_found))

    def _send_event(self, number: int) -> None:
        if self._transport is None:
            return
        self._transport.write(self._said.events[number])
        if number + 1 < len(self._said.events):
            self._timer = self._loop.call_later(self._interval_s, self._send_event, number + 1)


async def serve(said: Canned, *, listeners: int, interval_s: float, announce: Callable[[list[int]], None]) -> None:
    """Listen on `listeners` loopback ports until SIGTERM or SIGINT; `announce` gets the ports once they are open."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    servers = [
        await loop.create_server(lambda: Backend(said, interval_s=interval_s), "127.0.0.1", 0, backlog=4096)
        for _ in range(listeners)
    ]
    announce([server.sockets[0].getsockname()[1] for server in servers])
    await stop.wait()
    for server in servers:
        server.close()


def main(arguments: list[str] | None = None) -> None:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(prog="python -m bench.backend", description=__doc__)
    parser.add_argument("--listeners", type=int, default=1, help="how many ports, each a backend of its own")
    parser.add_argument("--chunks", type=int, default=200, help="events of a streamed answer")
    parser.add_argument("--interval-ms", type=float, default=2.0, help="time between two events")
    parser.add_argument("--tokens", type=int, default=16, help="words of an answer that is not streamed")
    parser.add_argument("--model", default=MODEL)
    options = parser.parse_args(arguments)
    said = canned(chunks=options.chunks, tokens=options.tokens, model=options.model)

    def announce(ports: list[int]) -> None:
        print(*ports, flush=True)

    uvloop.run(serve(said, listeners=options.listeners, interval_s=options.interval_ms / 1e3, announce=announce))


if __name__ == "__main__":
    main()
