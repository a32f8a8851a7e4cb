"""Prints figures as tables for people. Knows columns and wording; computes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.figures import Row, Spread
from bench.shapes import CHUNK_INTERVAL_MS, Shape

# A file or a pipe has no width of its own.
WIDTH = 160
NOTHING = "–"


def console() -> Console:
    """Where the tables go: stdout, wide enough off a terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDTH)


def shape_table(shape: Shape, rows: Iterable[Row], *, connections: int) -> Table:
    """One shape, a line per contender; a line of its own for each process of several."""
    pace = f", a chunk every {CHUNK_INTERVAL_MS:g} ms" if shape.stream else ""
    unit = "streams" if shape.stream else "requests"
    title = f"{shape.title}; CPU and rate at {connections} connections{pace}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    chunks = ["CPU s/1k chunks"] if shape.stream else []
    times = ["first byte p50 ms", "added ms"] if shape.stream else ["p50 ms", "added p50 ms"]
    for column in (f"CPU s/1k {unit}", *chunks, "x waypost run", f"{unit}/s", "x direct", *times, "errors"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, stream=shape.stream), style="bold red" if row.errors else None)
        for role, part in row.cpu_parts_s.items():
            table.add_row(f"  of it {role}", _range(part, 3), style="dim")
    return table


def _cells(row: Row, *, stream: bool) -> list[Text]:
    cells = [
        Text(("! " if row.errors else "") + row.contender),
        _range(row.cpu_s, 3),
        _median(row.cpu_ratio, 2),
        _median(row.requests_per_s, 0),
        _median(row.rate_ratio, 2),
        _median(row.p50_ms, 2),
        _range(row.added_p50_ms, 2),
        Text(str(row.errors)),
    ]
    if stream:
        cells.insert(2, _median(row.chunk_cpu_s, 4))
    return cells


def _median(value: Spread | None, digits: int) -> Text:
    return Text(NOTHING if value is None else f"{value.median:,.{digits}f}")


def _range(value: Spread | None, digits: int) -> Text:
    text = _median(value, digits)
    if value is not None and value.low != value.high:
        text.append(f" [{value.low:,.{digits}f}–{value.high:,.{digits}f}]", style="dim")
    return text


def heading(machine: Mapping[str, object], versions: Mapping[str, str]) -> Text:
    """What was measured on."""
    system = f"{machine['cores']} cores ({machine['processor']}), Linux {machine['kernel']}, Python {machine['python']}"
    lines = [f"{machine['date']}; {system}; load average before: {machine['load_average']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return Text("\n".join(lines))


def method(rounds: int, samples: int) -> Text:
    """How to read the tables."""
    return Text(
        f"Median [lowest–highest] of {rounds} round(s). Contenders alternate in every round, direct before each.\n"
        "CPU: user and system time of all threads of the contender's processes; load generator and backends share the "
        "cores, but are not in it.\n"
        f"p50: {samples:,} requests a round, one at a time; of streams the first byte, all started at once. Added: "
        "over the direct burst just before.\n"
        "Defaults throughout, logs to a file: waypost run and picker write one JSON line per request.\n"
    )


def verdict(ratio: Spread | None, peer: str, limit: float) -> Text | None:
    """How `waypost run` compares with a peer; None if that was not measured."""
    if ratio is None:
        return None
    outcome = "within" if ratio.median <= limit else "OVER"
    return Text(
        f"waypost run costs {ratio.median:.2f} [{ratio.low:.2f}–{ratio.high:.2f}] times the CPU of {peer} per small "
        f"request: {outcome} the limit of {limit:g}.",
        style="bold",
    )
