"""What `waypost picker` refuses: by name, with exit code 2, before anything is opened."""

from __future__ import annotations

import shlex

import pytest

from tests.unit.cli.doors import Doors, waypost

ONE = ("--to", "http://a:1")
GUARD = "the metrics port has no TLS; leave the flag out and guard the port with a NetworkPolicy or a mesh"
GROUPS = "inference.networking.k8s.io or inference.networking.x-k8s.io"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--pool-nme p", "--pool-nme: there is no such flag; did you mean --pool-name?"),
        ("-poolNam=p", "-poolNam: there is no such flag; did you mean --pool-name?"),
        ("--polcy random", "--polcy: there is no such flag; did you mean --policy?"),
        ("--xyzzy", "--xyzzy: there is no such flag"),
        ("--pool-name", "--pool-name: needs a value"),
        ("--pool-name --grpc-port 1", "--pool-name: needs a value"),
        ("--policy -v4", "--policy: needs a value"),
        ("--secure-serving=maybe", "--secure-serving: must be true or false (got 'maybe')"),
        ("--disable-endpoint-subset-filter=yes", "--disable-endpoint-subset-filter: must be true or false (got 'yes')"),
        ("--grpcPort abc", "--grpcPort: must be a whole number (got 'abc')"),
        ("--grpc-port=70000", "--grpc-port: must be at most 65535 (got '70000')"),
        ("--grpc-port -1", "--grpc-port: must be at least 0 (got '-1')"),
        (
            "--drain-timeout -5s",
            "--drain-timeout: must be a duration with a unit, such as 50ms, 2s, 5m or 1h (got '-5s')",
        ),
        (
            "--grpc-max-recv-msg-size=big",
            "--grpc-max-recv-msg-size: must be a size with a unit, such as 64KiB, 10MiB or 4GiB (got 'big')",
        ),
        ("-v loud", "-v: must be a number (got 'loud')"),
        ("--zap-log-level=loud", "--zap-log-level: must be debug, info, error or a number (got 'loud')"),
        ("--zap-encoder=xml", "--zap-encoder: must be one of auto, json, console (got 'xml')"),
        ("--metrics-cert-dir /x", f"--metrics-cert-dir: {GUARD}"),
        ("--metricsClientCAFile=/x", f"--metricsClientCAFile: {GUARD}"),
        ("--pool-name p --pool-group example.com", f"--pool-group: must be {GROUPS} (got 'example.com')"),
        (
            "--pool-name 'A\x1b[31m'",
            "--pool-name: must be NAME or NAMESPACE/NAME, as Kubernetes spells them (got 'A\\x1b[31m')",
        ),
        ("--pool-namespace a/b", "--pool-namespace: must be the name of a Kubernetes namespace (got 'a/b')"),
        (
            "--pool-name=p --endpoint-selector=a=b --endpoint-target-ports=1",
            "--endpoint-selector: cannot be given together with --pool-name: the pool has its own",
        ),
        (
            "--endpoint-selector a=b",
            "--endpoint-selector: needs --endpoint-target-ports too, such as 8000 or 8000,8001",
        ),
        (
            "--endpoint-selector a=b --endpoint-target-ports 0,1",
            "--endpoint-target-ports: must be ports between 1 and 65535, such as 8000,8001 (got '0')",
        ),
        (
            "--endpoint-selector a=b --endpoint-target-ports 1,2,3,4,5 --endpoint-target-ports=6,7,8,9",
            "--endpoint-target-ports: must be at most 8 ports",
        ),
        (
            "--endpoint-selector 'a in (' --endpoint-target-ports 1",
            "--endpoint-selector: not a label selector at `a in (` (got 'a in (')",
        ),
        (
            "--model-server-metrics-scheme ftp --pool-name=p",
            "--model-server-metrics-scheme: must be http or https (got 'ftp')",
        ),
        (
            "--model-server-metrics-port x --pool-name=p",
            "--model-server-metrics-port: must be a port between 1 and 65535 (got 'x')",
        ),
        (
            "--model-server-metrics-path 'x?' --pool-name=p",
            "--pool-name, --model-server-metrics-path: must be a path such as /v1/foo (got 'x?')",
        ),
        ("--config-text a --config-file b", "--config-text: cannot be given together with --config-file"),
        ("--config-file /nowhere.yaml", "/nowhere.yaml: cannot read the file: No such file or directory"),
        ("--config-text 'kind: EndpointPickerConfig'", "--config-text:1:1: apiVersion: is required"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: str, line: str, doors: Doors) -> None:
    result = waypost("picker", *shlex.split(arguments), *ONE)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [line]
    assert doors.called == []


def test_all_that_is_unknown_is_named_at_once(doors: Doors) -> None:
    result = waypost("picker", "--nope", "--grpc-prt=1", *ONE)
    assert (result.exit_code, result.stderr.splitlines()) == (
        2,
        ["--nope: there is no such flag", "--grpc-prt: there is no such flag; did you mean --grpc-port?"],
    )


def test_a_stray_word_is_refused(doors: Doors) -> None:
    result = waypost("picker", "--tracing=false", "stray", *ONE)
    assert result.exit_code == 2
    assert "stray" in result.stderr
    assert doors.called == []
