"""The page that says how well the caches of the fleet are known."""

from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from picker.core.prefix.deltas import Op, Tier, pack
from picker.core.prefix.index import PrefixIndex
from picker.core.prefix.prompt import PromptKeys
from picker.telemetry.metrics import Metrics
from picker.telemetry.prefix_metrics import PrefixFigures

Samples = dict[tuple[str, str], float]


def page(metrics: Metrics) -> Samples:
    """The prefix part of the page as Prometheus reads it: values by name and label value."""
    samples: Samples = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        if family.name.startswith(("waypost_prefix_", "waypost_kv_", "waypost_prompt_")):
            assert family.documentation.endswith(".")
            for sample in family.samples:
                key = (sample.name, ",".join(sample.labels.values()))
                assert key not in samples
                samples[key] = sample.value
    return samples


def test_the_index_the_events_and_the_prompts() -> None:
    index = PrefixIndex(max_keys=100)
    events: dict[str, int] = {}
    prompts: dict[str, int] = {}
    metrics = Metrics("test")
    metrics.watch_prefixes(PrefixFigures(index=index.statistics, events=lambda: events, prompts=lambda: prompts))
    before = page(metrics)
    assert set(before.values()) == {0.0}

    publisher = index.bind("a")
    index.bind("b")
    index.apply(pack(Op.ONLINE, publisher) + pack(Op.ADD, publisher, Tier.GPU, [1, 2, 3]))
    index.apply(pack(Op.ADD, 99, Tier.GPU, [4, 5]))
    keys = PromptKeys(exact={16: [1, 2, 3]}, learned=[6, 7], tokens=50, chunk_tokens=25.0)
    index.lookup(keys)
    index.lookup(PromptKeys(exact={16: [9]}, tokens=20))
    index.routed("c", keys, 1.0)
    events |= {"batches": 3, "gaps": 1}
    prompts |= {"engine": 2, "late": 0}

    after = page(metrics)
    assert after == {
        ("waypost_prefix_publishers", ""): 2.0,
        ("waypost_prefix_publishers_online", ""): 1.0,
        ("waypost_prefix_blocks", ""): 3.0,
        ("waypost_prefix_chunks", ""): 2.0,
        ("waypost_prefix_index_bytes", ""): float(index.statistics().bytes_estimate),
        ("waypost_prefix_lookups_total", "hit"): 1.0,
        ("waypost_prefix_lookups_total", "miss"): 1.0,
        ("waypost_prefix_blocks_lost_total", "evicted"): 0.0,
        ("waypost_prefix_blocks_lost_total", "refused"): 0.0,
        ("waypost_prefix_blocks_lost_total", "stale"): 2.0,
        ("waypost_kv_events_total", "batches"): 3.0,
        ("waypost_kv_events_total", "gaps"): 1.0,
        ("waypost_prompt_keys_total", "engine"): 2.0,
        ("waypost_prompt_keys_total", "late"): 0.0,
    }
    assert after[("waypost_prefix_index_bytes", "")] > 0
