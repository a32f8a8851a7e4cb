"""What the request loop and the worker process say to each other, and how it is framed. Values only.

A frame is `u32 length, u8 kind, body`, little-endian, on a local stream socket. Deltas travel as they are packed,
everything else as msgpack.
"""

from __future__ import annotations

import struct

import msgspec

FRAME = struct.Struct("<IB")
DELTA, FACTS, COUNTS, TROUBLE, ALIVE, COMMAND = range(1, 7)
# A snapshot of one publisher is cut in many deltas; nothing comes near.
MAX_FRAME_BYTES = 2**20


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """Where one publisher is heard: ZMQ addresses (`tcp://host:port`) of its events and, if it has one, of its
    replays; only messages whose topic begins with `topic` are taken.
    """

    endpoint: str
    replay_endpoint: str = ""
    topic: str = ""


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first command. `secret` goes into all keys."""

    secret: bytes

    def __repr__(self) -> str:
        return "Start(secret=...)"


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Hear a publisher. `publisher` is a u64 of the caller's choice that comes back with every delta."""

    publisher: int
    spec: Spec


class Unsubscribe(msgspec.Struct, frozen=True, tag=True):
    """Hear it no more. Its last delta is a clearing."""

    publisher: int


Command = Start | Subscribe | Unsubscribe


class Facts(msgspec.Struct, frozen=True):
    """What was learnt of a publisher. `block_tokens` are the block sizes its keys are made of; `loras` the adapters
    that were used; `complete` that all it holds is known (its history was heard from the start or from a clearing).
    """

    publisher: int
    block_tokens: tuple[int, ...] = ()
    loras: tuple[str, ...] = ()
    complete: bool = False


class Counts(msgspec.Struct):
    """What happened to one publisher's events so far.

    `batches` applied; blocks `stored` and `removed` (copies counted), `skipped` (not a whole block of dense
    attention), `orphans` (their parent is unknown), `refused` (too many); events `ignored` (of unknown kinds);
    batches and events `malformed`; `gaps` in the numbers, `replays` asked for, `losses` of everything known because
    batches are lost, `restarts` of the engine seen, `late` joins whose history was gone, `resyncs` after our own loop
    did not keep up.
    """

    batches: int = 0
    stored: int = 0
    removed: int = 0
    skipped: int = 0
    orphans: int = 0
    refused: int = 0
    ignored: int = 0
    malformed: int = 0
    gaps: int = 0
    replays: int = 0
    losses: int = 0
    restarts: int = 0
    late: int = 0
    resyncs: int = 0


class Counted(msgspec.Struct, frozen=True):
    """The counts of one publisher."""

    publisher: int
    counts: Counts


class Trouble(msgspec.Struct, frozen=True):
    """A publisher that cannot be heard, and why."""

    publisher: int
    reason: str


def frame(kind: int, body: bytes) -> bytes:
    """One message for the other side."""
    return FRAME.pack(len(body), kind) + body
