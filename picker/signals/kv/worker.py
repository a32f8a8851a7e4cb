"""The worker process: `python -m picker.signals.kv.worker FD`. Receives, orders, decodes and hashes KV-cache events.

Commands come and deltas go over the socket FD; it ends when the other side does. It never waits for the request loop:
when the loop does not read, deltas are dropped, and each publisher concerned is told anew from what is known here.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
import time
from array import array
from collections.abc import Callable

import msgspec
import zmq

from picker.core.prefix.deltas import Op, Tier
from picker.signals.kv.messages import (
    ALIVE,
    COUNTS,
    FACTS,
    FRAME,
    MAX_FRAME_BYTES,
    TROUBLE,
    Command,
    Counted,
    Counts,
    Facts,
    Start,
    Subscribe,
    Trouble,
)
from picker.signals.kv.outbox import Outbox
from picker.signals.kv.publisher import Publisher
from picker.signals.kv.replay import Stream
from picker.signals.kv.sockets import Socket, Subscription

# Read from one socket before the others get their turn, and from all before the loop is served.
_MESSAGES_PER_TURN = 64
_TURN_S = 0.05
_REPORT_S = 1.0
# Each decodes up to 10,000 batches; more at a time only make all of them later.
_MAX_REPLAYS = 8
_SEND_BYTES = 256 * 1024
# Five per publisher: events, monitor (two), replay and its pipe. Thousands of publishers.
_MAX_SOCKETS = 65_536

_COMMANDS = msgspec.msgpack.Decoder[Command](Command)


class _Heard:
    """One publisher as the worker sees it, and what the loop was told of it."""

    __slots__ = ("counts", "dropped", "facts", "online", "subscription")

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.dropped = False
        self.online = False
        self.facts: Facts | None = None
        self.counts: Counts | None = None


class Worker:
    """Everything between the link to the loop and the publishers' sockets."""

    def __init__(self, link: socket.socket, clock: Callable[[], float], outbox: Outbox | None = None) -> None:
        self._link, self._clock = link, clock
        self._outbox = outbox or Outbox()
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._secret = b""
        self._ended = False
        self._reported_at = clock()
        self._turns = 0
        self._context: zmq.Context[Socket] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self._poller = zmq.Poller()
        self._readers: dict[object, tuple[int, Callable[[], bool]]] = {}
        self._heard: dict[int, _Heard] = {}
        link.setblocking(False)

    def run(self) -> None:
        """Until the other side is gone."""
        try:
            while not self._ended:
                self._turn()
        finally:
            for heard in self._heard.values():
                heard.subscription.close()
            self._context.term()

    # -- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        pending = len(self._unsent) > 0 or not self._outbox.empty
        self._poller.register(self._link.fileno(), zmq.POLLIN | (zmq.POLLOUT if pending else 0))
        ready = dict(self._poller.poll(int(_REPORT_S * 1000)))
        if ready.pop(self._link.fileno(), 0) & ~zmq.POLLOUT:
            self._read_commands()
        touched = self._receive([socket for socket in ready if socket in self._readers])
        now = self._clock()
        self._replay(now)
        for publisher in touched:
            if publisher in self._heard:
                self._tell(publisher, self._heard[publisher])
        if now - self._reported_at >= _REPORT_S:
            self._reported_at = now
            self._report()
        self._send()

    def _receive(self, ready: list[object]) -> set[int]:
        """Reads what is there, fairly and for a bounded time. Returns whose it was."""
        touched: set[int] = set()
        until = self._clock() + _TURN_S
        # Each turn begins with another socket, since it may end before the last one.
        self._turns += 1
        first = self._turns % max(1, len(ready))
        for socket_ready in ready[first:] + ready[:first]:
            if socket_ready not in self._readers:
                continue  # given up a moment ago
            publisher, read = self._readers[socket_ready]
            touched.add(publisher)
            try:
                for _ in range(_MESSAGES_PER_TURN):
                    if not read():
                        break
            except Exception as error:
                # A bug that one publisher's data found must not cost the others their worker.
                self._give_up(publisher, type(error).__name__)
            if self._clock() >= until:
                break
        return touched

    def _replay(self, now: float) -> None:
        under_way = 0
        for publisher, heard in self._heard.items():
            if heard.subscription.tend(now):
                self._tell(publisher, heard)
            under_way += heard.subscription.replaying
        for publisher, heard in self._heard.items():
            if under_way >= _MAX_REPLAYS:
                return
            if heard.subscription.stream.wants_replay:
                heard.subscription.ask_replay(now)
                under_way += heard.subscription.replaying
                self._tell(publisher, heard)

    # -- what the loop is told ---------------------------------------------------------------------------------------

    def _tell(self, publisher: int, heard: _Heard) -> None:
        """What is new about one publisher."""
        stream = heard.subscription.stream
        cleared, changes = stream.publisher.take()
        if self._outbox.full:
            heard.dropped = heard.dropped or cleared or bool(changes)
        if heard.dropped:
            return
        self._outbox.changes(publisher, cleared, changes)
        self._tell_state(publisher, heard)

    def _tell_state(self, publisher: int, heard: _Heard) -> None:
        stream = heard.subscription.stream
        known = stream.publisher
        facts = Facts(publisher, known.block_tokens, known.loras, known.complete)
        if facts != heard.facts:
            heard.facts = facts
            self._outbox.message(FACTS, msgspec.msgpack.encode(facts))
        if stream.current is not heard.online:
            heard.online = stream.current
            self._outbox.state(publisher, heard.online)

    def _tell_anew(self) -> None:
        """All that is known of the publishers whose deltas were dropped, one after another."""
        for publisher, heard in self._heard.items():
            if heard.dropped and self._outbox.drained:
                known = heard.subscription.stream.publisher
                heard.dropped = False
                known.counts.resyncs += 1
                known.take()
                self._outbox.changes(publisher, True, [])
                for tier in Tier:
                    self._outbox.keys(publisher, Op.ADD, tier, array("Q", known.held(tier)))
                self._tell_state(publisher, heard)

    def _report(self) -> None:
        if self._outbox.full:
            return
        self._outbox.message(ALIVE, b"")
        for publisher, heard in self._heard.items():
            counts = heard.subscription.stream.publisher.counts
            if counts != heard.counts:
                heard.counts = msgspec.structs.replace(counts)
                self._outbox.message(COUNTS, msgspec.msgpack.encode(Counted(publisher, counts)))

    def _send(self) -> None:
        self._tell_anew()
        try:
            while True:
                if not self._unsent:
                    self._unsent = memoryview(self._outbox.next_bytes(_SEND_BYTES))
                if not self._unsent:
                    return
                self._unsent = self._unsent[self._link.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._ended = True

    # -- commands ----------------------------------------------------------------------------------------------------

    def _read_commands(self) -> None:
        try:
            data = self._link.recv(2**16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended = True
            return
        self._received += data
        while len(self._received) >= FRAME.size:
            length, _ = FRAME.unpack_from(self._received)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a command of {length} bytes")
            end = FRAME.size + length
            if len(self._received) < end:
                return
            command = _COMMANDS.decode(bytes(self._received[FRAME.size : end]))
            del self._received[:end]
            self._obey(command)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Start):
            self._secret = command.secret
        elif isinstance(command, Subscribe):
            self._subscribe(command)
        else:
            self._end(command.publisher)

    def _end(self, publisher: int) -> None:
        heard = self._heard.pop(publisher, None)
        if heard is not None:
            heard.subscription.close()
            self._outbox.changes(publisher, True, [])
            self._outbox.state(publisher, False)

    def _give_up(self, publisher: int, reason: str) -> None:
        self._end(publisher)
        self._outbox.message(TROUBLE, msgspec.msgpack.encode(Trouble(publisher, reason)))

    def _subscribe(self, command: Subscribe) -> None:
        publisher = command.publisher

        def watch(socket: Socket, read: Callable[[], bool]) -> None:
            self._readers[socket] = (publisher, read)
            self._poller.register(socket, zmq.POLLIN)

        def unwatch(socket: Socket) -> None:
            del self._readers[socket]
            self._poller.unregister(socket)

        stream = Stream(Publisher(self._secret), replays=bool(command.spec.replay_endpoint))
        try:
            subscription = Subscription(self._context, command.spec, stream, watch=watch, unwatch=unwatch)
        except zmq.ZMQError as error:
            self._give_up(publisher, f"{command.spec.endpoint}: {error}")
            return
        self._heard[publisher] = _Heard(subscription)


def main(arguments: list[str]) -> None:
    """Runs until the parent's end of the socket is closed."""
    # A terminal's interrupt goes to parent and worker alike; the parent decides, and may still drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket(fileno=int(arguments[0])) as link:
        Worker(link, time.monotonic).run()


if __name__ == "__main__":
    main(sys.argv[1:])
