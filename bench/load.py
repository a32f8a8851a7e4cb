"""A closed-loop load generator: N connections, each with one request under way, for M requests or S seconds.

Run as `python -m bench.load --url ...`; prints one JSON line, see `Report`. A small HTTP/1.1 client of its own on
asyncio Protocols, so that the client costs little beside what is measured. It does not retry: a failure is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

from bench.cpu import cpu_seconds

MODEL = "bench-model"
MAX_SAMPLES = 2_000_000
_RECONNECT_PAUSE_S = 0.01
_WATCH_EVERY_S = 0.05
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do. One of `requests` and `seconds` ends the run; `warmup` requests come first and are not counted.

    `timeout_s` bounds each request. `deadline_s` bounds the whole run, whatever the server does. `watch` are processes
    whose CPU time, children included, is read when the counting starts and when it ends. A run by time waits for what
    is under way, so streams are better counted by `requests`.
    """

    url: str
    body: bytes
    connections: int = 1
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    timeout_s: float = 30.0
    deadline_s: float = 300.0
    watch: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened. `*_ms` map p50, p90, p99, max and mean; `events` are server-sent events.

    `statuses` counts answers by code, `errors` requests without a complete answer. `client_cpu_s` is
    what the generator itself used, `cpu_s` what the watched processes used, by pid.
    """

    requests: int
    errors: int
    statuses: dict[str, int]
    seconds: float
    requests_per_s: float
    latency_ms: dict[str, float]
    first_byte_ms: dict[str, float]
    events: int
    body_bytes: int
    client_cpu_s: float
    cpu_s: dict[str, float]
    error_kinds: dict[str, int]


def chat_body(*, size: int, stream: bool, model: str = MODEL, max_tokens: int = 16) -> bytes:
    """A chat request of about `size` bytes, at least as long as its frame."""
    head = {"model": model, "stream": stream, "max_tokens": max_tokens}
    frame = json.dumps({**head, "messages": [{"role": "user", "content": ""}]}, separators=(",", ":"))
    words = ("lorem ipsum dolor sit amet " * (size // 27 + 1))[: max(1, size - len(frame))]
    return json.dumps({**head, "messages": [{"role": "user", "content": words}]}, separators=(",", ":")).encode()


class Tally:
    """Counts of one run, shared by its connections. Samples are bounded; beyond the bound only counts go on."""

    def __init__(self, plan: Plan) -> None:
        self.left = plan.requests
        self.warmup = plan.warmup
        self.latencies = array("d")
        self.first_bytes = array("d")
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.events = 0
        self.body_bytes = 0
        self.stopped = False
        self.started: float | None = None
        self.ended = 0.0
        self.cpu_before: tuple[float, ...] = ()
        self.watched = plan.watch

    @property
    def exhausted(self) -> bool:
        """No more requests will be given out."""
        return self.stopped or (self.left is not None and self.left <= 0)

    def cpu(self) -> tuple[float, ...]:
        """CPU seconds of the generator, then of each watched process."""
        return (time.process_time(), *(cpu_seconds(pid) for pid in self.watched))

    def take(self) -> bool:
        """Whether one more request may start. The clock starts with the first one that counts."""
        if self.stopped:
            return False
        if self.warmup > 0:
            self.warmup -= 1
            return True
        if self.started is None:
            self.cpu_before = self.cpu()
            self.started = time.perf_counter()
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0

    def done(self, exchange: Exchange, now: float) -> None:
        """An answer is complete."""
        if not self._counts(exchange):
            return
        self.ended = now
        self.statuses[exchange.status] += 1
        self.events += exchange.events
        self.body_bytes += exchange.body_bytes
        if len(self.latencies) < MAX_SAMPLES:
            self.latencies.append((now - exchange.sent) * 1e3)
            self.first_bytes.append((exchange.first_byte - exchange.sent) * 1e3)

    def failed(self, exchange: Exchange, kind: str) -> None:
        """A request ended without a complete answer."""
        if self._counts(exchange):
            self.ended = time.perf_counter()
            self.errors[kind] += 1

    def _counts(self, exchange: Exchange) -> bool:
        return self.started is not None and exchange.sent >= self.started


class Exchange:
    """One request under way: when it was sent and what came back so far."""

    __slots__ = ("body_bytes", "events", "first_byte", "half_event", "sent", "status")

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.first_byte = 0.0
        self.status = 0
        self.events = 0
        self.body_bytes = 0
        self.half_event = False


class Connection(asyncio.Protocol):
    """A keep-alive connection. `finished` gets None, or the kind of failure, when the connection is done."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request = request
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sse = False
        self.exchange: Exchange | None = None
        self.finished: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By type, not isinstance: uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("reset" if exc is not None else "closed")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("malformed")

    def abort(self, kind: str) -> None:
        """Give the request under way up."""
        self._end(kind)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._sse = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        if self.exchange is not None:
            self.exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        if not exchange.body_bytes:
            exchange.first_byte = time.perf_counter()
        exchange.body_bytes += len(body)
        if self._sse:
            # A separator may be split between two reads.
            exchange.events += body.count(b"\n\n") + (exchange.half_event and body.startswith(b"\n"))
            exchange.half_event = body.endswith(b"\n") and not body.endswith(b"\n\n")

    def on_message_complete(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        now = time.perf_counter()
        exchange.first_byte = exchange.first_byte or now
        self._tally.done(exchange, now)
        self._sse = False
        if self._parser.should_keep_alive():
            self._next()
        else:
            self._end(None)

    def _next(self) -> None:
        if self._transport is None or not self._tally.take():
            self._end(None)
            return
        self.exchange = Exchange()
        self._transport.write(self._request)

    def _end(self, kind: str | None) -> None:
        if self.finished.done():
            return
        if self.exchange is not None:
            self._tally.failed(self.exchange, kind or "closed")
            self.exchange = None
        if self._transport is not None:
            self._transport.abort()
        self.finished.set_result(kind)


async def run(plan: Plan) -> Report:
    """Carry the plan out. Raises ValueError for a plan without an end, OSError if a watched process does not exist."""
    if (plan.requests is None) == (plan.seconds is None):
        raise ValueError("a plan needs either requests or seconds")
    tally = Tally(plan)
    connections: set[Connection] = set()
    watcher = asyncio.create_task(_watch(plan, tally, connections))
    try:
        await asyncio.gather(*(_keep_connected(plan, tally, connections) for _ in range(plan.connections)))
    finally:
        watcher.cancel()
    return _report(tally)


def request_bytes(plan: Plan) -> bytes:
    """The one request of the plan as it goes over the wire."""
    parts = urlsplit(plan.url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"host": parts.netloc, "content-type": "application/json", **plan.headers}
    if plan.method != "GET":
        headers["content-length"] = str(len(plan.body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"{plan.method} {path} HTTP/1.1\r\n{lines}\r\n".encode()
    return head if plan.method == "GET" else head + plan.body


async def _keep_connected(plan: Plan, tally: Tally, connections: set[Connection]) -> None:
    """One of the N: reconnects as long as there is something to do."""
    parts = urlsplit(plan.url)
    request = request_bytes(plan)
    loop = asyncio.get_running_loop()
    while not tally.exhausted:
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(request, tally), parts.hostname or "127.0.0.1", parts.port or 80
            )
        except OSError:
            # It costs a request, so that a dead server ends a run that counts requests.
            if tally.take():
                tally.errors["connect"] += 1
            await asyncio.sleep(_RECONNECT_PAUSE_S)
            continue
        connections.add(connection)
        failure = await connection.finished
        connections.discard(connection)
        if failure is not None:
            await asyncio.sleep(_RECONNECT_PAUSE_S)


async def _watch(plan: Plan, tally: Tally, connections: set[Connection]) -> None:
    """Ends the run, and requests that take too long."""
    begun = time.perf_counter()
    while True:
        await asyncio.sleep(_WATCH_EVERY_S)
        now = time.perf_counter()
        over = now - begun > plan.deadline_s
        if over or (plan.seconds is not None and tally.started is not None and now - tally.started >= plan.seconds):
            tally.stopped = True
        for connection in tuple(connections):
            exchange = connection.exchange
            if over or (exchange is not None and now - exchange.sent > plan.timeout_s):
                connection.abort("deadline" if over else "timeout")


def _report(tally: Tally) -> Report:
    cpu = [after - before for after, before in zip(tally.cpu(), tally.cpu_before, strict=False)] or [0.0]
    seconds = max(tally.ended - tally.started, 0.0) if tally.started is not None else 0.0
    done = tally.statuses.total()
    return Report(
        requests=done,
        errors=tally.errors.total(),
        statuses={str(status): count for status, count in sorted(tally.statuses.items())},
        seconds=round(seconds, 6),
        requests_per_s=round(done / seconds, 1) if seconds else 0.0,
        latency_ms=summary(tally.latencies),
        first_byte_ms=summary(tally.first_bytes),
        events=tally.events,
        body_bytes=tally.body_bytes,
        client_cpu_s=round(cpu[0], 6),
        cpu_s={str(pid): round(used, 6) for pid, used in zip(tally.watched, cpu[1:], strict=False)},
        error_kinds=dict(sorted(tally.errors.items())),
    )


def summary(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, max and mean; nearest rank. Empty for no samples."""
    if not samples:
        return {}
    ordered = sorted(samples)
    ranks = {name: ordered[min(len(ordered) - 1, int(len(ordered) * q))] for name, q in _QUANTILES.items()}
    values = {**ranks, "max": ordered[-1], "mean": sum(ordered) / len(ordered)}
    return {name: round(value, 4) for name, value in values.items()}


def plan_from(arguments: Sequence[str] | None) -> Plan:
    """The plan a command line asks for; ends the process with a message for a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    add = parser.add_argument
    add("--url", required=True)
    add("--connections", type=int, default=1)
    add("--requests", type=int)
    add("--seconds", type=float)
    add("--warmup", type=int, default=0, help="requests before the counting starts")
    add("--method", default="POST")
    add("--size", type=int, default=0, help="bytes of the chat request, about")
    add("--stream", action="store_true")
    add("--max-tokens", type=int, default=16)
    add("--model", default=MODEL)
    add("--body", type=Path, help="a file to send in place of a chat request")
    add("--header", action="append", default=[], metavar="NAME:VALUE")
    add("--timeout-s", type=float, default=30.0)
    add("--deadline-s", type=float, default=300.0)
    add("--watch", type=int, action="append", default=[], metavar="PID", help="report the CPU time of this process")
    options = parser.parse_args(arguments)
    if (options.requests is None) == (options.seconds is None):
        parser.error("give either --requests or --seconds")
    headers = dict(text.partition(":")[::2] for text in options.header)
    chat = chat_body(size=options.size, stream=options.stream, model=options.model, max_tokens=options.max_tokens)
    return Plan(
        url=options.url,
        body=options.body.read_bytes() if options.body else chat,
        connections=options.connections,
        requests=options.requests,
        seconds=options.seconds,
        warmup=options.warmup,
        headers={name.strip(): value.strip() for name, value in headers.items()},
        method=options.method,
        timeout_s=options.timeout_s,
        deadline_s=options.deadline_s,
        watch=tuple(options.watch),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see --help."""
    print(json.dumps(asdict(uvloop.run(run(plan_from(arguments))))))


if __name__ == "__main__":
    main()
