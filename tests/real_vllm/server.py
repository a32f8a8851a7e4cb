"""One real vLLM server: its processes, its port, its page.

Started at low priority in a process group of its own and stopped by process id. It judges nothing: tests do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

MODEL = "tiny"
MAX_MODEL_TOKENS = 8192
BLOCK_TOKENS = 32
# Two together on two busy cores have taken 65 s.
START_WITHIN_S = 300.0
STOP_WITHIN_S = 30.0
PAGE_WITHIN_S = 30.0
POLL_S = 0.2
PRIORITY = 15
ENGINE_PRIORITY = 19

# No compiler, no hub, no reports, no pinning to cores, and all its sockets on loopback. A cache of 1 GiB is plenty.
_ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}
_ARGUMENTS = (
    *("--served-model-name", MODEL, "--host", "127.0.0.1", "--dtype", "bfloat16", "--enforce-eager"),
    *("--max-model-len", str(MAX_MODEL_TOKENS), "--max-num-seqs", "32", "--block-size", str(BLOCK_TOKENS)),
)


class VllmFailed(Exception):
    """vLLM ended or did not get ready; the message has the end of its log."""


class Vllm:
    """A vLLM of the installation in `directory`, with a log at `log` and further flags of `vllm serve`."""

    def __init__(self, directory: Path, log: Path, flags: Sequence[str] = ()) -> None:
        self._directory = directory
        self._log = log
        self._flags = tuple(flags)
        # Bound and not listening: while vLLM is down connects are refused and nobody else gets the port.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = self._place.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self.started_in_s = 0.0
        self.id = f"127.0.0.1:{self._port}"
        self.url = f"http://{self.id}"

    @property
    def model_directory(self) -> Path:
        """Where its model and tokenizer are."""
        return self._directory / "models" / MODEL

    def start(self) -> None:
        """Starts it; `wait` waits until it answers."""
        binaries = self._directory / "venv" / "bin"
        command = [
            "nice",
            "-n",
            str(PRIORITY),
            str(binaries / "vllm"),
            "serve",
            str(self.model_directory),
        ]
        command += [*_ARGUMENTS, "--port", str(self._port), *self._flags]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHON"))}
        environ |= _ENVIRONMENT | {
            "PATH": f"{binaries}:{environ.get('PATH', '')}",
            "VLLM_CACHE_ROOT": str(self._directory / "cache"),
        }
        self._started_at = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )

    def wait(self) -> None:
        """Waits until it answers. Raises VllmFailed if it ends instead, or takes too long."""
        assert self._process is not None
        with httpx.Client(base_url=self.url, trust_env=False, timeout=10) as client:
            while not _healthy(client):
                late = time.monotonic() - self._started_at > START_WITHIN_S
                if late or self._process.poll() is not None:
                    self.stop()
                    raise VllmFailed(f"{'late' if late else 'ended'}:\n{self._log_tail()}")
                time.sleep(POLL_S)
        self.started_in_s = time.monotonic() - self._started_at
        # An engine this small outruns its front end on two cores, which then reads tokens and answers nobody for
        # seconds. Where there is an accelerator the front end is the faster one.
        for pid in self.engine_pids():
            os.setpriority(os.PRIO_PROCESS, pid, ENGINE_PRIORITY)

    @property
    def alive(self) -> bool:
        """Whether its front end and its engine run."""
        return self._process is not None and self._process.poll() is None and len(self.engine_pids()) >= 2

    def engine_pids(self) -> list[int]:
        """The processes behind the front end: the engine core first, then its workers."""
        if self._process is None:
            return []
        found = [(pid, _name(pid)) for pid in _descendants(self._process.pid)]
        cores = [pid for pid, name in found if "EngineCore" in name]
        return cores + [pid for pid, name in found if "Worker" in name]

    def signal_engine(self, number: signal.Signals) -> float:
        """Signals engine core and workers, not the front end. Returns when, by `time.time`."""
        pids = self.engine_pids()
        assert len(pids) >= 2, pids
        for pid in pids:
            os.kill(pid, number)
        return time.time()

    def kill_worker(self) -> float:
        """SIGKILL to the process that holds the model. Returns when, by `time.time`."""
        os.kill(self.engine_pids()[-1], signal.SIGKILL)
        return time.time()

    async def page(self) -> bytes:
        """Its metrics page."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=PAGE_WITHIN_S) as client:
            answer = await client.get("/metrics")
        assert answer.status_code == 200
        return answer.content

    async def figure(self, name: str) -> float:
        """The sum of all series of a metric, by the official parser; 0 where there is none."""
        families = text_string_to_metric_families((await self.page()).decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def stop(self) -> None:
        """Ends all its processes: SIGTERM to the front end, and SIGKILL to what is left of the group after a while."""
        if self._process is None:
            return
        for pid in self.engine_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_WITHIN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Stops it and gives the port back."""
        self.stop()
        self._place.close()

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _descendants(pid: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # It may end while we look.
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in sorted(children.get(waiting.pop(), ())):
            yield child
            waiting.append(child)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
