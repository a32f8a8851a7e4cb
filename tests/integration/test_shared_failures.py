"""Redis is absent, slow, frozen, flushed, restarted, full, closed to us, or not Redis: replicas go on and heal."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.redis_rig import (
    PATIENCE_S,
    QUICK,
    SEEN_S,
    Line,
    RedisServer,
    Replica,
    free_port,
    keys_of,
    load,
    quick,
    redis_server,
    settled,
    until,
)

# Redis fails at once or after its deadline; loads end a lease after that.
GONE_S = 5 * (QUICK.lease_s + QUICK.call_timeout_s)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


async def lag_of_loop(seconds: float) -> float:
    """The longest time the loop did not turn, while `seconds` went by."""
    worst, end = 0.0, time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        await asyncio.sleep(0.005)
        worst = max(worst, time.monotonic() - began - 0.005)
    return worst


async def share_again(one: Replica, two: Replica, number: int) -> None:
    """Loads and learned prefixes go from one to the other."""
    one.own = {"a": load(number)}
    await until(lambda: two.loads == {"a": load(number)}, "loads after trouble")
    one.shared.tell_routed("a", "uid", [number])
    await until(lambda: two.routed and two.routed[-1][2] == (number,), "prefixes after trouble")


async def test_redis_absent_at_the_start_is_used_when_it_comes() -> None:
    port = free_port()
    async with Replica(f"redis://127.0.0.1:{port}") as one, Replica(f"redis://127.0.0.1:{port}") as two:
        own = one.shared.secret
        await until(lambda: one.troubles)
        one.shared.tell_routed("a", "uid", [1])
        assert len(own) == 32
        assert own != two.shared.secret
        assert not one.shared.connected
        assert one.shared.status().problem in {
            "no connection to Redis (ConnectionError)",
            "Redis does not answer in time",
        }
        assert one.shared.status().age_s == float("inf")
        assert await one.shared.load_snapshots({"a": "uid"}) == 0
        with redis_server() as later:
            later.kill()
            server = RedisServer(later._directory, port=port)
            server.start()
            try:
                await settled(one, two)
                # One of the two secrets, and only the other replica was told to change.
                assert one.shared.secret in (own, *one.secrets)
                assert len(one.secrets) + len(two.secrets) == 1
                await share_again(one, two, 3)
                # What was learnt in the dark is known to the others, unless its keys are void.
                assert [1] in [list(keys) for _, _, keys in two.routed] or one.secrets
            finally:
                server.kill()


async def test_without_redis_the_others_loads_end_and_come_back(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two:
        await settled(one, two)
        secret = one.shared.secret
        await share_again(one, two, 1)
        server.kill()
        await until(lambda: two.loads == {} and not two.shared.connected, "loads end", within_s=GONE_S)
        assert two.shared.status().replicas == 1
        age_s = two.shared.age_s
        await asyncio.sleep(0.05)
        assert two.shared.age_s > age_s
        server.start()
        await settled(one, two)
        await share_again(one, two, 2)
        # A new, empty Redis changes nobody's secret.
        assert one.shared.secret == two.shared.secret == secret


async def test_a_flush_heals_without_another_secret(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two, server.client() as client:
        await settled(one, two)
        secret, changes = one.shared.secret, len(one.secrets) + len(two.secrets)
        for number in range(1, 4):
            await share_again(one, two, number)
            await client.flushall()
            # A replica that is new does not know the secret: it must not be the one who says which.
            async with Replica(server.url) as three:
                await settled(one, two, three)
                assert three.shared.secret == secret
            await share_again(one, two, number + 10)
        assert len(one.secrets) + len(two.secrets) == changes


async def test_a_frozen_redis_stops_nothing_and_thaws(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two:
        await settled(one, two)
        await share_again(one, two, 1)
        server.signal(signal.SIGSTOP)
        try:
            lag = asyncio.create_task(lag_of_loop(1.0))
            for number in range(100):
                one.shared.tell_routed("a", "uid", keys_of(number, 64))
            await until(lambda: two.loads == {} and not two.shared.connected, within_s=GONE_S)
            assert two.shared.status().problem == "Redis does not answer in time"
            # A Redis that is asked synchronously holds the loop for its whole deadline.
            assert await lag < QUICK.call_timeout_s / 4
        finally:
            server.signal(signal.SIGCONT)
        await settled(one, two)
        await share_again(one, two, 2)
        heard = [keys for _, _, keys in two.routed]
        # Commands that lay in the sockets were done late, and twice: nothing counts twice.
        assert len(heard) == len(set(heard)) == 102
        assert two.shared.status().missed == 0


async def test_a_slow_redis_is_as_good_as_none(server: RedisServer) -> None:
    async with Line(server.port) as line, Replica(server.url) as two:
        async with Replica(f"redis://127.0.0.1:{line.port}") as one:
            await settled(one, two)
            await share_again(two, one, 1)
            line.delay_s = 2.0
            await until(lambda: not one.shared.connected and one.loads == {}, within_s=GONE_S)
            began = time.monotonic()
            for number in range(1000):
                one.shared.tell_routed("a", "uid", keys_of(number, 16))
            assert time.monotonic() - began < 0.1
            line.delay_s = 0.0
            line.cut()
            await settled(one, two)
            await share_again(two, one, 2)
            line.delay_s = 2.0
            began = time.monotonic()
        # Closing while Redis is slow waits for nothing.
        assert time.monotonic() - began < 5 * QUICK.call_timeout_s


async def test_a_half_open_line_is_noticed(server: RedisServer) -> None:
    async with (
        Line(server.port) as line,
        Replica(server.url) as two,
        Replica(f"redis://127.0.0.1:{line.port}") as one,
    ):
        await settled(one, two)
        await share_again(one, two, 1)
        line.silent = True
        await until(lambda: not one.shared.connected, within_s=GONE_S)
        await until(lambda: two.loads == {}, within_s=GONE_S)
        line.silent = False
        await settled(one, two)
        await share_again(one, two, 2)


async def test_a_line_that_is_cut_again_and_again_mixes_no_answers_up(server: RedisServer) -> None:
    async with Line(server.port) as line, Replica(server.url) as two:
        two.own = {"a": load(5)}
        async with Replica(f"redis://127.0.0.1:{line.port}") as one:
            await settled(one, two)
            secret, seen = one.shared.secret, set()
            for number in range(40):
                line.delay_s = 0.004 * (number % 4)
                if number % 3 == 0:
                    line.cut()
                await asyncio.sleep(0.02)
                seen.add(one.loads.get("a", load(0)))
            line.delay_s = 0.0
            await settled(one, two)
            assert seen <= {load(0), load(5)}
            assert one.shared.secret == secret
            assert {text.partition("(")[0].strip() for text in one.troubles} <= {
                "no connection to Redis",
                "Redis does not answer in time",
            }


async def test_a_full_redis_is_named_and_left(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(server.url) as two, server.client() as client:
        await settled(one, two)
        await share_again(one, two, 1)
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1")
        await until(lambda: two.loads == {}, within_s=GONE_S)
        await until(lambda: one.shared.status().problem == "Redis is out of memory (maxmemory)")
        assert not one.shared.connected
        await client.config_set("maxmemory", "0")
        await settled(one, two)
        await share_again(one, two, 2)


async def test_a_full_redis_at_the_start_leaves_everybody_with_a_secret(server: RedisServer) -> None:
    async with server.client() as client:
        await client.config_set("maxmemory", "1")
        async with Replica(server.url) as one, Replica(server.url) as two:
            await until(lambda: one.shared.status().problem)
            await asyncio.sleep(2 * QUICK.secret_patience_s)
            assert not one.secrets
            await client.config_set("maxmemory", "0")
            await settled(one, two)
            assert len(one.secrets) + len(two.secrets) == 1


async def test_a_wrong_password_is_named_without_it_and_a_right_one_heals() -> None:
    with redis_server("--requirepass", "right") as server:
        url = f"redis://:wrong-secret@127.0.0.1:{server.port}"
        async with (
            Replica(url) as one,
            Replica(server.url) as nobody,
            Replica(url, password="right") as two,
            server.client(password="right") as client,
        ):
            await until(lambda: two.shared.connected)
            for replica in (one, nobody):
                await until(lambda replica=replica: replica.troubles)  # type: ignore[misc]
                assert replica.troubles == ["Redis does not accept the user or password"]
                assert "wrong-secret" not in repr(vars(replica.shared))
            await client.config_set("requirepass", "wrong-secret")
            await until(lambda: one.shared.connected)


async def test_a_server_that_is_not_redis_is_trouble_and_no_more() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n*-3\r\n$99999999999\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        async with Replica(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}") as one:
            await until(lambda: len(one.shared._troubles) >= 2)
            assert not one.shared.connected
            assert one.loads == {}
        server.close()


async def test_answers_of_other_kinds_than_expected_are_trouble_and_no_more(server: RedisServer) -> None:
    async with server.client() as client:
        for name in ("secret", "replicas", "routed"):
            await client.lpush(f"{{test}}:{name}", "x")
        async with Replica(server.url) as one:
            await until(lambda: len(one.shared._troubles) == 2)
            assert one.shared.status().problem == "Redis answers WRONGTYPE"
            await client.delete("{test}:secret")
            await until(lambda: "routed in" in one.shared._troubles)
            one.shared.tell_routed("a", "uid", [1])
            await until(lambda: "routed out" in one.shared._troubles)
            await client.flushall()
            await settled(one)
            await client.set("{test}:secret", b"not 32 bytes")
            await until(lambda: "secret" in one.shared.status().problem)
            assert len(one.shared.secret) == 32


@pytest.mark.parametrize("state", ["well", "absent", "frozen", "never started"])
async def test_close_leaves_nothing_behind(server: RedisServer, state: str) -> None:
    before = asyncio.all_tasks()
    one = Replica(server.url, settings=quick(ingester=True))
    if state != "never started":
        one.shared.start()
        await until(lambda: one.shared.connected)
    if state == "absent":
        server.kill()
    if state == "frozen":
        server.signal(signal.SIGSTOP)
    began = time.monotonic()
    await one.shared.close()
    await one.shared.close()
    assert time.monotonic() - began < 5 * QUICK.call_timeout_s
    assert asyncio.all_tasks() == before
    if state == "frozen":
        server.signal(signal.SIGCONT)
    # Connections that were not closed complain when they are collected.
    one = Replica(server.url)
    gc.collect()
    await one.shared.close()


async def test_close_may_be_cancelled(server: RedisServer) -> None:
    before = asyncio.all_tasks()
    async with Line(server.port) as line:
        inside = asyncio.all_tasks()
        one = Replica(f"redis://127.0.0.1:{line.port}")
        one.shared.start()
        await until(lambda: one.shared.connected)
        line.silent = True
        closing = asyncio.create_task(one.shared.close())
        await asyncio.sleep(0.02)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert closing.cancelled()
        await until(lambda: not {task for task in asyncio.all_tasks() - inside if "shared" in task.get_name()})
        assert not one.shared.connected
    await until(lambda: asyncio.all_tasks() == before)
    gc.collect()


async def test_the_request_path_costs_little_with_redis_or_without(server: RedisServer) -> None:
    async with Replica(server.url) as one, Replica(f"redis://127.0.0.1:{free_port()}") as dark:
        await until(lambda: one.shared.connected)
        for replica in (one, dark):
            began = time.process_time()
            for number in range(2000):
                replica.shared.tell_routed("a", "uid", keys_of(number, 64))
            # 20 us each are five times what it takes.
            assert (time.process_time() - began) / 2000 < 100e-6
        assert dark.shared.status().dropped == 0
        assert await asyncio.wait_for(lag_of_loop(0.3), PATIENCE_S) < SEEN_S
