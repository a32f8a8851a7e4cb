"""The ledger: every reservation is released exactly once, whatever order things happen in."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from picker.core.ledger import CORRECTIONS_MAX, DETACHED, EVICT_AGAIN_S, Deadlines, Eviction, Ledger
from picker.core.prefix.prompt import Match
from tests.unit.core.builders import request

LIMITS = Deadlines(first_byte_s=10.0, between_chunks_s=5.0, total_s=100.0)


def test_reserve_and_release_balance() -> None:
    ledger = Ledger()
    ledger.reserve(request(1, prompt_tokens=100, max_output_tokens=50), "a", 1.0)

    assert (len(ledger), ledger.in_flight("a"), ledger.load("a").tokens) == (1, 1, 150)
    assert ledger.load("a").correction == 1

    released = ledger.release(1, 2.0)

    assert released is not None
    assert released.endpoint_id == "a"
    assert (len(ledger), ledger.in_flight("a"), ledger.load("a").tokens) == (0, 0, 0)
    assert ledger.load("a").correction == 0


def test_release_is_idempotent_and_ignores_strangers() -> None:
    ledger = Ledger()
    ledger.reserve(request(1), "a", 1.0)

    assert ledger.release(1, 2.0) is not None
    assert ledger.release(1, 2.0) is None
    assert ledger.release(99, 2.0) is None
    assert ledger.progress(1, 3.0) is None
    assert ledger.load("a").tokens == 0
    assert ledger.load("a").correction == 0


def test_a_key_reserved_twice_moves() -> None:
    ledger = Ledger()
    ledger.reserve(request(1), "a", 1.0)
    ledger.reserve(request(1), "b", 2.0)

    assert (len(ledger), ledger.in_flight("a"), ledger.in_flight("b")) == (1, 0, 1)


@pytest.mark.parametrize(
    ("prompt", "limit", "expected"), [(10, None, 266), (10, 5, 15), (10, 10**12, 4106), (10, -7, 10), (-10, -7, 0)]
)
def test_expected_tokens_are_bounded_and_never_negative(prompt: int, limit: int | None, expected: int) -> None:
    """Clients choose max_tokens; a negative one must not make an endpoint look emptier than empty."""
    assert request(1, prompt_tokens=prompt, max_output_tokens=limit).expected_tokens_at("a") == expected


def test_correction_counts_what_a_scrape_cannot_have_seen() -> None:
    ledger = Ledger()
    for key, at in ((1, 1.0), (2, 2.0), (3, 3.0)):
        ledger.reserve(request(key), "a", at)
    ledger.release(1, 3.5)

    ledger.load("a").scraped(2.5)

    assert ledger.load("a").correction == 1 - 1


def test_correction_ignores_changes_older_than_the_last_scrape() -> None:
    """A request the proxy moved is booked at its old time; the scrape has counted it already."""
    load = Ledger().load("a")
    load.scraped(5.0)

    load.record(4.0, 1)
    assert load.correction == 0
    load.record(5.0, 1)
    assert load.correction == 1


def test_corrections_are_bounded() -> None:
    ledger = Ledger()
    for key in range(CORRECTIONS_MAX):
        ledger.reserve(request(key), "a", 1.0)
        ledger.release(key, 1.0)
    load = ledger.load("a")
    assert len(load._since) == CORRECTIONS_MAX

    load.scraped(2.0)

    assert (load.correction, len(load._since)) == (0, 0)


def test_a_clock_that_steps_back_a_little_leaves_no_trace() -> None:
    ledger = Ledger()
    ledger.reserve(request(1), "a", 10.0)
    ledger.progress(1, 9.9)
    ledger.release(1, 9.8)
    load = ledger.load("a")

    load.scraped(11.0)

    assert (load.correction, load.tokens, ledger.in_flight("a")) == (0, 0, 0)


def test_books_of_a_gone_endpoint_go_when_its_flights_end() -> None:
    """Pods that come and go for months must not leave a book each."""
    ledger = Ledger()
    ledger.reserve(request(1), "a", 1.0)
    ledger.forget("a")
    assert ledger.in_flight("a") == 1

    ledger.release(1, 2.0)

    assert ledger._loads == {}


def test_an_endpoint_that_comes_back_keeps_its_count() -> None:
    ledger = Ledger()
    ledger.reserve(request(1), "a", 1.0)
    ledger.forget("a")
    ledger.reserve(request(2), "a", 2.0)

    assert ledger.in_flight("a") == 2
    ledger.release(1, 3.0)
    ledger.release(2, 3.0)
    assert (len(ledger), ledger.in_flight("a")) == (0, 0)


def test_reading_a_count_makes_no_book() -> None:
    ledger = Ledger()

    assert ledger.in_flight("never seen") == 0
    assert ledger._loads == {}


def test_detached_flights_no_longer_count_and_still_end() -> None:
    ledger = Ledger()
    for key in (1, 2):
        ledger.reserve(request(key), "a", 1.0)
    ledger.detach("a")
    ledger.reserve(request(3), "a", 2.0)
    ledger.detach("b")

    assert (len(ledger), ledger.in_flight("a"), ledger.in_flight(DETACHED)) == (3, 1, 2)
    for key in (1, 2, 3):
        assert ledger.release(key, 3.0) is not None
    assert len(ledger) == 0
    assert set(ledger._loads) == {"a"}
    assert ledger.load("a").tokens == 0


def test_departed_requests_are_released_oldest_first() -> None:
    ledger = Ledger()
    for key in range(1, 6):
        ledger.reserve(request(key), "a", float(key))
    for key in (1, 2, 4):
        _left(ledger, key)

    ledger.release_departed("a", 3.0, sent_at=4.5)

    assert sorted(flight.request.key for flight in ledger.flights()) == [2, 3, 4, 5], "4 were seen, 3 are left: 1 ended"
    ledger.release_departed("a", 0.0, sent_at=4.5)
    assert sorted(flight.request.key for flight in ledger.flights()) == [3, 5], "3 is watched, 5 came later"


def test_a_departure_corrects_nothing() -> None:
    """The scrape that showed the end does not count the request either."""
    ledger = Ledger()
    ledger.reserve(request(1), "a", 1.0)
    _left(ledger, 1)
    ledger.load("a").scraped(2.0)

    ledger.release_departed("a", 0.0, sent_at=2.0)

    assert (ledger.in_flight("a"), ledger.load("a").correction) == (0, 0)


def test_departures_of_an_unknown_endpoint_are_nothing() -> None:
    ledger = Ledger()
    ledger.release_departed("a", 0.0, sent_at=2.0)
    assert ledger._loads == {}


@pytest.mark.parametrize(
    ("fields", "first_byte_at", "left", "now", "expected"),
    [
        ({}, None, False, 10.5, []),
        ({}, None, False, 11.5, [Eviction.FIRST_BYTE_TIMEOUT]),
        ({}, 2.0, False, 6.9, []),
        ({}, 2.0, False, 7.1, [Eviction.IDLE_TIMEOUT]),
        ({"sees_body": False}, 2.0, False, 60.0, []),
        ({"sees_body": False}, 2.0, False, 100.5, [Eviction.TOTAL_TIMEOUT]),
        ({}, None, True, 60.0, []),
        ({}, None, True, 100.5, [Eviction.TOTAL_TIMEOUT]),
    ],
)
def test_overdue(
    fields: dict[str, Any], first_byte_at: float | None, left: bool, now: float, expected: list[Eviction]
) -> None:
    ledger = Ledger()
    ledger.reserve(request(1, **fields), "a", 1.0)
    if first_byte_at is not None:
        ledger.progress(1, first_byte_at)
    if left:
        _left(ledger, 1)

    assert [why for _, why in ledger.overdue(now, LIMITS)] == expected


def test_total_counts_from_the_arrival_not_from_the_last_attempt() -> None:
    ledger = Ledger()
    ledger.reserve(request(1, received_at=0.0), "a", 95.0)

    assert ledger.overdue(100.5, LIMITS) == [(1, Eviction.TOTAL_TIMEOUT)]


def test_a_request_is_given_up_once_then_again_only_after_a_while() -> None:
    ledger = Ledger()
    ledger.reserve(request(1), "a", 1.0)

    assert ledger.evict(1, 2.0)
    assert not ledger.evict(1, 2.1)
    assert ledger.evict(1, 2.0 + EVICT_AGAIN_S)
    assert not ledger.evict(2, 2.0)

    ledger.reserve(request(1), "b", 8.0)
    assert ledger.evict(1, 8.0), "another attempt is another story"


@pytest.mark.parametrize(
    ("fields", "telling"),
    [
        ({"stream": True, "sees_body": True}, True),
        ({"stream": False, "sees_body": True}, True),
        ({"stream": False, "sees_body": False}, True),
        ({"stream": True, "sees_body": False}, False),
    ],
)
def test_headers_of_a_stream_prove_nothing(fields: dict[str, bool], telling: bool) -> None:
    ledger = Ledger()
    ledger.reserve(request(1, **fields), "a", 1.0)
    flight = ledger.progress(1, 2.0)

    assert flight is not None
    assert flight.telling is telling
    assert ledger.load("a").progress_at == 2.0
    assert ledger.load("a").proof_at == (2.0 if telling else 0.0)


def _left(ledger: Ledger, key: int) -> None:
    flight = ledger.flight(key)
    assert flight is not None
    flight.left = True


KEYS = st.integers(0, 12)
PODS = st.sampled_from(["a", "b", "c"])


class LedgerMachine(RuleBasedStateMachine):
    """The ledger against a model: one dictionary from key to where it is, what it weighs and whether it was left."""

    @initialize()
    def start(self) -> None:
        self.ledger = Ledger()
        self.model: dict[int, tuple[str, int, bool]] = {}
        self.now = 0.0

    def _later(self) -> float:
        self.now += 0.5
        return self.now

    @rule(key=KEYS, name=PODS, prompt=st.integers(0, 9), limit=st.none() | st.integers(-5, 9000))
    def reserve(self, key: int, name: str, prompt: int, limit: int | None) -> None:
        made = request(key, prompt_tokens=prompt, max_output_tokens=limit)
        self.ledger.reserve(made, name, self._later())
        self.model.pop(key, None)
        self.model[key] = (name, made.expected_tokens_at(name), False)

    @rule(key=KEYS)
    def release(self, key: int) -> None:
        flight = self.ledger.release(key, self._later())
        expected = self.model.pop(key, None)
        assert (flight is None) == (expected is None)
        if flight is not None and expected is not None:
            assert flight.endpoint_id == expected[0]

    @rule(key=KEYS)
    def progress(self, key: int) -> None:
        flight = self.ledger.progress(key, self._later())
        assert (flight is not None) == (key in self.model)

    @rule(key=KEYS)
    def leave(self, key: int) -> None:
        flight = self.ledger.flight(key)
        if flight is not None:
            flight.left = True
            name, tokens, _ = self.model[key]
            self.model[key] = (name, tokens, True)

    @rule(name=PODS, total=st.integers(0, 6))
    def departed(self, name: str, total: int) -> None:
        self.ledger.load(name).scraped(self._later())
        self.ledger.release_departed(name, float(total), self.now)
        here = [key for key, (at, _, _) in self.model.items() if at == name]
        gone = [key for key in here if self.model[key][2]][: max(0, len(here) - total)]
        for key in gone:
            del self.model[key]

    @rule(name=PODS)
    def forget(self, name: str) -> None:
        self.ledger.forget(name)

    @rule(name=PODS)
    def detach(self, name: str) -> None:
        self.ledger.detach(name)
        for key, (at, tokens, left) in self.model.items():
            if at == name:
                self.model[key] = (DETACHED, tokens, left)

    @rule(key=KEYS)
    def evict(self, key: int) -> None:
        assert not self.ledger.evict(key, self._later()) or key in self.model

    @rule()
    def overdue(self) -> None:
        never = Deadlines(first_byte_s=1e9, between_chunks_s=1e9, total_s=1e9)
        assert self.ledger.overdue(self.now, never) == []
        at_once = Deadlines(first_byte_s=-1e9, between_chunks_s=-1e9, total_s=-1e9)
        assert sorted(key for key, _ in self.ledger.overdue(self.now, at_once)) == sorted(self.model)

    @invariant()
    def books_agree(self) -> None:
        assert len(self.ledger) == len(self.model)
        for name in ("a", "b", "c", DETACHED):
            weights = [tokens for at, tokens, _ in self.model.values() if at == name]
            assert self.ledger.in_flight(name) == len(weights)
            if name in self.ledger._loads:
                load = self.ledger.load(name)
                assert load.tokens == sum(weights) >= 0
                assert load.correction == sum(change for _, change in load._since)
                assert load.flights.keys() == {key for key, (at, _, _) in self.model.items() if at == name}
                assert weights or not load.gone


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def test_what_the_endpoint_holds_of_the_prompt_is_no_work() -> None:
    made = msgspec.structs.replace(
        request(1, prompt_tokens=1000, max_output_tokens=10), matches={"a": Match(960, exact=True), "b": Match(2000)}
    )
    ledger = Ledger()
    for name, tokens in (("a", 50), ("b", 10), ("c", 1010)):
        ledger.reserve(made, name, 1.0)
        assert ledger.load(name).tokens == tokens
