"""The command line: flags to configuration, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from picker.config import example
from tests.unit.cli.doors import Doors, waypost

ROOT = Path(__file__).parents[3]


def test_verbs_are_listed_in_order() -> None:
    result = waypost("--help")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert [words[0] for words in lines] == ["run", "picker", "sim", "demo", "validate", "config", "version"]


@pytest.mark.parametrize("verb", ["run", "picker", "sim", "demo", "validate", "config", "version"])
def test_every_verb_has_help(verb: str) -> None:
    result = waypost(verb, "--help")
    assert result.exit_code == 0
    assert f"Usage: waypost {verb}" in result.stdout


def test_unknown_verb_and_flag_are_usage_errors() -> None:
    assert waypost("nope").exit_code == 2
    result = waypost("run", "--nope")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_run_hands_flags_over(doors: Doors) -> None:
    result = waypost(
        "run", "--to", "http://a:1", "--to", "http://b:1", "--listen", "127.0.0.1:0", "--admin", "[::1]:0",
        "--policy", "least-loaded", "--log-level", "debug", "--drain-timeout", "5s",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    ((door, loaded),) = doors.called
    config = loaded.config
    assert door == "gateway"
    assert [entry.url for entry in config.endpoints.static] == ["http://a:1", "http://b:1"]
    assert (str(config.listen), str(config.admin.listen)) == ("127.0.0.1:0", "[::1]:0")
    assert (config.policy, config.log.level, config.drain.timeout) == ("least-loaded", "debug", 5.0)
    assert str(loaded.origins["endpoints", "static"]) == "flag --to"
    assert str(loaded.origins["admin", "listen"]) == "flag --admin"


def test_exit_code_is_the_doors(doors: Doors) -> None:
    doors.code = 1
    assert waypost("run", "--to", "http://a:1").exit_code == 1


def test_run_reads_the_file_named_by_the_environment(doors: Doors, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("endpoints: {static: ['http://a:1']}\n")
    result = waypost("run", env={"WAYPOST_CONFIG": str(path), "WAYPOST_POLICY": "random", "WAYPOST_POLICI": "x"})
    assert result.exit_code == 0
    assert result.stderr == "warning: WAYPOST_POLICI: unknown variable, ignored; did you mean WAYPOST_POLICY?\n"
    assert doors.called[0][1].config.policy == "random"


def test_run_without_endpoints_is_refused(doors: Doors) -> None:
    result = waypost("run")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("no endpoints: give --to URL")
    assert doors.called == []


def test_wrong_flags_are_named(doors: Doors) -> None:
    result = waypost("run", "--to", "ftp://a:1", "--admin", "9090", "--policy", "ballanced", "--drain-timeout", "30")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        '--admin: must be HOST:PORT, such as 127.0.0.1:8080 or "[::1]:8080"; '
        "did you mean 127.0.0.1:9090? (got '9090')",
        "--policy: unknown policy; did you mean balanced? (got 'ballanced')",
        "--to: must start with http:// or https:// (got 'ftp://a:1')",
        "--drain-timeout: must be a duration with a unit, such as 50ms, 2s, 5m or 1h; did you mean 30s? (got '30')",
    ]
    assert doors.called == []


def test_sim_and_demo_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, dict[str, Any]]] = []

    def run_cluster(engines: int, port: int, **options: Any) -> int:
        calls.append((engines, port, options))
        if options["accelerator"] == ["nope"]:
            raise ValueError("unknown accelerator 'nope'")
        return 0

    cluster = types.ModuleType("sim.cluster")
    cluster.__dict__["run_cluster"] = run_cluster
    demo = types.ModuleType("gateway.demo")
    demo.__dict__["run_demo"] = lambda: 1
    monkeypatch.setitem(sys.modules, "sim.cluster", cluster)
    monkeypatch.setitem(sys.modules, "gateway.demo", demo)
    result = waypost(
        "sim", "--engines", "2", "--port", "9", "--accelerator", "L40S", "--lora", "x", "--speed", "2", "--seed", "5"
    )
    assert result.exit_code == 0
    options = {"model": "sim-8b", "accelerator": ["L40S"], "speed": 2.0, "seed": 5, "lora": ["x"], "processes": False}
    assert calls == [(2, 9, options)]
    result = waypost("sim", "--accelerator", "nope")
    assert (result.exit_code, result.stderr) == (2, "unknown accelerator 'nope'\n")
    assert waypost("demo").exit_code == 1


def test_sim_refuses_what_cannot_be() -> None:
    assert waypost("sim", "--engines", "0").exit_code == 2
    assert (
        waypost("sim", "--engines", "2", "--port", "65535").stderr == "--port: 2 ports from 65535 up go beyond 65535\n"
    )


FOUR_MISTAKES = """\
listen: 8080
polcy: balanced
timeouts:
  connect: 2
endpoints:
  static:
  - {url: "http://a:8000", engine: vlm}
