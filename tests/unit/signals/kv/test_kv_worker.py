"""The worker's loop in a thread, with sockets of its own: what a bug costs, and what a full outbox does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from picker.core.prefix.deltas import Op, Record, unpack
from picker.signals.kv.messages import (
    COMMAND,
    COUNTS,
    DELTA,
    FRAME,
    TROUBLE,
    Counted,
    Spec,
    Start,
    Subscribe,
    Trouble,
    frame,
)
from picker.signals.kv.outbox import Outbox
from picker.signals.kv.publisher import Publisher
from picker.signals.kv.worker import Worker

PATIENCE_S = 20.0


class Link:
    """The loop's end: reads only when asked to."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours = ours
        self._data = b""
        self.records: list[Record] = []
        self.troubles: list[Trouble] = []
        self.resyncs = 0

    def command(self, command: Start | Subscribe) -> None:
        self._ours.sendall(frame(COMMAND, msgspec.msgpack.encode(command)))

    def until(self, true: Callable[[], bool]) -> None:
        self._ours.settimeout(PATIENCE_S)
        while not true():
            self._data += self._ours.recv(2**16)
            while len(self._data) >= FRAME.size:
                length, kind = FRAME.unpack_from(self._data)
                end = FRAME.size + length
                if len(self._data) < end:
                    break
                self._take(kind, self._data[FRAME.size : end])
                self._data = self._data[end:]

    def _take(self, kind: int, body: bytes) -> None:
        if kind == DELTA:
            self.records += unpack(body)
        elif kind == TROUBLE:
            self.troubles.append(msgspec.msgpack.decode(body, type=Trouble))
        elif kind == COUNTS:
            self.resyncs = msgspec.msgpack.decode(body, type=Counted).counts.resyncs

    def keys(self, publisher: int) -> set[int]:
        held: set[int] = set()
        for record in self.records:
            if record.publisher == publisher and record.op is Op.CLEAR:
                held.clear()
            elif record.publisher == publisher and record.op is Op.ADD:
                held.update(record.keys)
            elif record.publisher == publisher and record.op is Op.REMOVE:
                held.difference_update(record.keys)
        return held


class Engine:
    """A publisher socket and the batches sent so far."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._socket = context.socket(zmq.XPUB)
        self._socket.linger = 0
        self._socket.rcvtimeo = int(PATIENCE_S * 1000)
        self.spec = Spec(endpoint=f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}")
        self._number = 0

    def subscribed(self) -> None:
        assert self._socket.recv() == b"\x01"

    def store(self, *names: int) -> bytes:
        event = {"type": "BlockStored", "block_hashes": names, "token_ids": names, "block_size": 1, "medium": "GPU"}
        payload = msgspec.msgpack.encode([time.time(), [event], 0])
        self._socket.send_multipart([b"", self._number.to_bytes(8, "big"), payload])
        self._number += 1
        return payload


@pytest.fixture
def engines() -> Iterator[tuple[Engine, Engine]]:
    context = zmq.Context()
    yield Engine(context), Engine(context)
    context.destroy(0)


@pytest.fixture
def link() -> Iterator[Link]:
    ours, its = socket.socketpair()
    for end in (ours, its):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    thread = threading.Thread(target=Worker(its, time.monotonic, Outbox(max_bytes=20_000)).run)
    thread.start()
    with ours, its:
        made = Link(ours)
        made.command(Start(b"secret"))
        yield made
        ours.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_bug_found_by_one_publisher_costs_the_others_nothing(
    link: Link, engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = engines
    for number, engine in enumerate(engines, 1):
        link.command(Subscribe(number, engine.spec))
        engine.subscribed()
    bad.store(1)
    link.until(lambda: len(link.keys(2)) == 1)
    whole = Publisher.apply
    monkeypatch.setattr(Publisher, "apply", lambda self, data: 1 // 0 if b"\xcd\x03\xe7" in data else whole(self, data))
    bad.store(999)
    link.until(lambda: bool(link.troubles))
    good.store(5)
    link.until(lambda: len(link.keys(1)) == 1)

    assert link.troubles == [Trouble(2, "ZeroDivisionError")]
    assert not link.keys(2)


def test_a_loop_that_does_not_read_is_told_anew(link: Link, engines: tuple[Engine, Engine]) -> None:
    engine = engines[0]
    link.command(Subscribe(1, engine.spec))
    engine.subscribed()
    for first in range(0, 20_000, 200):
        engine.store(*range(first, first + 200))
        time.sleep(0.002)
    link.until(lambda: len(link.keys(1)) == 20_000)
    link.until(lambda: link.resyncs > 0)

    cleared = [record for record in link.records if record.op is Op.CLEAR]
    assert len(cleared) == link.resyncs
