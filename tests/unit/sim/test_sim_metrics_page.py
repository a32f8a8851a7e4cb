"""The simulated metrics page has the families, types and labels of the captured vLLM 0.32 page."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from sim import sglang_page
from sim.exposition import Histogram, label_set, number
from sim.meter import MAX_LORA_SERIES, Gauges, Meter
from sim.metrics_page import render
from sim.physics import Engine
from sim.profiles import profile_for
from sim.requests import Request

CAPTURES = Path(__file__).parents[2] / "data" / "vllm-0.32"


def page_after_work(*, loras: bool = False, gauges: Gauges | None = None) -> bytes:
    engine = Engine(profile_for("tiny", "H100"))
    meter = Meter(started_at_s=1.7951755169e9, max_loras=2 if loras else None)
    for index in range(3):
        lora = "lora1" if loras else None
        token_ids = list(range(200))
        request = Request(id=str(index), arrived_at_s=index * 10.0, max_tokens=5, token_ids=token_ids, lora=lora)
        engine.submit(request, index * 10.0)
        while (due := engine.next_step_at()) is not None:
            for emission in engine.step(due):
                meter.observe(emission)
            meter.note_loras(engine, 1.79e9 + due)
    return render(engine, meter, model="tiny", gauges=gauges or Gauges.of(engine))


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def label_names(family: Metric) -> dict[str, set[frozenset[str]]]:
    names: dict[str, set[frozenset[str]]] = {}
    for sample in family.samples:
        names.setdefault(sample.name, set()).add(frozenset(sample.labels))
    return names


@pytest.mark.parametrize(("capture", "loras"), [("metrics.txt", False), ("metrics-lora.txt", True)])
def test_families_types_and_labels_are_those_of_the_capture(capture: str, loras: bool) -> None:
    real = families((CAPTURES / capture).read_text())
    ours = families(page_after_work(loras=loras).decode())
    assert set(ours) - set(real) == set()
    for name, family in ours.items():
        assert family.type == real[name].type, name
        assert label_names(family) == label_names(real[name]), name
    wanted = """num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc
        prefix_cache_queries prefix_cache_hits prompt_tokens generation_tokens num_preemptions request_success
        cache_config_info time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
        request_queue_time_seconds admission_rejections"""
    assert {f"vllm:{name}" for name in wanted.split()} <= set(ours)
    assert ("vllm:lora_requests_info" in ours) is loras


@pytest.mark.parametrize(
    "name",
    ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_success"],
)
def test_buckets_and_reasons_are_those_of_the_capture(name: str) -> None:
    def values(text: str) -> list[str]:
        samples = families(text)[f"vllm:{name}"].samples
        return [sample.labels.get("le") or sample.labels.get("finished_reason", "") for sample in samples]

    assert values(page_after_work().decode()) == values((CAPTURES / "metrics.txt").read_text())


def test_help_type_and_created_lines_are_written_as_the_client_library_does() -> None:
    lines = page_after_work().decode().splitlines()
    assert "# TYPE vllm:prompt_tokens_total counter" in lines
    assert "# TYPE vllm:prompt_tokens_created gauge" in lines
    assert 'vllm:prompt_tokens_created{engine="0",model_name="tiny"} 1.7951755169e+09' in lines
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 3.0' in lines
    assert any(line.startswith("# HELP vllm:kv_cache_usage_perc ") for line in lines)


def test_numbers_tell_what_happened() -> None:
    found = families(page_after_work().decode())

    def value(family: str, sample: str, **labels: str) -> float:
        for candidate in found[f"vllm:{family}"].samples:
            if candidate.name == f"vllm:{sample}" and labels.items() <= candidate.labels.items():
                return candidate.value
        raise AssertionError(sample)

    assert value("prompt_tokens", "prompt_tokens_total") == 600
    assert value("generation_tokens", "generation_tokens_total") == 15
    assert value("prefix_cache_queries", "prefix_cache_queries_total") == 600
    assert value("prefix_cache_hits", "prefix_cache_hits_total") == 2 * 192
    assert value("time_to_first_token_seconds", "time_to_first_token_seconds_count") == 3
    assert value("inter_token_latency_seconds", "inter_token_latency_seconds_count") == 12
    assert value("inter_token_latency_seconds", "inter_token_latency_seconds_bucket", le="+Inf") == 12
    assert value("cache_config_info", "cache_config_info", block_size="16", num_gpu_blocks="25000") == 1


def test_unstreamed_requests_count_all_their_gaps() -> None:
    engine, meter = Engine(profile_for("tiny", "H100")), Meter(started_at_s=0.0)
    request = Request(id="x", arrived_at_s=0.0, max_tokens=9, token_ids=[1], ignore_eos=True, every_token=False)
    engine.submit(request, 0.0)
    while (due := engine.next_step_at()) is not None:
        for emission in engine.step(due):
            meter.observe(emission)
    assert sum(meter.inter_token.counts) == 8
    assert meter.inter_token.total == pytest.approx(8 * engine.profile.step_s, rel=0.05)


def test_stopped_reports_show_an_idle_engine() -> None:
    engine = Engine(profile_for("tiny", "H100"))
    engine.submit(Request(id="x", arrived_at_s=0.0, max_tokens=5, token_ids=[1] * 100), 0.0)
    engine.step(0.0)
    assert Gauges.of(engine).running == 1
    text = render(engine, Meter(started_at_s=0.0), model="m", gauges=Gauges()).decode()
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in text
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.0' in text


def test_lora_series_are_kept_and_bounded() -> None:
    engine, meter = Engine(profile_for("tiny", "H100"), max_loras=200), Meter(started_at_s=0.0, max_loras=200)
    for index in range(MAX_LORA_SERIES + 10):
        name = f"lora{index}"
        engine.submit(Request(id=name, arrived_at_s=0.0, max_tokens=5, token_ids=[1], lora=name), 0.0)
        meter.note_loras(engine, float(index))
    assert len(meter.lora_series) == MAX_LORA_SERIES
    assert min(meter.lora_series.values()) == 10.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0"),
        (2.5, "2.5"),
        (999_999, "999999.0"),
        (1_000_000, "1e+06"),
        (1_073_741_824, "1.073741824e+09"),
        (1.7951755169645944e9, "1.7951755169645944e+09"),
        (0.00006, "6e-05"),
    ],
)
def test_number_format(value: float, text: str) -> None:
    assert number(value) == text
    assert float(text) == value


def test_labels_are_sorted_and_escaped() -> None:
    assert label_set({"b": 'x"y\\', "a": "1\n2"}) == 'a="1\\n2",b="x\\"y\\\\"'


def test_histogram_bounds_are_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 14.0


def test_data_parallel_rank_is_the_engine_label() -> None:
    engine, meter = Engine(profile_for("tiny", "H100")), Meter(started_at_s=0.0)
    text = render(engine, meter, model="m", gauges=Gauges(), rank=3).decode()
    assert 'vllm:num_requests_running{engine="3",model_name="m"} 0.0' in text
    assert 'engine="0"' not in text


def test_sglang_page_has_its_names_labels_and_numbers() -> None:
    engine, meter = Engine(profile_for("tiny", "H100")), Meter(started_at_s=1.0)
    for index in range(2):
        engine.submit(Request(id=str(index), arrived_at_s=0.0, max_tokens=5, token_ids=list(range(200))), 0.0)
        while (due := engine.next_step_at()) is not None:
            for emission in engine.step(due):
                meter.observe(emission)
    engine.submit(Request(id="runs", arrived_at_s=0.0, max_tokens=5, token_ids=list(range(200))), 0.0)
    engine.step(0.0)
    found = families(sglang_page.render(engine, meter, model="m", gauges=Gauges.of(engine), rank=1).decode())
    assert all(name.startswith("sglang:") for name in found)
    samples = {sample.name: sample for family in found.values() for sample in family.samples}
    base = {"model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank", "dp_rank"}
    assert set(samples["sglang:num_running_reqs"].labels) == base
    expected = {
        "num_running_reqs": 1,
        "num_queue_reqs": 0,
        "token_usage": 13 / 25_000,
        "page_size": 16,
        "num_pages": 25_000,
        "max_total_num_tokens": 400_000,
        "prompt_tokens_total": 400,
        "generation_tokens_total": 10,
        "cached_tokens_total": 2 * 192,
        "num_requests_total": 2,
        "time_to_first_token_seconds_count": 2,
    }
    assert {name: samples[f"sglang:{name}"].value for name in expected} == expected
    modes = {sample.labels["mode"]: sample.value for sample in found["sglang:realtime_tokens"].samples}
    assert modes == {"prefill_compute": 400 - 384, "prefill_cache": 384, "decode": 10}
