"""The page under the reference pickers' names: exactly those names, labels and buckets, and figures that are right."""

from __future__ import annotations

import pytest

from picker.core.events import Outcome, Usage
from picker.core.record import RequestRecord
from picker.telemetry.metrics import Metrics
from picker.telemetry.reference_metrics import error_code
from tests.unit.core.builders import state
from tests.unit.reference_rig import FLOW, MODEL, Rig, pod

M = {"model_name", "target_model_name"}
F = M | {"fairness_id", "priority"}
DURATION = (
    "0.005 0.025 0.05 0.1 0.2 0.4 0.6 0.8 1 1.25 1.5 2 3 4 5 6 8 10 15 20 30 45 60 120 "
    "180 240 300 360 480 600 900 1200 1800 2700 3600"
)
TTFT = DURATION[: DURATION.index("120") + 3]
TOKENS = "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 32778 65536 131072 262144 524288 1.048576e+06"
OUTPUT = TOKENS[: TOKENS.index("8192") + 4]
NTPOT = "0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5 10"
TPOT = "0.0005 0.00205 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.125 0.15 0.2 0.3 0.4 0.5 0.6 0.8 1 2"
SCHEDULER = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1"
ATTEMPT = {"status", "target_model_name", "namespace", "port"}

# Name after the prefix -> type, labels, buckets. Written down from the reference, not from our tables.
EPP = {
    "request_total": ("counter", F, ""),
    "request_error_total": ("counter", F | {"error_code"}, ""),
    "request_duration_seconds": ("histogram", F, DURATION),
    "request_input_tokens": ("histogram", F, TOKENS),
    "request_output_tokens": ("histogram", F, OUTPUT),
    "request_cached_tokens": ("histogram", F, TOKENS),
    "request_running": ("gauge", F, ""),
    "request_ntpot_seconds": ("histogram", F, NTPOT),
    "request_ttft_seconds": ("histogram", F | {"streaming"}, TTFT),
    "request_streaming_tpot_seconds": ("histogram", F, TPOT),
    "average_kv_cache_utilization": ("gauge", {"name"}, ""),
    "average_queue_size": ("gauge", {"name"}, ""),
    "average_running_requests": ("gauge", {"name"}, ""),
    "std_dev_kv_cache_utilization": ("gauge", {"name"}, ""),
    "std_dev_queue_size": ("gauge", {"name"}, ""),
    "std_dev_running_requests": ("gauge", {"name"}, ""),
    "ready_endpoints": ("gauge", {"name"}, ""),
    "per_endpoint_queue_size": ("gauge", {"name", "model_server_endpoint"}, ""),
    "scheduler_e2e_duration_seconds": ("histogram", set[str](), SCHEDULER),
    "scheduler_attempts_total": ("counter", ATTEMPT | {"endpoint_name"}, ""),
    "info": ("gauge", {"commit", "build_ref"}, ""),
}
OLDER = {
    "inference_objective_request_total": ("counter", M | {"priority"}, ""),
    "inference_objective_request_error_total": ("counter", M | {"error_code"}, ""),
    "inference_objective_request_duration_seconds": ("histogram", M, DURATION),
    "inference_objective_input_tokens": ("histogram", M, TOKENS),
    "inference_objective_output_tokens": ("histogram", M, OUTPUT),
    "inference_objective_prompt_cached_tokens": ("histogram", M, TOKENS),
    "inference_objective_running_requests": ("gauge", {"model_name"}, ""),
    "inference_objective_normalized_time_per_output_token_seconds": ("histogram", M, NTPOT),
    "inference_pool_average_kv_cache_utilization": ("gauge", {"name"}, ""),
    "inference_pool_average_queue_size": ("gauge", {"name"}, ""),
    "inference_pool_average_running_requests": ("gauge", {"name"}, ""),
    "inference_pool_ready_pods": ("gauge", {"name"}, ""),
    "inference_pool_per_pod_queue_size": ("gauge", {"name", "model_server_pod"}, ""),
    "inference_extension_scheduler_e2e_duration_seconds": ("histogram", set[str](), SCHEDULER),
    "inference_extension_scheduler_attempts_total": ("counter", ATTEMPT | {"pod_name"}, ""),
    "inference_extension_info": ("gauge", {"commit", "build_ref"}, ""),
}
TABLE: dict[str, tuple[str, set[str], str]] = {**{f"llm_d_epp_{name}": row for name, row in EPP.items()}, **OLDER}


