"""The picker door behind a real Envoy: what endpoints want of a request arrives, and conformance tests get theirs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from picker.core.rules import Rewrite, Target
from picker.core.updates import Replace
from picker.extproc.settings import SessionSettings
from tests.integration.envoy_config import EnvoyListener
from tests.integration.extproc_envoy_rig import COMPLETIONS, EchoEngine, Site, echo_engines, site

BODY = b'{"model": "m", "prompt": "hello"}'
SELECTION = "test-epp-endpoint-selection"
SERVED = "x-conformance-test-served-endpoint"
# In every mode a decision is answered on another message.
LISTENERS = [
    EnvoyListener(name="duplex", response_body_mode="FULL_DUPLEX_STREAMED"),
    EnvoyListener(name="buffered", request_body_mode="BUFFERED"),
    EnvoyListener(name="partial", request_body_mode="BUFFERED_PARTIAL"),
    EnvoyListener(name="streamed", request_body_mode="STREAMED", response_body_mode="STREAMED"),
    EnvoyListener(name="headers", request_body_mode="NONE"),
]
MODES = [listener.name for listener in LISTENERS]
ON = SessionSettings(conformance=True)


async def test_prefix_and_key_arrive_and_go_no_further(tmp_path: Path) -> None:
    client = {"authorization": "Bearer client"}
    async with echo_engines("plain", "special") as [plain, special]:
        entries: list[str | dict[str, str]] = [
            plain.url,
            {"url": special.url, "path_prefix": "/openai", "credentials": "main"},
        ]
        secrets = {"main": {"api_key": "s3cret"}}
        async with site(tmp_path, entries, LISTENERS, credentials=secrets, session=ON) as here:
            for name in MODES:
                for asked in (COMPLETIONS, "/openai" + COMPLETIONS):
                    for engine, path, key in (
                        (plain, COMPLETIONS, "Bearer client"),
                        (special, "/openai" + COMPLETIONS, "Bearer s3cret"),
                    ):
                        headers = {**client, SELECTION: engine.address}
                        status, told, answer = await here.ask(name, asked + "?a=/v1/b", data=BODY, headers=headers)
                        assert (status, answer) == (200, BODY), (name, asked)
                        assert engine.paths[-1] == path + "?a=/v1/b", (name, asked)
                        assert engine.seen[-1]["authorization"] == key, name
                        assert "authorization" not in told
            # A path of nobody's API stays.
            await here.ask("duplex", "/primary-gateway-test", data=BODY, headers={SELECTION: special.address})
            assert special.paths[-1] == "/primary-gateway-test"
            # Its models were listed below the prefix.
            served = {state.endpoint.id: state.models for state in here.runtime.director.snapshot().states}
            assert set(served.values()) == {frozenset({"m"})}


async def test_a_conformance_test_chooses_and_sees_who_served(tmp_path: Path) -> None:
    async with echo_engines("one", "two", "three") as engines:
        one, two, _ = engines
        unrestricted = [*LISTENERS, EnvoyListener(name="subset", subset=(two.address,))]
        async with site(tmp_path, [engine.url for engine in engines], unrestricted, session=ON) as here:
            for name in MODES:
                for engine in engines:
                    status, told, _ = await here.ask(name, data=BODY, headers={SELECTION: engine.address})
                    assert (status, told["x-served-by"], told[SERVED]) == (200, engine.name, engine.address), name
                    assert SELECTION not in engine.seen[-1]
                    assert engine.seen[-1]["x-echo-set-header"] == f"{SERVED}:{engine.address}"
            both = f"{one.address}, {two.address},10.9.9.9"
            assert await served_by(here, 40, both) == {"one", "two"}
            assert await served_by(here, 40, "127.0.0.1") == {"one", "two", "three"}
            assert await served_by(here, 40, None) == {"one", "two", "three"}
            assert (await here.ask("duplex", data=BODY, headers={SELECTION: "10.9.9.9"}))[0] == 503
            # What the proxy allows is not widened.
            assert (await here.ask("subset", data=BODY, headers={SELECTION: both}))[1]["x-served-by"] == "two"
            assert (await here.ask("subset", data=BODY, headers={SELECTION: one.address}))[0] == 503
            # As the tests of gateways with two pools do: a request without a body.
            async with here.client.get(here.envoy.url("duplex") + "/x", headers={SELECTION: two.address}) as response:
                assert (response.status, response.headers[SERVED]) == (200, two.address)


async def served_by(here: Site, count: int, selection: str | None) -> set[str]:
    headers = {} if selection is None else {SELECTION: selection}
    return {(await here.ask("duplex", data=BODY, headers=headers))[1]["x-served-by"] for _ in range(count)}


async def test_without_the_setting_nobody_chooses(tmp_path: Path) -> None:
    async with (
        echo_engines("one", "two") as engines,
        site(tmp_path, [engine.url for engine in engines], LISTENERS[:1]) as here,
    ):
        told = [(await here.ask("duplex", data=BODY, headers={SELECTION: engines[0].address}))[1] for _ in range(8)]
        assert {each["x-served-by"] for each in told} == {"one", "two"}
        assert not [each for each in told if SERVED in each]
        assert not [seen for engine in engines for seen in engine.seen if SELECTION in seen]


@asynccontextmanager
async def two_pools(directory: Path, engines: Sequence[EchoEngine]) -> AsyncIterator[Site]:
    """Engines `a` and `b` in pools of the same names, and listeners that say so."""
    listeners = [EnvoyListener(name="any"), *(EnvoyListener(name=name, pool=f"ns/{name}") for name in "abc")]
    async with site(directory, [engine.url for engine in engines], listeners) as here:
        pools = {engine.address: f"ns/{engine.name}" for engine in engines}
        here.runtime.director.pools = tuple(pools.values())
        known = here.runtime.datastore.endpoints()
        placed = [msgspec.structs.replace(each, pool=pools[each.address]) for each in known]
        here.runtime.datastore.apply(Replace("static", tuple(placed)))
        yield here


async def test_the_route_names_the_pool(tmp_path: Path) -> None:
    async with echo_engines("a", "b") as engines, two_pools(tmp_path, engines) as here:
        for _ in range(4):
            for name in "ab":
                assert (await here.ask(name, data=BODY))[1]["x-served-by"] == name
                # The route knows better than the client.
                assert (await here.ask(name, data=BODY, headers={"x-waypost-pool": "a"}))[1]["x-served-by"] == name
                assert (await here.ask("any", data=BODY, headers={"x-waypost-pool": name}))[1]["x-served-by"] == name
        status, told, body = await here.ask("c", data=BODY)
        assert (status, json.loads(body)["error"]["code"]) == (503, "pool_not_found")
        assert told["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert not [seen for engine in engines for seen in engine.seen if "x-waypost-pool" in seen]


@pytest.mark.parametrize("mode", ["duplex", "buffered", "streamed"])
async def test_a_rewrite_of_the_cluster_reaches_the_body_at_once(tmp_path: Path, mode: str) -> None:
    async with echo_engines("one") as engines, site(tmp_path, [engines[0].url], LISTENERS) as here:
        assert (await here.ask(mode, data=BODY))[2] == BODY
        rewrite = Rewrite(pool="ns/a", name="r", models=frozenset({"m"}), targets=(Target("real"),))
        here.runtime.director.rules.replace("cluster", (), (rewrite,))
        answer = (await here.ask(mode, data=BODY))[2]
        # In full duplex the answer is given back under the client's name; in the other modes we do not see it.
        assert json.loads(answer)["model"] == ("m" if mode == "duplex" else "real")
