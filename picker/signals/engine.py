"""What a table about one engine can say, and how a page becomes `Signals` by it.

A table names metrics; this file owns their arithmetic: which series count, how several become one, and what is too
odd to believe. A figure that lies (negative, NaN, a usage of 37) becomes None, which means "the engine does not
tell", and never an error.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from picker.core.updates import ProbeFailure
from picker.core.values import Lora, Signals
from picker.signals.page import PageFilter, Sample, looks_like_page

NO_METRICS = "none"
# Counts above this are not counts. Token counters reach 1e12 in a long life, so they have a bound of their own.
MAX_COUNT = 1e7
MAX_TOKENS = 1e18
MAX_BLOCK_TOKENS = 65536
# Rounding in an engine may give 1.0000001, never 1.1.
USAGE_SLACK = 1e-3
# vLLM keeps some tens of adapters; a list of thousands of names is a mistake or an attack.
MAX_ADAPTERS = 1024


class Fold(enum.Enum):
    """How several series of one figure become one number."""

    SUM = "sum"
    MEAN = "mean"
    SAME = "same"


@dataclass(frozen=True, slots=True)
class Figure:
    """Where one number stands on a page.

    `where` holds label values a series must have; an absent label counts as "". With `label` the number is the value
    of that label and not the sample's own.
    """

    name: str
    where: Mapping[str, str] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Engine:
    """The table of one engine. Each field lists places to look, today's name first; the first that has series is used.

    Over data-parallel ranks waiting, running and blocks are summed, and `kv_usage` is the mean: then usage times
    blocks is what is in use on the whole endpoint. The maximum would call an endpoint full because of one rank, while
    the engine itself sends the next request to another. All of `progress` are added up; they must move whenever the
    engine works and may not rest during a long answer, so counters that are written when a request ends do not
    qualify. `copies` are labels that number copies of one figure, such as tensor-parallel ranks. `families` are the
    prefixes or names that give the engine away: one of each inner tuple must be there.
    """

    name: str
    metrics_path: str
    families: tuple[tuple[str, ...], ...]
    waiting: tuple[Figure, ...] = ()
    running: tuple[Figure, ...] = ()
    kv_usage: tuple[Figure, ...] = ()
    block_tokens: tuple[Figure, ...] = ()
    blocks: tuple[Figure, ...] = ()
    progress: tuple[Figure, ...] = ()
    lora: str = ""
    copies: tuple[str, ...] = ()
    progress_lag_s: float = 0.0

    @cached_property
    def lines(self) -> PageFilter:
        """The filter for exactly the names in this table."""
        fields = (self.waiting, self.running, self.kv_usage, self.block_tokens, self.blocks, self.progress)
        names = [figure.name for places in fields for figure in places]
        return PageFilter([*names, self.lora] if self.lora else names)

    @cached_property
    def _signatures(self) -> tuple[re.Pattern[bytes], ...]:
        return tuple(
            re.compile(rb"^(?:" + b"|".join(re.escape(name.encode()) for name in names) + rb")", re.MULTILINE)
            for names in self.families
        )

    def wrote(self, page: bytes) -> bool:
        """Whether the page has this engine's families."""
        return all(signature.search(page) for signature in self._signatures)


def read(engine: Engine, page: bytes, at: float) -> Signals | ProbeFailure:
    """What the page says by the engine's table; PARSE when it is no metrics page. `at` is when the scrape was sent."""
    samples = engine.lines.read(page)
    if not samples and not looks_like_page(page):
        return ProbeFailure.PARSE
    page_by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        page_by_name.setdefault(sample.name, []).append(sample)
    block_tokens = _first(engine, engine.block_tokens, page_by_name, Fold.SAME, MAX_BLOCK_TOKENS)
    blocks = _first(engine, engine.blocks, page_by_name, Fold.SUM, MAX_TOKENS)
    return Signals(
        at=at,
        waiting=_first(engine, engine.waiting, page_by_name, Fold.SUM, MAX_COUNT),
        running=_first(engine, engine.running, page_by_name, Fold.SUM, MAX_COUNT),
        kv_usage=_usage(engine, page_by_name),
        block_tokens=int(block_tokens) if block_tokens else None,
        blocks=int(blocks) if blocks else None,
        lora=_newest_lora(page_by_name.get(engine.lora, ())),
        progress_tokens=_progress(engine, page_by_name),
        progress_lag_s=engine.progress_lag_s,
    )


def _first(
    engine: Engine, places: tuple[Figure, ...], page: Mapping[str, Sequence[Sample]], fold: Fold, limit: float
) -> float | None:
    for figure in places:
        values = _values(figure, page.get(figure.name, ()), engine.copies)
        if values:
            return _folded(values, fold, limit)
    return None


def _values(figure: Figure, samples: Sequence[Sample], copies: tuple[str, ...]) -> list[float]:
    chosen = [
        (sample.labels, _number(sample, figure.label))
        for sample in samples
        if all(sample.labels.get(name, "") == value for name, value in figure.where.items())
    ]
    if len(chosen) < 2 or not copies:
        return [value for _, value in chosen]
    originals: dict[frozenset[tuple[str, str]], float] = {}
    for labels, value in chosen:
        key = frozenset((name, text) for name, text in labels.items() if name not in copies)
        # A copy may be a step behind; the larger is the newer for counters and the safer for queues. NaN must not
        # hide behind it.
        before = originals.get(key, value)
        originals[key] = value if math.isnan(value) else max(value, before) if not math.isnan(before) else before
    return list(originals.values())


def _number(sample: Sample, label: str) -> float:
    if not label:
        return sample.value
    try:
        return float(sample.labels.get(label, "nan"))
    except ValueError:
        return math.nan


def _folded(values: list[float], fold: Fold, limit: float) -> float | None:
    # One bad series spoils the figure: a sum without it would make a full endpoint look idle.
    if not all(0 <= value <= limit for value in values):
        return None
    if fold is Fold.SAME:
        return values[0] if all(value == values[0] for value in values) else None
    total = math.fsum(values)
    return total / len(values) if fold is Fold.MEAN else total


def _usage(engine: Engine, page: Mapping[str, Sequence[Sample]]) -> float | None:
    usage = _first(engine, engine.kv_usage, page, Fold.MEAN, 1 + USAGE_SLACK)
    return None if usage is None else min(usage, 1.0)


def _progress(engine: Engine, page: Mapping[str, Sequence[Sample]]) -> float | None:
    parts = [_first(engine, (figure,), page, Fold.SUM, MAX_TOKENS) for figure in engine.progress]
    known = [part for part in parts if part is not None]
    return math.fsum(known) if known and len(known) == len(parts) else None


def _newest_lora(samples: Sequence[Sample]) -> Lora | None:
    """The series with the newest time: its value is unix time, and series of earlier states stay on the page for
    ever.
    """
    dated = [sample for sample in samples if math.isfinite(sample.value) and sample.value > 0]
    if not dated:
        return None
    labels = max(dated, key=lambda sample: sample.value).labels
    slots = labels.get("max_lora", "")
    return Lora(
        running=_adapters(labels.get("running_lora_adapters", "")),
        waiting=_adapters(labels.get("waiting_lora_adapters", "")),
        slots=min(int(slots), MAX_ADAPTERS) if slots.isascii() and slots.isdigit() and len(slots) < 9 else 0,
    )


def _adapters(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",", MAX_ADAPTERS)[:MAX_ADAPTERS]]
    return frozenset(name for name in names if name)
