"""Order, gaps, restarts and replays: single cases, and histories in which batches and whole answers get lost."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.core.prefix.deltas import Tier
from picker.signals.kv.publisher import Publisher
from picker.signals.kv.replay import END, MAX_ATTEMPTS, MAX_HELD, MAX_UNHEARD, Stream, parse, request
from tests.unit.signals.kv.engine import Engine
from tests.unit.signals.kv.naive import SECRET
from tests.unit.signals.kv.test_kv_publisher import Mirror

Held = tuple[set[int], set[int], set[int]]


def batch(name: int) -> bytes:
    """Stores one block whose tokens are its name."""
    event = {"type": "BlockStored", "block_hashes": [name], "token_ids": [name], "block_size": 1, "medium": "GPU"}
    return msgspec.msgpack.encode([float(name), [event], 0])


def listening(*, replays: bool) -> Stream:
    stream = Stream(Publisher(SECRET), replays=replays)
    stream.connected()
    return stream


def blocks(stream: Stream) -> int:
    return len(set(stream.publisher.held(Tier.GPU)))


def answer(stream: Stream, *numbers: int, end: bool = True, offset: int = 0) -> int:
    """Asks and answers with these batches. Returns the number asked from."""
    asked = stream.ask()
    for number in numbers:
        stream.replayed(number, batch(number + offset))
    if end:
        stream.replayed(END, b"")
    return asked


def settled(*numbers: int) -> Stream:
    """A stream with replays that has these batches, from 0."""
    stream = listening(replays=True)
    answer(stream, *numbers)
    assert stream.current
    return stream


def test_frames_are_read_from_the_end() -> None:
    number = (7).to_bytes(8, "big")
    assert parse([b"topic", number, b"x"]) == parse([b"", b"topic", number, b"x"]) == parse([b"", number, b"x"])
    assert parse([b"", b"", b"\xff" * 8, b""]) == (END, b"")
    assert request(7) == [b"", number]


@pytest.mark.parametrize("frames", [[], [b"x"], [b"topic", b"short", b"x"], [b"", b""]])
def test_other_frames_are_none(frames: list[bytes]) -> None:
    assert parse(frames) is None


def test_in_order() -> None:
    stream = listening(replays=False)
    assert not stream.current
    for number in range(3):
        stream.live(number, batch(number))

    assert (blocks(stream), stream.current, stream.publisher.complete) == (3, True, True)
    assert stream.publisher.counts.late == 0


def test_joining_late_is_not_complete() -> None:
    stream = listening(replays=False)
    stream.live(5, batch(5))

    assert (blocks(stream), stream.current, stream.publisher.complete) == (1, True, False)
    assert stream.publisher.counts.late == 1


def test_gap_without_replays_clears() -> None:
    stream = listening(replays=False)
    stream.live(0, batch(0))
    stream.live(2, batch(2))

    counts = stream.publisher.counts
    assert (blocks(stream), stream.current, stream.publisher.complete) == (1, True, False)
    assert (counts.gaps, counts.losses) == (1, 1)


def test_going_backwards_is_a_restart() -> None:
    stream = listening(replays=False)
    for number in (0, 1, 2):
        stream.live(number, batch(number))
    stream.live(0, batch(9))

    assert (blocks(stream), stream.publisher.complete, stream.publisher.counts.restarts) == (1, True, 1)


def test_first_connection_asks_for_everything() -> None:
    stream = listening(replays=True)
    assert stream.wants_replay
    assert answer(stream, 0, 1, 2) == 0

    assert (blocks(stream), stream.current, stream.publisher.complete) == (3, True, True)


def test_an_engine_that_published_nothing_is_known_exactly() -> None:
    stream = settled()
    assert (blocks(stream), stream.publisher.complete) == (0, True)
    stream.live(0, batch(0))
    assert (blocks(stream), stream.publisher.counts.gaps) == (1, 0)


def test_history_that_is_gone_is_a_late_join() -> None:
    stream = listening(replays=True)
    answer(stream, 4, 5)

    assert (blocks(stream), stream.current, stream.publisher.complete) == (2, True, False)
    assert (stream.publisher.counts.late, stream.publisher.counts.losses) == (1, 0)


def test_live_batches_during_a_replay_are_applied_once_and_in_order() -> None:
    stream = listening(replays=True)
    stream.live(1, batch(1))
    stream.ask()
    stream.live(2, batch(2))
    stream.live(3, batch(3))
    for number in (0, 1, 2):
        stream.replayed(number, batch(number))
    stream.replayed(END, b"")
    stream.live(4, batch(4))

    assert (blocks(stream), stream.publisher.counts.stored) == (5, 5)


def test_overlap_that_is_heard_after_the_replay_is_dropped() -> None:
    stream = settled(0, 1, 2)
    for number in (1, 2, 3):
        stream.live(number, batch(number))

    assert (stream.publisher.counts.stored, stream.publisher.counts.restarts) == (4, 0)


def test_gap_is_filled() -> None:
    stream = settled(0, 1)
    stream.live(4, batch(4))
    assert stream.wants_replay
    assert not stream.current
    stream.live(5, batch(5))
    assert answer(stream, 1, 2, 3, 4, 5) == 1

    assert (blocks(stream), stream.current, stream.publisher.complete) == (6, True, True)
    assert (stream.publisher.counts.gaps, stream.publisher.counts.losses) == (1, 0)


def test_replay_that_begins_too_late_clears() -> None:
    stream = settled(0, 1)
    stream.live(5, batch(5))
    answer(stream, 4, 5)

    assert (blocks(stream), stream.current, stream.publisher.complete) == (2, True, False)
    assert stream.publisher.counts.losses == 1


def test_another_batch_under_a_known_number_is_another_process() -> None:
    stream = settled(0, 1)
    stream.disconnected()
    assert not stream.current
    stream.connected()
    assert answer(stream, 1, 2, end=False, offset=100) == 1
    assert stream.wants_replay
    assert answer(stream, 0, 1, 2, offset=100) == 0

    assert (blocks(stream), stream.current, stream.publisher.complete) == (3, True, True)
    assert stream.publisher.counts.restarts == 1


def test_a_process_with_fewer_batches_is_another_one() -> None:
    stream = settled(0, 1, 2)
    stream.disconnected()
    stream.connected()
    answer(stream)
    assert answer(stream, 0, offset=100) == 0

    assert (blocks(stream), stream.publisher.complete) == (1, True)


def test_another_process_is_noticed_when_its_replays_do_not_answer() -> None:
    """Nothing had been heard live of the old one, so its numbers are only known from a replay."""
    stream = settled(0, 1, 2)
    stream.disconnected()
    stream.connected()
    stream.ask()
    stream.replay_failed()
    stream.live(0, batch(100))

    assert (blocks(stream), stream.current, stream.publisher.counts.restarts) == (1, True, 1)


def test_an_empty_answer_of_an_engine_that_was_heard_is_not_believed() -> None:
    stream = listening(replays=True)
    stream.live(5, batch(5))
    answer(stream)

    assert stream.wants_replay
    assert not stream.publisher.complete


def test_short_cut_of_the_connection_keeps_everything() -> None:
    stream = settled(0, 1)
    stream.disconnected()
    stream.connected()
    assert answer(stream, 1, 2) == 1

    assert (blocks(stream), stream.current) == (3, True)
    assert (stream.publisher.counts.restarts, stream.publisher.counts.losses) == (0, 0)


@pytest.mark.parametrize(("number", "kept"), [(2, False), (MAX_UNHEARD + 1, True)])
def test_reconnected_without_replays_the_next_number_proves_little_while_it_is_low(number: int, kept: bool) -> None:
    stream = listening(replays=False)
    for earlier in range(number):
        stream.live(earlier, batch(earlier))
    stream.disconnected()
    stream.connected()
    before = stream.current
    stream.live(number, batch(number))

    assert (before, stream.current) == (False, True)
    assert blocks(stream) == (number + 1 if kept else 1)


def test_a_hole_in_a_replay_is_asked_for_again() -> None:
    stream = listening(replays=True)
    answer(stream, 0, 1, 3, 4)
    assert stream.wants_replay
    assert answer(stream, 1, 2, 3, 4) == 1

    assert (blocks(stream), stream.publisher.complete) == (5, True)


def test_a_hole_that_stays_is_a_loss() -> None:
    stream = listening(replays=True)
    stream.ask()
    stream.live(5, batch(5))
    stream.replayed(0, batch(0))
    stream.replayed(2, batch(2))
    stream.replayed(END, b"")
    for _ in range(MAX_ATTEMPTS):
        if stream.wants_replay:
            answer(stream, 0, 2, 5)
    assert not stream.wants_replay
    stream.live(6, batch(6))

    assert (blocks(stream), stream.publisher.complete, stream.current) == (2, False, True)
    assert stream.publisher.counts.losses == 1


def test_nobody_answers() -> None:
    stream = listening(replays=True)
    stream.ask()
    stream.live(7, batch(7))
    stream.live(8, batch(8))
    stream.replay_failed()

    assert (blocks(stream), stream.current, stream.publisher.complete) == (2, True, False)
    stream.live(10, batch(10))
    assert (blocks(stream), stream.publisher.counts.losses) == (1, 1)


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    stream = listening(replays=True)
    answer(stream, 0, 1, end=False)
    stream.replay_failed()
    assert stream.wants_replay
    assert answer(stream, 1, 2) == 1
    assert blocks(stream) == 3


def test_restart_during_a_replay() -> None:
    stream = listening(replays=True)
    stream.live(8, batch(8))
    stream.ask()
    stream.replayed(0, batch(0))
    stream.live(0, batch(100))
    stream.replayed(1, batch(1))

    assert not stream.awaits_replay
    assert (blocks(stream), stream.current, stream.publisher.complete) == (1, True, True)


def test_held_batches_are_bounded() -> None:
    stream = listening(replays=True)
    stream.ask()
    for number in range(MAX_HELD + 10):
        stream.live(number, batch(number))
    stream.replayed(END, b"")
    assert blocks(stream) == MAX_HELD
    stream.live(MAX_HELD + 10, batch(MAX_HELD + 10))
    assert stream.wants_replay


def test_a_malformed_batch_is_a_loss() -> None:
    stream = settled(0, 1)
    stream.live(2, b"\xc1")

    assert (blocks(stream), stream.publisher.complete, stream.publisher.counts.losses) == (0, False, 1)
    stream.live(3, batch(3))
    assert (blocks(stream), stream.publisher.counts.gaps) == (1, 0)


class Recorder(Publisher):
    """Remembers what it applied last."""

    last = b""

    def apply(self, payload: bytes | memoryview) -> bool:
        self.last = bytes(payload)
        return super().apply(payload)


class Wire:
    """An engine and a stream, with a network in between that loses things when the dice say so."""

    def __init__(self, rng: Random, *, replays: bool, keeps: int) -> None:
        self.rng, self.replays, self.keeps = rng, replays, keeps
        self.publisher = Recorder(SECRET)
        self.stream = Stream(self.publisher, replays=replays)
        self.mirror = Mirror(self.publisher)
        self.engine = Engine(rng)
        self.truths: dict[bytes, tuple[Engine, Held]] = {}
        self.up = False

    def publish(self, *, arrives: bool) -> None:
        number, payload = self.engine.step()
        self.truths[payload] = (self.engine, self.engine.truth.held())
        if arrives and self.up:
            self.stream.live(number, payload)
        self.check()

    def connect(self, up: bool) -> None:
        if up != self.up:
            self.up = up
            self.stream.connected() if up else self.stream.disconnected()
        self.check()

    def restart(self) -> None:
        self.connect(False)
        self.engine = Engine(self.rng)
        for _ in range(self.rng.randrange(4)):
            self.publish(arrives=False)

    def serve(self, *, perfect: bool) -> None:
        if not self.stream.wants_replay or not self.up:
            return
        messages = self.engine.replay(self.stream.ask(), self.keeps)
        for number, payload in messages:
            if not perfect and self.rng.random() < 0.05:
                continue
            if not perfect and self.rng.random() < 0.05:
                self.stream.replay_failed()
                self.check()
                return
            self.stream.replayed(number, payload)
            if self.rng.random() < 0.1:
                self.publish(arrives=True)
        self.stream.replayed(END, b"")
        self.check()

    def act(self) -> None:
        dice = self.rng.random()
        if dice < 0.7:
            self.publish(arrives=dice < 0.6)
        elif dice < 0.75:
            self.restart()
        elif dice < 0.85:
            self.connect(not self.up)
        else:
            self.serve(perfect=False)

    def check(self) -> None:
        """What is claimed to be current was true when the last batch was sent; nothing more, and all if complete."""
        self.mirror.follow()
        held = self.mirror.held
        assert held == tuple(set(self.publisher.held(tier)) for tier in Tier)
        if not self.stream.current:
            return
        engine, truth = self.truths.get(self.publisher.last, (self.engine, (set(), set(), set())))
        if engine is not self.engine:
            truth = (set(), set(), set())
        for mine, its in zip(held, truth, strict=True):
            assert mine <= its
            assert mine == its or not self.publisher.complete


@given(
    seed=st.integers(0, 2**32),
    actions=st.integers(0, 80),
    replays=st.booleans(),
    keeps=st.sampled_from([1, 5, 1000]),
)
def test_histories_never_claim_what_is_not_there(seed: int, actions: int, replays: bool, keeps: int) -> None:
    wire = Wire(Random(seed), replays=replays, keeps=keeps)
    for _ in range(actions):
        wire.act()

    wire.connect(True)
    for _ in range(MAX_ATTEMPTS + 4):
        wire.publish(arrives=True)
        wire.serve(perfect=True)
    assert wire.stream.current
    assert wire.publisher.last == wire.engine.sent[-1][1]


@given(seed=st.integers(0, 2**32), actions=st.integers(0, 60))
def test_with_replays_of_everything_nothing_is_ever_missing(seed: int, actions: int) -> None:
    """As long as answers arrive: gaps, restarts and cut connections are all repaired."""
    wire = Wire(Random(seed), replays=True, keeps=10_000)
    for _ in range(actions):
        dice = wire.rng.random()
        if dice < 0.1:
            wire.restart()
        elif dice < 0.25:
            wire.connect(not wire.up)
        else:
            wire.publish(arrives=dice < 0.8)
        if wire.rng.random() < 0.5:
            wire.serve(perfect=True)
    wire.connect(True)
    for _ in range(4):
        wire.publish(arrives=True)
        wire.serve(perfect=True)

    assert wire.publisher.complete
    assert wire.mirror.held == wire.engine.truth.held()
