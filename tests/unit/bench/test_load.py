"""The load generator against the canned backend, both in this process, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.backend import Backend, canned
from bench.cpu import cpu_seconds, process_tree
from bench.load import Plan, chat_body, run, summary


@asynccontextmanager
async def listening(protocol: Callable[[], asyncio.Protocol]) -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def backend() -> asyncio.Protocol:
    return Backend(canned(chunks=20), interval_s=0.001)


async def test_counts_requests_without_the_warmup() -> None:
    body = chat_body(size=2_000, stream=False)
    async with listening(backend) as url:
        report = await run(Plan(url=f"{url}/v1/chat/completions", body=body, connections=4, requests=50, warmup=9))

    assert (report.requests, report.errors, report.statuses) == (50, 0, {"200": 50})
    assert report.body_bytes % 50 == 0
    assert report.events == 0
    assert 0 < report.latency_ms["p50"] <= report.latency_ms["p99"] <= report.latency_ms["max"]
    assert report.first_byte_ms["mean"] <= report.latency_ms["mean"]


async def test_counts_the_events_of_streams() -> None:
    body = chat_body(size=0, stream=True)
    async with listening(backend) as url:
        report = await run(Plan(url=f"{url}/v1/chat/completions", body=body, connections=3, requests=6))

    assert report.requests == 6
    assert report.events == 6 * 21  # the last of the 20 chunks carries [DONE] as well
    assert report.first_byte_ms["p50"] < report.latency_ms["p50"]
    assert report.latency_ms["p50"] > 15


async def test_a_run_by_time_ends() -> None:
    async with listening(backend) as url:
        report = await run(Plan(url=url, body=b"{}", connections=2, seconds=0.2, watch=(os.getpid(),)))

    assert report.requests > 10
    assert 0.15 < report.seconds < 1.0
    assert report.cpu_s[str(os.getpid())] > 0


async def test_pages_of_the_backend() -> None:
    async with listening(backend) as url:
        for path, status in {
            "/v1/models": 200,
            "/version?x=1": 200,
            "/health": 200,
            "/metrics": 200,
            "/no": 404,
        }.items():
            report = await run(Plan(url=url + path, body=b"", method="GET", requests=1))
            assert report.statuses == {str(status): 1}, path


class Cut(asyncio.Protocol):
    """Answers `head` to every read and closes."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._head)
        self._transport.close()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", "closed"),
        (b"", "closed"),
        (b"nonsense\r\n\r\n", "malformed"),
    ],
)
async def test_incomplete_answers_are_errors(head: bytes, kind: str) -> None:
    async with listening(lambda: Cut(head)) as url:
        report = await run(Plan(url=url, body=b"{}", connections=2, requests=4))

    assert (report.requests, report.errors, report.error_kinds) == (0, 4, {kind: 4})


async def test_a_connection_the_server_closes_is_opened_again() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
    async with listening(lambda: Cut(answer)) as url:
        report = await run(Plan(url=url, body=b"{}", connections=2, requests=6))

    assert (report.requests, report.errors) == (6, 0)


async def test_a_silent_server_times_out() -> None:
    async with listening(asyncio.Protocol) as url:
        report = await run(Plan(url=url, body=b"{}", requests=1, timeout_s=0.1))
        late = await run(Plan(url=url, body=b"{}", requests=1, deadline_s=0.1))

    assert report.error_kinds == {"timeout": 1}
    assert late.error_kinds == {"deadline": 1}


async def test_a_dead_server_ends_the_run() -> None:
    async with listening(asyncio.Protocol) as url:
        pass

    assert (await run(Plan(url=url, body=b"", requests=5))).error_kinds == {"connect": 5}


def test_a_chat_body_has_the_size_asked_for() -> None:
    for size in (200, 1_000, 32_768):
        body = chat_body(size=size, stream=True)
        assert abs(len(body) - size) < 30
        assert json.loads(body)["stream"] is True


def test_summary_is_by_nearest_rank() -> None:
    assert summary([]) == {}
    assert summary([3.0, 1.0, 2.0, 4.0]) == {"p50": 3.0, "p90": 4.0, "p99": 4.0, "max": 4.0, "mean": 2.5}


def test_cpu_of_a_tree_includes_the_children() -> None:
    burn = "sum(i for i in range(3_000_000))"
    child = f"import time; {burn}; print('burnt', flush=True); time.sleep(30)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"burnt\n"
            tree = process_tree(process.pid)
            assert len(tree) == 2
            assert cpu_seconds(process.pid) > cpu_seconds(tree[1]) > 0.02
        finally:
            for pid in reversed(process_tree(process.pid)):
                os.kill(pid, 9)


def test_cpu_of_this_process_is_what_the_clock_says() -> None:
    sum(range(1_000_000))

    assert cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.2)


def test_no_process_no_figure() -> None:
    with pytest.raises(ProcessLookupError):
        cpu_seconds(2**22 + 1)
