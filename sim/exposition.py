"""The Prometheus text format as the Python client library prints it: numbers, labels, families of samples.

Knows no engine and no names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Final

CONTENT_TYPE: Final = b"text/plain; version=1.0.0; charset=utf-8"
Series = Iterable[tuple[Mapping[str, str], float]]


def number(value: float) -> str:
    """A sample value as the Python Prometheus client prints it: from 1e6 on with an exponent."""
    text = repr(float(value))
    point = text.find(".")
    if value > 0 and point > 6:
        digits = (text[0] + "." + text[1:point] + text[point + 1 :]).rstrip("0.")
        return f"{digits}e+{point - 1:02d}"
    return text


def label_set(labels: Mapping[str, str]) -> str:
    """``a="1",b="2"`` in alphabetical order, escaped."""
    pairs = []
    for name in sorted(labels):
        value = labels[name].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{value}"')
    return ",".join(pairs)


class Histogram:
    """Counts per bucket, sum and number of observations. ``bounds`` ascend; the last bucket is +Inf."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, *, times: int = 1) -> None:
        """Add ``times`` observations of the same value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Page:
    """Collects the lines of one page. ``base``: labels of every sample.

    ``created_at_s``: unix seconds, told beside counters and histograms; None leaves that out, as several processes do.
    """

    def __init__(self, base: Mapping[str, str], created_at_s: float | None) -> None:
        self.base = base
        self.lines: list[str] = []
        self._created = None if created_at_s is None else number(created_at_s)

    def gauge(self, name: str, text: str, series: Series) -> None:
        """A gauge family; ``series`` are further labels and values."""
        self._family(name, "gauge", text)
        for labels, value in series:
            self._sample(name, label_set({**self.base, **labels}), number(value))

    def counter(self, name: str, text: str, series: Series) -> None:
        """A counter family, named without ``_total``, and when it was made."""
        rendered = [(label_set({**self.base, **labels}), value) for labels, value in series]
        self._family(name + "_total", "counter", text)
        for labels_text, value in rendered:
            self._sample(name + "_total", labels_text, number(value))
        self._tell_creation(name, text, [labels_text for labels_text, _ in rendered])

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        """A histogram family without further labels."""
        self._family(name, "histogram", text)
        running = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            running += count
            le = "+Inf" if bound == float("inf") else number(bound)
            self._sample(name + "_bucket", label_set({**self.base, "le": le}), number(running))
        base = label_set(self.base)
        self._sample(name + "_count", base, number(running))
        self._sample(name + "_sum", base, number(histogram.total))
        self._tell_creation(name, text, [base])

    def _tell_creation(self, name: str, text: str, label_texts: Iterable[str]) -> None:
        if self._created is None:
            return
        self._family(name + "_created", "gauge", text)
        for label_text in label_texts:
            self._sample(name + "_created", label_text, self._created)

    def _family(self, name: str, kind: str, text: str) -> None:
        self.lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")

    def _sample(self, name: str, labels: str, value: str) -> None:
        self.lines.append(f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n")

    def rendered(self) -> bytes:
        """The whole page, UTF-8."""
        return "".join(self.lines).encode()
