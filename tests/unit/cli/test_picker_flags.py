"""The flags of `waypost picker`: every spelling the reference endpoint picker knows, and what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.doors import QUEUE_AND_KV, Doors, waypost

ONE = ("--to", "http://a:1")


def test_picker_hands_flags_over(doors: Doors) -> None:
    result = waypost(
        "picker", "--to", "http://a:1", "--bind", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "7001",
        "--metrics-port", "7002", "--cert-path", "/certs", "--enable-cert-reload", "--response-path", "leave",
        "--policy", "random", "--drain-timeout", "1m30s", "--conformance", "--log-level", "warning",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    section = doors.config.picker
    assert doors.called[0][0] == "picker"
    assert (section.host, section.grpc_port, section.grpc_health_port, section.metrics_port) == (
        "127.0.0.1",
        0,
        7001,
        7002,
    )
    assert (section.cert_path, section.cert_reload, section.response_path) == (Path("/certs"), True, "leave")
    assert (section.conformance, doors.config.drain.timeout) == (True, 90.0)
    assert (doors.config.policy, doors.config.log.level) == ("random", "warning")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], True),
        (["--secure-serving"], True),
        (["--secure-serving=true"], True),
        (["--secure-serving=false"], False),
        (["--secure-serving", "false"], False),
        (["--secure-serving", "False"], False),
        (["--secure-serving=0"], False),
        (["-secure-serving=f"], False),
        (["--secureServing=false"], False),
        (["-secureServing", "false"], False),
        (["--secure-serving="], True),
        (["--secure-serving", ""], True),
        (["--secure-serving=false", "--secure-serving"], True),
        (["--secure-serving", "--policy", "random"], True),
    ],
)
def test_switches(args: list[str], expected: bool, doors: Doors) -> None:
    result = waypost("picker", *args, *ONE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert doors.config.picker.secure_serving is expected


@pytest.mark.parametrize(
    "args",
    [
        ["--grpc-port", "7"],
        ["--grpc-port=7"],
        ["-grpc-port", "7"],
        ["-grpc-port=7"],
        ["--grpcPort", "7"],
        ["-grpcPort=7"],
        ["--grpc-port", "8", "--grpc-port", "7"],
        ["", "--grpc-port", "7", ""],
        ["--grpc-port", "7", "--grpc-port", ""],
    ],
)
def test_values(args: list[str], doors: Doors) -> None:
    result = waypost("picker", *args, *ONE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert doors.config.picker.grpc_port == 7


@pytest.mark.parametrize(
    ("args", "level", "style"),
    [
        (["-v", "4"], "debug", "auto"),
        (["-v=5"], "debug", "auto"),
        (["-v4"], "debug", "auto"),
        (["--v", "10"], "debug", "auto"),
        (["--v=3"], "info", "auto"),
        (["-v", "-1"], "info", "auto"),
        (["-v=5", "--zap-log-level=error"], "error", "auto"),
        (["--zap-log-level", "debug", "-v=1"], "debug", "auto"),
        (["--zap-log-level=5", "--zap-encoder", "json"], "debug", "json"),
        (["--zap-log-level", "info", "-zap-encoder=console"], "info", "console"),
        (["-v=5", "--log-level", "warning", "--zap-encoder=json", "--log-format=console"], "warning", "console"),
    ],
)
def test_logging(args: list[str], level: str, style: str, doors: Doors) -> None:
    result = waypost("picker", *args, *ONE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (doors.config.log.level, doors.config.log.format) == (level, style)


@pytest.mark.parametrize(
    ("args", "path", "expected"),
    [
        (["--drain-timeout=500ms"], "drain.timeout", 0.5),
        (["--drainTimeout", "1.5h"], "drain.timeout", 5400.0),
        (["--drain-timeout", "0s"], "drain.timeout", 0.001),
        (["--refresh-metrics-interval", "1ms"], "scrape.busy_interval", 0.05),
        (["--refreshMetricsInterval=100ms"], "scrape.busy_interval", 0.1),
        (["--refresh-metrics-interval=3s"], "scrape.idle_interval", 3.0),
        (["--refresh-metrics-interval=100ms"], "scrape.idle_interval", 1.0),
        (["--metrics-staleness-threshold", "1m0s"], "scrape.stale_after", 60.0),
        (["--grpc-max-recv-msg-size", "10MiB"], "picker.max_message", 10 * 2**20),
        (["--grpc-max-recv-msg-size=25MB"], "picker.max_message", 25_000_000),
        (["--grpc-max-recv-msg-size=4Mi"], "picker.max_message", 4 * 2**20),
        (["--grpc-max-recv-msg-size=0"], "picker.max_message", 64 * 2**20),
        (["--emit-endpoint-scores"], "picker.emit_scores", True),
        (["--disable-endpoint-subset-filter"], "picker.subset_filter", False),
        (["--disable-endpoint-subset-filter=false"], "picker.subset_filter", True),
        (["--namespace", "own", "--pool-namespace", "theirs"], "kubernetes.namespace", "own"),
        (["--kubeconfig", "/k"], "kubernetes.kubeconfig", Path("/k")),
    ],
)
def test_what_they_set(args: list[str], path: str, expected: object, doors: Doors) -> None:
    result = waypost("picker", *args, *ONE)
    assert (result.exit_code, result.stderr) == (0, "")
    value: Any = doors.config
    for key in path.split("."):
        value = getattr(value, key)
    assert value == expected


def test_what_has_no_effect_is_told_in_one_line(doors: Doors) -> None:
    result = waypost(
        "picker", "--zap-devel", "--zap-stacktrace-level", "error", "--zap-time-encoding=iso8601",
        "--ha-enable-leader-election", "--metrics-endpoint-auth=true", "--tls-min-version", "VersionTLS13",
        "--enable-cert-reload", "--loraInfoMetric=x", "--to", "http://a:1",
    )  # fmt: skip
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: accepted without effect: --zap-devel (see --log-format), --zap-stacktrace-level (errors have their "
        "traces), --zap-time-encoding (times are ISO 8601), --ha-enable-leader-election (all replicas are active), "
        "--metrics-endpoint-auth (metrics are served without authentication), --tls-min-version (TLS 1.2 and 1.3 are "
        "accepted), --loraInfoMetric (engines are recognised, each has its own metrics), --enable-cert-reload (there "
        "is no --cert-path)\n"
    )
    assert doors.config.picker.cert_reload is False


def test_what_asks_for_nothing_is_not_worth_a_word(doors: Doors) -> None:
    result = waypost(
        "picker", "--tracing=false", "--ha-enable-leader-election=false", "--metrics-endpoint-auth", "false",
        "--enable-pprof=0", "--health-checking", "--enable-cert-reload=false",
        "--allow-experimental-plugins=false", *ONE,
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    assert [entry.url for entry in doors.config.endpoints.static] == ["http://a:1"]


def test_short_options_of_ours_still_work(doors: Doors, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("policy: random\n")
    for args in (["-c", str(path)], [f"-c{path}"], ["--config", str(path)], ["-config", str(path)]):
        doors.called.clear()
        result = waypost("picker", *args, *ONE)
        assert (result.exit_code, result.stderr) == (0, ""), args
        assert doors.config.policy == "random"
    assert "--pool-name" in waypost("picker", "-h").stdout


def test_the_scheduling_profile_becomes_the_policy(doors: Doors, tmp_path: Path) -> None:
    path = tmp_path / "plugins.yaml"
    path.write_text(QUEUE_AND_KV)
    for args in (["--config-file", str(path)], [f"-configFile={path}"], ["--configText", QUEUE_AND_KV]):
        doors.called.clear()
        result = waypost("picker", *args, *ONE)
        assert (result.exit_code, result.stderr) == (0, "")
        assert doors.config.policy == "endpoint-picker-config"
        profile = doors.config.profiles["endpoint-picker-config"]
        assert [(s.name, s.weight) for s in profile.scorers] == [("queue-depth", 2.0), ("kv-usage", 3.0)]
    doors.called.clear()
    assert waypost("picker", "--config-file", str(path), "--policy", "random", *ONE).exit_code == 0
    assert doors.config.policy == "random"


def test_a_document_that_starts_with_dashes_is_a_value(doors: Doors) -> None:
    result = waypost("picker", "--config-text", "---\n" + QUEUE_AND_KV, *ONE)
    assert (result.exit_code, result.stderr) == (0, "")
    assert doors.config.policy == "endpoint-picker-config"


def test_parameters_ours_refuse_are_an_error_of_the_file(doors: Doors) -> None:
    text = QUEUE_AND_KV.replace("queue-scorer", "label-selector-filter").replace("weight: 2", "weight: 1").replace(
        "- type: label-selector-filter", "- {type: label-selector-filter, parameters: {matchLabels: {a: 1}}}"
    )  # fmt: skip
    result = waypost("picker", "--config-text", text, *ONE)
    assert result.exit_code == 2
    assert result.stderr.startswith("--config-text: profiles.endpoint-picker-config: filter `label`: ")


def test_config_show_explains_an_argument_list(tmp_path: Path) -> None:
    path = tmp_path / "plugins.yaml"
    path.write_text(QUEUE_AND_KV)
    result = waypost(
        "config", "show", "-poolName", "p", "--grpc-port=7", "--config-file", str(path), "--bind=::1",
        "--drain-timeout=1m", "--log-format=json", "-o", "json",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    origins = {row["path"]: row["origin"]["where"] for row in json.loads(result.stdout) if row["origin"]["where"]}
    assert origins == {
        "policy": "--config-file",
        "profiles.endpoint-picker-config.filters": "--config-file",
        "profiles.endpoint-picker-config.scorers": "--config-file",
        "kubernetes.pools": "-poolName",
        "picker.host": "--bind",
        "picker.grpc_port": "--grpc-port",
        "drain.timeout": "--drain-timeout",
        "log.format": "--log-format",
    }
