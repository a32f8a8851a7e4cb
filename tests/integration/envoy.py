"""Runs a real Envoy for a test: `async with RealEnvoy(tmp_path, listeners, picker_address=...) as envoy`.

It owns the process and its files below the given directory, nothing else. The binary comes from the separate
environment `make envoy` installs; without it a test is skipped, or fails where `REQUIRE_ENVOY=1` says so.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import pytest
import yaml

from tests.integration.envoy_config import EnvoyListener, envoy_config

BINARY = Path(__file__).resolve().parents[2] / ".venv-envoy" / "bin" / "envoy"
READY_WITHIN_S = 30.0
STOP_WITHIN_S = 5.0
_POLL_S = 0.01


def envoy_binary() -> Path:
    """Path of Envoy. Skips the test if it is not installed, or fails it if the environment requires Envoy."""
    if os.access(BINARY, os.X_OK):
        return BINARY
    reason = f"no Envoy at {BINARY}; `make envoy` installs it"
    if os.environ.get("REQUIRE_ENVOY") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _written(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


class EnvoyFailed(Exception):
    """Envoy ended or did not get ready; the message has the end of its log."""


class RealEnvoy:
    """One Envoy process on loopback ports of the kernel's choice.

    `picker_address` is `host:port` of the ext-proc server; it need not listen yet, except that a `fail_open` listener
    waits for its first health check. `directory` gets `envoy.yaml` and `envoy.log`. After entering, `started_in_s`
    says how long Envoy took to be ready.
    """

    def __init__(
        self,
        directory: Path,
        listeners: Sequence[EnvoyListener],
        *,
        picker_address: str | None = None,
        picker_tls: bool = False,
        concurrency: int = 1,
        log_level: str = "warning",
    ) -> None:
        self.started_in_s = 0.0
        self._directory = directory
        self._config = envoy_config(listeners, picker_address=picker_address, picker_tls=picker_tls)
        self._arguments = ("--concurrency", str(concurrency), "--log-level", log_level)
        self._process: asyncio.subprocess.Process | None = None
        self._admin = ""
        self._urls: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        binary = envoy_binary()
        config, self._log = self._directory / "envoy.yaml", self._directory / "envoy.log"
        admin_file = self._directory / "envoy.admin"
        admin_file.unlink(missing_ok=True)
        config.write_text(yaml.safe_dump(self._config, sort_keys=False), encoding="utf-8")
        started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(binary),
                *("--config-path", str(config), "--admin-address-path", str(admin_file), "--disable-hot-restart"),
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                await self._wait_until_ready(admin_file)
        except TimeoutError:
            await self.stop()
            raise EnvoyFailed(f"not ready within {READY_WITHIN_S} s:\n{self.log_tail()}") from None
        except BaseException:
            await self.stop()
            raise
        self.started_in_s = time.monotonic() - started
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        """Process id, for measuring. Raises EnvoyFailed before the start."""
        if self._process is None:
            raise EnvoyFailed("not started")
        return self._process.pid

    @property
    def admin_url(self) -> str:
        """`http://host:port` of the admin page."""
        return self._admin

    def url(self, name: str) -> str:
        """`http://host:port` of the listener `name`. Raises KeyError for an unknown one."""
        return self._urls[name]

    def log_tail(self, lines: int = 20) -> str:
        """The last lines Envoy logged."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    async def stats(self, prefix: str = "") -> dict[str, int]:
        """Counters and gauges whose name starts with `prefix`, by full name; histograms are left out.

        Counters of Envoy's worker threads are merged when they are read, so the numbers are current.
        """
        found: dict[str, int] = {}
        for line in (await self._get("/stats")).splitlines():
            name, separator, value = line.partition(": ")
            if separator and name.startswith(prefix) and value.lstrip("-").isdigit():
                found[name] = int(value)
        return found

    async def stat(self, name: str) -> int:
        """One counter or gauge; 0 if Envoy does not have it (yet)."""
        return (await self.stats(name)).get(name, 0)

    async def stop(self) -> None:
        """End the process, at last by force. May be called again."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _wait_until_ready(self, admin_file: Path) -> None:
        while not (address := _written(admin_file)):
            await self._breathe()
        self._admin = f"http://{address}"
        while not self._urls:
            try:
                await self._get("/ready")
                self._urls = await self._listener_urls()
            except aiohttp.ClientError:
                await self._breathe()

    async def _breathe(self) -> None:
        if self._process is not None and self._process.returncode is not None:
            raise EnvoyFailed(f"ended with code {self._process.returncode}:\n{self.log_tail()}")
        await asyncio.sleep(_POLL_S)

    async def _listener_urls(self) -> dict[str, str]:
        urls: dict[str, str] = {}
        for line in (await self._get("/listeners")).splitlines():
            name, _, address = line.partition("::")
            urls[name] = f"http://{address}"
        return urls

    async def _get(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=5)
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
            session.get(self._admin + path) as response,
        ):
            return await response.text()
