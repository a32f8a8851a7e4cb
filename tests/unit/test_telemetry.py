"""Metrics and logs: bounded labels, a page others can parse, lines that are JSON."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_page
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from picker.core.values import InferenceRequest, Signals, Standing
from picker.telemetry import metrics as telemetry
from picker.telemetry.logs import configure
from picker.telemetry.metrics import Metrics
from tests.unit.core.builders import snapshot, state


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value, as the official parser reads our page."""
    page = generate_latest(metrics.registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(page)
        for sample in family.samples
    }


def labels_of(metrics: Metrics, name: str, label: str) -> set[str]:
    return {dict(labels)[label] for found, labels in samples(metrics) if found == name}


# -- metrics -------------------------------------------------------------------------------------------


def test_every_family_has_our_prefix_and_a_description(metrics: Metrics) -> None:
    metrics.watch(lambda: snapshot(state("a", waiting=1.0)))
    families = list(parse(generate_latest(metrics.registry).decode()))
    assert len(families) > 15
    for family in families:
        assert family.name.startswith("waypost_")
        assert family.name.endswith("_created") or family.documentation.endswith(".")


def test_the_page_is_openmetrics_too(metrics: Metrics) -> None:
    metrics.watch(lambda: snapshot(state("a", waiting=1.0)))
    metrics.model("m")[1].count("m", 200)
    page = openmetrics_page(metrics.registry).decode()  # type: ignore[no-untyped-call]
    assert list(parse_openmetrics(page))  # type: ignore[no-untyped-call]


def test_requests_are_counted_by_model_and_code(metrics: Metrics) -> None:
    label, counters = metrics.model("m")
    counters.count(label, 200)
    counters.count(label, 200)
    counters.count(label, 503)
    counters.duration_s.observe(0.2)
    counters.prompt_tokens.inc(7)

    found = samples(metrics)
    assert found["waypost_requests_total", (("code", "200"), ("model", "m"))] == 2
    assert found["waypost_requests_total", (("code", "503"), ("model", "m"))] == 1
    assert found["waypost_tokens_total", (("kind", "prompt"), ("model", "m"))] == 7
    assert found["waypost_request_duration_seconds_count", (("model", "m"),)] == 1


def test_children_are_looked_up_once(metrics: Metrics) -> None:
    assert metrics.model("m")[1] is metrics.model("m")[1]
    assert metrics.model(None)[0] == ""


def test_model_labels_are_bounded(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "MODELS_MAX", 20)
    for number in range(20 + 500):
        label, counters = metrics.model(f"model-{number}")
        counters.count(label, 200)

    found = labels_of(metrics, "waypost_requests_total", "model")
    assert len(found) <= 20 + 1
    assert "other" in found
    assert metrics.model("model-1")[0] == "model-1", "the first ones keep their series"
    assert metrics.model("never seen")[0] == "other"
    assert samples(metrics)["waypost_requests_total", (("code", "200"), ("model", "other"))] == 500


@pytest.mark.parametrize("first", [True, False])
def test_long_model_names_are_others(metrics: Metrics, first: bool) -> None:
    if not first:
        metrics.model("m")
    assert metrics.model("x" * 257)[0] == "other"
    assert metrics.model("y" * 10_000)[1] is metrics.model("z" * 10_000)[1]
    assert len(metrics._models) <= 2


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "new\nline", "ünïcode 🦊", "other", " "])
def test_odd_model_names_survive_the_page(metrics: Metrics, name: str) -> None:
    label, counters = metrics.model(name)
    counters.count(label, 200)
    assert labels_of(metrics, "waypost_requests_total", "model") == {name}


def test_forgetting_endpoints_drops_all_their_series(metrics: Metrics) -> None:
    for name in ("a", "b"):
        metrics.chosen(name)
        metrics.attempts_failed.labels(name, "reset").inc()
        metrics.attempts_failed.labels(name, "connect").inc()
        metrics.standing_changes.labels(name, "out").inc()
        metrics.scrape_errors.labels(name).inc()

    metrics.forget(["a", "never there"])

    endpoints = {dict(labels)["endpoint"] for _, labels in samples(metrics) if "endpoint" in dict(labels)}
    assert endpoints == {"b"}
    metrics.chosen("a")
    assert samples(metrics)["waypost_endpoint_selected_total", (("endpoint", "a"),)] == 1, "it starts anew"


