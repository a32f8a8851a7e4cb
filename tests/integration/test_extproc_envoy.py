"""The picker behind a real Envoy: every body mode, both cluster kinds, errors, streams, TLS, leaving."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import pytest

from picker.core.ledger import Eviction
from picker.core.updates import Replace
from picker.extproc.settings import ResponsePath, SessionSettings, TlsSettings
from sim.cluster import serve_engines
from sim.frontend import EngineSpec
from sim.profiles import PACED
from tests.integration.envoy_config import BodyMode, ClusterKind, EnvoyListener, Retries
from tests.integration.extproc_envoy_rig import COMPLETIONS, PATIENCE_S, EchoEngine, Site, echo_engines, site

FULL: BodyMode = "FULL_DUPLEX_STREAMED"
BUFFER_BYTES = 4 << 20
# name: request mode, response mode, response trailers
MODES: dict[str, tuple[BodyMode, BodyMode, bool]] = {
    "duplex": (FULL, FULL, True),
    "duplex-none": (FULL, "NONE", True),
    "duplex-plain-none": (FULL, "NONE", False),
    "buffered": ("BUFFERED", "NONE", True),
    "buffered-both": ("BUFFERED", "BUFFERED", False),
    "partial": ("BUFFERED_PARTIAL", "NONE", False),
    "streamed": ("STREAMED", "STREAMED", False),
    "headers": ("NONE", "NONE", True),
}


def listeners(cluster: ClusterKind, engines: list[EchoEngine], **more: object) -> list[EnvoyListener]:
    endpoints = tuple(engine.address for engine in engines) if cluster == "override_host" else ()
    return [
        EnvoyListener(
            name=name,
            request_body_mode=request,
            response_body_mode=response,
            response_trailers=trailers,
            cluster=cluster,
            endpoints=endpoints,
            buffer_bytes=BUFFER_BYTES if "BUFFERED" in request + response else None,
            **more,  # type: ignore[arg-type]
        )
        for name, (request, response, trailers) in MODES.items()
    ]


def completion(size: int = 0, **fields: object) -> bytes:
    """A completion request, padded to `size` bytes with a member nobody reads."""
    body = {"model": "m", "prompt": "hello", "seed": 2**70, **fields}
    padding = max(0, size - len(json.dumps(body)) - len(', "pad": ""'))
    return json.dumps({**body, "pad": "x" * padding} if padding else body).encode()


def error_code(body: bytes) -> str:
    code = json.loads(body)["error"]["code"]
    assert isinstance(code, str)
    return code


@pytest.mark.parametrize("cluster", ["original_dst", "override_host"])
async def test_bodies_of_every_size_in_every_mode(tmp_path: Path, cluster: ClusterKind) -> None:
    async with echo_engines("one", "two") as engines:
        names = {engine.name: engine for engine in engines}
        async with site(tmp_path, [e.url for e in engines], listeners(cluster, engines)) as here:
            for name in MODES:
                for body, path in (
                    (b"1", "/echo"),
                    (completion(), COMPLETIONS),
                    (completion(100_000), COMPLETIONS),
                    (completion(2_000_000), COMPLETIONS),
                ):
                    status, headers, answer = await here.ask(name, path, data=body)
                    assert (status, answer) == (200, body), (name, len(body))
                    seen = names[headers["x-served-by"]].seen[-1]
                    assert seen["x-gateway-destination-endpoint"] == names[headers["x-served-by"]].address
                    assert seen["x-request-id"]
                async with here.client.get(here.envoy.url(name) + "/v1/something") as response:
                    assert response.status == 200
            await here.settled()
            assert {engine.name: bool(engine.seen) for engine in engines} == {"one": True, "two": True}


async def test_events_arrive_one_by_one(tmp_path: Path) -> None:
    async with echo_engines("one", "two") as engines:
        specs = listeners("original_dst", engines)
        async with site(tmp_path, [e.url for e in engines], specs) as here:
            for name in MODES:
                if name == "buffered-both":
                    continue
                async with here.post(name, COMPLETIONS + "?n=8", data=completion(stream=True)) as response:
                    late = []
                    async for line in response.content:
                        if line.startswith(b"data: ") and b"DONE" not in line:
                            late.append(time.monotonic() - float(line.split()[2]))
                # Sent 50 ms apart: an event that waited for the next one would be that late.
                assert len(late) == 8
                assert sorted(late)[4] < 0.05, (name, late)
                assert max(late) < 5 * 0.05, (name, late)


async def test_the_simulated_engine_behind_envoy(tmp_path: Path) -> None:
    specs = [EngineSpec(profile=PACED, model="tiny", index=index) for index in range(2)]
    async with await serve_engines(specs) as running:
        proxies = listeners("original_dst", [])
        async with site(tmp_path, running.urls, proxies) as here:
            for name in ("duplex", "duplex-none", "buffered"):
                body = {"model": "tiny", "prompt": "a b c", "max_tokens": 8, "ignore_eos": True}
                status, _, answer = await here.ask(name, json=body)
                assert status == 200
                assert json.loads(answer)["usage"]["completion_tokens"] == 8
                status, _, answer = await here.ask(name, json={**body, "stream": True})
                assert answer.endswith(b"data: [DONE]\n\n")
                assert answer.count(b"data: ") >= 9
            # An engine's own refusal passes as it is.
            assert (await here.ask("duplex", json={"model": "nobody", "prompt": "x"}))[0] == 404


async def test_refusals_in_every_mode(tmp_path: Path) -> None:
    async with echo_engines("one") as engines:
        specs = listeners("original_dst", engines)
        nobody = listeners("original_dst", engines, subset=("10.9.9.9:1",))
        nobody = [
            EnvoyListener(name=f"nobody-{s.name}", request_body_mode=s.request_body_mode, subset=s.subset)
            for s in nobody
        ]
        async with site(tmp_path, [engines[0].url], [*specs, *nobody]) as here:
            for name in ("duplex", "duplex-none", "buffered", "buffered-both"):
                status, headers, body = await here.ask(name, data=b"no json")
                assert (status, error_code(body)) == (400, "invalid_json"), name
                assert headers["x-request-id"]
                status, _, body = await here.ask(name, data=b'{"prompt": "x"}')
                assert (status, json.loads(body)["error"]["param"]) == (400, "model"), name
                status, _, body = await here.ask(name, "/v1/messages", data=b"no json")
                assert (status, json.loads(body)["type"]) == (400, "error"), name
            for spec in nobody:
                status, headers, body = await here.ask(spec.name, data=completion(100_000))
                assert (status, error_code(body)) == (503, "subset_empty"), spec.name
                assert headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
                assert int(headers["retry-after"]) >= 1
            assert engines[0].seen == []


async def test_no_room_is_429_and_a_long_body_413(tmp_path: Path) -> None:
    async with echo_engines("one") as engines:
        specs = listeners("original_dst", engines)
        async with site(tmp_path, [engines[0].url], specs, max_streams=0) as here:
            for name in MODES:
                status, headers, body = await here.ask(name, data=completion(100_000))
                assert (status, error_code(body)) == (429, "saturated"), name
                assert headers["retry-after-ms"] == "1000"
        async with site(tmp_path, [engines[0].url], specs, session=SessionSettings(max_body_bytes=1000)) as here:
            for name in ("duplex", "duplex-none", "buffered"):
                assert (await here.ask(name, data=completion(2000)))[0] == 413, name
                assert (await here.ask(name, data=completion(500)))[0] == 200, name


@pytest.mark.parametrize("as_list", [True, False])
async def test_subset_hints(tmp_path: Path, as_list: bool) -> None:
    async with echo_engines("one", "two", "three") as engines:
        two = engines[1].address
        subset: str | tuple[str, ...] = (two, "10.0.0.9:1") if as_list else f"{two},10.0.0.9:1"
        specs = listeners("override_host", engines, subset=subset)
        async with site(tmp_path, [e.url for e in engines], specs) as here:
            for name in MODES:
                for _ in range(3):
                    assert (await here.ask(name, data=completion()))[1]["x-served-by"] == "two"


async def test_models_are_rewritten_and_control_headers_removed(tmp_path: Path) -> None:
    steering = {
        "x-llm-d-model-name-rewrite": "target",
        "x-llm-d-inference-objective": "o",
        "x-prefiller-host-port": "h",
    }
    async with echo_engines("one") as engines:
        specs = listeners("original_dst", engines)
        async with site(tmp_path, [engines[0].url], specs) as here:
            for name in ("duplex", "duplex-none", "buffered", "streamed"):
                for size in (0, 200_000):
                    body = completion(size)
                    _, _, answer = await here.ask(name, data=body, headers=steering)
                    # In full duplex the response is seen as a whole too, and gets the name the client knows.
                    expected = body if name == "duplex" else body.replace(b'"m"', b'"target"', 1)
                    assert answer == expected, (name, size)
                    seen = engines[0].seen[-1]
                    assert not set(steering) & set(seen)


async def test_tls_with_the_self_signed_certificate(tmp_path: Path) -> None:
    async with echo_engines("one") as engines:
        specs = listeners("original_dst", engines)
        async with site(tmp_path, [engines[0].url], specs, tls=TlsSettings()) as here:
            for name in MODES:
                assert (await here.ask(name, data=completion(100_000)))[0] == 200, name


async def test_leaving_loses_nothing(tmp_path: Path) -> None:
    """The stream ends with the last reply: an engine that refuses at once is the hard case."""
    async with echo_engines("one") as engines:
        [engine] = engines
        leave = SessionSettings(response_path=ResponsePath.LEAVE)
        async with site(tmp_path, [engine.url], listeners("original_dst", engines), session=leave) as here:
            for name in MODES:
                for size in (0, 2_000_000):
                    body = completion(size)
                    assert (await here.ask(name, data=body))[2] == body, (name, size)
                _, _, answer = await here.ask(name, COMPLETIONS + "?n=4", data=completion(stream=True))
                assert answer.count(b"data: ") == 5, name
            await here.settled()
            assert here.server.open_streams == 0
            engine.status = 400

            body = completion(500)
            for _ in range(20):
                answers = await asyncio.gather(*(here.ask("duplex", data=body) for _ in range(8)))
                assert {(status, answer) for status, _, answer in answers} == {(400, body)}


async def test_observability_mode_decides_nothing(tmp_path: Path) -> None:
    async with echo_engines("one") as engines:
        watched = EnvoyListener(
            name="watched",
            request_body_mode="STREAMED",
            response_body_mode="STREAMED",
            observability=True,
            cluster="override_host",
            endpoints=(engines[0].address,),
        )
        async with site(tmp_path, [engines[0].url], [watched]) as here:
            body = completion(100_000)
            assert (await here.ask("watched", data=body))[2] == body
            assert len(here.runtime.director.decisions) == 0


async def test_a_client_that_leaves(tmp_path: Path) -> None:
    async with echo_engines("one") as engines:
        [engine] = engines
        engine.delay_s = 30.0
        async with site(tmp_path, [engine.url], listeners("original_dst", engines)) as here:
            for name in MODES:
                with pytest.raises(asyncio.TimeoutError):
                    await here.ask(name, data=completion(), timeout=aiohttp.ClientTimeout(total=0.2))
                await asyncio.wait_for(engine.aborted.wait(), PATIENCE_S)
                engine.aborted.clear()
                await here.settled()


async def test_a_hung_request_is_answered_late(tmp_path: Path) -> None:
    async with echo_engines("one") as engines:
        [engine] = engines
        engine.delay_s = 30.0
        async with site(tmp_path, [engine.url], listeners("original_dst", engines)) as here:
            for name in MODES:
                asked = asyncio.create_task(here.ask(name, data=completion()))
                await until(lambda: engine.running == 1)
                evict(here, Eviction.HUNG)
                status, headers, body = await asyncio.wait_for(asked, PATIENCE_S)
                assert (status, error_code(body)) == (503, "upstream_hung"), name
                assert headers["x-should-retry"] == "true"
                await here.settled()
                engine.running = 0
                forgive(here)


async def test_a_dead_endpoint_is_blamed_and_another_one_serves(tmp_path: Path) -> None:
    async with echo_engines("one", "two") as engines:
        async with echo_engines("dead") as [dead]:
            pass
        specs = listeners("original_dst", engines)
        retrying = EnvoyListener(
            name="retrying", cluster="override_host", endpoints=(dead.address, engines[0].address), retries=Retries()
        )
        urls = [dead.url, engines[0].url]
        async with site(tmp_path, urls, [*specs, retrying], session=SessionSettings(fallbacks=0)) as here:
            answers = [(await here.ask("duplex", data=completion()))[0] for _ in range(6)]
            # Whoever was sent to the dead one told us about it, if a scrape had not done so before.
            assert answers.count(503) <= 1
            assert 200 in answers
        with_fallbacks = SessionSettings(fallbacks=1)
        async with site(tmp_path, urls, [retrying], session=with_fallbacks) as here:
            assert [(await here.ask("retrying", data=completion(1000)))[0] for _ in range(4)] == [200] * 4


async def until(condition: object) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def evict(here: Site, reason: Eviction) -> None:
    """What the director's tick does when a pod is declared hung."""
    director = here.runtime.director
    for watcher in tuple(director._watchers.values()):
        watcher(reason)


def forgive(here: Site) -> None:
    """Takes the endpoints out and in again, which forgets what they did."""
    endpoints = here.runtime.datastore.endpoints()
    here.runtime.datastore.apply(Replace("static", ()))
    here.runtime.datastore.apply(Replace("static", endpoints))
