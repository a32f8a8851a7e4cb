"""What each engine's page means: names, labels, arithmetic over series, and figures that lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from picker.core.updates import ProbeFailure
from picker.core.values import Lora, Signals
from picker.signals.engine import MAX_ADAPTERS, read
from picker.signals.engines import BUILTIN, identify

DATA = Path(__file__).parents[2] / "data" / "vllm-0.32"


def signals(engine: str, page: str | bytes) -> Signals:
    text = page if isinstance(page, bytes) else page.encode()
    found = read(BUILTIN[engine], text, 7.0)
    assert isinstance(found, Signals)
    return found


def capture(name: str) -> bytes:
    return (DATA / name).read_bytes()


class TestVllm:
    def test_captured_page(self) -> None:
        assert signals("vllm", capture("metrics.txt")) == Signals(
            at=7.0, waiting=0, running=0, kv_usage=0, block_tokens=128, blocks=32768, lora=None, progress_tokens=40
        )

    def test_captured_page_with_stale_lora_series(self) -> None:
        page = capture("metrics-lora.txt")
        found = signals("vllm", page)
        assert found.lora == Lora(frozenset(), frozenset(), 2)
        assert (found.block_tokens, found.blocks) == (32, 300)
        newest_first = page.replace(b"1.795175823258743e+09", b"1.795175821e+09")
        assert signals("vllm", newest_first).lora == Lora(frozenset({"lora1"}), frozenset({"lora1"}), 2)

    def test_captured_page_after_a_failed_transfer(self) -> None:
        found = signals("vllm", capture("metrics-nixl-decode.txt"))
        assert (found.block_tokens, found.blocks, found.progress_tokens) == (32, 131072, 1228)

    def test_data_parallel_ranks_are_one_endpoint(self) -> None:
        page = """\
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1e1
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="capacity"} 7.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="deferred"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1200"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+06
vllm:prompt_tokens_total{engine="1",model_name="m"} 100
vllm:prompt_tokens_created{engine="1",model_name="m"} 1.79e9
vllm:generation_tokens_total{engine="0",model_name="m"} 10
vllm:generation_tokens_total{engine="1",model_name="m"} 1
"""
        assert signals("vllm", page) == Signals(
            at=7.0, waiting=11, running=8, kv_usage=0.5, block_tokens=16, blocks=2200, progress_tokens=1500111
        )

    def test_old_names_are_understood_and_new_ones_win(self) -> None:
        old = "vllm:gpu_cache_usage_perc 0.5\n"
        assert signals("vllm", old).kv_usage == 0.5
        assert signals("vllm", old + "vllm:kv_cache_usage_perc 0.1\n").kv_usage == 0.1

    def test_adapter_lists_have_spaces_and_gaps(self) -> None:
        page = 'vllm:lora_requests_info{max_lora="4",running_lora_adapters=" a , b,,",waiting_lora_adapters="c"} 5\n'
        assert signals("vllm", page).lora == Lora(frozenset("ab"), frozenset("c"), 4)

    def test_adapter_lists_are_bounded_and_nonsense_slots_are_none(self) -> None:
        names = ",".join(str(n) for n in range(2 * MAX_ADAPTERS))
        page = f'vllm:lora_requests_info{{max_lora="-1",running_lora_adapters="{names}"}} 5\n'
        lora = signals("vllm", page).lora
        assert lora is not None
        assert (len(lora.running), lora.slots) == (MAX_ADAPTERS, 0)

    @pytest.mark.parametrize("value", ["NaN", "-1", "0", "+Inf"])
    def test_a_lora_series_without_a_time_does_not_count(self, value: str) -> None:
        page = f'vllm:lora_requests_info{{max_lora="1",running_lora_adapters="a"}} {value}\n'
        assert signals("vllm", page).lora is None

    def test_a_counter_alone_is_no_progress_figure(self) -> None:
        assert signals("vllm", "vllm:prompt_tokens_total 5\n").progress_tokens is None


class TestSglang:
    def test_ranks_priorities_and_copies(self) -> None:
        page = """\