@pytest.fixture
def full() -> Rig:
    """Something in every family."""
    rows = (pod("a", waiting=2, running=4, kv_usage=0.5), pod("b", waiting=4, running=8, kv_usage=0.1))
    rig = Rig(*rows, pools=("ns/p",))
    rig.metrics.decision_s.observe(0.0003)
    usage = Usage(prompt_tokens=100, output_tokens=11, cached_tokens=0)
    rig.finish(duration_s=3.0, first_byte_s=1.0, stream=True, usage=usage)
    rig.finish(status=500, first_byte_s=0.1)
    rig.fly()
    return rig


def test_all_names_types_labels_and_buckets_are_those_of_the_reference(full: Rig) -> None:
    text = full.page
    found = {}
    for family in full.families():
        labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        # The parser reads numbers; what stands on the page is what rules compare.
        first = next((sample for sample in family.samples if sample.name.endswith("_bucket")), None)
        edges: list[str] = []
        if first is not None:
            rest = {key: value for key, value in first.labels.items() if key != "le"}
            edges = [
                sample.labels["le"]
                for sample in family.samples
                if sample.name.endswith("_bucket") and {**sample.labels, "le": ""} == {**rest, "le": ""}
            ]
            assert edges.pop() == "+Inf"
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, labels, " ".join(edges))
        assert family.samples, name
    assert found == TABLE
    assert 'le="32778"' in text
    assert 'le="1"' in text
    assert 'le="1.0"' not in "".join(line for line in text.splitlines() if not line.startswith("waypost_"))


def test_off_means_absent_and_not_asked() -> None:
    metrics = Metrics("1")
    rig = Rig()
    rig.metrics = metrics
    rig.finish()
    assert metrics.reference is None
    assert not list(rig.families())


def test_requests_by_model_target_and_priority() -> None:
    rig = Rig()
    rig.finish()
    rig.finish(priority=-1)
    rig.finish(model="alias", target_model="m", priority=-1)
    rig.finish(model="alias", target_model="m", priority=5, duration_s=0.02)

    assert rig.value("llm_d_epp_request_total", **FLOW) == 1
    assert rig.value("llm_d_epp_request_total", **FLOW | {"priority": "-1"}) == 1
    alias = {"model_name": "alias", "target_model_name": "m"}
    assert rig.value("llm_d_epp_request_total", **alias, fairness_id="default-flow", priority="5") == 1
    assert rig.value("inference_objective_request_total", **alias, priority="-1") == 1
    older = "inference_objective_request_duration_seconds"
    assert rig.value(f"{older}_count", **alias) == 2, "over all priorities"
    assert rig.value(f"{older}_sum", **alias) == pytest.approx(1.02)
    assert rig.value(f"{older}_bucket", **alias, le="0.025") == 1
    assert rig.value(f"{older}_bucket", **alias, le="0.8") == 1
    assert rig.value(f"{older}_bucket", **alias, le="1") == 2, "bounds belong to their bucket"


def test_a_scripted_stream() -> None:
    rig = Rig()
    usage = Usage(prompt_tokens=100, output_tokens=11, cached_tokens=64)
    rig.finish(duration_s=3.0, first_byte_s=1.0, stream=True, usage=usage)

    def observed(name: str, **labels: str) -> float | None:
        assert rig.value(f"{name}_count", **labels) == 1
        return rig.value(f"{name}_sum", **labels)

    assert observed("llm_d_epp_request_duration_seconds", **FLOW) == 3
    assert observed("llm_d_epp_request_ttft_seconds", **FLOW, streaming="true") == 1
    assert observed("llm_d_epp_request_ntpot_seconds", **FLOW) == pytest.approx(3 / 11)
    assert observed("llm_d_epp_request_streaming_tpot_seconds", **FLOW) == pytest.approx(0.2)
    for older, newer, tokens in (
        ("input_tokens", "input_tokens", 100),
        ("output_tokens", "output_tokens", 11),
        ("prompt_cached_tokens", "cached_tokens", 64),
    ):
        assert observed(f"inference_objective_{older}", **MODEL) == tokens
        assert observed(f"llm_d_epp_request_{newer}", **FLOW) == tokens
    assert observed("inference_objective_normalized_time_per_output_token_seconds", **MODEL) == pytest.approx(3 / 11)


