"""`python -m bench`, `make bench`: what a request costs through each front door, beside plain Envoy and the peers.

Starts every contender as a user would, drives all of them in turn with the same load, prints tables. Needs about three
minutes; `PEERS=1` adds sglang-router and vllm-router from environments of their own, and needs five.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from rich.console import Console

from bench import table
from bench.contenders import OURS, PEERS, ROOT, Running, Start, backend, direct
from bench.figures import REFERENCE, cpu_ratio, rows
from bench.processes import StartFailed
from bench.rounds import Sample, measure
from bench.shapes import FULL, QUICK, SHAPES, SMALL, Burst

PEER = "sglang-router"
PEER_LIMIT = 2.0
PEERS_SCRIPT = ROOT / "tests" / "install" / "peers.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    starts: Mapping[str, Start]
    bursts: Sequence[Burst]
    rounds: int
    budget_s: float
    json_file: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything that was measured. `missing` says why a contender is not in it."""

    samples: list[Sample]
    missing: dict[str, str]
    versions: dict[str, str]
    pids: dict[str, dict[str, int]]


def options_from(arguments: Sequence[str] | None) -> Options:
    """Ends the process with a message for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    everybody = {**OURS, **PEERS}
    parser.add_argument("--quick", action="store_true", help="one small round of direct and `waypost run`; no figures")
    parser.add_argument(
        "--only", action="append", choices=everybody, metavar="NAME", help="just this contender; repeatable"
    )
    parser.add_argument("--rounds", type=int, help="how many rounds at most [5, with --quick 1]")
    parser.add_argument("--budget-s", type=float, help="begin no fourth round that ends later [180, with peers 300]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there")
    chosen = parser.parse_args(arguments)
    peers = os.environ.get("PEERS", "") not in ("", "0")
    if chosen.only:
        starts = {name: start for name, start in everybody.items() if name in chosen.only}
    elif chosen.quick:
        starts = {REFERENCE: OURS[REFERENCE]}
    else:
        starts = everybody if peers else dict(OURS)
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds: at least 1")
    return Options(
        starts=starts,
        bursts=QUICK if chosen.quick else FULL,
        rounds=chosen.rounds or (1 if chosen.quick else 5),
        budget_s=chosen.budget_s or (300.0 if PEERS.keys() & starts.keys() else 180.0),
        json_file=chosen.json,
    )


async def carry_out(options: Options, console: Console) -> Outcome:
    """Start all contenders, measure, stop them."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    # The programs are in sessions of their own: only we can end them.
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    missing: dict[str, str] = {}
    running: list[Running] = []
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waypost-bench-")))
        behind = await stack.enter_async_context(backend(directory))
        bare = await stack.enter_async_context(direct(behind, directory))
        status = stack.enter_context(console.status("starting"))
        for name, start in options.starts.items():
            try:
                running.append(await stack.enter_async_context(start(behind, directory)))
            except StartFailed as error:
                missing[name] = str(error)
        samples = await measure(
            behind,
            bare,
            running,
            bursts=options.bursts,
            rounds=options.rounds,
            budget_s=options.budget_s,
            progress=status.update,
        )
    return Outcome(
        samples=samples,
        missing=missing,
        versions={"waypost": importlib.metadata.version("waypost")} | _versions(running),
        pids={"backend": {"backend": behind.pid}} | {r.name: dict(r.pids) for r in running},
    )


def _versions(running: Sequence[Running]) -> dict[str, str]:
    return {contender.program: contender.version for contender in running if contender.version}


def machine() -> dict[str, object]:
    """What it runs on. Load average is that of the last 1, 5 and 15 minutes."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": names[0] if names else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def show(outcome: Outcome, options: Options, before: dict[str, object], console: Console) -> None:
    """Print the tables and what is to be said about them."""
    console.print(table.heading(before, outcome.versions))
    rounds = len({sample.round for sample in outcome.samples})
    timed = min((burst.requests for burst in options.bursts if burst.purpose == "latency"), default=0)
    console.print(table.method(rounds, timed))
    for shape in SHAPES:
        connections = max(burst.connections for burst in options.bursts if burst.shape is shape)
        console.print(table.shape_table(shape, rows(outcome.samples, shape), connections=connections))
    loads = [sample.load_average for sample in outcome.samples]
    if loads:
        console.print(f"Load average while measuring: {min(loads):.2f} to {max(loads):.2f}.", highlight=False)
    sentence = table.verdict(cpu_ratio(outcome.samples, SMALL, REFERENCE, PEER), PEER, PEER_LIMIT)
    if sentence:
        console.print(sentence)
    for name, reason in outcome.missing.items():
        console.print(f"not measured: {name}: {reason}", style="red", markup=False)


def written(outcome: Outcome, before: dict[str, object]) -> dict[str, object]:
    """Everything, as JSON values."""
    ratio = cpu_ratio(outcome.samples, SMALL, REFERENCE, PEER)
    return {
        "machine": before,
        "versions": outcome.versions,
        "pids": outcome.pids,
        "missing": outcome.missing,
        "rows": [asdict(row) for shape in SHAPES for row in rows(outcome.samples, shape)],
        "cpu_ratio_to_sglang_router": asdict(ratio) if ratio else None,
        "samples": [asdict(sample) for sample in outcome.samples],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see --help. Returns 1 when something of ours failed or was not measured."""
    options = options_from(arguments)
    console = table.console()
    if PEERS.keys() & options.starts.keys():
        console.print("peers: making sure of their environments")
        if subprocess.run(["sh", str(PEERS_SCRIPT)], check=False, cwd=ROOT).returncode:
            console.print(f"{PEERS_SCRIPT.relative_to(ROOT)} failed; without PEERS=1 there is nothing to install")
            return 1
    before = machine()
    try:
        outcome = uvloop.run(carry_out(options, console))
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("stopped; no figures")
        return 1
    except StartFailed as error:
        console.print(str(error), markup=False)
        return 1
    show(outcome, options, before, console)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(written(outcome, before), indent=1), encoding="utf-8")
    failed = {sample.contender for sample in outcome.samples if sample.errors} | outcome.missing.keys()
    return 1 if failed & OURS.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
