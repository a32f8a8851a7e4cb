"""`python -m bench --quick` as a user runs it: it measures, prints, writes JSON and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def row(figures: dict[str, Any], contender: str, shape: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [
        row for row in figures["rows"] if (row["contender"], row["shape"]) == (contender, shape)
    ]
    assert len(found) == 1
    return found[0]


def test_quick_bench_measures_and_cleans_up(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    # Its temporary files, so that we see whether it removes them. PEERS would make it install things.
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PEERS"} | {"TMPDIR": str(scratch)}

    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--json", str(file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("cores", "waypost run", "direct", "32 KB chat", "SSE"):
        assert expected in done.stdout
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["missing"] == {}
    for shape in ("small", "32KB", "sse"):
        bare, ours = row(figures, "direct", shape), row(figures, "waypost run", shape)
        assert bare["errors"] == ours["errors"] == 0
        assert bare["cpu_s"] is None
        assert ours["cpu_s"]["median"] > 0.01
        assert ours["cpu_ratio"]["median"] == 1
        assert bare["requests_per_s"]["median"] > 0
        assert ours["p50_ms"]["median"] > 0
    # A stream costs more than a request: 200 chunks are relayed one by one.
    assert (
        row(figures, "waypost run", "sse")["cpu_s"]["median"] > row(figures, "waypost run", "small")["cpu_s"]["median"]
    )
    pids = [pid for processes in figures["pids"].values() for pid in processes.values()]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert list(scratch.iterdir()) == []
