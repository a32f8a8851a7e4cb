"""The batches of one publisher put in order: numbers, gaps, restarts and replays. Pure: no sockets, no clock.

A publisher numbers its batches from 0 and keeps the last of them for replays, if it was told to. Batches heard live
and replayed overlap. A number that is not higher than the last one heard means another process; so does a replay whose
batch differs from the one we had under its number. What cannot be repaired clears the publisher.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from picker.signals.kv.publisher import Publisher

END = 2**64 - 1
_NUMBER_BYTES = 8
# Heard before a replay is over. At one batch per engine step of 10 ms that is 10 s.
MAX_HELD = 1000
MAX_HELD_BYTES = 32 * 2**20
# What a new process can have published before the connection to it stands.
MAX_UNHEARD = 1000
# Replays asked for in a row without one new batch from them.
MAX_ATTEMPTS = 4


def parse(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """Number and payload of a message, live or replayed; None for something else. The end of a replay has number
    `END` and no payload.

    Read from the end: replays have two forms, with the topic (vLLM from 0.28, SGLang 0.5.23) and without.
    """
    if len(frames) < 2 or len(frames[-2]) != _NUMBER_BYTES:
        return None
    return int.from_bytes(frames[-2], "big"), frames[-1]


def request(number: int) -> list[bytes]:
    """What is sent to ask for all batches from `number` on. The empty frame stands for a REQ socket's."""
    return [b"", number.to_bytes(_NUMBER_BYTES, "big")]


class _Mode(enum.Enum):
    LIVE = enum.auto()
    WANTED = enum.auto()  # a replay is needed, not asked for yet
    ASKED = enum.auto()


class Stream:
    """Order for one `Publisher`. Whoever owns the sockets tells what arrived, and asks when `wants_replay`."""

    def __init__(self, publisher: Publisher, *, replays: bool) -> None:
        self.publisher = publisher
        self._has_replays = replays
        self._may_ask = replays
        self._mode = _Mode.LIVE
        self._connected = False
        self._silent = True
        self._doubted = True
        self._next: int | None = None
        self._digest = 0
        self._heard = -1
        self._held: list[tuple[int, bytes]] = []
        self._held_bytes = 0
        self._attempts = 0
        self._opened = False
        self._hole = False

    @property
    def wants_replay(self) -> bool:
        return self._mode is _Mode.WANTED

    @property
    def awaits_replay(self) -> bool:
        return self._mode is _Mode.ASKED

    @property
    def current(self) -> bool:
        """Connected, with nothing missed since the last clearing."""
        return self._connected and not self._doubted and self._mode is _Mode.LIVE and self._next is not None

    # -- the connection ----------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """To the events. What was missed before is asked for, and whether it is still the same process."""
        self._connected = self._silent = True
        self._may_ask, self._attempts = self._has_replays, 0
        self._want()

    def disconnected(self) -> None:
        """Nothing is heard for now; what is known may be out of date."""
        self._connected = False
        self._doubted = True
        self._live_again()

    # -- live --------------------------------------------------------------------------------------------------------

    def live(self, number: int, payload: bytes) -> None:
        """One batch from the events socket."""
        if number <= self._heard:
            self._restarted()
        self._heard, self._silent = number, False
        if self._mode is _Mode.LIVE:
            self._in_order(number, payload)
        else:
            self._hold(number, payload)

    def _in_order(self, number: int, payload: bytes) -> None:
        if self._next is not None and number < self._next:
            if not self._doubted:
                return  # came with a replay
            self._restarted()
        if self._next is None:
            self._first(number, payload)
        elif number == self._next and not self._suspicious():
            self._apply(number, payload)
        else:
            self.publisher.counts.gaps += number > self._next
            if self._want():
                self._hold(number, payload)
            else:
                self._lost()
                self._apply(number, payload)

    def _suspicious(self) -> bool:
        """Whether the next number may come from another process than the ones before it."""
        return self._doubted and 0 < (self._next or 0) <= MAX_UNHEARD

    def _first(self, number: int, payload: bytes) -> None:
        if number > 0 and self._want():
            self._hold(number, payload)
            return
        self.publisher.complete = number == 0
        self.publisher.counts.late += number > 0
        self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        if not self.publisher.apply(payload):
            self._lost()
        self._next = number + 1
        self._doubted = False
        if self._has_replays:
            self._digest = xxh3_64_intdigest(payload)

    def _hold(self, number: int, payload: bytes) -> None:
        # Not kept beyond the bound: the gap will show, and another replay has them.
        if len(self._held) < MAX_HELD and self._held_bytes + len(payload) <= MAX_HELD_BYTES:
            self._held.append((number, payload))
            self._held_bytes += len(payload)

    def _lost(self) -> None:
        self.publisher.counts.losses += 1
        self.publisher.clear(complete=False)
        self._may_ask, self._attempts = self._has_replays, 0

    def _restarted(self) -> None:
        self.publisher.counts.restarts += 1
        self.publisher.clear(complete=False)
        self._next, self._heard = None, -1
        self._live_again()

    def _live_again(self) -> None:
        self._mode = _Mode.LIVE
        self._held, self._held_bytes = [], 0

    # -- replays -----------------------------------------------------------------------------------------------------

    def _want(self) -> bool:
        """Whether a replay will be asked for."""
        self._may_ask = self._may_ask and self._attempts < MAX_ATTEMPTS
        if self._may_ask:
            self._mode = _Mode.WANTED
        return self._may_ask

    def ask(self) -> int:
        """The number to ask a replay from, which is being done now."""
        self._mode = _Mode.ASKED
        self._attempts += 1
        self._opened = self._hole = False
        self.publisher.counts.replays += 1
        # From the last batch we have: if it comes back unchanged, it is the same process.
        return max(0, (self._next or 0) - 1)

    def replayed(self, number: int, payload: bytes) -> None:
        """One message of the replay asked for last, its end included. Others do no harm."""
        if self._mode is not _Mode.ASKED:
            return
        if number == END:
            self._replay_ended()
        elif not self._opened:
            self._opened = True
            self._replay_begins(number, payload)
        elif self._next is not None and number > self._next:
            # A publisher drops replayed batches when they are read slower than it sends them.
            self._hole = True
        elif number == self._next and not self._hole:
            self._attempts = 0
            self._apply(number, payload)

    def _replay_begins(self, number: int, payload: bytes) -> None:
        publisher = self.publisher
        if not self._next:
            publisher.complete = number == 0
            publisher.counts.late += number > 0
            self._apply(number, payload)
        elif number == self._next - 1:
            if xxh3_64_intdigest(payload) == self._digest:
                self._doubted = False
            else:
                self._restarted()
                self._want()
        elif number >= self._next:
            self._lost()
            self._apply(number, payload)

    def _replay_ended(self) -> None:
        if not self._opened:
            if self._next:
                # It has less than it once sent.
                self._restarted()
                self._want()
                return
            if self._silent:
                self._next = 0
                self._doubted = False
                self.publisher.complete = True
            elif not self._held or self._held[0][0] > 0:
                self._hole = True
        if not (self._hole and self._want()):
            self._release()

    def replay_failed(self) -> None:
        """No answer came, or it broke off."""
        if self._mode is _Mode.ASKED:
            self._may_ask = self._opened
            if not self._want():
                self._release()

    def _release(self) -> None:
        """Goes on live with what was heard during the replay."""
        held = self._held
        self._live_again()
        for number, payload in held:
            if self._mode is _Mode.LIVE:
                self._in_order(number, payload)
            else:
                self._hold(number, payload)
        if self._mode is _Mode.LIVE:
            self._attempts = 0
