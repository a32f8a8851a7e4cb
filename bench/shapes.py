"""What is sent: the shapes of requests, and in which bursts they go out.

Values only. Sizes are fixed, so that figures of two days can be compared; `quick` has the same bursts, smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.load import Plan, chat_body

CHUNKS = 200
CHUNK_INTERVAL_MS = 5.0
STREAMS = 32
# The backend ends a stream with `data: [DONE]`, an event of its own.
EVENTS_PER_STREAM = CHUNKS + 1
BURST_DEADLINE_S = 30.0

Purpose = Literal["cost", "latency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One kind of request. `body_bytes` is the whole JSON body, about."""

    name: str
    title: str
    body_bytes: int
    stream: bool = False

    @property
    def body(self) -> bytes:
        """The request's body."""
        return chat_body(size=self.body_bytes, stream=self.stream)


SMALL = Shape(name="small", title="small chat (250 B)", body_bytes=250)
LARGE = Shape(name="32KB", title="32 KB chat", body_bytes=32 * 1024)
SSE = Shape(name="sse", title=f"SSE, {STREAMS} streams x {CHUNKS} chunks", body_bytes=250, stream=True)
SHAPES = (SMALL, LARGE, SSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Requests of one shape, sent without a pause. `latency` bursts use one connection, so that nothing queues."""

    shape: Shape
    purpose: Purpose
    connections: int
    requests: int
    warmup: int

    def plan(self, url: str, *, headers: dict[str, str], watch: tuple[int, ...]) -> Plan:
        """The burst as the load generator takes it."""
        return Plan(
            url=url,
            body=self.shape.body,
            connections=self.connections,
            requests=self.requests,
            warmup=self.warmup,
            headers=headers,
            timeout_s=15.0,
            deadline_s=BURST_DEADLINE_S,
            watch=watch,
        )


FULL = (
    Burst(shape=SMALL, purpose="cost", connections=32, requests=3_000, warmup=300),
    Burst(shape=LARGE, purpose="cost", connections=32, requests=2_000, warmup=200),
    Burst(shape=SSE, purpose="cost", connections=STREAMS, requests=2 * STREAMS, warmup=0),
    Burst(shape=SMALL, purpose="latency", connections=1, requests=2_000, warmup=100),
    Burst(shape=LARGE, purpose="latency", connections=1, requests=2_000, warmup=100),
)
QUICK = (
    Burst(shape=SMALL, purpose="cost", connections=32, requests=500, warmup=100),
    Burst(shape=LARGE, purpose="cost", connections=32, requests=200, warmup=50),
    Burst(shape=SSE, purpose="cost", connections=STREAMS, requests=STREAMS, warmup=0),
    Burst(shape=SMALL, purpose="latency", connections=1, requests=200, warmup=50),
    Burst(shape=LARGE, purpose="latency", connections=1, requests=100, warmup=50),
)
