"""What the fault campaign shares: engines and the gateway in processes of their own, what they tell of themselves, and
the audit that nothing leaked.

All times are seconds of `time.time`, the clock of the gateway's log. It judges nothing about a scenario: tests do.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.integration.test_faults_client import MODEL, PATIENCE_S, Call, Load

POLL_S = 0.02
WAYPOST = Path(sys.executable).with_name("waypost")


# -- processes -----------------------------------------------------------------------------------------------------


class Engine:
    """One simulated engine in a process of its own, on a port that stays ours while it is dead."""

    def __init__(self, index: int, *, accelerator: str = "H100", speed: float = 0.5) -> None:
        self._arguments = ["--model", MODEL, "--accelerator", accelerator, "--speed", str(speed), "--index", str(index)]
        # Bound and not listening: connects are refused and nobody else gets the port.
        self._place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.id = f"127.0.0.1:{self._place.getsockname()[1]}"
        self.url = f"http://{self.id}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process; `ready` waits for it."""
        port = self.id.rpartition(":")[2]
        command = [sys.executable, "-m", "sim", "--port", port, *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def ready(self) -> float:
        """Waits until it listens. Returns when."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith(b"ready ")
        return time.time()

    async def restarted(self) -> float:
        """Starts it again after `kill`. Returns when it listened."""
        self.start()
        return await asyncio.to_thread(self.ready)

    def signal(self, number: signal.Signals) -> float:
        """Sends a signal. Returns when."""
        assert self._process is not None
        self._process.send_signal(number)
        return time.time()

    def kill(self) -> float:
        """SIGKILL. Returns when the process was gone."""
        if self._process is None:
            return time.time()
        self.signal(signal.SIGKILL)
        self._process.wait()
        at = time.time()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
        return at

    @contextlib.contextmanager
    def swallowed(self) -> Iterator[float]:
        """Dead in the way of a lost host: connects are neither accepted nor refused. Gives when that began."""
        self.kill()
        self._place.listen(0)
        with contextlib.ExitStack() as stack:
            # The kernel completes one connection more than the backlog says; then it drops what comes.
            for _ in range(2):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(self._place.getsockname())
            yield time.time()
        self._place.shutdown(socket.SHUT_RDWR)

    async def switch(self, **faults: Any) -> float:
        """Sets fault switches. Returns when they held."""
        await fetch(self.url, "/sim", json.dumps(faults).encode())
        return time.time()

    async def state(self) -> dict[str, Any]:
        """What `/sim` shows."""
        state: dict[str, Any] = json.loads(await fetch(self.url, "/sim"))
        return state

    def close(self) -> None:
        """Ends the process and gives the port back."""
        self.kill()
        self._place.close()


class Gateway:
    """A real `waypost run`, its admin port and its log."""

    def __init__(self, directory: Path, urls: Sequence[str], config: Mapping[str, Any]) -> None:
        # JSON is YAML.
        file = directory / "waypost.yaml"
        file.write_text(json.dumps(config))
        self._log_file = directory / "waypost.log"
        command = [str(WAYPOST), "run", "--config", str(file), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        command += [part for url in urls for part in ("--to", url)]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(command, stderr=log)
        self._read_to = 0
        self.url = self.admin = ""

    def ready(self) -> None:
        """Waits until it listens."""
        deadline = time.time() + 2 * PATIENCE_S
        while not self.url:
            assert self._process.poll() is None, self._log_file.read_text()
            assert time.time() < deadline, self._log_file.read_text()
            time.sleep(POLL_S)
            for line in self.log():
                if line["event"] == "listening":
                    self.url, self.admin = line["gateway"], line["admin"]

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        """All complete log lines from a position on. Fails on a line that is not JSON, such as a traceback."""
        text = self._log_file.read_bytes()[since:]
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines() if line]

    def position(self) -> int:
        """Where the log ends now."""
        return self._log_file.stat().st_size

    async def endpoints(self) -> dict[str, dict[str, Any]]:
        """`/debug/endpoints` by id."""
        rows: list[dict[str, Any]] = json.loads(await fetch(self.admin, "/debug/endpoints"))
        return {row["id"]: row for row in rows}

    async def metrics(self) -> dict[str, float]:
        """The samples of `/metrics`, by name and labels as they are written."""
        return samples((await fetch(self.admin, "/metrics")).decode())

    def resident_bytes(self) -> int:
        """Memory of the process."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    def close(self) -> int:
        """SIGTERM and wait. Returns the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2 * PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()


def samples(page: str) -> dict[str, float]:
    """The samples of a Prometheus page."""
    lines = [line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def fetch(url: str, path: str, body: bytes | None = None) -> bytes:
    """One small exchange on a connection of its own. Fails unless the answer is 200."""
    method = "GET" if body is None else "POST"
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body or b'')}"
            writer.write(head.encode() + b"\r\n\r\n" + (body or b""))
            answer_head = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.read()
        finally:
            writer.close()
    assert answer_head.startswith(b"HTTP/1.1 200 "), (answer_head, answer)
    return answer


@dataclass(slots=True)
class Fleet:
    """Engines behind one gateway."""

    engines: list[Engine]
    gateway: Gateway
    audited_to: int = 0
    calls: list[Call] = field(default_factory=list)

    def load(self, **settings: Any) -> Load:
        """Closed-loop clients whose calls the audit will know."""
        return Load(self.gateway.url, self.calls, **settings)

    async def all_ready(self, *, signals: bool = True) -> float:
        """Waits until every endpoint is in rotation, with figures if `signals`. Returns when."""

        async def ready() -> bool:
            rows = (await self.gateway.endpoints()).values()
            known = all(row["signal_age_s"] is not None for row in rows)
            return all(row["standing"] == "ready" for row in rows) and (known or not signals)

        await until(ready, self.describe)
        return time.time()

    async def describe(self) -> str:
        """For messages of failed tests."""
        keys = ("standing", "reason", "in_flight", "in_flight_tokens", "waiting", "running", "signal_age_s")
        rows = await self.gateway.endpoints()
        return "\n".join(f"{name}: { ({key: row[key] for key in keys}) }" for name, row in rows.items())

    async def heal(self) -> None:
        """Every switch off, everybody in rotation, nothing in flight; what a failed test left is forgotten."""
        for engine in self.engines:
            await engine.switch(reset=True, forget=True)
        await self.emptied()
        await self.all_ready()
        self.calls.clear()
        self.audited_to = self.gateway.position()

    async def emptied(self) -> float:
        """Waits until every counter of requests in flight is 0. Returns when."""

        async def idle() -> bool:
            rows = (await self.gateway.endpoints()).values()
            bodies = (await self.gateway.metrics())["waypost_request_bodies_bytes"]
            return bodies == 0 and not any(row["in_flight"] or row["in_flight_tokens"] for row in rows)

        await until(idle, self.describe)
        return time.time()

    async def audit(self) -> None:
        """Nothing in flight anywhere, one log line per request that tells what its client saw, and no traceback."""
        await self.emptied()
        lines = self.gateway.log(self.audited_to)
        self.audited_to = self.gateway.position()
        told = {line["id"]: line for line in lines if line["event"] == "request"}
        counts = Counter(line["id"] for line in lines if line["event"] == "request")
        assert counts == Counter(call.id for call in self.calls)
        troubles = [line for line in lines if line["level"] == "error"]
        assert not troubles, troubles
        for call in self.calls:
            assert told[call.id]["outcome"] in call.outcomes(), (call, told[call.id])
            assert told[call.id]["status"] == call.status or call.left, (call, told[call.id])
        self.calls.clear()


async def until(holds: Callable[[], Any], describe: Callable[[], Any] | None = None) -> None:
    """Polls a condition, async or not; fails with what `describe` says."""
    deadline = time.time() + PATIENCE_S
    while True:
        held = holds()
        if await held if inspect.isawaitable(held) else held:
            return
        if time.time() > deadline:
            raise AssertionError(f"not within {PATIENCE_S} s: {await describe() if describe is not None else holds}")
        await asyncio.sleep(POLL_S)


@contextlib.contextmanager
def running(
    directory: Path, count: int, config: Mapping[str, Any], *, engine: Mapping[str, Any] | None = None
) -> Iterator[Fleet]:
    """`count` engines and a gateway before them, in rotation."""
    with contextlib.ExitStack() as stack:
        engines = [Engine(index, **(engine or {})) for index in range(count)]
        for each in engines:
            stack.callback(each.close)
            each.start()
        for each in engines:
            each.ready()
        gateway = Gateway(directory, [each.url for each in engines], config)
        stack.callback(gateway.close)
        gateway.ready()
        fleet = Fleet(engines, gateway)
        fleet.audited_to = gateway.position()
        asyncio.run(fleet.all_ready())
        yield fleet
        code, last = gateway.close(), gateway.log()[-5:]
        assert code == 0, (code, last)
        assert any(line["event"] == "stopped" and line["cut"] == 0 for line in last), last


# -- observation ---------------------------------------------------------------------------------------------------


class Watch:
    """Samples the counters of decisions by endpoint while it runs."""

    def __init__(self, gateway: Gateway, *, every_s: float = 0.04) -> None:
        self._gateway = gateway
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        self.samples: list[tuple[float, dict[str, float]]] = []

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            page = await self._gateway.metrics()
            chosen = {name.split('"')[1]: value for name, value in page.items() if name.startswith(_SELECTED)}
            self.samples.append((time.time(), chosen))
            await asyncio.sleep(self._every_s)

    def decisions(self, endpoint_id: str, since: float = 0.0) -> list[tuple[float, int]]:
        """When decisions for an endpoint were seen, and how many: pairs of a sample's time and what it added."""
        steps = zip(self.samples, self.samples[1:], strict=False)
        added = [(at, int(now.get(endpoint_id, 0) - then.get(endpoint_id, 0))) for (_, then), (at, now) in steps]
        return [(at, count) for at, count in added if count and at > since]

    def chosen(self, endpoint_id: str, since: float) -> bool:
        """Whether a decision for an endpoint was seen after `since`."""
        return bool(self.decisions(endpoint_id, since))

    def share(self, endpoint_id: str, since: float, until: float) -> float:
        """The endpoint's share of all decisions seen in a span of time."""
        names = self.samples[-1][1]
        counts = {
            name: sum(count for at, count in self.decisions(name, since) if at <= until)
            for name in (*names, endpoint_id)
        }
        return counts[endpoint_id] / max(1, sum(counts.values()))

    def out_after_s(self, endpoint_id: str, since: float, *, quiet_s: float = 0.8) -> float:
        """Seconds from `since` to the last decision before the first silence of `quiet_s`."""
        last = since
        for at, _ in self.decisions(endpoint_id, since):
            if at - last > quiet_s:
                break
            last = at
        return last - since

    def back_after_s(self, endpoint_id: str, since: float) -> float:
        """Seconds from `since` to the first decision after it."""
        return next((at - since for at, _ in self.decisions(endpoint_id, since)), float("inf"))


_SELECTED = "waypost_endpoint_selected_total{"


def standings(lines: Sequence[Mapping[str, Any]], endpoint_id: str) -> list[tuple[float, str, str]]:
    """When an endpoint's standing changed, to what and why, as the log tells."""
    return [
        (datetime.fromisoformat(line["timestamp"]).timestamp(), line["standing"], line["reason"])
        for line in lines
        if line["event"] == "endpoint_standing" and line["endpoint"] == endpoint_id
    ]


def report(name: str, **figures: object) -> None:
    """Prints measured figures; seen with `-s`."""
    told = ", ".join(
        f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}" for key, value in figures.items()
    )
    print(f"\n[faults] {name}: {told}", end="", flush=True)