sglang:num_running_reqs{dp_rank="0",model_name="m",priority="",tp_rank="0",moe_ep_rank="0"} 4
sglang:num_running_reqs{dp_rank="0",model_name="m",priority="",tp_rank="1",moe_ep_rank="1"} 4
sglang:num_running_reqs{dp_rank="0",model_name="m",priority="1",tp_rank="0",moe_ep_rank="0"} 3
sglang:num_running_reqs{dp_rank="1",model_name="m",priority="",tp_rank="2",moe_ep_rank="0"} 2
sglang:num_queue_reqs{dp_rank="0",model_name="m",tp_rank="0"} 7
sglang:token_usage{dp_rank="0",tp_rank="0"} 0.2
sglang:token_usage{dp_rank="0",tp_rank="1"} 0.2
sglang:token_usage{dp_rank="1",tp_rank="2"} 0.4
sglang:cache_config_info{page_size="64",num_pages="1000",dp_rank="0",tp_rank="0"} 1
sglang:cache_config_info{page_size="64",num_pages="1000",dp_rank="1",tp_rank="2"} 1
sglang:realtime_tokens_total{dp_rank="0",mode="decode",tp_rank="0"} 100
sglang:realtime_tokens_total{dp_rank="0",mode="decode",tp_rank="1"} 101
sglang:realtime_tokens_total{dp_rank="0",mode="prefill_compute",tp_rank="0"} 50
sglang:realtime_tokens_total{dp_rank="1",mode="decode",tp_rank="2"} 7
sglang:generation_tokens_total{model_name="m"} 90
"""
        found = signals("sglang", page)
        assert (found.running, found.waiting, found.progress_tokens) == (6, 7, 158)
        assert found.kv_usage == pytest.approx(0.3)
        assert (found.block_tokens, found.blocks) == (64, 2000)

    def test_gauges_for_pages_come_before_the_info_series(self) -> None:
        page = 'sglang:page_size 1\nsglang:num_pages 500\nsglang:cache_config_info{page_size="64",num_pages="9"} 1\n'
        found = signals("sglang", page)
        assert (found.block_tokens, found.blocks) == (1, 500)

    def test_counters_of_finished_requests_are_no_progress(self) -> None:
        page = "sglang:prompt_tokens_total 5\nsglang:generation_tokens_total 5\n"
        assert signals("sglang", page).progress_tokens is None

    def test_a_copy_that_is_not_a_number_spoils_the_figure(self) -> None:
        page = 'sglang:num_queue_reqs{tp_rank="0"} NaN\nsglang:num_queue_reqs{tp_rank="1"} 3\n'
        assert signals("sglang", page).waiting is None
        assert signals("sglang", "\n".join(reversed(page.strip().split("\n"))) + "\n").waiting is None


def test_trtllm() -> None:
    page = """\
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 2.0
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 6.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.125
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="m"} 32.0
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="m"} 5000.0
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 99
"""
    assert signals("trtllm", page) == Signals(
        at=7.0, waiting=2, running=6, kv_usage=0.125, block_tokens=32, blocks=5000
    )


def test_triton_with_trtllm() -> None:
    page = """\
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 8
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 4
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.6
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
nv_inference_pending_request_count{model="ensemble",version="1"} 5
nv_inference_exec_count{model="ensemble",version="1"} 500
"""
    assert signals("triton", page) == Signals(at=7.0, waiting=1, running=4, kv_usage=0.6, block_tokens=64, blocks=6239)


def test_triton_alone_has_a_queue_and_no_running_count() -> None:
    page = """\
nv_inference_pending_request_count{model="a",version="1"} 5
nv_inference_pending_request_count{model="b",version="1"} 1
nv_inference_exec_count{model="a",version="1"} 500
"""
    assert signals("triton", page) == Signals(at=7.0, waiting=6)


def test_nim() -> None:
    page = """\
