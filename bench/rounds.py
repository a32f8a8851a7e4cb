"""Carries the rounds out: in every round each contender gets each burst, with `direct` immediately before it.

The order is reversed in every second round, so that a slow drift of the machine favours nobody. Measures only; what it
means is for `figures`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.contenders import Backend, Running
from bench.load import Report, run
from bench.shapes import CHUNKS, EVENTS_PER_STREAM, Burst, Purpose

MIN_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One burst through one contender, and the same burst without it just before.

    `cpu_s` is what the contender's processes used, by role. `errors` are requests without a complete answer, answers
    other than 200, and for streams missing events.
    """

    round: int
    contender: str
    shape: str
    purpose: Purpose
    connections: int
    requests: int
    chunks: int
    cpu_s: dict[str, float]
    backend_cpu_s: float
    errors: int
    report: Report
    direct: Report
    direct_errors: int
    load_average: float


async def measure(
    backend: Backend,
    direct: Running,
    contenders: Sequence[Running],
    *,
    bursts: Sequence[Burst],
    rounds: int,
    budget_s: float,
    progress: Callable[[str], None],
) -> list[Sample]:
    """All samples of at most `rounds` rounds.

    No round beyond `MIN_ROUNDS` is begun that would not end within `budget_s`, going by the longest so far.
    """
    samples: list[Sample] = []
    began = time.monotonic()
    longest_s = 0.0
    for number in range(rounds):
        round_began = time.monotonic()
        if number >= MIN_ROUNDS and round_began - began + longest_s > budget_s:
            progress(f"{number} rounds; one more would take longer than {budget_s:.0f} s")
            break
        for burst in bursts:
            order = contenders if number % 2 == 0 else contenders[::-1]
            for contender in order:
                progress(f"round {number + 1}, {burst.shape.title}, {burst.purpose}: {contender.name}")
                samples.append(await _sample(number, burst, backend, direct, contender))
        longest_s = max(longest_s, time.monotonic() - round_began)
    return samples


async def _sample(number: int, burst: Burst, backend: Backend, direct: Running, contender: Running) -> Sample:
    without = await _burst(burst, direct, backend)
    report = await _burst(burst, contender, backend)
    return Sample(
        round=number,
        contender=contender.name,
        shape=burst.shape.name,
        purpose=burst.purpose,
        connections=burst.connections,
        requests=burst.requests,
        chunks=burst.requests * CHUNKS if burst.shape.stream else 0,
        cpu_s={role: report.cpu_s.get(str(pid), 0.0) for role, pid in contender.pids.items()},
        backend_cpu_s=report.cpu_s.get(str(backend.pid), 0.0),
        errors=_errors(burst, report),
        report=report,
        direct=without,
        direct_errors=_errors(burst, without),
        load_average=os.getloadavg()[0],
    )


async def _burst(burst: Burst, contender: Running, backend: Backend) -> Report:
    watch = (*contender.pids.values(), backend.pid)
    try:
        return await run(burst.plan(contender.url, headers=dict(contender.headers), watch=watch))
    except ProcessLookupError:
        return _nothing(burst)


def _nothing(burst: Burst) -> Report:
    """The report of a contender whose process is gone."""
    return Report(
        requests=0,
        errors=burst.requests,
        statuses={},
        seconds=0.0,
        requests_per_s=0.0,
        latency_ms={},
        first_byte_ms={},
        events=0,
        body_bytes=0,
        client_cpu_s=0.0,
        cpu_s={},
        error_kinds={"process gone": burst.requests},
    )


def _errors(burst: Burst, report: Report) -> int:
    complete = report.statuses.get("200", 0)
    errors = report.errors + report.requests - complete
    if burst.shape.stream:
        errors += abs(complete * EVENTS_PER_STREAM - report.events)
    # A burst cut off by its deadline has requests that nobody sent.
    return max(errors, burst.requests - complete)
