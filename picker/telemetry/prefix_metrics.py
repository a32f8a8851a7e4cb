"""What the prefix index holds and how well it knows, as metrics. Read when somebody asks for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.core.prefix.index import PrefixStatistics


class PrefixFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Where the figures come from. `events` counts what was heard of the engines' caches, `prompts` how keys of prompts
    were made.
    """

    index: Callable[[], PrefixStatistics]
    events: Callable[[], Mapping[str, int]]
    prompts: Callable[[], Mapping[str, int]]


class PrefixCollector(Collector):
    """The index, the events it hears and the prompts it is asked about."""

    def __init__(self, figures: PrefixFigures) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        found = self._figures.index()
        gauges = {
            "waypost_prefix_publishers": ("Engines whose KV-cache events can be heard.", found.publishers),
            "waypost_prefix_publishers_online": ("Those that are heard.", found.online),
            "waypost_prefix_blocks": ("Blocks known to be cached somewhere.", found.keys),
            "waypost_prefix_chunks": ("Chunks of text learnt from what was routed.", found.chunks),
            "waypost_prefix_index_bytes": ("Memory of the index, estimated.", found.bytes_estimate),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        lookups = {"hit": found.hits, "miss": found.lookups - found.hits}
        yield _counter(
            "waypost_prefix_lookups", "Prompts looked up, by whether anybody held any of it.", "result", lookups
        )
        lost = {"evicted": found.evicted, "refused": found.refused, "stale": found.stale}
        yield _counter("waypost_prefix_blocks_lost", "Blocks not kept, by the reason.", "reason", lost)
        yield _counter("waypost_kv_events", "What was heard of KV caches.", "kind", self._figures.events())
        yield _counter(
            "waypost_prompt_keys", "How the exact keys of prompts were made.", "way", self._figures.prompts()
        )


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
