"""The table of the reference's flags, and taking lists of arguments apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.config import Config, go_values, load
from picker.config.fields import annotation_at
from picker.config.pool_flags import pool_values
from picker.config.reference_arguments import read_flags
from picker.config.reference_flags import FLAGS, Kind, settings

OWN = {"config": True, "c": True, "policy": True, "help": False, "h": False, "endpoint-selector": True}

# The options of llm-d-router at v0.10.0 but for the two that are the command's own, of the lightweight picker, of the
# older releases KServe 0.16 starts, and the logging flags they all have.
REFERENCE = """
grpc-port grpc-health-port pool-name pool-namespace pool-group disable-endpoint-subset-filter emit-endpoint-scores
refresh-metrics-interval refresh-prometheus-metrics-interval metrics-staleness-threshold ha-enable-leader-election
drain-timeout v zap-log-level zap-encoder zap-devel zap-stacktrace-level zap-time-encoding metrics-port
metrics-endpoint-auth metrics-cert-dir metrics-client-ca-file enable-pprof tracing health-checking secure-serving
cert-path enable-cert-reload tls-min-version tls-cipher-suites grpc-max-recv-msg-size grpc-max-send-msg-size
enable-grpc-stream-metrics config-file config-text allow-experimental-plugins total-queued-requests-metric
total-running-requests-metric kv-cache-usage-percentage-metric lora-info-metric cache-info-metric
model-server-metrics-scheme model-server-metrics-port model-server-metrics-path
model-server-metrics-https-insecure-skip-verify
"""


def test_every_flag_of_the_reference_is_known() -> None:
    assert set(REFERENCE.split()) <= set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_means_one_thing(name: str) -> None:
    flag = FLAGS[name]
    assert sum(map(bool, (flag.path, flag.ignored, flag.refused))) <= 1
    assert flag.path == "" or annotation_at(Config, tuple(flag.path.split("."))) is not None
    assert flag.quiet is None or (flag.ignored and flag.kind is Kind.SWITCH)


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "v"])
def test_each_flag_is_known_however_it_is_spelled(name: str) -> None:
    head, *tail = name.split("-")
    camel = head + "".join(part.capitalize() for part in tail)
    shouted = head + "".join(part.upper() if part in ("ca", "https", "tls") else part.capitalize() for part in tail)
    for spelled in (f"--{name}", f"-{name}", f"--{camel}", f"-{camel}", f"--{shouted}"):
        for args in ([f"{spelled}=true"], [spelled, "true"], [spelled, "true", ""]):
            reading = read_flags(args, OWN)
            assert (reading.rest, reading.said.problems) == ([], [])
            assert {flag: (one.value, one.spelled) for flag, one in reading.given.items()} == {name: ("true", spelled)}


def test_what_is_the_commands_own_stays() -> None:
    args = ["-policy", "x", "--endpointSelector=a=b", "-c", "f", "-cf", "--help", "-v4", "--", "--pool-name", "p"]
    reading = read_flags(args, OWN)
    assert reading.rest == [
        "--policy=x", "--endpoint-selector=a=b", "-c", "f", "-cf", "--help", "--", "--pool-name", "p",
    ]  # fmt: skip
    assert list(reading.given) == ["v"]


def test_a_value_may_look_like_anything_but_a_flag() -> None:
    args = ["--config-text", "--- {a: b}", "--pool-name", "-x", "--cert-path", "a=b", "-v", "-1"]
    reading = read_flags(args, OWN)
    assert reading.said.problems == []
    values = {name: one.value for name, one in reading.given.items()}
    assert values == {"config-text": "--- {a: b}", "pool-name": "-x", "cert-path": "a=b", "v": "-1"}


WORDS = st.one_of(
    st.sampled_from([f"--{name}" for name in (*FLAGS, *OWN)]),
    st.sampled_from(["", "-", "--", "-v", "-v4", "true", "false", "a=b", "--=", "-=", "--config-text={", "0s", "1"]),
    st.text(max_size=8),
    st.text(max_size=8).map("--".__add__),
)


@given(st.lists(WORDS, max_size=8))
def test_no_list_of_arguments_is_a_crash(args: list[str]) -> None:
    reading = read_flags(args, OWN)
    said = settings(reading.given, configured=False)
    said.add(pool_values(["p"], None, args, reading.given))
    loaded = load(None, environ={}, flags=said.values, flag_names=said.names)
    assert isinstance(loaded, list) or loaded.config
    for line in (*map(str, said.problems), *said.warnings, *map(str, reading.said.problems)):
        assert line.isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30s", 30.0),
        ("1m30s", 90.0),
        ("+1h0m0.5s", 3600.5),
        ("500ms", 0.5),
        ("250us", 0.00025),
        ("2µs", 0.000002),
        ("1ns", 1e-9),
        (".5s", 0.5),
        ("5.s", 5.0),
        ("0", 0.0),
        ("30", None),
        ("-5s", None),
        ("1d", None),
        ("s", None),
        ("", None),
        ("1m 30s", None),
        ("1s\n", None),
        ("9" * 400 + "h", None),
    ],
)
def test_durations_of_go(text: str, expected: float | None) -> None:
    got = go_values.seconds(text)
    assert got is None if expected is None else got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10MiB", 10 * 2**20),
        ("25MB", 25_000_000),
        ("4Mi", 4 * 2**20),
        ("1.5Gi", 3 * 2**29),
        ("64k", 64_000),
        (" 1048576 ", 2**20),
        ("7b", 7),
        ("-1Mi", None),
        ("Mi", None),
        ("1e400", None),
        ("٣Mi", None),
        ("9" * 30, None),
    ],
)
def test_quantities_of_bytes(text: str, expected: int | None) -> None:
    assert go_values.size_bytes(text) == expected


def test_words_of_go_for_true_and_false() -> None:
    assert [go_values.switch(word) for word in ("1", "t", "TRUE", "True", "true")] == [True] * 5
    assert [go_values.switch(word) for word in ("0", "F", "False", "false")] == [False] * 4
    assert [go_values.switch(word) for word in ("", "yes", "tRue", "2")] == [None] * 4