num_requests_running{model_name="meta/llama"} 3.0
num_requests_waiting{model_name="meta/llama"} 1.0
num_request_max{model_name="meta/llama"} 256
gpu_cache_usage_perc{model_name="meta/llama"} 0.0625
prompt_tokens_total{model_name="meta/llama"} 10
generation_tokens_total{model_name="meta/llama"} 20
"""
    assert signals("nim", page) == Signals(at=7.0, waiting=1, running=3, kv_usage=0.0625, progress_tokens=30)


GOOD = {
    "vllm:num_requests_running": "1",
    "vllm:num_requests_waiting": "2",
    "vllm:kv_cache_usage_perc": "0.5",
    "vllm:prompt_tokens_total": "3",
    "vllm:generation_tokens_total": "4",
}


@pytest.mark.parametrize("lie", ["-1", "NaN", "+Inf", "-Inf", "37.0", "1e300"])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("vllm:num_requests_running", "running"),
        ("vllm:num_requests_waiting", "waiting"),
        ("vllm:kv_cache_usage_perc", "kv_usage"),
        ("vllm:prompt_tokens_total", "progress_tokens"),
    ],
)
def test_a_lie_costs_its_own_field_only(name: str, field: str, lie: str) -> None:
    page = "".join(f"{key} {lie if key == name else value}\n" for key, value in GOOD.items())
    found = signals("vllm", page)
    expected = {"running": 1, "waiting": 2, "kv_usage": 0.5, "progress_tokens": 7}
    if lie != "37.0" or field == "kv_usage":
        expected[field] = None  # type: ignore[assignment]
    elif field == "progress_tokens":
        expected[field] = 41
    else:
        expected[field] = 37
    assert {key: getattr(found, key) for key in expected} == expected


def test_one_lying_rank_makes_the_sum_unknown() -> None:
    page = 'vllm:num_requests_waiting{engine="0"} 5\nvllm:num_requests_waiting{engine="1"} NaN\n'
    assert signals("vllm", page).waiting is None


def test_usage_a_hair_above_one_is_full() -> None:
    assert signals("vllm", "vllm:kv_cache_usage_perc 1.0000001\n").kv_usage == 1.0


@pytest.mark.parametrize(
    ("labels", "block_tokens", "blocks"),
    [
        ('block_size="None",num_gpu_blocks="None"', None, None),
        ('block_size="16"', 16, None),
        ('block_size="0",num_gpu_blocks="0"', None, None),
        ('block_size="99999999",num_gpu_blocks="-4"', None, None),
        ('block_size="inf",num_gpu_blocks="nan"', None, None),
    ],
)
def test_info_labels_that_tell_nothing(labels: str, block_tokens: int | None, blocks: int | None) -> None:
    found = signals("vllm", f"vllm:cache_config_info{{{labels}}} 1\n")
    assert (found.block_tokens, found.blocks) == (block_tokens, blocks)


def test_ranks_that_disagree_about_the_block_size_leave_it_unknown() -> None:
    page = 'vllm:cache_config_info{block_size="16"} 1\nvllm:cache_config_info{block_size="32"} 1\n'
    assert signals("vllm", page).block_tokens is None


@pytest.mark.parametrize("page", [b"<html></html>", b'{"a": 1}', b"nope"])
def test_other_answers_are_no_pages(page: bytes) -> None:
    assert read(BUILTIN["vllm"], page, 1.0) is ProbeFailure.PARSE


@pytest.mark.parametrize("page", [b"", b"# HELP x y\n", b"python_info 1\n"])
def test_a_page_without_figures_tells_nothing_but_is_one(page: bytes) -> None:
    assert signals("vllm", page) == Signals(at=7.0)


@pytest.mark.parametrize(
    ("page", "name"),
    [
        (capture("metrics.txt"), "vllm"),
        (b"sglang:num_running_reqs 1\n", "sglang"),
        (b"# HELP x y\ntrtllm_request_success_total 1\n", "trtllm"),
        (b'nv_inference_count{model="a"} 1\n', "triton"),
        (b'nv_inference_count{model="a"} 1\nvllm:num_requests_running 1\n', "vllm"),
        (b"num_requests_running 1\nnum_request_max 4\n", "nim"),
        (b"num_requests_running 1\n", None),
        (b"# HELP vllm:x is not a series\nllamacpp:requests_processing 1\n", None),
        (b"", None),
    ],
)
def test_engines_are_known_by_their_families(page: bytes, name: str | None) -> None:
    found = identify(page)
    assert (found.name if found else None) == name


def test_tables_are_registered_under_their_names() -> None:
    assert list(BUILTIN) == ["vllm", "sglang", "trtllm", "triton", "nim"]
    assert all(name == table.name for name, table in BUILTIN.items())
