"""The director between attempts: what doors observe, what is remembered, what is named."""

from __future__ import annotations

import pytest

from picker.core.events import AttemptFailed, FailureKind, Finished, FirstByte, Left, Outcome, Progress, Served
from picker.core.rules import Rewrite, Target
from picker.core.updates import Remove, Upsert
from picker.core.values import Rejection, RejectionCode, Standing
from picker.director import DECISIONS_MAX, REMEMBERED_CHARS
from tests.unit.core.builders import chosen, pod, request, row
from tests.unit.director_rig import Rig

# -- observe -------------------------------------------------------------------------------------------


def test_observing_strangers_is_harmless() -> None:
    rig = Rig()
    for event in (
        FirstByte(9, 1.0),
        Progress(9, 1.0),
        Served(9, 1.0, "10.0.0.1:8000"),
        AttemptFailed(9, 1.0, FailureKind.RESET),
        Left(9, 1.0),
        Finished(key=9, at=1.0, outcome=Outcome.FAILED),
    ):
        rig.director.observe(event)
    assert rig.empty
    assert rig.sample("waypost_attempts_failed_total", endpoint="a", kind="reset") == 0


def test_served_moves_the_request() -> None:
    rig = Rig("ab")
    picked = chosen(rig.director.decide(request(1, received_at=rig.now)))
    other = "b" if picked == "a" else "a"
    rig.director.observe(Served(1, rig.now, pod(other).address))
    assert (rig.store.in_flight(picked), rig.store.in_flight(other)) == (0, 1)


def test_a_passed_on_server_error_is_blamed_on_the_endpoint() -> None:
    rig = Rig("a")
    for key in range(5):
        rig.director.decide(request(key, received_at=rig.now))
        rig.director.observe(Finished(key=key, at=rig.now, outcome=Outcome.COMPLETED, status=500))
    assert row(rig.store, "a", rig.now).standing is Standing.DEGRADED


@pytest.mark.parametrize(("status", "trial_over"), [(200, True), (404, False), (0, False)])
def test_a_whole_good_answer_ends_a_trial(status: int, trial_over: bool) -> None:
    rig = Rig("a")
    for key in range(5):
        rig.director.decide(request(key, received_at=rig.now))
        rig.director.observe(AttemptFailed(key, rig.now, FailureKind.RESET))
    rig.now += 6
    rig.director.tick()
    rig.director.decide(request(10, received_at=rig.now))
    rig.director.observe(Finished(key=10, at=rig.now, outcome=Outcome.COMPLETED, status=status))

    rig.director.decide(request(11, received_at=rig.now))

    standing = row(rig.store, "a", rig.now).standing
    assert (standing is Standing.READY) == trial_over


def test_a_gone_endpoint_gets_no_series_back() -> None:
    rig = Rig("a")
    rig.director.decide(request(1, received_at=rig.now))
    rig.store.apply(Remove("test", "a"))
    rig.metrics.forget(["a"])

    rig.director.observe(AttemptFailed(1, rig.now, FailureKind.RESET))

    assert (
        rig.metrics.registry.get_sample_value("waypost_attempts_failed_total", {"endpoint": "a", "kind": "reset"})
        is None
    )
    assert rig.empty


# -- the rest ------------------------------------------------------------------------------------------


def test_decisions_are_remembered_in_a_ring() -> None:
    rig = Rig()
    for key in range(DECISIONS_MAX + 5):
        rig.director.decide(request(key, received_at=rig.now))
        rig.director.observe(Finished(key=key, at=rig.now, outcome=Outcome.COMPLETED, status=200))
    assert len(rig.director.decisions) == DECISIONS_MAX
    assert rig.director.decisions[0].request.key == 5
    assert rig.director.decisions[-1].request.key == DECISIONS_MAX + 4


def test_the_ring_does_not_keep_what_clients_make_long() -> None:
    rig = Rig()
    long = "x" * 100_000
    texts = ("id", "model", "target_model", "session", "path", "objective")
    verdict = rig.director.decide(request(1, **dict.fromkeys(texts, long)))
    kept = rig.director.decisions[-1].request

    assert verdict.request.model == long, "the engine gets the name as it is"
    for text in (kept.id, kept.model, kept.target_model, kept.session, kept.path, kept.objective):
        assert text == "x" * REMEMBERED_CHARS
    assert isinstance(rig.director.decide(request(2, pool=long)), Rejection)
    assert rig.director.decisions[-1].request.pool == "x" * REMEMBERED_CHARS


def test_a_refusal_of_a_long_name_is_short() -> None:
    rig = Rig("a")
    rig.store.apply(Upsert("test", pod("a", models=frozenset({"m"}))))
    verdict = rig.director.decide(request(1, model="x" * 100_000, strict_model=True))
    assert isinstance(verdict, Rejection)
    assert verdict.code is RejectionCode.MODEL_NOT_FOUND
    assert len(verdict.message) < 400


def test_keys_are_unique_and_models_renamed() -> None:
    rig = Rig(aliases={"small": "llama-8b"})
    assert len({rig.director.new_key() for _ in range(100)}) == 100
    assert rig.director.target_model("small") == "llama-8b"
    assert rig.director.target_model("other") is None
    assert rig.director.target_model(None) is None
    assert dict(rig.director.aliases) == {"small": "llama-8b"}


def test_a_pool_is_named_in_full_or_by_a_name_only_one_has() -> None:
    director = Rig(pools=("ns/a", "ns/b", "other/b")).director
    for text, expected in (
        (None, None),
        ("", None),
        ("ns/a", "ns/a"),
        ("a", "ns/a"),
        ("ns/b", "ns/b"),
        ("b", "b"),
        ("ns/c", "ns/c"),
        ("s/a", "s/a"),
    ):
        assert director.pool_named(text) == expected
    assert "b" not in director.pools, "a name two pools have is nobody's"


@pytest.mark.parametrize("pools", [(), ("ns/a",)])
def test_without_a_choice_no_pool_is_named(pools: tuple[str, ...]) -> None:
    director = Rig(pools=pools).director
    assert {director.pool_named(text) for text in (None, "", "a", "ns/a", "ns/b")} == {None}


def test_aliases_come_before_the_clusters_rewrites() -> None:
    director = Rig(aliases={"small": "llama-8b"}).director
    assert director.renames
    director.rules.replace(
        "cluster", (), (Rewrite(pool="ns/a", name="r", models=frozenset({"small", "m"}), targets=(Target("n"),)),)
    )
    assert director.target_model("small", "ns/a") == "llama-8b"
    assert director.target_model("m", "ns/a") == director.target_model("m") == "n"
    assert director.target_model("m", "ns/b") is None
    assert not Rig().director.renames
