"""The gateway door and what differs between pools: paths, which pool serves, what names mean."""

from __future__ import annotations

import json

import msgspec
import pytest

from picker.admin.explained import explained
from picker.core.rules import Objective, Rewrite, Target
from picker.core.updates import Replace
from tests.integration.gateway_rig import (
    CHAT,
    HELLO,
    JSON,
    MODEL,
    STREAM,
    Gateway,
    Script,
    backend,
    events,
    gateway,
    get,
    says,
)
from tests.unit.upstream.hostile import Hostile, Peer, Received, answer

OK = answer(b'{"ok":true}', JSON)
TWIN = "/openai" + CHAT


def posts(engine: Hostile) -> list[Received]:
    """The clients' requests among what an engine got."""
    return [request for request in engine.received if request.method == "POST"]


def named(name: str) -> Script:
    """An engine that says its name."""
    return says(answer(b'{"name":"%s"}' % name.encode(), JSON))


def put_into_pools(door: Gateway, **pools: str) -> None:
    """What a Kubernetes source would say: the pool of each engine, by its URL."""
    runtime = door.runtime
    pool_of = {url: pool.replace("_", "/") for pool, url in pools.items()}
    runtime.director.pools = tuple(pool_of.values())
    endpoints = [msgspec.structs.replace(each, pool=pool_of[each.url]) for each in runtime.datastore.endpoints()]
    runtime.datastore.apply(Replace("static", tuple(endpoints)))


@pytest.mark.parametrize("asked", [CHAT, TWIN])
@pytest.mark.parametrize(("prefix", "expected"), [("", CHAT), ("/openai", TWIN), ("/a/b", "/a/b" + CHAT)])
async def test_the_path_is_the_endpoints(asked: str, prefix: str, expected: str) -> None:
    async with backend(says(OK)) as engine, gateway({"url": engine.url, "path_prefix": prefix}) as door:
        for query in ("", "?a=/v1/b&c=%2Fv1"):
            got = await door.post(path=asked + query)
            assert (got.status, got.body) == (200, b'{"ok":true}')
            assert posts(engine)[-1].target == expected + query
        # One route, whatever its path was: metrics and logs count them together.
        assert {line["path"] for line in door.lines()} == {CHAT}


async def test_other_paths_have_no_prefix_and_no_twin() -> None:
    async with backend(says(OK)) as engine, gateway({"url": engine.url, "path_prefix": "/openai"}) as door:
        assert (await door.post(b'{"model":"tiny","prompt":"x"}', path="/tokenize")).status == 200
        assert posts(engine)[-1].target == "/tokenize"
        for path in ("/openai/tokenize", "/openai/openai" + CHAT, "/openai/v1/missing"):
            assert (await door.post(path=path)).status == 404
        assert (await door.ask(get(TWIN), method="GET")).status == 405
        assert len(posts(engine)) == 1


async def test_each_attempt_goes_to_its_endpoints_path() -> None:
    async def refuses(peer: Peer, request: Received) -> None:
        await peer.send(answer(b"", status=b"503 Service Unavailable"))

    async with backend(refuses) as one, backend(refuses) as two, backend(refuses) as three:
        prefixes = {one.url: "", two.url: "/openai", three.url: "/a"}
        async with gateway(*({"url": url, "path_prefix": prefix} for url, prefix in prefixes.items())) as door:
            await door.post(path=TWIN)
            assert [[request.target for request in posts(each)] for each in (one, two, three)] == [
                [CHAT],
                [TWIN],
                ["/a" + CHAT],
            ]


async def test_the_gateways_own_pages_have_twins() -> None:
    async with backend(says(OK), models=[MODEL]) as engine, gateway(engine.url) as door:
        for path in ("/v1/models", "/v1/models/tiny", "/v1/models/missing"):
            plain, twin = await door.ask(get(path), method="GET"), await door.ask(get("/openai" + path), method="GET")
            assert (plain.status, plain.body) == (twin.status, twin.body)
        assert (await door.ask(get("/openai/health"), method="GET")).status == 404


async def test_a_pool_serves_what_asks_for_it() -> None:
    async with backend(named("a")) as a, backend(named("b")) as b, gateway(a.url, b.url) as door:
        put_into_pools(door, ns_a=a.url, ns_b=b.url)
        for asked in (b"ns/a", b"a"):
            for _ in range(3):
                assert (await door.post(HELLO, b"X-Waypost-Pool: " + asked)).body == b'{"name":"a"}'
        assert {(await door.post()).body for _ in range(8)} == {b'{"name":"a"}', b'{"name":"b"}'}
        assert all(request.header(b"x-waypost-pool") is None for request in posts(a))