def test_gauges_come_from_the_snapshot_and_no_data_is_no_sample(metrics: Metrics) -> None:
    rows = [
        state("a", waiting=2.0, running=3.0, in_flight=4, in_flight_tokens=50, signals=Signals(at=1.0, kv_usage=0.25)),
        state("b", standing=Standing.OUT),
    ]
    metrics.watch(lambda: snapshot(*rows, now=1.5))

    found = samples(metrics)

    a, b = (("endpoint", "a"),), (("endpoint", "b"),)
    assert found["waypost_endpoint_waiting", a] == 2.0
    assert found["waypost_endpoint_running", a] == 3.0
    assert found["waypost_endpoint_inflight", a] == 4.0
    assert found["waypost_endpoint_inflight_tokens", a] == 50.0
    assert found["waypost_endpoint_kv_usage_ratio", a] == 0.25
    assert found["waypost_signal_age_seconds", a] == 0.5
    assert found["waypost_endpoint_inflight", b] == 0.0
    for name in ("waypost_endpoint_waiting", "waypost_endpoint_kv_usage_ratio", "waypost_signal_age_seconds"):
        assert (name, b) not in found
    assert found["waypost_endpoints", (("standing", "ready"),)] == 1
    assert found["waypost_endpoints", (("standing", "out"),)] == 1
    assert found["waypost_endpoints", (("standing", "degraded"),)] == 0


def test_registries_do_not_share_anything() -> None:
    first, second = Metrics("1"), Metrics("2")
    first.chosen("a")
    assert labels_of(second, "waypost_endpoint_selected_total", "endpoint") == set()
    assert labels_of(second, "waypost_build_info", "version") == {"2"}


# -- logs ----------------------------------------------------------------------------------------------


def test_a_log_line_is_one_json_object() -> None:
    out = io.StringIO()
    log = configure("info", style="json", stream=out)
    log.info("request", id="x\ny", status=200, ttft_ms=1.5, model=None, odd=frozenset({"z"}), text='"\u2028')

    line, rest = out.getvalue().split("\n")
    fields = json.loads(line)
    assert rest == ""
    assert fields["event"] == "request"
    assert fields["level"] == "info"
    assert fields["timestamp"].endswith("Z")
    assert (fields["id"], fields["status"], fields["model"]) == ("x\ny", 200, None)


def test_lines_below_the_level_are_not_written() -> None:
    out = io.StringIO()
    log = configure("warning", style="json", stream=out)
    log.info("request")
    assert out.getvalue() == ""
    log.warning("endpoint_standing")
    assert json.loads(out.getvalue())["event"] == "endpoint_standing"


def test_off_a_terminal_auto_is_json_and_console_is_text() -> None:
    out = io.StringIO()
    configure("info", stream=out).info("request", status=200)
    assert json.loads(out.getvalue())["status"] == 200

    out = io.StringIO()
    configure("info", style="console", stream=out).info("request", status=200)
    assert "request" in out.getvalue()
    assert "status" in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("value", ["\ud800", float("nan"), b"\xff", 2**70, object(), {1: "x"}])
def test_odd_values_never_break_a_line(value: object) -> None:
    out = io.StringIO()
    configure("info", style="json", stream=out).info("request", value=value)
    assert json.loads(out.getvalue())["event"] == "request"


async def test_lines_of_one_turn_are_written_together() -> None:
    out = io.StringIO()
    log = configure("info", style="json", stream=out)
    for number in range(3):
        log.info("request", number=number)
    assert out.getvalue() == ""
    await asyncio.sleep(0)
    assert [json.loads(line)["number"] for line in out.getvalue().splitlines()] == [0, 1, 2]


def test_a_loop_that_ends_early_holds_no_lines_back() -> None:
    out = io.StringIO()
    log = configure("info", style="json", stream=out)
    loop = asyncio.new_event_loop()
    try:
        loop.call_soon(lambda: (log.info("first"), loop.stop()))
        loop.run_forever()
    finally:
        loop.close()
    log.info("second")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["first", "second"]


def test_a_request_has_no_place_for_its_prompt() -> None:
    """All that decisions, metrics and logs can know of it. A new field must not hold what people wrote."""
    assert set(InferenceRequest.__struct_fields__) == {
        "key",
        "id",
        "received_at",
        "path",
        "model",
        "target_model",
        "stream",
        "prompt_tokens",
        "max_output_tokens",
        "session",
        "subset",
        "pool",
        "objective",
        "priority",
        "pinned",
        "tried",
        "strict_model",
        "sees_body",
        "keys",
        "matches",
    }


def test_libraries_are_quiet() -> None:
    out = io.StringIO()
    configure("info", style="json", stream=out)
    logging.getLogger("aiohttp.client").error("something")
    logging.getLogger("uvicorn.error").error("something")
    logging.getLogger("anything").warning("something")
    assert out.getvalue() == ""
