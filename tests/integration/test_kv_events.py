"""KV-cache events over real sockets and a real worker process: an engine's publisher in here, deltas out there."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest
import uvloop
import zmq
import zmq.asyncio

from bench.cpu import cpu_seconds
from picker.core.prefix.deltas import Op, unpack
from picker.signals.kv import events as kv_events
from picker.signals.kv.events import KvEvents, KvHooks
from picker.signals.kv.messages import Facts, Spec
from tests.unit.signals.kv.engine import Engine
from tests.unit.signals.kv.naive import SECRET

END = b"\xff" * 8
# Processes start and connections are made on a machine that does other things too.
PATIENCE_S = 20.0
Held = tuple[set[int], set[int], set[int]]


class Publisher:
    """An engine's publisher with vLLM's framing: PUB, and a ROUTER for replays. `with_topic` is the newer replay."""

    def __init__(
        self, context: zmq.asyncio.Context, engine: Engine, *, replays: bool, with_topic: bool, port: int
    ) -> None:
        self.engine, self.with_topic = engine, with_topic
        self.asked: list[int] = []
        self._pub = context.socket(zmq.XPUB)
        self._pub.sndhwm = 0
        self._pub.linger = 0
        self.port = port or self._pub.bind_to_random_port("tcp://127.0.0.1")
        if port:
            self._pub.bind(f"tcp://127.0.0.1:{port}")
        self._router: zmq.asyncio.Socket | None = None
        self._serving: asyncio.Task[None] | None = None
        self.spec = Spec(endpoint=f"tcp://127.0.0.1:{self.port}", topic="kv@")
        if replays:
            self._router = context.socket(zmq.ROUTER)
            self._router.linger = 0
            replay_port = self._router.bind_to_random_port("tcp://127.0.0.1")
            self.spec = msgspec.structs.replace(self.spec, replay_endpoint=f"tcp://127.0.0.1:{replay_port}")
            self._serving = asyncio.create_task(self._serve(self._router))

    async def subscribed(self) -> None:
        """Returns when somebody subscribed."""
        async with asyncio.timeout(PATIENCE_S):
            assert (await self._pub.recv())[:1] == b"\x01"

    async def publish(self, batches: int = 1, *, heard: bool = True) -> None:
        for _ in range(batches):
            number, payload = self.engine.step()
            if heard:
                await self.send(number, payload)

    async def send(self, number: int, payload: bytes, topic: bytes = b"kv@10.0.0.9:8000@m") -> None:
        await self._pub.send_multipart([topic, number.to_bytes(8, "big"), payload])

    async def _serve(self, router: zmq.asyncio.Socket) -> None:
        while True:
            who, empty, start = await router.recv_multipart()
            assert empty == b""
            self.asked.append(int.from_bytes(start, "big"))
            topic = [b"kv@10.0.0.9:8000@m"] if self.with_topic else []
            for number, payload in self.engine.replay(self.asked[-1], 10_000):
                await router.send_multipart([who, b"", *topic, number.to_bytes(8, "big"), payload])
            await router.send_multipart([who, b"", *([b""] if self.with_topic else []), END, b""])

    async def close(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        for socket in (self._pub, self._router):
            if socket is not None:
                socket.close(0)


class Loop:
    """The request loop's side: keeps what the deltas say, by publisher."""

    def __init__(self) -> None:
        self.held: dict[int, Held] = {}
        self.online: dict[int, bool] = {}
        self.facts: dict[int, Facts] = {}
        self.troubles: list[tuple[int, str]] = []
        self.hooks = KvHooks(
            on_delta=self.on_delta,
            on_facts=lambda facts: self.facts.update({facts.publisher: facts}),
            on_trouble=lambda *what: self.troubles.append(what),
        )

    def on_delta(self, delta: bytes) -> None:
        keys = 0
        for record in unpack(delta):
            held = self.held.setdefault(record.publisher, (set(), set(), set()))
            keys += len(record.keys)
            match record.op:
                case Op.ADD:
                    held[record.tier].update(record.keys)
                case Op.REMOVE:
                    held[record.tier].difference_update(record.keys)
                case Op.CLEAR:
                    for tier in held:
                        tier.clear()
                case _:
                    self.online[record.publisher] = record.op is Op.ONLINE
        assert keys <= 512