def test_what_is_not_known_is_not_observed() -> None:
    rig = Rig()
    rig.finish(usage=None)
    rig.finish(usage=Usage())
    rig.finish(usage=Usage(prompt_tokens=0, output_tokens=0, cached_tokens=0), first_byte_s=0.5)
    rig.finish(usage=Usage(output_tokens=1), first_byte_s=0.5, stream=True)
    rig.finish(outcome=Outcome.CLIENT_GONE, status=200, first_byte_s=0.5, usage=Usage(output_tokens=5), stream=True)
    rig.finish(outcome="left", status=0)

    assert rig.value("llm_d_epp_request_total", **FLOW) == 6
    assert rig.value("llm_d_epp_request_duration_seconds_count", **FLOW) == 4, "of those that ended"
    assert rig.value("llm_d_epp_request_input_tokens_count", **FLOW) is None
    assert rig.value("llm_d_epp_request_output_tokens_count", **FLOW) == 2
    assert rig.value("llm_d_epp_request_cached_tokens_count", **FLOW) == 1
    assert rig.value("llm_d_epp_request_ntpot_seconds_count", **FLOW) == 1
    assert rig.value("llm_d_epp_request_streaming_tpot_seconds_count", **FLOW) is None, "one token has no pace"
    assert rig.value("llm_d_epp_request_ttft_seconds_count", **FLOW, streaming="true") == 2
    assert rig.value("llm_d_epp_request_ttft_seconds_count", **FLOW, streaming="false") == 1
    assert rig.value("llm_d_epp_request_error_total", **FLOW, error_code="Unknown") is None


@pytest.mark.parametrize(
    ("status", "outcome", "endpoint", "code"),
    [
        (200, Outcome.COMPLETED, "a", ""),
        (0, Outcome.COMPLETED, "a", ""),
        (0, "left", "a", ""),
        (302, Outcome.COMPLETED, "a", ""),
        (400, Outcome.COMPLETED, "a", "ModelServerError"),
        (429, Outcome.COMPLETED, "a", "ModelServerError"),
        (500, Outcome.COMPLETED, "a", "ModelServerError"),
        (502, Outcome.FAILED, "a", "ModelServerError"),
        (200, Outcome.FAILED, "a", "ModelServerError"),
        (504, Outcome.TIMEOUT, "a", "ModelServerError"),
        (0, Outcome.CLIENT_GONE, "a", ""),
        (0, Outcome.CLIENT_GONE, None, ""),
        (400, Outcome.REJECTED, "a", "BadRequest"),
        (400, Outcome.REJECTED, None, "BadRequest"),
        (401, Outcome.REJECTED, None, "Unauthorized"),
        (403, Outcome.REJECTED, None, "Forbidden"),
        (404, Outcome.REJECTED, None, "NotFound"),
        (408, Outcome.REJECTED, None, "BadRequest"),
        (412, Outcome.REJECTED, None, "PreconditionFailed"),
        (413, Outcome.REJECTED, None, "BadRequest"),
        (429, Outcome.REJECTED, None, "ResourceExhausted"),
        (500, Outcome.FAILED, None, "Internal"),
        (503, Outcome.REJECTED, None, "ServiceUnavailable"),
        (503, Outcome.TIMEOUT, None, "ServiceUnavailable"),
        (505, Outcome.REJECTED, None, "Unknown"),
        (0, Outcome.REJECTED, None, "Unknown"),
        (200, Outcome.COMPLETED, None, ""),
    ],
)
def test_error_codes(status: int, outcome: str, endpoint: str | None, code: str) -> None:
    record = RequestRecord(id="r", path="/", status=status, outcome=outcome, duration_s=1, endpoint=endpoint)
    assert error_code(record) == code


def test_errors_of_both_families() -> None:
    rig = Rig()
    rig.finish()
    rig.finish(status=503, outcome=Outcome.REJECTED, endpoint=None)
    rig.finish(status=503, outcome=Outcome.REJECTED, endpoint=None, priority=3)
    assert rig.value("llm_d_epp_request_error_total", **FLOW, error_code="ServiceUnavailable") == 1
    assert rig.value("inference_objective_request_error_total", **MODEL, error_code="ServiceUnavailable") == 2
    assert rig.value("llm_d_epp_request_total", **FLOW) == 1, "nobody was chosen for the others"


