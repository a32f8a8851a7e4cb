"""Something else than an API server at the other end, byte by byte; and a plugin that never answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from picker.sources.kubernetes import access
from picker.sources.kubernetes.access import NoCluster
from picker.sources.kubernetes.failure import ApiFailure
from tests.fakes.kube_mirror import PODS, connected

HEAD = b"HTTP/1.1 200 OK\r\n"
JSON = HEAD + b"Content-Type: application/json\r\n"
STRANGERS = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "TLS": bytes.fromhex("150301000202280a0d0a0d0a"),
    "half a head": HEAD + b"Content-",
    "a head without end": HEAD + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "half a body": JSON + b"Content-Length: 1000\r\n\r\n{}",
    "half a chunk": JSON + b"Transfer-Encoding: chunked\r\n\r\n100\r\n{}",
    "chunks that are none": JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "gzip that is none": JSON + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n" + b"x" * 20,
}


@asynccontextmanager
async def stranger(answer: bytes) -> AsyncIterator[str]:
    """A server that sends the same bytes to everybody and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def config_for(url: str, directory: Path, user: str = "{}") -> Path:
    path = directory / "kubeconfig"
    path.write_text(
        "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], "
        f"clusters: [{{name: k, cluster: {{server: '{url}'}}}}], users: [{{name: u, user: {user}}}]}}"
    )
    return path


@pytest.mark.parametrize("answer", STRANGERS.values(), ids=STRANGERS.keys())
async def test_other_answers_are_failures(answer: bytes, tmp_path: Path) -> None:
    async with stranger(answer) as url, connected(config_for(url, tmp_path)) as api, asyncio.timeout(20):
        got = await api.get(PODS, {}, timeout_s=5)
        *lines, last = [line async for line in api.watch(PODS, {"watch": "1"}, timeout_s=5, idle_s=5)]
    for failure in (got, last):
        assert isinstance(failure, ApiFailure)
        assert failure.status == 0
        assert "\n" not in failure.message
        assert len(failure.message) <= 300
    assert all(line == b"" for line in lines)


async def test_nobody_answers(tmp_path: Path) -> None:
    hold = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, connected(config_for(url, tmp_path)) as api, asyncio.timeout(20):
        assert await api.get(PODS, {}, timeout_s=0.1) == ApiFailure(0, "the API server did not answer in time")
        lines = [line async for line in api.watch(PODS, {}, timeout_s=5, idle_s=0.1)]
        assert lines == [ApiFailure(0, "the API server did not answer in time")]
        hold.set()


async def test_a_plugin_that_waits_for_somebody_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "PLUGIN_TIMEOUT_S", 0.2)
    started = tmp_path / "started"
    command = tmp_path / "plugin"
    # It answers in the end, as when somebody comes back to the browser it opened.
    command.write_text(
        f"#!/bin/sh\necho $$ >> {started}\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.02; done\n"
        """echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"t"}}'\n"""
    )
    command.chmod(0o755)
    user = f"{{exec: {{apiVersion: client.authentication.k8s.io/v1, command: {command}}}}}"
    loader = access.AccessLoader(
        kubeconfig=config_for("http://127.0.0.1:1", tmp_path, user),
        context=None,
        service_account=tmp_path,
        environ={},
        clock=asyncio.get_running_loop().time,
    )
    for _ in range(3):
        with pytest.raises(NoCluster, match="no credentials within"):
            await loader.load()
    assert len(started.read_text().split()) == 1
    (tmp_path / "go").touch()
    monkeypatch.setattr(access, "PLUGIN_TIMEOUT_S", 10)
    assert (await loader.load()).authorization == "Bearer t"
    await loader.close()
