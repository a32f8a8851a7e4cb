"""Medians, ratios within a round, and errors that mark a row."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench.figures import Row, Spread, cpu_ratio, rows, spread
from bench.load import Report
from bench.rounds import Sample
from bench.shapes import SMALL, SSE, Purpose
from bench.table import shape_table, verdict


def report(*, requests: int = 1000, rate: float = 100.0, p50_ms: float = 1.0) -> Report:
    return Report(
        requests=requests,
        errors=0,
        statuses={"200": requests},
        seconds=1.0,
        requests_per_s=rate,
        latency_ms={"p50": p50_ms} if requests else {},
        first_byte_ms={"p50": p50_ms / 2} if requests else {},
        events=0,
        body_bytes=0,
        client_cpu_s=0.0,
        cpu_s={},
        error_kinds={},
    )


def sample(
    contender: str = "waypost run",
    *,
    number: int = 0,
    shape: str = "small",
    purpose: Purpose = "cost",
    cpu_s: dict[str, float] | None = None,
    errors: int = 0,
    seen: Report | None = None,
) -> Sample:
    return Sample(
        round=number,
        contender=contender,
        shape=shape,
        purpose=purpose,
        connections=1,
        requests=1000,
        chunks=200_000 if shape == "sse" else 0,
        cpu_s={"it": 0.2} if cpu_s is None else cpu_s,
        backend_cpu_s=0.0,
        errors=errors,
        report=seen or report(),
        direct=report(rate=400.0, p50_ms=0.25),
        direct_errors=0,
        load_average=1.0,
    )


def test_spread_is_median_and_range_of_what_is_known() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)
    assert spread([None]) is None


def test_cpu_is_the_sum_of_a_contenders_processes() -> None:
    samples = [sample("Envoy + waypost picker", cpu_s={"envoy": 0.3, "picker": 0.5})]

    row = rows(samples, SMALL)[1]

    assert row.cpu_s is not None
    assert row.cpu_s.median == pytest.approx(0.8)
    assert {role: part.median for role, part in row.cpu_parts_s.items()} == {"envoy": 0.3, "picker": 0.5}


def test_ratio_is_taken_within_a_round() -> None:
    """A round in which everything costs five times as much does not move the ratio."""
    samples = [
        sample(name, number=number, cpu_s={"it": base * weather})
        for number, weather in enumerate((1.0, 5.0, 1.2))
        for name, base in (("waypost run", 0.2), ("sglang-router", 0.1))
    ]

    ratio = cpu_ratio(samples, SMALL, "waypost run", "sglang-router")

    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_ratio_leaves_rounds_out_in_which_one_is_missing() -> None:
    samples = [sample(number=0), sample("sglang-router", number=1)]

    assert cpu_ratio(samples, SMALL, "waypost run", "sglang-router") is None


def test_latency_comes_from_latency_bursts_and_rate_from_cost_bursts() -> None:
    samples = [
        sample(seen=report(rate=100.0, p50_ms=30.0)),
        sample(purpose="latency", seen=report(rate=1.0, p50_ms=1.25, requests=2000)),
    ]

    direct, row = rows(samples, SMALL)

    assert row.requests_per_s == Spread(median=100.0, low=100.0, high=100.0)
    assert row.rate_ratio is not None
    assert row.rate_ratio.median == 0.25
    assert row.added_p50_ms is not None
    assert row.added_p50_ms.median == 1.0
    assert row.samples == 2000
    assert direct.cpu_s is None
    assert direct.p50_ms is not None
    assert direct.p50_ms.median == 0.25


def test_streams_are_timed_by_their_first_byte_and_cost_per_chunk() -> None:
    row = rows([sample(shape="sse", seen=report(p50_ms=10.0))], SSE)[1]

    assert row.p50_ms is not None
    assert row.p50_ms.median == 5.0
    assert row.chunk_cpu_s is not None
    assert row.chunk_cpu_s.median == pytest.approx(0.001)


def test_contender_that_answered_nothing_has_errors_and_no_figures() -> None:
    row = rows([sample(cpu_s={}, errors=1000, seen=report(requests=0, rate=0.0))], SMALL)[1]

    assert row.errors == 1000
    assert row.cpu_s is None
    assert row.requests_per_s is None


def printed(*entries: Row) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(shape_table(SMALL, entries, connections=32))
    return capture.get()


def test_row_with_errors_is_marked() -> None:
    good = Row(contender="good", shape="small", cpu_parts_s={}, samples=1, errors=0)
    bad = Row(contender="bad", shape="small", cpu_parts_s={}, samples=1, errors=3)

    lines = printed(good, bad).splitlines()

    assert any("! bad" in line and " 3 " in line for line in lines)
    assert not any("! good" in line for line in lines)


@pytest.mark.parametrize(("median", "word"), [(1.99, "within"), (2.01, "OVER")])
def test_verdict_says_whether_the_limit_holds(median: float, word: str) -> None:
    sentence = verdict(Spread(median=median, low=1.0, high=3.0), "sglang-router", 2.0)

    assert sentence is not None
    assert word in sentence.plain
    assert verdict(None, "sglang-router", 2.0) is None
