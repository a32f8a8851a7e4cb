"""Every fault switch of the simulated engines, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx
import pytest

from sim.profiles import INSTANT
from tests.integration.sim_rig import (
    ENDLESS,
    HELLO,
    PATIENCE_S,
    engine,
    metrics,
    raw_post,
    send_raw,
    spawned,
    state_where,
    stays_silent,
    switch,
)


async def test_slow_multiplies_step_times() -> None:
    async with engine() as client:

        async def took() -> float:
            begun = time.monotonic()
            await client.post("/v1/chat/completions", json=HELLO)
            return time.monotonic() - begun

        await took()
        await switch(client, slow=10)
        assert await took() > 8 * 0.05 * 0.9
        await switch(client, reset=True)


async def test_hang_all_silences_every_socket_but_the_switch() -> None:
    async with engine() as client:
        get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        old_reader, old_writer = await send_raw(client, get)
        await old_reader.readuntil(b"\r\n\r\n")
        stream = raw_post("/v1/chat/completions", {**ENDLESS, "stream": True})
        busy_reader, busy_writer = await send_raw(client, stream)
        await busy_reader.readuntil(b"data: ")
        assert (await switch(client, hang="all"))["faults"]["hang"] == "all"
        await asyncio.sleep(0.02)
        busy_reader._buffer.clear()  # type: ignore[attr-defined]
        old_writer.write(get)
        new_reader, new_writer = await send_raw(client, raw_post("/v1/chat/completions", HELLO))
        assert await asyncio.gather(*(stays_silent(reader) for reader in (old_reader, busy_reader, new_reader)))
        await switch(client, hang=None)
        for reader in (old_reader, busy_reader, new_reader):
            assert await asyncio.wait_for(reader.read(8), PATIENCE_S)
        for writer in (old_writer, busy_writer, new_writer):
            writer.close()


async def test_hang_engine_looks_healthy_and_makes_no_progress() -> None:
    async with engine() as client:
        stream = raw_post("/v1/chat/completions", {**ENDLESS, "stream": True})
        busy_reader, busy_writer = await send_raw(client, stream)
        await busy_reader.readuntil(b"data: ")
        assert (await metrics(client))["vllm:num_requests_running"] == 1
        await switch(client, hang="engine")
        before = await metrics(client)
        assert (await client.get("/health")).status_code == 200
        assert (before["vllm:num_requests_running"], before["vllm:num_requests_waiting"]) == (0, 0)
        new_reader, new_writer = await send_raw(client, stream)
        head = await asyncio.wait_for(new_reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        assert head.startswith(b"HTTP/1.1 200")
        whole_reader, whole_writer = await send_raw(client, raw_post("/v1/chat/completions", HELLO))
        assert await asyncio.gather(stays_silent(new_reader), stays_silent(whole_reader))
        assert (await metrics(client))["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"]
        await switch(client, hang=None)
        assert b"data: " in await asyncio.wait_for(new_reader.readuntil(b"data: "), PATIENCE_S)
        assert (await asyncio.wait_for(whole_reader.readline(), PATIENCE_S)).startswith(b"HTTP/1.1 200")
        for writer in (busy_writer, new_writer, whole_writer):
            writer.close()


@pytest.mark.parametrize("status", [500, 503])
async def test_error_rate(status: int) -> None:
    async with engine(profile=INSTANT) as client:
        await switch(client, error_rate={str(status): 1.0})
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert answer.status_code == answer.json()["error"]["code"] == status
        assert (await client.get("/health")).status_code == 200
        await switch(client, error_rate={})
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200


@pytest.mark.parametrize("events", [0, 3])
async def test_reset_after_chunks_is_a_real_rst(events: int) -> None:
    async with engine() as client:
        await switch(client, reset_after_chunks=events)
        reader, writer = await send_raw(client, raw_post("/v1/chat/completions", {**ENDLESS, "stream": True}))
        received = bytearray()

        async def read_all() -> None:
            while piece := await reader.read(65_536):
                received.extend(piece)

        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(read_all(), PATIENCE_S)
        assert received.startswith(b"HTTP/1.1 200")
        assert received.count(b"data: ") == events
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await state_where(client, running=0)


async def test_close_before_response_is_an_empty_eof() -> None:
    async with engine() as client:
        await switch(client, close_before_response=True)
        reader, writer = await send_raw(client, raw_post("/v1/chat/completions", HELLO))
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()
        assert (await client.get("/health")).status_code == 200


async def test_stale_and_missing_metrics() -> None:
    async with engine(profile=INSTANT) as client:
        await switch(client, stale_metrics=True)
        before = await metrics(client)
        await client.post("/v1/chat/completions", json=HELLO)
        assert await metrics(client) == before
        await switch(client, stale_metrics=False)
        assert (await metrics(client))["vllm:generation_tokens_total"] == 8
        await switch(client, metrics="off")
        assert (await client.get("/metrics")).status_code == 404


async def test_restart_refuses_then_forgets() -> None:
    async with engine() as client:
        port = client.base_url.port
        await client.post("/v1/chat/completions", json=HELLO)
        response_id = (await client.post("/v1/responses", json={"input": "x", "max_output_tokens": 1})).json()["id"]
        reader, writer = await send_raw(client, raw_post("/v1/chat/completions", {**ENDLESS, "stream": True}))
        await reader.readuntil(b"data: ")
        await switch(client, restart=0.5, slow=2.0)
        rest = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert not rest.endswith(b"0\r\n\r\n"), "cut, not ended"
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                page = await metrics(client)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
        assert page["vllm:prompt_tokens_total"] == 0
        state = await state_where(client, restarts=1, aborted=0, finished=0)
        assert state["faults"]["slow"] == 1.0
        assert state["received"] == 3, "the recorder outlives the engine"
        assert (await client.get(f"/v1/responses/{response_id}")).status_code == 404
        usage = (await client.post("/v1/chat/completions", json=HELLO)).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


async def test_wrong_switch_changes_nothing() -> None:
    async with engine() as client:
        answer = await client.post("/sim", json={"slow": 5, "hagn": "all"})
        assert answer.status_code == 400
        assert "hagn" in answer.json()["error"]
        assert (await client.get("/sim")).json()["faults"]["slow"] == 1.0


async def test_faults_work_on_the_other_event_loop_too() -> None:
    """``python -m sim`` runs on uvloop, the rest of these tests on asyncio's own loop."""
    async with (
        spawned(1, "-m", "sim", "--accelerator", "paced") as (_, urls),
        httpx.AsyncClient(base_url=urls[0], timeout=PATIENCE_S, trust_env=False) as client,
    ):
        await switch(client, reset_after_chunks=2)
        reader, writer = await send_raw(client, raw_post("/v1/chat/completions", {**ENDLESS, "stream": True}))
        assert (await reader.readuntil(b"data: ")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(-1), PATIENCE_S)
        writer.close()
        await switch(client, reset=True, hang="all")
        reader, writer = await send_raw(client, raw_post("/v1/chat/completions", HELLO))
        assert await stays_silent(reader)
        await switch(client, hang=None)
        assert (await asyncio.wait_for(reader.readline(), PATIENCE_S)).startswith(b"HTTP/1.1 200")
        await switch(client, restart=0.1)
        await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/sim")).json()["restarts"] == 1:
                    break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