async def test_an_unknown_pool_is_503() -> None:
    async with backend(named("a")) as a, backend(named("b")) as b, gateway(a.url, b.url) as door:
        put_into_pools(door, ns_a=a.url, ns_b=b.url)
        for asked in (b"ns/c", b"c", b"other/a", b"ns/a, ns/b", b"x" * 4000):
            got = await door.post(HELLO, b"x-waypost-pool: " + asked)
            assert (got.status, got.error["code"]) == (503, "pool_not_found")
            assert got.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
            assert int(got.headers["retry-after"]) >= 1
        assert posts(a) == posts(b) == []


async def test_with_one_pool_there_is_nothing_to_choose() -> None:
    async with backend(named("a")) as a, gateway(a.url) as door:
        put_into_pools(door, ns_a=a.url)
        assert (await door.post(HELLO, b"x-waypost-pool: ns/other")).status == 200
        assert posts(a)[0].header(b"x-waypost-pool") is None


@pytest.mark.parametrize(
    ("headers", "objective", "priority"),
    [
        ([], None, 0),
        ([b"x-llm-d-inference-objective: gold"], "gold", 7),
        ([b"X-Gateway-Inference-Objective: gold"], "gold", 7),
        ([b"x-gateway-inference-objective: gold", b"x-llm-d-inference-objective: batch"], "batch", -1),
        ([b"x-llm-d-inference-objective: " + b"x" * 4000], "x" * 512, 0),
    ],
)
async def test_objectives_are_known_to_the_brain_alone(
    headers: list[bytes], objective: str | None, priority: int
) -> None:
    async with backend(named("a")) as a, gateway(a.url) as door:
        gold, batch = Objective(pool="ns/a", name="gold", priority=7), Objective(pool="ns/a", name="batch", priority=-1)
        door.runtime.director.rules.replace("cluster", (gold, batch), ())
        assert (await door.post(HELLO, *headers)).status == 200
        told = explained(door.runtime.director.decisions[-1])
        assert (told["objective"], told["priority"], told["pool"]) == (objective, priority, None)
        assert not [name for name, _ in posts(a)[0].headers if b"objective" in name]


async def test_rewrites_of_the_cluster_are_drawn_and_undone() -> None:
    async def echoes(peer: Peer, request: Received) -> None:
        model = json.loads(request.body)["model"].encode()
        if b'"stream":true' in request.body:
            await peer.send(events(b'data: {"model":"%s"}\n\n' % model, b"data: [DONE]\n\n"))
        else:
            await peer.send(answer(b'{"model":"%s"}' % model, JSON))

    entry = {"models": ["old", "new"]}
    async with backend(echoes) as engine, gateway({"url": engine.url, **entry}) as door:
        split = Rewrite(
            pool="ns/a", name="canary", models=frozenset({MODEL}), targets=(Target("old", 50), Target("new", 50))
        )
        unserved = Rewrite(pool="ns/a", name="later", models=frozenset({"later"}), targets=(Target("missing"),))
        door.runtime.director.rules.replace("cluster", (), (split, unserved))

        for body in [HELLO] * 12 + [STREAM] * 4:
            got = await door.post(body)
            assert got.status == 200
            assert b'"model":"tiny"' in got.body
        asked = [json.loads(request.body)["model"] for request in posts(engine)]
        assert set(asked) == {"old", "new"}
        # What was decided is what was sent.
        assert asked == [decision.request.target_model for decision in door.runtime.director.decisions]
        listed = json.loads((await door.ask(get("/v1/models"), method="GET")).body)["data"]
        assert [card["id"] for card in listed] == ["new", "old", "tiny"]
        assert (await door.post(HELLO.replace(b"tiny", b"later"))).status == 404


async def test_a_rewrite_to_the_same_name_changes_no_byte() -> None:
    body = b'{ "model":"tiny" ,"messages":[{"role":"user","content":"hi"}]}'
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        door.runtime.director.rules.replace("cluster", (), (Rewrite(pool="p", name="r", targets=(Target(MODEL),)),))
        assert (await door.post(body)).status == 200
        assert posts(engine)[0].body == body
        assert door.runtime.director.decisions[-1].request.target_model is None
