"""What the director asks of the prefix index and tells it, and what it remembers of prompts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from picker.core.events import AttemptFailed, FailureKind, Finished, FirstByte, Left, Outcome, Served, Usage
from picker.core.prefix.deltas import Op, Tier, pack
from picker.core.prefix.index import PrefixIndex
from picker.core.prefix.prompt import Match, PromptKeys
from picker.core.values import Decision, Rejection
from tests.unit.core.builders import chosen, pod, request, row
from tests.unit.director_rig import Rig

KEYS = PromptKeys(exact={16: [1, 2, 3, 4]}, learned=[11, 12], tokens=70, chunk_tokens=32.0)
SHORT = PromptKeys(exact={16: []}, tokens=5)


class Asked(PrefixIndex):
    """A real index that notes what it is asked and told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def lookup(self, keys: PromptKeys) -> dict[str, Match]:
        self.calls.append(("lookup",))
        return super().lookup(keys)

    def routed(self, endpoint_id: str, keys: PromptKeys, now: float) -> None:
        self.calls.append(("routed", endpoint_id, keys is KEYS))
        super().routed(endpoint_id, keys, now)

    def observed(
        self, endpoint_id: str, keys: PromptKeys, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        self.calls.append(("observed", endpoint_id, prompt_tokens, cached_tokens))
        super().observed(endpoint_id, keys, prompt_tokens, cached_tokens, now)


class Site(Rig):
    """Endpoints `a` and `b`; the engine of `a` tells of its cache."""

    def __init__(self, names: str = "ab", **options: Any) -> None:
        super().__init__(names, **options)
        self.index = Asked()
        self.store.prefixes = self.director.prefixes = self.index
        publisher = self.index.bind("a")
        self.index.apply(pack(Op.ONLINE, publisher) + pack(Op.ADD, publisher, Tier.GPU, [1, 2]))

    def decide(self, key: int = 1, **fields: Any) -> Decision | Rejection:
        return self.director.decide(request(key, keys=KEYS, **fields))

    def finish(self, key: int = 1, **fields: Any) -> None:
        usage = fields.pop("usage", Usage(prompt_tokens=70, output_tokens=1, cached_tokens=32))
        given = {"outcome": Outcome.COMPLETED, "status": 200, **fields}
        self.director.observe(Finished(key=key, at=self.now, usage=usage, **given))

    def told(self, what: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.index.calls if call[0] == what]


def test_matches_are_there_when_endpoints_are_scored_and_not_before() -> None:
    site = Site()
    verdict = site.decide()
    assert verdict.request.matches == {"a": Match(32, exact=True)}
    assert [call[0] for call in site.index.calls] == ["lookup", "routed"]
    # What a caller says of matches is not believed.
    verdict = site.decide(2, matches={"b": Match(64, exact=True)})
    assert "b" not in verdict.request.matches or not verdict.request.matches["b"].exact


def test_without_keys_the_index_is_left_alone() -> None:
    site = Site()
    site.director.decide(request(1))
    site.finish()
    assert site.index.calls == []


def test_a_prompt_is_work_only_as_far_as_it_is_not_held() -> None:
    site = Site()
    verdict = site.decide(prompt_tokens=70, max_output_tokens=0)
    assert chosen(verdict) == "a"
    assert row(site.store, "a", site.now).in_flight_tokens == 70 - 32


def test_remembered_decisions_hold_no_chains_and_only_the_matches_they_show() -> None:
    site = Site()
    for name in ("a", "x", "y"):
        site.index.routed(name, KEYS, 1.0)
    [remembered] = [site.decide() and site.director.decisions[-1]]
    kept = remembered.request.keys
    assert kept is not None
    assert kept.exact == {16: ()}
    assert (kept.learned, kept.tokens) == ((), 70)
    assert remembered.request.matches.keys() == {"a"}
    assert len(msgspec.json.encode(msgspec.structs.replace(remembered.request, matches={}))) < 1000
    # The one in the books keeps them: the end of the request is learnt from.
    flight = site.store.ledger.flight(1)
    assert flight is not None
    assert flight.request.keys is KEYS


def test_a_good_end_is_told_once() -> None:
    site = Site()
    where = chosen(site.decide())
    site.director.observe(FirstByte(1, site.now))
    site.finish()
    site.finish()
    assert site.told("routed") == [(where, True)]
    assert site.told("observed") == [(where, 70, 32)]
    site.decide(2)
    site.finish(2, usage=Usage(prompt_tokens=70))
    assert site.told("observed")[1:] == [(chosen(site.director.decisions[-1]), 70, None)]


@pytest.mark.parametrize(
    "end",
    [
        {"usage": None},
        {"usage": Usage()},
        {"usage": Usage(prompt_tokens=0, cached_tokens=0)},
        {"status": 400},
        {"status": 500},
        {"outcome": Outcome.CLIENT_GONE},
        {"outcome": Outcome.FAILED},
        {"outcome": Outcome.TIMEOUT, "status": 0},
    ],
)
def test_other_ends_say_nothing_of_the_cache(end: dict[str, Any]) -> None:
    site = Site()
    site.decide()
    site.finish(**end)
    assert site.told("observed") == []
    assert site.empty


def test_who_left_is_not_learnt_from() -> None:
    site = Site()
    site.decide()
    site.director.observe(Left(1, site.now))
    assert site.told("observed") == []


def test_the_endpoint_that_served_is_the_one_that_is_learnt_of() -> None:
    site = Site()
    assert chosen(site.decide()) == "a"
    site.director.observe(Served(1, site.now, pod("b").address))
    site.finish()
    assert site.told("observed") == [("b", 70, 32)]


async def test_a_retry_is_looked_up_and_routed_again_and_observed_once() -> None:
    site = Site()
    outcome, decision, attempts = await site.dispatch(site.attempt(FailureKind.CONNECT, "ok"), keys=KEYS)
    assert (outcome, attempts) == ("ok", 2)
    assert decision is not None
    site.finish()
    assert [call[:2] for call in site.index.calls] == [
        ("lookup",),
        ("routed", "a"),
        ("lookup",),
        ("routed", "b"),
        ("observed", "b"),
    ]
    assert site.empty


async def test_the_only_endpoint_gets_another_try_and_rejections_route_nothing() -> None:
    site = Site("a")
    outcome, _, attempts = await site.dispatch(site.attempt(FailureKind.RESET, "ok"), keys=KEYS)
    assert (outcome, attempts) == ("ok", 2)
    assert [call[0] for call in site.index.calls] == ["lookup", "routed", "lookup", "lookup", "routed"]
    site.finish()
    verdict = site.decide(2, pinned="nobody")
    assert isinstance(verdict, Rejection)
    assert len(site.told("routed")) == 2
    kept = site.director.decisions[-1].request.keys
    assert kept is not None
    assert kept.exact == {16: ()}


def test_a_request_that_is_decided_twice_is_observed_where_it_is() -> None:
    site = Site()
    first, second = chosen(site.decide()), chosen(site.decide())
    assert first != second
    site.director.observe(AttemptFailed(1, site.now, FailureKind.RESET))
    site.finish()
    assert site.told("observed") == []
    assert site.empty


def test_cold_at_is_the_last_prompt_that_filled_the_cache() -> None:
    site = Site()

    def cold_at(name: str) -> float:
        return row(site.store, name, site.now).cold_at

    assert chosen(site.decide(1)) == "a"
    assert cold_at("a") == 0.0
    site.now += 1
    assert chosen(site.decide(2)) == "b"
    assert (cold_at("a"), cold_at("b")) == (0.0, site.now)
    turn = site.now
    site.now += 1
    # It has been sent there meanwhile.
    site.decide(3)
    assert chosen(site.decide(4)) == "b"
    assert cold_at("b") == turn
    # A prompt without a whole block fills nothing, and without keys nothing is known.
    for key, keys in ((5, SHORT), (6, SHORT), (7, None), (8, None)):
        site.now += 1
        site.director.decide(request(key, keys=keys))
    assert (cold_at("a"), cold_at("b")) == (0.0, turn)


def test_the_tick_lets_what_was_sent_expire() -> None:
    site = Site()
    site.director.tick()
    only_exact = msgspec.structs.replace(KEYS, learned=())
    site.index.bind("b")
    site.director.decide(request(1, keys=only_exact, subset=frozenset({pod("b").address})))
    assert site.index.lookup(only_exact)["b"] == Match(64)
    site.now += 5.0
    site.director.tick()
    assert "b" not in site.index.lookup(only_exact)
