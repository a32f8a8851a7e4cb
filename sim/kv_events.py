"""The ZeroMQ side of KV-cache events: a PUB socket for what happens, a ROUTER socket for what was missed.

A message has three frames: topic, sequence number (8 bytes, big endian, from 0, one per batch), payload. A subscriber
that missed some sends an empty frame and the first number it wants to the replay socket, and gets the batches that are
still kept, then an end marker. No thread of our own: sends do not block, and requests come through the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import zmq

from sim.kv_encoding import Encoding, KvEncoder
from sim.prefix import CacheChange

# A subscriber this many batches behind loses the next ones. Real engines keep 100,000; here many share one machine.
SEND_LIMIT: Final = 10_000
# What replay may hold beside its number of batches: a batch of a long prompt has some 40 kB.
MAX_BUFFERED_BYTES: Final = 64 << 20
END_OF_REPLAY: Final = b"\xff" * 8
_SEQ_BYTES: Final = 8


class KvEvents(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine publishes its KV-cache events. Port 0 takes a free one; no ``replay_port``, no replay.

    ``buffer_steps``: batches kept for replay. ``replay_topic``: whether the frames of a replay include the topic;
    None does as the versions with this encoding do (maps: yes, arrays: no).
    """

    encoding: Encoding = "map"
    port: int = 0
    replay_port: int | None = None
    buffer_steps: int = 10_000
    replay_topic: bool | None = None

    def moved(self, offset: int) -> KvEvents:
        """The same with fixed ports moved by ``offset``."""
        return msgspec.structs.replace(
            self,
            port=self.port and self.port + offset,
            replay_port=self.replay_port and self.replay_port + offset,
        )


class KvPublisher:
    """Publishes the batches of one engine incarnation until ``close``. Raises OSError when a port is taken.

    ``answers`` says whether replay requests are answered at the moment. ``endpoint`` and ``replay_endpoint`` tell
    where the sockets are, and ``settings`` is as given but with the real ports.
    """

    def __init__(
        self,
        settings: KvEvents,
        *,
        encoder: KvEncoder,
        host: str,
        topic: str,
        loop: asyncio.AbstractEventLoop,
        answers: Callable[[], bool],
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.topic = topic
        self.next_seq = 0
        self.replay_endpoint: str | None = None
        self._encoder = encoder
        self._host = f"[{host}]" if ":" in host else host
        self._loop = loop
        self._answers = answers
        self._unix_s = unix_s
        self._drops = 0
        self._kept: deque[tuple[bytes, bytes]] = deque()
        self._kept_bytes = 0
        with_topic = settings.encoding == "map" if settings.replay_topic is None else settings.replay_topic
        self._replay_head = [b""] if with_topic else []
        self._context = zmq.Context()
        self._publisher = self._context.socket(zmq.PUB)
        self._router: zmq.Socket[bytes] | None = None
        try:
            self.endpoint = self._bind(self._publisher, settings.port, limit=SEND_LIMIT)
            if settings.replay_port is not None:
                self._router = self._context.socket(zmq.ROUTER)
                # One whole replay must fit: a router drops what does not.
                limit = settings.buffer_steps + 1
                self.replay_endpoint = self._bind(self._router, settings.replay_port, limit=limit)
                loop.add_reader(self._router.fileno(), self._serve_replay)
        except OSError:
            self._context.destroy(linger=0)
            raise
        self.settings = msgspec.structs.replace(
            settings,
            port=_port(self.endpoint),
            replay_port=_port(self.replay_endpoint) if self.replay_endpoint else None,
        )

    def publish(self, changes: Sequence[CacheChange]) -> None:
        """Send one batch. Never blocks: subscribers that are too far behind miss it."""
        number = self.next_seq.to_bytes(_SEQ_BYTES, "big")
        payload = self._encoder.batch(changes, unix_s=self._unix_s())
        self.next_seq += 1
        if self._router is not None:
            self._keep(number, payload)
        if self._drops:
            self._drops -= 1
            return
        self._publisher.send_multipart([self.topic.encode(), number, payload], zmq.NOBLOCK)

    def drop(self, batches: int) -> None:
        """Do not send the next ``batches`` ones. They count, and replay has them."""
        self._drops = batches

    def close(self) -> None:
        """Close the sockets at once; what is unsent is lost."""
        if self._router is not None:
            self._loop.remove_reader(self._router.fileno())
            self._router.close(linger=0)
            self._router = None
        self._context.destroy(linger=0)

    def _bind(self, socket: zmq.Socket[bytes], port: int, *, limit: int) -> str:
        socket.setsockopt(zmq.SNDHWM, limit)
        socket.setsockopt(zmq.IPV6, int(self._host.startswith("[")))
        try:
            socket.bind(f"tcp://{self._host}:{port or '*'}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{error} (KV events, port {port})") from error
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _keep(self, number: bytes, payload: bytes) -> None:
        self._kept.append((number, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self.settings.buffer_steps or self._kept_bytes > MAX_BUFFERED_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _serve_replay(self) -> None:
        router = self._router
        # The descriptor only says that something has happened to the socket, once.
        if router is None or not int(router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return
        identity, *request = router.recv_multipart(zmq.NOBLOCK)
        if self._answers() and len(request) == 2 and len(request[1]) == _SEQ_BYTES:
            self._replay(router, identity, wanted=request[1])
        self._loop.call_soon(self._serve_replay)

    def _replay(self, router: zmq.Socket[bytes], identity: bytes, *, wanted: bytes) -> None:
        topic = [self.topic.encode()] if self._replay_head else []
        # Big-endian numbers of one length compare as bytes.
        for number, payload in self._kept:
            if number >= wanted:
                router.send_multipart([identity, b"", *topic, number, payload], zmq.NOBLOCK)
        router.send_multipart([identity, b"", *self._replay_head, END_OF_REPLAY, b""], zmq.NOBLOCK)


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
