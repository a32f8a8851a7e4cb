"""Turns samples into figures: medians over rounds with their range, and ratios taken within a round.

Pure. A ratio pairs what ran in the same round, before the median is taken: rounds differ more than contenders do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.load import Report
from bench.rounds import Sample
from bench.shapes import Shape

REFERENCE = "waypost run"
DIRECT = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and range over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender with one shape. None where there is nothing to say: no samples, or nothing in front of the backend.

    `cpu_s` is per 1,000 requests, `cpu_parts_s` the same by process, `chunk_cpu_s` per 1,000 chunks. `cpu_ratio` is to
    `waypost run`, `rate_ratio` to direct. `p50_ms` is a whole request's, for streams its first byte's. `samples` is how
    many requests each round's p50 comes from.
    """

    contender: str
    shape: str
    cpu_s: Spread | None = None
    cpu_parts_s: dict[str, Spread]
    chunk_cpu_s: Spread | None = None
    cpu_ratio: Spread | None = None
    requests_per_s: Spread | None = None
    rate_ratio: Spread | None = None
    p50_ms: Spread | None = None
    added_p50_ms: Spread | None = None
    samples: int
    errors: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values there are; None for none."""
    known = sorted(value for value in values if value is not None)
    return Spread(median=statistics.median(known), low=known[0], high=known[-1]) if known else None


def rows(samples: Sequence[Sample], shape: Shape) -> list[Row]:
    """`direct`, then every contender in the order of its first sample."""
    chosen = [sample for sample in samples if sample.shape == shape.name]
    names = dict.fromkeys(sample.contender for sample in chosen)
    return [_direct_row(chosen, shape), *(_row(chosen, name, shape) for name in names)]


def cpu_ratio(samples: Iterable[Sample], shape: Shape, name: str, reference: str) -> Spread | None:
    """CPU per request of `name` over that of `reference`, by round."""
    cost = [sample for sample in samples if sample.shape == shape.name and sample.purpose == "cost"]
    of_name = {sample.round: _cpu_s_per_1k(sample) for sample in cost if sample.contender == name}
    of_reference = {sample.round: _cpu_s_per_1k(sample) for sample in cost if sample.contender == reference}
    return spread(_ratio(of_name[number], of_reference[number]) for number in of_name.keys() & of_reference.keys())


def _row(samples: Sequence[Sample], name: str, shape: Shape) -> Row:
    own = [sample for sample in samples if sample.contender == name]
    cost = [sample for sample in own if sample.purpose == "cost"]
    timed = cost if shape.stream else [sample for sample in own if sample.purpose == "latency"]
    roles = dict.fromkeys(role for sample in cost for role in sample.cpu_s)
    p50 = _first_byte_p50 if shape.stream else _latency_p50
    return Row(
        contender=name,
        shape=shape.name,
        cpu_s=spread(_cpu_s_per_1k(sample) for sample in cost),
        cpu_parts_s=_parts(cost, tuple(roles)),
        chunk_cpu_s=spread(_cpu_s_per_1k_chunks(sample) for sample in cost),
        cpu_ratio=cpu_ratio(samples, shape, name, REFERENCE),
        requests_per_s=spread(_rate(sample.report) for sample in cost),
        rate_ratio=spread(_ratio(_rate(sample.report), _rate(sample.direct)) for sample in cost),
        p50_ms=spread(p50(sample.report) for sample in timed),
        added_p50_ms=spread(_difference(p50(sample.report), p50(sample.direct)) for sample in timed),
        samples=min((sample.report.requests for sample in timed), default=0),
        errors=sum(sample.errors for sample in own),
    )


def _direct_row(samples: Sequence[Sample], shape: Shape) -> Row:
    cost = [sample for sample in samples if sample.purpose == "cost"]
    timed = cost if shape.stream else [sample for sample in samples if sample.purpose == "latency"]
    p50 = _first_byte_p50 if shape.stream else _latency_p50
    return Row(
        contender=DIRECT,
        shape=shape.name,
        cpu_parts_s={},
        requests_per_s=spread(_rate(sample.direct) for sample in cost),
        p50_ms=spread(p50(sample.direct) for sample in timed),
        samples=min((sample.direct.requests for sample in timed), default=0),
        errors=sum(sample.direct_errors for sample in samples),
    )


def _parts(cost: Sequence[Sample], roles: tuple[str, ...]) -> dict[str, Spread]:
    def of(role: str) -> Callable[[Sample], float | None]:
        return lambda sample: _ratio(sample.cpu_s.get(role, 0.0) * 1e3, sample.report.requests)

    if len(roles) < 2:
        return {}
    return {role: found for role in roles if (found := spread(map(of(role), cost))) is not None}


def _cpu_s_per_1k(sample: Sample) -> float | None:
    return _ratio(sum(sample.cpu_s.values()) * 1e3, sample.report.requests) if sample.cpu_s else None


def _cpu_s_per_1k_chunks(sample: Sample) -> float | None:
    return _ratio(sum(sample.cpu_s.values()) * 1e3, sample.chunks) if sample.cpu_s else None


def _rate(report: Report) -> float | None:
    return report.requests_per_s or None


def _latency_p50(report: Report) -> float | None:
    return report.latency_ms.get("p50")


def _first_byte_p50(report: Report) -> float | None:
    return report.first_byte_ms.get("p50")


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None
