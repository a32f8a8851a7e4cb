"""The ZMQ sockets of one publisher: its events, the state of that connection, and replays when they are asked for.

Opens, reads and closes; what is read goes to the `Stream`. Each publisher has sockets of its own, so that what it says
is known by the connection and never by a topic it chose.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from picker.signals.kv.decode import MAX_PAYLOAD_BYTES
from picker.signals.kv.messages import Spec
from picker.signals.kv.replay import Stream, parse, request

# Ten seconds of an engine's steps. Beyond it the engine's own queue (100,000) fills, then it drops.
_EVENTS_HWM = 1000
# As many as engines keep for replays: they drop what the connection does not take at once.
_REPLAY_HWM = 10_000
# An engine that starts serves its first requests seconds after it opened its socket.
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 1000
_HOST_GONE_S = 30
# No answer for so long means that none comes: an idle engine looks for requests every 0.1 s.
REPLAY_PATIENCE_S = 3.0
# Ten thousand batches take seconds. One that goes on for ever holds a place that others wait for.
REPLAY_MAX_S = 120.0

Socket = zmq.Socket[bytes]


def _open(context: zmq.Context[Socket], kind: int, address: str, hwm: int) -> Socket:
    socket: Socket = context.socket(kind)
    socket.linger = 0
    socket.rcvhwm = hwm
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    # Finds hosts that vanished. ZMQ's own heartbeats would cut off publishers that do not answer them.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _HOST_GONE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _HOST_GONE_S // 3)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    return socket


class Subscription:
    """One publisher's sockets and stream. `watch` and `unwatch` are told which sockets to poll."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        spec: Spec,
        stream: Stream,
        *,
        watch: Callable[[Socket, Callable[[], bool]], None],
        unwatch: Callable[[Socket], None],
    ) -> None:
        """Raises zmq.ZMQError for an address that ZMQ does not take, or when there are no more sockets."""
        self.stream = stream
        self._context, self._spec = context, spec
        self._watch, self._unwatch = watch, unwatch
        self._replays: Socket | None = None
        self._answered = False
        self._asked_at = self._answered_at = 0.0
        self._events = _open(context, zmq.SUB, spec.endpoint, _EVENTS_HWM)
        self._states: Socket | None = None
        try:
            self._states = self._events.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            self._events.subscribe(spec.topic)
            self._events.connect(spec.endpoint)
        except zmq.ZMQError:
            self._close_events()
            raise
        watch(self._states, self._read_state)
        watch(self._events, self._read_event)

    def close(self) -> None:
        """Closes everything at once."""
        self._close_replay()
        for socket in (self._events, self._states):
            if socket is not None:
                self._unwatch(socket)
        self._close_events()

    def ask_replay(self, now: float) -> None:
        """Asks for the replay that the stream wants. `now` in seconds of any steady clock."""
        self._close_replay()
        number = self.stream.ask()
        try:
            self._replays = _open(self._context, zmq.DEALER, self._spec.replay_endpoint, _REPLAY_HWM)
            self._replays.connect(self._spec.replay_endpoint)
            self._replays.send_multipart(request(number), zmq.NOBLOCK)
        except zmq.ZMQError:
            if self._replays is not None:
                self._replays.close(0)
                self._replays = None
            self.stream.replay_failed()
            return
        self._asked_at = self._answered_at = now
        self._watch(self._replays, self._read_replay)

    def tend(self, now: float) -> bool:
        """Ends a replay that is over, or that nobody answers. Whether it ended one."""
        if self._replays is None:
            return False
        if self._answered:
            self._answered, self._answered_at = False, now
        overdue = now - self._answered_at > REPLAY_PATIENCE_S or now - self._asked_at > REPLAY_MAX_S
        if self.stream.awaits_replay and overdue:
            self.stream.replay_failed()
        if self.stream.awaits_replay:
            return False
        self._close_replay()
        return True

    @property
    def replaying(self) -> bool:
        return self._replays is not None

    # Readers take one message; False when there is none.

    def _read_event(self) -> bool:
        frames = _receive(self._events)
        message = parse(frames) if frames else None
        if message is not None:
            self.stream.live(*message)
        elif frames:
            self.stream.publisher.counts.malformed += 1
        return frames is not None

    def _read_replay(self) -> bool:
        frames = None if self._replays is None else _receive(self._replays)
        message = parse(frames) if frames else None
        if message is not None:
            self._answered = True
            self.stream.replayed(*message)
        return frames is not None

    def _read_state(self) -> bool:
        frames = None if self._states is None else _receive(self._states)
        if not frames:
            return False
        if parse_monitor_message(frames)["event"] == zmq.EVENT_DISCONNECTED:
            self.stream.disconnected()
        else:
            self.stream.connected()
        return True

    def _close_replay(self) -> None:
        if self._replays is not None:
            self._unwatch(self._replays)
            self._replays.close(0)
            self._replays = None

    def _close_events(self) -> None:
        self._events.disable_monitor()
        self._events.close(0)
        if self._states is not None:
            self._states.close(0)


def _receive(socket: Socket) -> list[bytes] | None:
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
