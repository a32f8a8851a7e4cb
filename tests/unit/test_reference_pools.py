"""Gauges of pools under the reference pickers' names: whom they count, and when there is no figure."""

from __future__ import annotations

import pytest

from picker.core.values import Signals, Standing
from tests.unit.core.builders import state
from tests.unit.reference_rig import Rig, pod


def test_gauges_of_a_pool() -> None:
    rig = Rig(
        pod("x", waiting=2, running=4, kv_usage=0.5),
        pod("x", rank=1, waiting=6, running=4, kv_usage=0.3),
        pod("y", standing=Standing.DEGRADED),
        pod("z", standing=Standing.OUT, waiting=0, running=0, kv_usage=0.0),
    )
    for prefix in ("llm_d_epp", "inference_pool"):
        assert rig.value(f"{prefix}_average_queue_size", name="p") == 4
        assert rig.value(f"{prefix}_average_running_requests", name="p") == 4
        assert rig.value(f"{prefix}_average_kv_cache_utilization", name="p") == pytest.approx(0.4)
    assert rig.value("llm_d_epp_std_dev_queue_size", name="p") == pytest.approx(8**0.5)
    assert rig.value("llm_d_epp_std_dev_running_requests", name="p") == 0
    assert rig.value("llm_d_epp_ready_endpoints", name="p") == rig.value("inference_pool_ready_pods", name="p") == 2
    for server, waiting in (("x-rank-0", 2), ("x-rank-1", 6), ("y-rank-0", None), ("z-rank-0", 0)):
        assert rig.value("inference_pool_per_pod_queue_size", name="p", model_server_pod=server) == waiting
        assert rig.value("llm_d_epp_per_endpoint_queue_size", name="p", model_server_endpoint=server) == waiting


def test_an_empty_pool_has_nobody_ready_and_no_averages() -> None:
    rig = Rig(pools=("ns/p",))
    assert rig.value("inference_pool_ready_pods", name="p") == 0
    assert rig.value("inference_pool_average_queue_size", name="p") is None
    rig.rows = (pod("x", waiting=3),)
    assert rig.value("inference_pool_average_queue_size", name="p") == 3
    assert rig.value("inference_pool_average_kv_cache_utilization", name="p") is None, "it does not tell"
    assert rig.value("llm_d_epp_std_dev_queue_size", name="p") == 0


def test_pools_of_one_name_are_told_apart() -> None:
    rig = Rig(pod("x", "one/p", waiting=1), pod("x", "two/p", waiting=3), pod("x", "two/q", waiting=5))
    assert rig.value("inference_pool_average_queue_size", name="one/p") == 1
    assert rig.value("inference_pool_average_queue_size", name="two/p") == 3
    assert rig.value("inference_pool_average_queue_size", name="q") == 5
    assert rig.value("inference_pool_average_queue_size", name="p") is None


def test_endpoints_without_pools() -> None:
    rig = Rig(state("10.0.0.1:8000", signals=Signals(at=0, waiting=7)))
    assert rig.value("inference_pool_average_queue_size", name="") == 7
    assert rig.value("inference_pool_per_pod_queue_size", name="", model_server_pod="10.0.0.1:8000") == 7
