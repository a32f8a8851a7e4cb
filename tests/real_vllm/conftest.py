"""Two real vLLM servers for the whole run and a fresh `waypost run` before them for each test.

The installation is in the directory that `WAYPOST_VLLM_DIR` names, or `.vllm`. Without it the tests are skipped, or
fail where `WAYPOST_REQUIRE_VLLM=1` says so.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fault_rig import Gateway, until
from tests.real_vllm.server import Vllm

ROOT = Path(__file__).resolve().parents[2]
# What one server may hold before it refuses: more than the load of any test but the one about refusals.
QUEUE_LIMIT = 12
FIGURES = pytest.StashKey[list[str]]()

Door = Callable[..., Gateway]
Tell = Callable[..., None]


def installation() -> Path:
    """Where vLLM is installed. Skips the test if it is not, or fails it if the environment requires it."""
    directory = ROOT / os.environ.get("WAYPOST_VLLM_DIR", ".vllm")
    if (directory / "ready").exists():
        return directory
    reason = f"no vLLM in {directory}; `make test-real-vllm` installs it"
    if os.environ.get("WAYPOST_REQUIRE_VLLM") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, tell: Tell) -> Iterator[list[Vllm]]:
    """Two servers, started together. The first refuses what is beyond QUEUE_LIMIT."""
    directory, logs = installation(), tmp_path_factory.mktemp("vllm")
    flags = [("--max-num-queued-reqs", str(QUEUE_LIMIT)), ()]
    made = [Vllm(directory, logs / f"vllm-{index}.log", each) for index, each in enumerate(flags)]
    try:
        for server in made:
            server.start()
        for server in made:
            server.wait()
        tell("vLLM started", seconds=max(server.started_in_s for server in made))
        yield made
    finally:
        for server in made:
            server.close()


@pytest.fixture
def pods(servers: list[Vllm]) -> list[Vllm]:
    """The two servers, both running: one that an earlier test killed is started again."""
    for server in servers:
        if not server.alive:
            server.stop()
            server.start()
            server.wait()
    return servers


@pytest.fixture
def door(pods: list[Vllm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """Starts a real `waypost run` before both servers, with sections of the configuration; ready when both are in
    rotation and their models are known. Ends it after the test, which must leave nothing in flight.
    """
    started: list[Gateway] = []
    # Variables of ours are configuration to it, and those that steer these tests are none that it knows.
    for name in [name for name in os.environ if name.startswith("WAYPOST_")]:
        monkeypatch.delenv(name)

    def start(**config: Any) -> Gateway:
        gateway = Gateway(tmp_path, [pod.url for pod in pods], config)
        started.append(gateway)
        gateway.ready()
        asyncio.run(until(lambda: _in_rotation(gateway)))
        return gateway

    yield start
    codes = [gateway.close() for gateway in started]
    assert codes == [0] * len(started)
    for gateway in started:
        assert not [line for line in gateway.log() if line["level"] == "error"]


async def _in_rotation(gateway: Gateway) -> bool:
    rows: list[Mapping[str, Any]] = list((await gateway.endpoints()).values())
    known = all(row["models"] and row["signal_age_s"] is not None for row in rows)
    return known and all(row["standing"] == "ready" for row in rows)


@pytest.fixture(scope="session")
def tell(pytestconfig: pytest.Config) -> Tell:
    """Keeps measured figures for the end of the run."""
    kept = pytestconfig.stash.setdefault(FIGURES, [])

    def note(what: str, **figures: object) -> None:
        told = [
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        kept.append(f"{what}: {', '.join(told)}")

    return note


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shows the figures."""
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(f"[real vllm] {line}")