class Rig:
    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.loop = Loop()
        self.events = KvEvents(secret=SECRET, hooks=self.loop.hooks, clock=time.monotonic)
        self.publishers: list[Publisher] = []
        self._context = context

    async def publisher(
        self, *, seed: int = 1, replays: bool = False, with_topic: bool = True, port: int = 0, published: int = 0
    ) -> Publisher:
        engine = Engine(Random(seed), groups=2)
        for _ in range(published):
            engine.step()
        self.publishers.append(Publisher(self._context, engine, replays=replays, with_topic=with_topic, port=port))
        return self.publishers[-1]

    async def until_equal(self, number: int, publisher: Publisher) -> None:
        """What the loop knows becomes what the engine holds."""
        truth = publisher.engine.truth.held()
        await until(lambda: self.loop.held.get(number) == truth and self.loop.online.get(number, False))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.01)


async def at_rest(pid: int) -> None:
    """Returns when a process has done what it had to do."""
    async with asyncio.timeout(3 * PATIENCE_S):
        before = -1.0
        while (now := cpu_seconds(pid)) - before > 0.02:
            before = now
            await asyncio.sleep(0.5)


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    before = asyncio.all_tasks()
    context = zmq.asyncio.Context()
    made = Rig(context)
    try:
        async with made.events:
            yield made
    finally:
        for publisher in made.publishers:
            await publisher.close()
        context.destroy(0)
    assert asyncio.all_tasks() == before
    assert made.events.stats().pid == 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_live_events_become_deltas() -> None:
    async with rig() as made:
        engine = await made.publisher()
        assert made.events.subscribe(3, engine.spec)
        await engine.subscribed()
        await engine.publish(50)
        await made.until_equal(3, engine)

        facts = made.loop.facts[3]
        assert (facts.block_tokens, facts.complete, facts.loras) == ((4,), True, ("sql",))
        await until(lambda: made.events.stats().total.batches == 50)
        stats = made.events.stats()
        assert (stats.total.gaps, stats.total.malformed, stats.total.late, stats.restarts) == (0, 0, 0, 0)
        pid = stats.pid
    assert not alive(pid)
    assert not made.loop.troubles


def test_on_uvloop() -> None:
    uvloop.run(test_live_events_become_deltas())


@pytest.mark.parametrize("with_topic", [True, False])
async def test_what_was_published_before_comes_by_replay(with_topic: bool) -> None:
    async with rig() as made:
        engine = await made.publisher(replays=True, with_topic=with_topic, published=300)
        made.events.subscribe(3, engine.spec)
        await made.until_equal(3, engine)
        assert made.loop.facts[3].complete

        await engine.publish(5)
        await engine.publish(3, heard=False)
        await engine.publish(1)
        await made.until_equal(3, engine)
        assert engine.asked == [0, 304]
        await until(lambda: made.events.stats().total.gaps == 1)
        assert made.events.stats().total.losses == 0


async def test_joining_late_without_replay_knows_only_what_came_after() -> None:
    async with rig() as made:
        engine = await made.publisher(published=40)
        made.events.subscribe(3, engine.spec)
        await engine.subscribed()
        await engine.publish(20)
        await until(lambda: made.events.stats().total.batches == 20)

        for told, true in zip(made.loop.held[3], engine.engine.truth.held(), strict=True):
            assert told <= true
        assert made.events.stats().total.late == 1


async def test_replay_endpoint_that_does_not_answer_delays_only() -> None:
    async with rig() as made:
        engine = await made.publisher()
        dead = msgspec.structs.replace(engine.spec, replay_endpoint="tcp://127.0.0.1:9")
        made.events.subscribe(3, dead)
        await engine.subscribed()
        await engine.publish(3)
        await made.until_equal(3, engine)


@pytest.mark.parametrize("replays", [True, False])
async def test_restarted_publisher(replays: bool) -> None:
    async with rig() as made:
        old = await made.publisher(replays=replays)
        made.events.subscribe(3, old.spec)
        await old.subscribed()
        await old.publish(20)
        await made.until_equal(3, old)

        await old.close()
        await until(lambda: not made.loop.online[3])
        new = await made.publisher(seed=2, replays=False, port=old.port)
        await new.subscribed()
        await new.publish(10)
        await made.until_equal(3, new)
        await until(lambda: made.events.stats().total.restarts == 1)


async def test_identity_is_the_connection_and_not_the_topic() -> None:
    async with rig() as made:
        first, second = await made.publisher(seed=1), await made.publisher(seed=2)
        for number, engine in ((1, first), (2, second)):
            made.events.subscribe(number, engine.spec)
            await engine.subscribed()
        await first.publish(10)
        await second.publish(10)

        await made.until_equal(1, first)
        await made.until_equal(2, second)


async def test_other_topics_and_wrong_frames_are_not_taken() -> None:
    async with rig() as made:
        engine = await made.publisher()
        made.events.subscribe(3, engine.spec)
        await engine.subscribed()
        await engine.send(0, b"load", topic=b"load")
        await engine._pub.send_multipart([b"kv@x", b"short", b"x"])
        await engine._pub.send_multipart([b"kv@x"])
        await engine.publish(2)
        await made.until_equal(3, engine)
        await until(lambda: made.events.stats().total.malformed == 2)


