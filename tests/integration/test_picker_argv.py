"""`waypost picker` started as real deployments start the reference endpoint picker: their argument lists, a process, a
cluster, its model servers, TLS. Only paths, ports and what stands in <> are filled in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes.kube_api import FakeKube
from tests.integration.cluster_rig import pod_object, pool_object
from tests.unit.upstream.certificates import Authority

ARGV = Path(__file__).parents[1] / "data" / "argv" / "epp-argv.yaml"
LISTS: dict[str, list[str]] = {name: each["argv"] for name, each in yaml.safe_load(ARGV.read_text()).items()}
LABELS = {"app": "vllm", "llm-d.ai/model": "qwen"}
# Imports, a certificate of its own and a first list take a second or two on a quiet machine.
PATIENCE_S = 30.0
CONFIG = """\
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: max-score-picker}
"""


@dataclass
class Engine:
    """A model server that has been asked for `paths`."""

    port: int = 0
    paths: set[str] = field(default_factory=set)

    async def answer(self, request: web.Request) -> web.Response:
        self.paths.add(request.path)
        if request.path == "/metrics":
            return web.Response(text="vllm:num_requests_waiting 0\nvllm:num_requests_running 0\n")
        return web.json_response({"object": "list", "data": [{"id": "m"}]})


@contextlib.asynccontextmanager
async def engine(tls: ssl.SSLContext | None) -> AsyncIterator[Engine]:
    """One on 127.0.0.1."""
    found = Engine()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        found.port = runner.addresses[0][1]
        yield found
    finally:
        await runner.cleanup()


@dataclass
class Picker:
    """A running picker. `said` is what came before its log."""

    process: asyncio.subprocess.Process
    said: list[str] = field(default_factory=list)
    listening: dict[str, Any] = field(default_factory=dict)

    async def listens(self) -> None:
        """Waits until it does."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            while line := (await self.process.stderr.readline()).decode():
                self.said.append(line)
                if line.startswith("{") and json.loads(line)["event"] == "listening":
                    self.listening = json.loads(line)
                    return
        raise AssertionError(f"ended: {self.said}")

    async def exit_code(self) -> int:
        """Asks it to end, and waits."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            await self.process.stderr.read()
            return await self.process.wait()


@contextlib.asynccontextmanager
async def picker(argv: list[str], kubeconfig: Path) -> AsyncIterator[Picker]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WAYPOST_", "KUBE"))}
    environ |= {"KUBECONFIG": str(kubeconfig), "NAMESPACE": "from-environment"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway.cli", "picker", *argv), stderr=asyncio.subprocess.PIPE, env=environ
    )
    try:
        yield Picker(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def filled_in(argv: list[str], directory: Path, port: int) -> list[str]:
    """The list with paths and ports of this machine."""
    config = directory / "default-plugins.yaml"
    config.write_text(CONFIG)

    def one(arg: str) -> str:
        name, equals, value = arg.rpartition("=")
        if arg.startswith("<"):
            return CONFIG
        if value.endswith(".yaml"):
            return f"{name}{equals}{config}"
        if value.startswith(("/var/run/", "/etc/ssl/")):
            return f"{name}{equals}{directory}"
        return {"9002": "0", "9003": "0", "8000,8001": str(port)}.get(arg, arg)

    # What a list does not say has its usual port, which may be taken here.
    return ["--grpc-port", "0", "--grpc-health-port=0", "--metrics-port", "0", *map(one, argv), "--bind", "127.0.0.1"]


def value_of(argv: list[str], *spelled: str) -> str | None:
    return next((argv[at + 1] for at, arg in enumerate(argv) if arg.lstrip("-") in spelled), None)


def put_pool(kube: FakeKube, argv: list[str], port: int) -> str:
    """The pool a list names, and one pod of it; returns the namespace."""
    namespace = value_of(argv, "pool-namespace", "poolNamespace") or "from-environment"
    name = value_of(argv, "pool-name", "poolName")
    if name is not None:
        kube.put("inferencepools", namespace, pool_object(name, ports=[port], selector={"matchLabels": LABELS}))
    kube.put("pods", namespace, pod_object("vllm-0", "127.0.0.1", labels=LABELS))
    return namespace


async def serving(address: str, service: str) -> str:
    """What the health port says. Asked again, as probes do, when a connection did not come about."""
    asked = health_pb2.HealthCheckRequest(service=service)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                async with grpc.aio.insecure_channel(address) as channel:
                    answer = await health_pb2_grpc.HealthStub(channel).Check(asked, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            else:
                return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def certificate_of(address: str) -> bytes:
    """What a TLS server shows."""
    host, _, port = address.rpartition(":")
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    anybody.set_alpn_protocols(["h2"])
    _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port), ssl=anybody), PATIENCE_S)
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return shown


async def until(holds: Callable[[], bool], picker: Picker) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, picker.said
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", LISTS)
async def test_starts_with_the_arguments_of_real_deployments(name: str, tmp_path: Path) -> None:
    argv = LISTS[name]
    pods = Authority(tmp_path, "pods").server("pod") if "https" in " ".join(argv) else None
    certificate, key = Authority(tmp_path, "ca").issue("picker")
    certificate.rename(tmp_path / "tls.crt")
    key.rename(tmp_path / "tls.key")
    async with engine(pods) as server, FakeKube() as kube:
        namespace = put_pool(kube, argv, server.port)
        given = filled_in(argv, tmp_path, server.port)
        async with picker(given, kube.kubeconfig(tmp_path)) as running:
            await running.listens()
            told = [line for line in running.said if not line.startswith("{")]
            assert all(line.startswith("warning: accepted without effect: ") for line in told), told
            assert running.listening["tls"] is True
            configured = any("onfig" in arg for arg in argv)
            assert running.listening["policy"] == ("endpoint-picker-config" if configured else "balanced")
            for service in ("", "inference-extension", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
                assert await serving(running.listening["health"], service) == "SERVING"
            shown = ssl.DER_cert_to_PEM_cert(await certificate_of(running.listening["grpc"]))
            own = any("ert-path" in arg or "ertPath" in arg for arg in argv)
            assert (shown == (tmp_path / "tls.crt").read_text()) is own
            # The pod was found in its namespace, and is read whether or not anybody signed for it.
            await until(lambda: {"/metrics", "/v1/models"} <= server.paths, running)
            assert any(f"/namespaces/{namespace}/pods" in seen.path for seen in kube.requests)
            async with aiohttp.ClientSession() as client, client.get(running.listening["admin"] + "/metrics") as page:
                assert page.status == 200
            assert await running.exit_code() == 0


@pytest.mark.parametrize("door", ["run", "picker"])
async def test_without_a_cluster_there_is_one_line(door: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    ports = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    if door == "picker":
        ports = ["--bind", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0"]
    command = [str(Path(sys.executable).with_name("waypost")), door, "--pool", "ns/llama", *ports]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), 30.0)
    assert process.returncode == 1
    lines = said.decode().splitlines()
    assert len(lines) == 1, lines
    assert "kubeconfig" in lines[0]