def test_requests_in_flight_run_and_count() -> None:
    rig = Rig(state("a", models=frozenset({"m"})), state("b"))
    flight = rig.fly()
    rig.fly(priority=2)
    rig.fly(left=True)
    assert rig.value("inference_objective_running_requests", model_name="m") == 3
    assert rig.value("llm_d_epp_request_running", **FLOW) == 2
    assert rig.value("llm_d_epp_request_total", **FLOW) == 1, "one that was left was recorded then"
    assert rig.value("llm_d_epp_request_running", **FLOW | {"priority": "2"}) == 1

    rig.flights = [flight]
    rig.finish()
    rig.flights = []
    for _ in range(2):
        assert rig.value("inference_objective_running_requests", model_name="m") == 0, "zero, not absent"
    assert rig.value("llm_d_epp_request_running", **FLOW) == 0


def test_counters_never_go_back() -> None:
    rig = Rig(state("a", models=frozenset({"m"})), state("b", models=frozenset({"m"})))
    place = {"target_model_name": "m", "namespace": "", "status": "success"}

    def counts() -> list[float | None]:
        name = "llm_d_epp_scheduler_attempts_total"
        ports = {"a": rig.rows[0].endpoint.url.rsplit(":", 1)[1], "b": rig.rows[1].endpoint.url.rsplit(":", 1)[1]}
        return [rig.value("llm_d_epp_request_total", **FLOW)] + [
            rig.value(name, **place, endpoint_name=pod, port=ports[pod]) for pod in "ab"
        ]

    rig.fly(endpoint="a")
    assert counts() == [1, 1, None]
    rig.flights = []
    rig.fly(endpoint="b")
    assert counts() == [1, 1, 1], "it moved to another endpoint"
    rig.flights = []
    assert counts() == [1, 1, 1], "released, not yet recorded"
    rig.finish(endpoint="b")
    assert counts() == [1, 1, 1]
    rig.finish(endpoint="b")
    assert counts() == [2, 1, 2]


def test_attempts_of_endpoints_that_are_gone_are_forgotten() -> None:
    endpoint = {"pool": "ns/p", "pod": "pod-a", "url": "http://10.0.0.1:8000", "rank": 1}
    rig = Rig(state("a", endpoint=endpoint))
    rig.finish()
    rig.finish(endpoint="long gone")
    labels = {"status": "success", "target_model_name": "m", "namespace": "ns", "port": "8000"}
    assert rig.value("llm_d_epp_scheduler_attempts_total", **labels, endpoint_name="pod-a") == 1
    assert rig.value("inference_extension_scheduler_attempts_total", **labels, pod_name="pod-a") == 1
    assert "long gone" not in rig.page
    rig.rows = ()
    assert "pod-a" not in rig.page
    assert rig.metrics.reference is not None
    assert not rig.metrics.reference._attempts


def test_failed_scheduling_is_counted_by_the_decisions() -> None:
    rig = Rig()
    rig.metrics.rejections.labels("no_endpoints").inc()
    rig.metrics.rejections.labels("saturated").inc(2)
    nobody = {"target_model_name": "", "namespace": "", "port": ""}
    assert rig.value("llm_d_epp_scheduler_attempts_total", status="failure", **nobody, endpoint_name="") == 3
    assert rig.value("inference_extension_scheduler_attempts_total", status="failure", **nobody, pod_name="") == 3


def test_scheduler_durations_are_our_own() -> None:
    rig = Rig()
    for seconds in (0.00003, 0.00015, 0.015, 0.04, 5.0):
        rig.metrics.decision_s.observe(seconds)
    for prefix in ("llm_d_epp", "inference_extension"):
        name = f"{prefix}_scheduler_e2e_duration_seconds"
        for edge, count in (("0.0001", 1), ("0.0002", 2), ("0.01", 2), ("0.02", 3), ("0.05", 4), ("0.1", 4)):
            assert rig.value(f"{name}_bucket", le=edge) == count
        assert rig.value(f"{name}_count") == 5
        assert rig.value(f"{name}_sum") == pytest.approx(5.05518)


def test_info() -> None:
    assert Rig().value("inference_extension_info", commit="", build_ref="waypost-1.2.3") == 1
