"""Frozen engines: found by the absence of progress, and by nothing else.

Every scenario runs on a simulated clock with a tick and a scrape every 100 ms, as in the running process.
"""

from __future__ import annotations

from typing import Any

import pytest

from picker.core.datastore import Datastore
from picker.core.events import FailureKind
from picker.core.ledger import EVICT_AGAIN_S, Eviction
from picker.core.updates import Alive, ProbeFailure, Remove, ScrapeFailed
from picker.core.values import Standing
from tests.unit.core.builders import datastore, pod, request, row, scraped

STEP_S = 0.1


class World:
    """One endpoint `a` on a simulated clock. `tokens` is its engine's counter, None for an engine without one."""

    def __init__(self, *, tokens: float | None = 1000.0) -> None:
        self.store: Datastore = datastore(pod("a"))
        self.now = 100.0
        self.tokens = tokens
        self.evicted: dict[int, list[Eviction]] = {}
        self.scrapes = True
        self.scrape()

    def scrape(self) -> None:
        if not self.scrapes:
            return
        if self.tokens is None:
            self.store.apply(Alive("a", self.now))
        else:
            self.store.apply(scraped("a", self.now, waiting=0.0, running=0.0, progress_tokens=self.tokens))

    def run(self, seconds: float, *, tokens_per_step: float = 0.0) -> None:
        """Lets time pass; the engine makes tokens at the rate given."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now += STEP_S
            if self.tokens is not None:
                self.tokens += tokens_per_step
            self.scrape()
            for key, why in self.store.tick(self.now).evictions:
                self.evicted.setdefault(key, []).append(why)

    def reserve(self, key: int, **fields: Any) -> None:
        self.store.reserve(request(key, received_at=self.now, **fields), "a", self.now)

    def standing(self) -> Standing:
        return row(self.store, "a", self.now).standing


@pytest.mark.parametrize("stream", [True, False])
def test_a_frozen_engine_is_out_after_two_seconds_although_its_gauges_say_idle(stream: bool) -> None:
    world = World()
    world.run(30)
    world.reserve(1, stream=stream)

    world.run(1.9)
    assert world.standing() is Standing.READY
    world.run(0.3)

    assert world.standing() is Standing.OUT
    assert world.evicted == {1: [Eviction.HUNG]}


def test_an_idle_engine_is_not_hung() -> None:
    world = World()
    world.run(60)
    assert world.standing() is Standing.READY


def test_moving_counters_are_progress() -> None:
    world = World()
    world.reserve(1)
    world.run(60, tokens_per_step=1)
    assert world.standing() is Standing.READY
    assert world.evicted == {}


def test_our_own_chunks_are_progress() -> None:
    world = World(tokens=None)
    world.reserve(1)
    world.reserve(2)
    for _ in range(20):
        world.run(1.5)
        world.store.progressed(1, world.now)
    assert world.standing() is Standing.READY, "request 2 is queued behind a working one"


def test_a_long_prefill_is_not_hung() -> None:
    """100,000 tokens at the 4,000 a second we assume take 25 s, and four times that is allowed."""
    world = World()
    world.reserve(1, prompt_tokens=100_000)
    world.run(60)
    assert world.standing() is Standing.READY
    world.run(45)
    assert world.standing() is Standing.OUT


def test_many_prompts_in_a_row_are_not_hung() -> None:
    """Each prompt of 5,000 tokens takes 2 s, and its end is the first sign after 2 s of silence."""
    world = World()
    for key in range(20):
        world.reserve(key, prompt_tokens=5_000)
    for _ in range(20):
        world.run(1.9)
        world.run(0.1, tokens_per_step=5_000)
    assert world.standing() is Standing.READY


def test_requests_that_pile_up_do_not_buy_a_frozen_engine_time() -> None:
    """Its gauges say 0, so it gets ever more requests; the first of them is as overdue as it would be alone."""
    world = World()
    for key in range(100):
        world.reserve(key, prompt_tokens=1_000)
        world.run(0.1)
        if world.standing() is Standing.OUT:
            break
    assert world.now - 100.0 < 4.0
    assert len(world.evicted) > 20


def test_a_fast_engine_is_judged_by_its_own_speed() -> None:
    world = World()
    for key in range(40):
        world.reserve(key, prompt_tokens=10_000)
        world.run(0.5, tokens_per_step=1000)
        world.store.progressed(key, world.now)
        world.store.ended(key, world.now)
    world.reserve(99, prompt_tokens=10_000)
    world.run(4.5)
    assert world.standing() is Standing.OUT


def test_a_slow_engine_is_given_time() -> None:
    world = World()
    for key in range(10):
        world.reserve(key)
        world.run(3.0, tokens_per_step=1)
        world.store.progressed(key, world.now)
        world.store.ended(key, world.now)
    world.reserve(99)
    world.run(8.0)
    assert world.standing() is Standing.READY
    world.run(5.0)
    assert world.standing() is Standing.OUT


def test_without_counters_a_silent_stream_is_hung() -> None:
    world = World(tokens=None)
    world.reserve(1, stream=True)
    world.run(2.3)
    assert world.standing() is Standing.OUT


def test_without_counters_a_long_silent_answer_is_not() -> None:
    world = World(tokens=None)
    world.reserve(1, stream=False)
    world.run(100)
    assert world.standing() is Standing.READY
    world.run(30)
    assert world.standing() is Standing.OUT


def test_a_client_that_reads_slowly_does_not_cost_the_endpoint_its_traffic() -> None:
    """The engine is done and idle; the answer is stuck in our buffers because its client does not read."""
    world = World()
    world.reserve(1)
    world.run(0.3, tokens_per_step=100)
    world.store.progressed(1, world.now)
    world.store.ledger.stall(1, world.now, stalled=True)
    world.run(60)
    world.store.ledger.stall(1, world.now, stalled=False)
    world.run(1)

    assert world.standing() is Standing.READY
    assert world.evicted == {}


def test_an_engine_that_freezes_in_the_middle_of_all_its_answers_is_found() -> None:
    """No new request need go there: token counters that rest tell, as long as the client takes what comes."""
    world = World()
    world.reserve(1)
    world.run(1.0, tokens_per_step=5)
    world.store.progressed(1, world.now)
    world.run(4.3)

    assert world.standing() is Standing.OUT
    assert world.evicted == {}, "the client has seen a part of it"


def test_an_engine_that_freezes_in_the_middle_is_found_by_the_next_request() -> None:
    world = World()
    world.reserve(1)
    world.run(1.0, tokens_per_step=5)
    world.store.progressed(1, world.now)
    world.reserve(2)
    world.run(4.3)

    assert world.standing() is Standing.OUT, "four times the second that request 1 took"
    assert world.evicted == {2: [Eviction.HUNG]}, "request 1 has its first byte and cannot move any more"


def test_a_new_request_is_not_judged_by_an_old_silence() -> None:
    """Requests that left or whose body is not seen keep the endpoint busy for a long time without a sound."""
    world = World()
    world.reserve(1)
    world.store.left(1, world.now)
    world.reserve(2, sees_body=False)
    world.run(1.0, tokens_per_step=1)
    world.store.progressed(2, world.now)
    world.run(30)
    world.reserve(3)
    world.run(1.8)
    assert world.standing() is Standing.READY


def test_headers_of_streams_do_not_hide_a_frozen_engine() -> None:
    """Behind a proxy that shows no body, a frozen engine answers every stream with headers within milliseconds."""
    world = World()
    world.run(5)
    for key in range(25):
        world.reserve(key, sees_body=False)
        world.store.progressed(key, world.now + 0.004)
        world.run(0.1)
    assert world.standing() is Standing.OUT


def test_headers_do_not_end_an_ejection_and_counters_do() -> None:
    world = World()
    world.reserve(1)
    world.run(2.3)
    assert world.standing() is Standing.OUT
    world.store.failed(1, FailureKind.HUNG, world.now)
    world.run(5.1)
    assert world.standing() is Standing.READY, "time for a trial"

    world.reserve(2, sees_body=False)
    world.store.progressed(2, world.now + 0.004)
    assert world.standing() is Standing.OUT
    world.run(1.0, tokens_per_step=3)
    assert world.standing() is Standing.READY


def test_a_long_prefill_behind_headers_is_not_hung() -> None:
    world = World()
    world.reserve(1, sees_body=False, prompt_tokens=50_000)
    world.store.progressed(1, world.now + 0.004)
    world.run(40)
    assert world.standing() is Standing.READY


def test_headers_teach_no_speed() -> None:
    world = World()
    for key in range(30):
        world.reserve(key, sees_body=False, prompt_tokens=20_000)
        world.store.progressed(key, world.now + 0.004)
        world.run(1.0, tokens_per_step=2000)
        world.store.ended(key, world.now)
    world.reserve(99, prompt_tokens=50_000)
    world.run(40)
    assert world.standing() is Standing.READY


def test_where_neither_body_nor_counters_are_seen_silence_proves_nothing() -> None:
    world = World(tokens=None)
    world.reserve(1, sees_body=False)
    world.store.progressed(1, world.now)
    world.run(100)
    assert world.standing() is Standing.READY


def test_requests_that_left_are_not_waited_for() -> None:
    world = World()
    world.scrapes = False
    world.reserve(1)
    world.store.left(1, world.now)
    world.run(60)
    assert world.standing() is Standing.READY
    assert world.evicted == {}


def test_a_trial_gets_its_time() -> None:
    """A trial that answers within the patience recovers; it is not cut at the first tick."""
    world = World()
    world.reserve(1)
    world.run(2.3)
    world.store.failed(1, FailureKind.HUNG, world.now)
    world.run(5.1)

    world.reserve(2)
    world.run(1.5)
    assert 2 not in world.evicted
    assert world.standing() is Standing.OUT, "nobody else meanwhile"
    world.store.progressed(2, world.now)
    assert world.standing() is Standing.READY


def test_a_trial_on_a_frozen_engine_fails_and_the_time_doubles() -> None:
    world = World()
    world.reserve(1)
    world.run(2.3)
    world.store.failed(1, FailureKind.HUNG, world.now)
    world.run(5.1)
    world.reserve(2)
    world.run(2.3)
    assert world.evicted[2] == [Eviction.HUNG]
    world.store.failed(2, FailureKind.HUNG, world.now)

    world.run(9.0)
    assert world.standing() is Standing.OUT
    world.run(1.5)
    assert world.standing() is Standing.READY


def test_counters_that_move_again_end_it_at_once() -> None:
    world = World()
    world.reserve(1)
    world.run(2.3)
    assert world.standing() is Standing.OUT
    world.run(0.2, tokens_per_step=1)
    assert world.standing() is Standing.READY


def test_a_restarted_engine_is_welcome_at_once() -> None:
    world = World()
    world.reserve(1)
    world.run(2.3)
    world.store.failed(1, FailureKind.HUNG, world.now)
    assert world.standing() is Standing.OUT

    world.tokens = 0.0
    world.run(0.1)
    assert world.standing() is Standing.READY


def test_counters_that_were_hidden_for_a_while_are_no_restart() -> None:
    world = World()
    world.reserve(1)
    world.run(2.3)
    world.store.apply(scraped("a", world.now, waiting=0.0, running=0.0))
    world.run(0.2)
    assert world.standing() is Standing.OUT


def test_victims_are_told_once_and_again_only_if_nobody_lets_go() -> None:
    world = World()
    world.reserve(1)
    world.run(2.2 + EVICT_AGAIN_S - 0.3)
    assert len(world.evicted[1]) == 1
    world.run(0.6)
    assert len(world.evicted[1]) == 2


def test_a_host_that_answers_nothing_is_out_by_its_probes_and_frees_its_streams() -> None:
    world = World()
    world.run(1, tokens_per_step=1)
    world.scrapes = False
    world.reserve(1)
    for _ in range(2):
        world.run(0.6)
        world.store.apply(ScrapeFailed("a", world.now - 0.6, world.now, ProbeFailure.TIMEOUT))
    assert world.standing() is Standing.OUT
    world.run(1.2)
    assert world.evicted == {1: [Eviction.HUNG]}


def test_deadlines_reach_requests_of_endpoints_that_are_gone() -> None:
    world = World()
    world.reserve(1, stream=False)

    world.store.apply(Remove("test", "a"))
    world.run(299)
    assert world.evicted == {}
    world.run(2)
    assert world.evicted == {1: [Eviction.FIRST_BYTE_TIMEOUT]}
