"""Snapshots and the secret: what a replica that begins knows at once, and with which keys."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from picker.signals.shared.settings import PodSnapshot
from picker.signals.shared.snapshots import owner_of
from tests.integration.redis_rig import PREFIX, QUICK, RedisServer, Replica, quick, redis_server, settled, until

HELD = PodSnapshot("uid-1", 16, {0: [1, 2, 2**64 - 1], 1: [4], 2: []})
READ = PodSnapshot("uid-1", 16, {0: (1, 2, 2**64 - 1), 1: (4,)})


@pytest.fixture(scope="module")
def one_server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
async def server(one_server: RedisServer) -> RedisServer:
    async with one_server.client() as client:
        await client.flushall()
    return one_server


def key_of(endpoint_id: str) -> str:
    return f"{{{PREFIX}}}:snap:{endpoint_id}"


async def test_a_replica_that_begins_loads_what_others_wrote(server: RedisServer) -> None:
    async with Replica(server.url) as one, server.client() as client:
        one.held = {"a": HELD}
        await settled(one)
        async with asyncio.timeout(5):
            while not await client.exists(key_of("a")):
                await asyncio.sleep(0.02)
        assert not await client.exists(key_of("b"))
        assert 0 < await client.ttl(key_of("a")) <= QUICK.snapshot_ttl_s

    # Everybody is gone; a new one comes.
    two = Replica(server.url)
    assert await two.shared.load_snapshots({"a": "uid-1"}) == 0, "they are not of its secret"
    async with two:
        await until(lambda: two.secrets)
        assert await two.shared.load_snapshots({"a": "uid-1", "b": "uid-1"}) == 1
        assert two.warm["a"][0] == READ
        assert 0 <= two.warm["a"][1] < 60


async def test_what_another_process_held_is_not_loaded(server: RedisServer) -> None:
    async with Replica(server.url) as one, server.client() as client:
        one.held = {"a": HELD}
        await settled(one)
        async with asyncio.timeout(5):
            while not await client.exists(key_of("a")):
                await asyncio.sleep(0.02)
        assert await one.shared.load_snapshots({"a": "uid-2"}) == 0
        assert await one.shared.load_snapshots({"a": "uid-1"}) == 1
        await client.set(key_of("a"), b"\x96\x01garbage")
        assert await one.shared.load_snapshots({"a": "uid-1"}) == 0
        await client.delete(key_of("a"))
        await client.lpush(key_of("a"), "x")
        assert await one.shared.load_snapshots({"a": "uid-1", "b": ""}) == 0


async def test_one_replica_writes_per_endpoint_and_only_what_changed(server: RedisServer) -> None:
    endpoints = [f"endpoint-{number}" for number in range(12)]
    async with Replica(server.url) as one, Replica(server.url) as two, server.client() as client:
        await settled(one, two)
        for replica in (one, two):
            replica.shared.follow(endpoints)
            replica.held = dict.fromkeys(endpoints, HELD)
        both = (one.shared.identity.replica, two.shared.identity.replica)
        async with asyncio.timeout(5):
            while len(await client.keys(key_of("*"))) < 12:
                await asyncio.sleep(0.02)

        def owners() -> dict[str, set[str]]:
            return {
                name: {each.shared.identity.replica for each in (one, two) if name in each.shared._snapshots._written}
                for name in endpoints
            }

        # Who wrote one before it knew of the other leaves it alone in the next round.
        await until(lambda: owners() == {name: {owner_of(name, both)} for name in endpoints})

        # What did not change only lives on.
        await client.config_resetstat()
        async with asyncio.timeout(5):
            while (await client.info("commandstats")).get("cmdstat_pexpire", {"calls": 0})["calls"] < 24:
                await asyncio.sleep(0.02)
        # Lost ones are written again.
        await client.delete(*map(key_of, endpoints))
        async with asyncio.timeout(5):
            while len(await client.keys(key_of("*"))) < 12:
                await asyncio.sleep(0.02)

        # The other takes over.
        await two.die()
        mine = {name for name in endpoints if owner_of(name, both) == both[0]}
        await until(lambda: set(one.shared._snapshots._written) == set(endpoints) > mine)


async def test_a_secret_that_changed_voids_snapshots_and_reads_the_stream_again(server: RedisServer) -> None:
    async with Replica(server.url) as one, server.client() as client:
        await settled(one)
        one.held = {"a": HELD}
        await until(lambda: "a" in one.shared._snapshots._written)
        other = bytes(range(32))
        await client.set(f"{{{PREFIX}}}:secret", other)
        await until(lambda: one.secrets[-1:] == [other])
        # The snapshot was written under the old secret, or is written again under the new one.
        assert one.shared.secret == other
        async with Replica(server.url) as two:
            await until(lambda: two.shared.secret == other)
            two.shared.tell_routed("a", "uid", [5])
            await until(lambda: one.routed)
            # Back and forth: what was told under the present secret is heard again, what was told under another is not.
            await client.set(f"{{{PREFIX}}}:secret", bytes(32))
            await until(lambda: one.shared.secret == two.shared.secret == bytes(32))
            one.routed.clear()
            await client.set(f"{{{PREFIX}}}:secret", other)
            await until(lambda: one.shared.secret == two.shared.secret == other)
            await until(lambda: one.routed == [("a", "uid", (5,))])
            assert two.routed == []


async def test_many_that_begin_at_once_agree(server: RedisServer) -> None:
    replicas = [Replica(server.url) for _ in range(6)]
    try:
        for replica in replicas:
            replica.shared.start()
        await settled(*replicas)
        # Nobody changed more than once.
        assert sorted(len(replica.secrets) for replica in replicas) == [0, 1, 1, 1, 1, 1]
    finally:
        await asyncio.gather(*(replica.shared.close() for replica in replicas))


async def test_prefixes_keep_deployments_apart(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url, prefix="other", settings=quick()) as two:
        await settled(one)
        await settled(two)
        one.shared.tell_routed("a", "uid", [1])
        await asyncio.sleep(0.2)
        assert two.routed == []
        assert two.shared.status().replicas == 1
        assert one.shared.secret != two.shared.secret
