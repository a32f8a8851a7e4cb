"""Replicas with a real Redis see each other's loads, and only those of replicas that live."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from picker.signals.shared import loads
from picker.signals.shared.formats import pack_rows, pack_vector
from tests.integration.redis_rig import (
    PATIENCE_S,
    PREFIX,
    QUICK,
    SEEN_S,
    RedisServer,
    Replica,
    load,
    redis_server,
    settled,
    until,
)


@pytest.fixture(scope="module")
def one_server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
async def server(one_server: RedisServer) -> RedisServer:
    async with one_server.client() as client:
        await client.flushall()
    return one_server


async def test_a_load_is_seen_by_the_other_within_a_few_cycles(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two:
        await settled(one, two)

        one.own = {"a": load(3, 1000, 200)}
        took_s = await until(lambda: two.loads == {"a": load(3, 1000, 200)}, "a load", within_s=SEEN_S)
        assert one.loads == {}
        assert took_s < SEEN_S

        one.own = {}
        await until(lambda: two.loads == {}, "its end", within_s=SEEN_S)


async def test_three_replicas_get_the_sum_of_the_others(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two, Replica(server.url) as three:
        await settled(one, two, three)
        one.own = {"a": load(1, 10, 1)}
        two.own = {"a": load(2, 20, 2), "b": load(5, 50, 5)}
        three.own = {"b": load(4, 40, 4), "nobody knows it": load(9)}

        await until(lambda: one.loads == {"a": load(2, 20, 2), "b": load(9, 90, 9)}, within_s=SEEN_S)
        await until(lambda: two.loads == {"a": load(1, 10, 1), "b": load(4, 40, 4)}, within_s=SEEN_S)
        await until(lambda: three.loads == {"a": load(3, 30, 3), "b": load(5, 50, 5)}, within_s=SEEN_S)


async def test_an_endpoint_that_appears_later_gets_the_load_told_before(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two:
        await settled(one, two)
        one.own = {"late": load(7)}
        await asyncio.sleep(0.1)
        assert two.loads == {}
        two.shared.follow(["late"])
        await until(lambda: two.loads == {"late": load(7)}, within_s=SEEN_S)


async def test_the_load_of_a_killed_replica_ends_with_its_lease(server: RedisServer) -> None:
    async with Replica(server.url) as one:
        two = Replica(server.url)
        two.shared.start()
        await settled(one, two)
        two.own = {"a": load(3)}
        await until(lambda: one.loads == {"a": load(3)}, within_s=SEEN_S)

        await two.die()
        took_s = await until(lambda: one.loads == {}, "the end of the lease", within_s=5 * QUICK.lease_s)
        assert took_s > QUICK.lease_s / 2
        assert one.shared.status().replicas == 1


async def test_a_replica_that_says_goodbye_takes_its_load_along(server: RedisServer) -> None:
    async with Replica(server.url) as one:
        async with Replica(server.url) as two:
            await settled(one, two)
            two.own = {"a": load(3)}
            await until(lambda: one.loads == {"a": load(3)}, within_s=SEEN_S)
        # Well before the lease is over.
        await until(lambda: one.loads == {}, within_s=0.8 * QUICK.lease_s)
        async with server.client() as client:
            assert await client.zrange(f"{{{PREFIX}}}:replicas", 0, -1) == [one.shared.identity.replica.encode()]


async def test_a_restart_under_the_same_name_replaces_the_old_load(server: RedisServer) -> None:
    async with Replica(server.url) as one:
        old = Replica(server.url, replica="fixed", wall=lambda: 1000.0)
        old.shared.start()
        await settled(one, old)
        old.own = {"a": load(50)}
        await until(lambda: one.loads == {"a": load(50)}, within_s=SEEN_S)
        await old.die()
        new = Replica(server.url, replica="fixed", wall=lambda: 1001.0)
        new.own = {"a": load(1)}
        async with new:
            await until(lambda: one.loads == {"a": load(1)}, within_s=SEEN_S)
            assert one.shared.status().replicas == 2


async def test_an_older_life_of_the_same_name_does_not_count_beside_the_newer_one(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url, replica="fixed") as two:
        await settled(one, two)
        two.own = {"a": load(1)}
        await until(lambda: one.loads == {"a": load(1)}, within_s=SEEN_S)
        seen: set[int] = set()
        old = pack_vector(1, 10**6, pack_rows({"a": load(99)}))
        async with server.client() as client:
            for number in range(100):
                two.own = {"a": load(1, number)}
                await client.set(f"{{{PREFIX}}}:load:fixed", old, px=500)
                await asyncio.sleep(0.002)
                seen.add(one.loads.get("a", load(0)).requests)
        assert 1 in seen
        assert 99 not in seen


async def test_a_replica_that_is_gone_is_struck_off_the_list(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "FORGET_S", 0.2)
    async with Replica(server.url) as one, server.client() as client:
        two = Replica(server.url)
        two.shared.start()
        await settled(one, two)
        await two.die()
        async with asyncio.timeout(PATIENCE_S):
            while await client.zrange(f"{{{PREFIX}}}:replicas", 0, -1) != [one.shared.identity.replica.encode()]:
                await asyncio.sleep(0.02)


async def test_garbage_where_loads_should_be_is_nobodys_load(server: RedisServer) -> None:
    async with Replica(server.url) as one, server.client() as client:
        await until(lambda: one.shared.connected)
        names = {"garbage": b"\xff" * 17, "empty": b"", "odd name!": b"x", "short": pack_vector(1, 1, b"123")}
        await client.zadd(f"{{{PREFIX}}}:replicas", dict.fromkeys(names, 10**12))
        for name, value in names.items():
            await client.set(f"{{{PREFIX}}}:load:{name}", value, ex=60)
        await client.hset(f"{{{PREFIX}}}:load:list", "x", "y")
        await client.zadd(f"{{{PREFIX}}}:replicas", {"list": 10**12})
        async with Replica(server.url) as two:
            two.own = {"a": load(2)}
            await until(lambda: one.loads == {"a": load(2)}, within_s=PATIENCE_S)
        assert one.shared.status().replicas <= 2
        assert not one.shared.status().problem


async def test_alone_a_replica_asks_seldom(server: RedisServer) -> None:
    async with Replica(server.url) as one, server.client() as client:
        await until(lambda: one.shared._secret.shared)
        before = (await client.info("stats"))["total_commands_processed"]
        await asyncio.sleep(1.0)
        alone = (await client.info("stats"))["total_commands_processed"] - before
        async with Replica(server.url) as two:
            await settled(one, two)
            before = (await client.info("stats"))["total_commands_processed"]
            await asyncio.sleep(1.0)
            together = (await client.info("stats"))["total_commands_processed"] - before
    # Per second: 7 loads, 7 signatures and lists, 20 looks at the stream, some at the secret.
    assert alone < 100
    # MGET of both every 20 ms.
    assert together > alone + 50
    assert two.loads == {}


async def test_the_view_is_as_old_as_the_last_cycle(server: RedisServer) -> None:
    replica = Replica(server.url)
    assert replica.shared.age_s == float("inf")
    assert replica.shared.status().lag_s == float("inf")
    async with replica, Replica(server.url) as two:
        await settled(replica, two)
        assert replica.shared.age_s < 0.5
        assert replica.shared.status().lag_s < 0.5