"""
FOUR_LINES = [
    '1:9: listen: must be HOST:PORT, such as 127.0.0.1:8080 or "[::1]:8080"; did you mean 127.0.0.1:8080? (got 8080)',
    "2:1: polcy: unknown key; did you mean policy?",
    "4:12: timeouts.connect: must be a duration with a unit, such as 50ms, 2s, 5m or 1h; did you mean 2s? (got 2)",
    "7:36: endpoints.static.0.engine: must be one of auto, vllm, sglang, trtllm, triton, nim, none; "
    "did you mean vllm? (got 'vlm')",
]


def test_validate_prints_four_located_errors(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(FOUR_MISTAKES)
    result = waypost("validate", str(path))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [f"{path}:{line}" for line in FOUR_LINES]


def test_validate_as_json(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(FOUR_MISTAKES)
    result = waypost("validate", str(path), "-o", "json")
    report = json.loads(result.stdout)
    assert result.exit_code == 2
    assert report["ok"] is False
    assert [problem["text"] for problem in report["problems"]] == [f"{path}:{line}" for line in FOUR_LINES]
    assert [(problem["line"], problem["column"]) for problem in report["problems"]] == [
        (1, 9),
        (2, 1),
        (4, 12),
        (7, 36),
    ]


def test_validate_accepts(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(example())
    result = waypost("validate", str(path))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ok\n", "")
    result = waypost("validate", str(path), "-o", "json")
    assert json.loads(result.stdout) == {"ok": True, "problems": [], "warnings": []}


def test_validate_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    result = waypost("validate", str(path))
    assert result.exit_code == 2
    assert result.stderr == f"{path}: cannot read the file: No such file or directory\n"


def test_validate_looks_into_the_endpoints_file(tmp_path: Path) -> None:
    path, endpoints = tmp_path / "w.yaml", tmp_path / "endpoints.yaml"
    path.write_text("endpoints: {file: endpoints.yaml}\n")
    result = waypost("validate", str(path))
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    assert result.stderr == f"warning: endpoints.file: {endpoints} does not exist yet\n"
    endpoints.write_text("endpoints: ['http://a:1', b]\n")
    result = waypost("validate", str(path))
    assert result.exit_code == 2
    assert result.stderr == f"{endpoints}:1:27: endpoints.1: must start with http:// or https:// (got 'b')\n"


def test_validate_builds_profiles(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("policy: mine\nprofiles:\n  mine: {scorers: [{name: kv-usage, params: {nope: 1}}]}\n")
    result = waypost("validate", str(path))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{path}:3:10: profiles.mine: scorer `kv-usage`:")
    assert "nope" in line


def test_config_show(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("admin: {token: very-secret-token}\npolicy: random\n")
    args = ("config", "show", "--config", str(path), "--to", "http://a:1")
    result = waypost(*args, env={"WAYPOST_LISTEN": "127.0.0.1:1"})
    assert result.exit_code == 0
    rows = [line.split("  # ") for line in result.stdout.splitlines()]
    origins = {row[0].rstrip(): row[-1] for row in rows}
    assert origins["listen: 127.0.0.1:1"] == "env WAYPOST_LISTEN"
    assert origins["  token: '**********'"] == f"file {path}:1:9"
    assert origins["policy: random"] == f"file {path}:2:1"
    assert origins["  static:"] == "flag --to"
    assert "very-secret-token" not in result.output
    shown = json.loads(waypost(*args, "-o", "json").stdout)
    by_path = {row["path"]: row for row in shown}
    assert by_path["policy"] == {
        "path": "policy",
        "value": "random",
        "origin": {"kind": "file", "where": f"{path}:2:1"},
    }
    assert by_path["admin.token"]["value"] == "**********"


def test_config_schema_and_example(tmp_path: Path) -> None:
    made = json.loads(waypost("config", "schema").stdout)
    assert made["properties"]["policy"]["default"] == "balanced"
    path = tmp_path / "example.yaml"
    path.write_text(waypost("config", "example").stdout)
    assert waypost("validate", str(path)).stdout == "ok\n"


def test_example_profile_names_real_plugins(tmp_path: Path) -> None:
    text = example()
    start = text.index("#profiles:")
    lines = [line.removeprefix("#") for line in text[start:].split("\n\n")[0].splitlines()]
    path = tmp_path / "w.yaml"
    path.write_text("\n".join(["policy: mine", *lines]))
    result = waypost("validate", str(path))
    assert (result.exit_code, result.stderr) == (0, "")


def test_version() -> None:
    assert waypost("version").stdout.startswith("waypost ")
    assert set(json.loads(waypost("version", "-o", "json").stdout)) == {"version", "python"}


def test_a_real_process(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(FOUR_MISTAKES)
    env = {name: value for name, value in os.environ.items() if not name.startswith("WAYPOST_")}
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "validate", str(path)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"{path}:{line}" for line in FOUR_LINES]


def test_version_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom gateway.cli import app\n"
        "assert CliRunner().invoke(app, ['version']).exit_code == 0\n"
        "print([m for m in ('picker', 'aiohttp', 'fastapi', 'grpc', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
