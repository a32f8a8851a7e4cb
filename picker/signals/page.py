"""The wanted lines of a Prometheus text page: bytes in, samples of a few named families out.

A scrape needs about ten lines of several hundred, so the rest is never parsed. Lines that are not well-formed samples
are skipped: a page comes from another program and must not be able to raise here. Equality with the official parser
is a test. Not a general parser: no types, no help texts, no timestamps, no quoted names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

import msgspec

# A real page is 60 kB; a fleet-wide exporter mistaken for an engine can be 100 times that. What lies beyond is not
# looked at.
MAX_PAGE_BYTES = 8 * 2**20
# An engine with 64 data-parallel ranks and 10 wanted families has 640.
MAX_SAMPLES = 4096
# vLLM's longest line (`cache_config_info`) has 1.3 kB.
MAX_LINE_BYTES = 64 * 2**10

_QUOTED = rb'"(?:[^"\\]++|\\.)*+"'
_LINE = re.compile(
    rb"([a-zA-Z_:][a-zA-Z0-9_:]*+)\s*+"
    rb"(?:\{((?:\s*+[a-zA-Z_][a-zA-Z0-9_]*+\s*+=\s*+" + _QUOTED + rb"\s*+(?:,|(?=\})))*+\s*+)\}\s*+)?+"
    rb"(?<=[\s}])([+-]?[0-9a-zA-Z.+-]++)"
    rb"(?:\s++[+-]?[0-9.eE+-]++)?+\s*+(?:#.*+)?+"
)
_PAIR = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*+)\s*+=\s*+"((?:[^"\\]++|\\.)*+)"')
_ESCAPE = re.compile(r'\\([\\n"])')
_PAGE_LINE = re.compile(rb"\s*+(?:#|[a-zA-Z_:][a-zA-Z0-9_:]*+(?:\{[^\n]*\})?\s++[+-]?(?:[0-9.]|NaN|Inf))")


class Sample(msgspec.Struct, frozen=True):
    """One series and its value. Two samples may have the same name; labels tell them apart."""

    name: str
    labels: dict[str, str]
    value: float


class PageFilter:
    """Finds the samples of some families. `names` are full sample names, so `x_total` or `x_count`, not `x`."""

    def __init__(self, names: Iterable[str]) -> None:
        wanted = sorted(set(names))
        if not wanted:
            raise ValueError("a page filter needs at least one name")
        # One literal first byte, then the alternatives: the regex engine skips whole lines with it, three times
        # faster than splitting.
        self._lines = re.compile(
            rb"\n[ \t\r\f\v]*+((?:" + b"|".join(re.escape(name.encode()) for name in wanted) + rb")[ \t{][^\n]*+)(?=\n)"
        )

    def read(self, page: bytes) -> list[Sample]:
        """All well-formed samples of the wanted families, in the order of the page.

        A last line without a line feed is not read: the format demands one, and half a number is worse than none.
        """
        lines = self._lines.finditer(b"\n" + page[:MAX_PAGE_BYTES])
        return [sample for line in islice(lines, MAX_SAMPLES) if (sample := parse_line(line[1])) is not None]


def parse_line(line: bytes) -> Sample | None:
    """One sample line without its line feed; None when it is not well-formed."""
    if len(line) > MAX_LINE_BYTES:
        return None
    parts = _LINE.fullmatch(line.strip())
    if parts is None:
        return None
    labels = _labels(parts[2]) if parts[2] else {}
    if labels is None:
        return None
    try:
        return Sample(parts[1].decode(), labels, float(parts[3]))
    except ValueError:
        return None


def _labels(text: bytes) -> dict[str, str] | None:
    pairs: list[tuple[str, str]] = _PAIR.findall(text.decode(errors="replace"))
    labels = dict(pairs)
    if len(labels) != len(pairs):
        return None
    if b"\\" in text:
        return {name: _ESCAPE.sub(_unescaped, value) for name, value in labels.items()}
    return labels


def _unescaped(escape: re.Match[str]) -> str:
    return "\n" if escape[1] == "n" else escape[1]


def looks_like_page(page: bytes) -> bool:
    """Whether this is a metrics page at all, maybe an empty one, and not the HTML or JSON of something else that
    answered 200.
    """
    head = page[:4096].strip()
    return not head or any(_PAGE_LINE.match(line) for line in head.split(b"\n"))
