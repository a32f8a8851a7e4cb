"""What one replica learns, the others hear: once, in order, and with what is lost counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from picker.signals.shared.formats import pack_entry, pack_routed, secret_tag
from tests.integration.redis_rig import (
    PREFIX,
    SEEN_S,
    Line,
    RedisServer,
    Replica,
    keys_of,
    quick,
    redis_server,
    settled,
    until,
)

STREAM = f"{{{PREFIX}}}:routed"
DELTAS = f"{{{PREFIX}}}:deltas"


@pytest.fixture(scope="module")
def one_server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture
async def server(one_server: RedisServer) -> RedisServer:
    async with one_server.client() as client:
        await client.flushall()
    return one_server


def numbers(replica: Replica) -> list[int]:
    """The first key of everything heard."""
    return [keys[0] for _, _, keys in replica.routed]


async def test_others_hear_what_was_routed_and_we_do_not(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two, Replica(server.url) as three:
        await settled(one, two, three)
        one.shared.tell_routed("a", "uid-1", [1, 2**64 - 1, 3])
        two.shared.tell_routed("b", "", [4])
        one.shared.tell_routed("b", "uid-2", [])
        await until(lambda: two.routed == [("a", "uid-1", (1, 2**64 - 1, 3))], within_s=SEEN_S)
        await until(lambda: one.routed == [("b", "", (4,))], within_s=SEEN_S)
        await until(lambda: len(three.routed) == 2, within_s=SEEN_S)
        assert one.shared.status().missed == 0


async def test_everything_comes_once_and_in_order(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two:
        await settled(one, two)
        for number in range(3000):
            one.shared.tell_routed("a", "uid", keys_of(number, 64))
            if number % 500 == 0:
                await asyncio.sleep(0.02)
        await until(lambda: len(two.routed) >= 3000)
        assert numbers(two) == list(range(3000))


async def test_who_comes_late_hears_the_recent_past_and_a_restarted_one_its_own(server: RedisServer) -> None:
    async with Replica(server.url, replica="fixed", wall=lambda: 1000.0) as one:
        await settled(one)
        for number in range(200):
            one.shared.tell_routed("a", "uid", keys_of(number, 64))
        async with Replica(server.url) as two:
            await until(lambda: len(two.routed) == 200)
            assert numbers(two) == list(range(200))
    async with Replica(server.url, replica="fixed", wall=lambda: 1001.0) as again:
        await until(lambda: len(again.routed) == 200)


async def test_the_past_that_is_read_is_bounded(server: RedisServer) -> None:
    async with Replica(server.url) as one:
        await settled(one)
        one.shared.tell_routed("a", "uid", [1])
        await asyncio.sleep(1.0)
        one.shared.tell_routed("a", "uid", [2])
        await asyncio.sleep(0.2)
        async with Replica(server.url, settings=quick(warm_s=0.5)) as two:
            await until(lambda: two.routed)
            await asyncio.sleep(0.1)
            assert numbers(two) == [2]


async def test_a_cut_line_loses_nothing(server: RedisServer) -> None:
    async with Line(server.port) as line, Replica(f"redis://127.0.0.1:{line.port}") as one, Replica(server.url) as two:
        await settled(one, two)
        for number in range(400):
            one.shared.tell_routed("a", "uid", keys_of(number, 64))
            two.shared.tell_routed("b", "uid", keys_of(number, 64))
            if number % 40 == 0:
                line.cut()
                await asyncio.sleep(0.03)
        await until(lambda: min(len(one.routed), len(two.routed)) >= 400)
        for replica in (one, two):
            assert numbers(replica) == list(range(400))
            assert replica.shared.status().missed == 0
            assert replica.shared.status().dropped == 0


async def test_what_was_trimmed_while_we_were_away_is_counted(server: RedisServer) -> None:
    small = quick(stream_entries=50)
    async with (
        Line(server.port) as line,
        Replica(server.url, settings=small) as one,
        Replica(f"redis://127.0.0.1:{line.port}") as two,
    ):
        await settled(one, two)
        one.shared.tell_routed("a", "uid", keys_of(0, 512))
        await until(lambda: two.routed)
        line.refuses = True
        line.cut()
        # 512 keys fill an entry.
        for number in range(1, 2000):
            one.shared.tell_routed("a", "uid", keys_of(number, 512))
            if number % 200 == 0:
                await until(lambda: not one.shared._routed_out._closed)
        async with server.client() as client:
            await until(lambda: not one.shared._routed_out._closed)
            assert await client.xlen(STREAM) < 500
        line.refuses = False
        await until(lambda: numbers(two)[-1] == 1999)
        heard = numbers(two)
        assert heard == sorted(set(heard))
        assert two.shared.status().missed == 2000 - len(heard) > 1000


async def test_the_buffer_is_bounded_and_drops_the_oldest(server: RedisServer) -> None:
    bounded = quick(buffer_bytes=64 * 1024)
    async with (
        Line(server.port) as line,
        Replica(f"redis://127.0.0.1:{line.port}", settings=bounded) as one,
        Replica(server.url) as two,
    ):
        await settled(one, two)
        one.shared.tell_routed("a", "uid", keys_of(0, 512))
        await until(lambda: two.routed)
        line.refuses = True
        line.cut()
        for number in range(1, 1000):
            one.shared.tell_routed("a", "uid", keys_of(number, 512))
        assert one.shared._routed_out._closed_bytes <= 64 * 1024
        dropped = one.shared.status().dropped
        assert dropped > 900
        line.refuses = False
        await until(lambda: numbers(two)[-1] == 999)
        assert numbers(two) == [0, *range(dropped + 1, 1000)]
        # The others know how much they do not know.
        assert two.shared.status().missed == dropped


async def test_a_stream_that_begins_again_is_followed_from_its_beginning(server: RedisServer) -> None:
    async with Replica(server.url) as one, server.client() as client:
        await settled(one)
        # Another server took over, whose clock is behind: ids begin anew, lower than where we are.
        await client.xadd(STREAM, {"x": "y"}, id="99999999999999-0")
        await until(lambda: one.shared._routed_in._position == "99999999999999-0")
        await client.delete(STREAM)
        body = pack_routed([])
        for number in range(1, 4):
            entry = pack_entry(secret_tag(one.shared.secret), number, body)
            await client.xadd(STREAM, {"other": entry}, id=f"{number}-0")
        await until(lambda: one.shared._routed_in._last.get("other") == 3)


async def test_garbage_in_the_stream_is_skipped(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two, server.client() as client:
        await settled(one, two)
        tag = secret_tag(one.shared.secret)
        for body in (b"", b"\xff", b"\x93\x01\x02\x03", pack_routed([])):
            await client.xadd(STREAM, {"stranger": pack_entry(tag, 1, body), b"\xff\xfe": b"short"})
        await client.xadd(STREAM, {"stranger": pack_entry(b"8 others", 2, b"")})
        one.shared.tell_routed("a", "uid", [7])
        await until(lambda: two.routed == [("a", "uid", (7,))], within_s=SEEN_S)
        assert not two.troubles


async def test_a_hook_that_raises_does_not_stop_the_stream(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two:
        await settled(one, two)
        applied: list[bytes] = []

        def fail_once(body: bytes) -> None:
            applied.append(body)
            if len(applied) == 1:
                raise ZeroDivisionError("in a hook")

        two.shared._routed_in._apply = fail_once
        one.shared.tell_routed("a", "uid", [1])
        await until(lambda: applied)
        one.shared.tell_routed("a", "uid", [2])
        await until(lambda: len(applied) == 2)
        assert two.troubles == ["a bug: ZeroDivisionError: in a hook"]


async def test_one_replica_is_elected_and_its_deltas_reach_the_others(server: RedisServer) -> None:
    elects = quick(ingester=True, ingester_lease_s=0.6)
    async with Replica(server.url, settings=elects) as one:
        await until(lambda: one.shared.elected)
        async with Replica(server.url, settings=elects) as two:
            await settled(one, two)
            one.shared.tell_delta(b"first")
            one.shared.tell_delta(b"second")
            two.shared.tell_delta(b"from one that is not elected")
            await until(lambda: b"".join(two.deltas) == b"firstsecond")
            assert not one.deltas
            assert not two.shared.elected
            await one.die()
            await until(lambda: two.shared.elected, within_s=5 * 0.6)
            assert two.elections == [True]
    # It gave the lease back.
    async with server.client() as client:
        assert await client.get(f"{{{PREFIX}}}:ingester") is None


async def test_an_ingester_without_redis_stops_being_one_before_another_can_be(server: RedisServer) -> None:
    elects = quick(ingester=True, ingester_lease_s=0.6)
    async with (
        Line(server.port) as line,
        Replica(f"redis://127.0.0.1:{line.port}", settings=elects) as one,
    ):
        await until(lambda: one.shared.elected)
        async with Replica(server.url, settings=elects) as two:
            await settled(one, two)
            line.silent = True
            both: list[bool] = []

            def second_takes_over() -> bool:
                both.append(one.shared.elected and two.shared.elected)
                return two.shared.elected

            await until(second_takes_over, within_s=5 * 0.6)
            assert not any(both)
            line.silent = False
            line.cut()
            await until(lambda: one.elections == [True, False])


async def test_missed_deltas_are_told(server: RedisServer) -> None:
    elects = quick(ingester=True, ingester_lease_s=0.6)
    async with Replica(server.url, settings=elects) as one, server.client() as client:
        await settled(one)
        tag = secret_tag(one.shared.secret)
        await client.xadd(DELTAS, {"other": pack_entry(tag, 1, b"1")})
        await client.xadd(DELTAS, {"other": pack_entry(tag, 5, b"5")})
        await until(lambda: one.deltas == [b"1", b"5"])
        assert one.missed == [3]
