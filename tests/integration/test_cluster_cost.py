"""What following a cluster may cost, with a fivefold allowance for a busy machine.

Exact figures come from `python -m bench.cluster`.
"""

from __future__ import annotations

import statistics

from bench.cluster import measure, publish_us

CORE_SHARE_MAX = 0.10
PUBLISH_MAX_US = 200.0
ALLOWANCE = 5.0


def test_a_thousand_pods_and_a_hundred_changes_a_second() -> None:
    figures = measure(1000, rate=100.0, seconds=3.0)
    assert figures.changes == 300
    # A change that leaves a pod as unready as it was is none.
    assert len(figures.snapshot_us) > 200
    assert figures.core_share < CORE_SHARE_MAX * ALLOWANCE, figures
    assert statistics.median(figures.snapshot_us) < PUBLISH_MAX_US * ALLOWANCE, figures


def test_one_change_among_a_thousand_endpoints() -> None:
    assert publish_us(1000) < PUBLISH_MAX_US * ALLOWANCE
