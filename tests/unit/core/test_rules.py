"""Objectives and rewrites: precedence, weights, pools."""

from __future__ import annotations

from random import Random

from picker.core.rules import Objective, Rewrite, Rulebook, Target


def rewrite(name: str, models: set[str], *targets: Target, pool: str = "ns/p") -> Rewrite:
    return Rewrite(pool=pool, name=name, models=frozenset(models), targets=targets)


def test_an_empty_book_says_nothing() -> None:
    rules = Rulebook()
    assert not rules
    assert rules.target("m", None, Random(0)) is None
    assert rules.priority("o", "m", None) == 0


def test_a_rewrite_that_names_the_model_goes_before_one_for_any() -> None:
    rules = Rulebook()
    rules.replace("s", (), (rewrite("any", set(), Target("fallback")), rewrite("exact", {"m"}, Target("n"))))
    assert rules.target("m", None, Random(0)) == "n"
    assert rules.target("other", None, Random(0)) == "fallback"
    assert rules.target(None, None, Random(0)) == "fallback"
    assert rules.target("m", "ns/other", Random(0)) is None
    assert rules.target("m", None, Random(0), generic=False) == "n"
    assert rules.target("other", None, Random(0), generic=False) is None


def test_among_equals_the_first_counts() -> None:
    rules = Rulebook()
    rules.replace("s", (), (rewrite("older", {"m"}, Target("old")), rewrite("newer", {"m"}, Target("new"))))
    assert rules.target("m", None, Random(0)) == "old"


def test_targets_are_drawn_by_weight() -> None:
    rules, rng = Rulebook(), Random(7)
    rules.replace("s", (), (rewrite("r", {"m"}, Target("a", 90), Target("b", 10), Target("never")),))
    drawn = [rules.target("m", None, rng) for _ in range(5000)]
    assert 0.87 < drawn.count("a") / 5000 < 0.93
    assert drawn.count("never") == 0


def test_without_weights_all_targets_are_alike() -> None:
    rules, rng = Rulebook(), Random(7)
    rules.replace("s", (), (rewrite("r", {"m"}, Target("a"), Target("b")),))
    drawn = [rules.target("m", None, rng) for _ in range(2000)]
    assert 0.45 < drawn.count("a") / 2000 < 0.55


def test_an_objective_counts_before_the_model_and_the_pool_must_fit() -> None:
    rules = Rulebook()
    rules.replace(
        "s",
        (Objective(pool="ns/p", name="chat", priority=5), Objective(pool="ns/p", model="m", priority=-1)),
        (),
    )
    assert rules.priority("chat", "m", None) == 5
    assert rules.priority("unknown", "m", "ns/p") == -1
    assert rules.priority("chat", None, "ns/other") == 0


def test_what_a_source_says_replaces_what_it_said() -> None:
    rules = Rulebook()
    rules.replace("a", (Objective(pool="p", name="x", priority=1),), ())
    rules.replace("b", (Objective(pool="p", name="y", priority=2),), ())
    rules.replace("a", (), ())
    assert rules.priority("x", None, None) == 0
    assert rules.priority("y", None, None) == 2