async def test_unsubscribed_publisher_is_cleared_and_not_heard() -> None:
    async with rig() as made:
        engine, other = await made.publisher(), await made.publisher(seed=2)
        for number, publisher in ((3, engine), (4, other)):
            made.events.subscribe(number, publisher.spec)
            await publisher.subscribed()
        await engine.publish(10)
        await made.until_equal(3, engine)
        made.events.unsubscribe(3)
        await until(lambda: made.loop.held[3] == (set(), set(), set()))
        await engine.publish(10)
        await other.publish(10)
        await made.until_equal(4, other)
        assert made.loop.held[3] == (set(), set(), set())
        assert not made.loop.online[3]


async def test_address_that_zmq_does_not_take_is_trouble() -> None:
    async with rig() as made:
        engine = await made.publisher()
        made.events.subscribe(9, Spec(endpoint="tcp://nonsense"))
        made.events.subscribe(3, engine.spec)
        await engine.subscribed()
        await engine.publish(3)
        await made.until_equal(3, engine)
        assert [number for number, _ in made.loop.troubles] == [9]


async def test_killed_worker_is_noticed_replaced_and_told_everything_again() -> None:
    async with rig() as made:
        engine = await made.publisher(replays=True)
        made.events.subscribe(3, engine.spec)
        await engine.subscribed()
        await engine.publish(30)
        await made.until_equal(3, engine)
        pid = made.events.stats().pid

        os.kill(pid, signal.SIGKILL)
        await until(lambda: made.loop.held[3] == (set(), set(), set()) and not made.loop.online[3])
        await engine.publish(5)
        await made.until_equal(3, engine)
        stats = made.events.stats()
        assert stats.restarts == 1
        assert stats.pid not in (0, pid)
        assert made.loop.troubles == [(0, "ended with -9")]


async def test_frozen_worker_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "SILENCE_S", 3.0)
    async with rig() as made:
        engine = await made.publisher(replays=True, published=10)
        made.events.subscribe(3, engine.spec)
        await made.until_equal(3, engine)
        pid = made.events.stats().pid
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: made.events.stats().restarts == 1)
        await made.until_equal(3, engine)
        assert not alive(pid)


PARENT = """
import asyncio, time
from picker.signals.kv.events import KvEvents, KvHooks

async def main():
    async with KvEvents(secret=b"s", hooks=KvHooks(), clock=time.monotonic) as events:
        while not events.stats().pid:
            await asyncio.sleep(0.01)
        print(events.stats().pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_worker_ends_with_its_parent() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            pid = int(await parent.stdout.readline())
        assert alive(pid)
    finally:
        parent.kill()
        await parent.communicate()
    # Nobody reaps it here, so a zombie counts as ended.
    await until(lambda: not alive(pid) or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")


async def test_many_publishers_at_once() -> None:
    async with rig() as made:
        engines = [
            await made.publisher(seed=n, replays=n % 2 == 0, published=20 if n % 2 == 0 else 0) for n in range(40)
        ]
        for number, engine in enumerate(engines):
            made.events.subscribe(number, engine.spec)
        for engine in engines:
            await engine.subscribed()
        for _ in range(5):
            for engine in engines:
                await engine.publish()
        for number, engine in enumerate(engines):
            await made.until_equal(number, engine)


async def test_loop_that_does_not_read_gets_everything_in_the_end() -> None:
    """The worker drops deltas rather than wait, and tells the publishers anew afterwards."""
    async with rig() as made:
        engine = await made.publisher()
        made.events.subscribe(3, engine.spec)
        await engine.subscribed()
        await engine.publish(10)
        await made.until_equal(3, engine)
        writer = made.events._writer
        assert writer is not None
        transport = writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        # 24 MB of deltas: stored and dropped again, 2,000 blocks at a time.
        number = engine.engine.number
        for turn in range(750):
            names = list(range(2**32, 2**32 + 2000))
            stored = {
                "type": "BlockStored",
                "block_hashes": names,
                "block_size": 1,
                "token_ids": [turn] * 2000,
            }
            batch = [stored, {"type": "BlockRemoved", "block_hashes": names}]
            await engine.send(number, msgspec.msgpack.encode([float(turn), batch, 0]))
            number += 1
            if turn % 50 == 0:
                await asyncio.sleep(0.02)
        engine.engine.number = number
        await engine.publish(5)
        await at_rest(made.events.stats().pid)
        transport.resume_reading()
        await until(lambda: made.events.stats().total.resyncs > 0)
        await made.until_equal(3, engine)
        assert made.events.stats().total.gaps == 0
