"""The datastore: which endpoints exist, what their rows say, and what a request does to them."""

from __future__ import annotations

import pytest

from picker.core.datastore import Datastore
from picker.core.events import FailureKind
from picker.core.updates import Alive, ModelsListed, ProbeFailure, Remove, Replace, ScrapeFailed, Upsert
from picker.core.values import Lora, Role, Standing
from tests.unit.core.builders import DEADLINES, FRESHNESS, LIMITS, datastore, pod, request, row, scraped


def names(store: Datastore) -> list[str]:
    return [endpoint.id for endpoint in store.endpoints()]


# -- sources -------------------------------------------------------------------------------------------


def test_replace_removes_what_its_source_no_longer_has() -> None:
    store = datastore(pod("a"), pod("b"))
    store.apply(Upsert("other", pod("c")))

    store.apply(Replace("test", (pod("b"), pod("d"))))

    assert names(store) == ["b", "c", "d"]
    assert [each.endpoint.id for each in store.snapshot(0.0).states] == ["b", "c", "d"]


def test_a_source_is_synced_after_its_first_replace() -> None:
    store = Datastore(health=LIMITS, freshness=FRESHNESS, deadlines=DEADLINES)
    store.apply(Upsert("test", pod("a")))
    assert not store.synced("test")
    store.apply(Replace("test", ()))
    assert store.synced("test")
    assert names(store) == []


def test_a_source_removes_only_its_own() -> None:
    store = datastore(pod("a"))
    store.apply(Remove("other", "a"))
    assert names(store) == ["a"]
    store.apply(Remove("test", "a"))
    store.apply(Remove("test", "a"))
    assert names(store) == []


def test_version_counts_changes_of_the_set_only() -> None:
    store = datastore(pod("a"))
    version = store.version

    store.apply(Replace("test", (pod("a"),)))
    store.apply(scraped("a", 1.0, waiting=1.0))
    store.reserve(request(1), "a", 1.0)
    assert store.version == version

    store.apply(Upsert("test", pod("a", labels={"zone": "x"})))
    store.apply(Remove("test", "a"))
    assert store.version == version + 2


def test_new_labels_keep_what_was_learnt() -> None:
    store = datastore(pod("a"))
    store.apply(scraped("a", 1.0, waiting=3.0, running=4.0))
    store.apply(ModelsListed("a", 1.0, frozenset({"m"})))

    store.apply(Upsert("test", pod("a", labels={"zone": "x"}, role=Role.DECODE)))

    changed = row(store, "a", 1.0)
    assert changed.endpoint.labels == {"zone": "x"}
    assert (changed.waiting, changed.models) == (3.0, frozenset({"m"}))


def test_another_address_is_another_process() -> None:
    store = datastore(pod("a"))
    store.apply(scraped("a", 1.0, waiting=3.0, running=4.0))
    store.reserve(request(1), "a", 1.0)
    for _ in range(2):
        store.apply(ScrapeFailed("a", 1.0, 1.6, ProbeFailure.REFUSED))

    store.apply(Upsert("test", pod("a", url="http://10.9.9.9:8000", address="10.9.9.9:8000")))

    fresh = row(store, "a", 2.0)
    assert (fresh.standing, fresh.waiting, fresh.in_flight) == (Standing.READY, None, 0)
    assert store.served_by(1, "10.9.9.9:8000", 2.0) == "a", "the new address is known"
    assert store.served_by(1, pod("a").address, 2.0) is None, "the old one is not"
    assert store.ended(1, 3.0) is not None
    assert len(store.ledger) == 0


def test_a_late_failure_on_the_old_process_does_not_blame_the_new_one() -> None:
    store = datastore(pod("a"))
    store.reserve(request(1), "a", 1.0)
    store.apply(Upsert("test", pod("a", address="10.9.9.9:8000")))

    store.failed(1, FailureKind.HUNG, 2.0)

    assert row(store, "a", 2.0).standing is Standing.READY
    assert len(store.ledger) == 0


def test_resolving_a_host_name_keeps_what_was_learnt() -> None:
    store = datastore(pod("a", url="http://engine:8000", address=""))
    store.apply(scraped("a", 1.0, waiting=3.0))
    store.reserve(request(1), "a", 0.5)

    store.apply(Upsert("test", pod("a", url="http://engine:8000", address="10.0.0.7:8000")))
    assert (row(store, "a", 1.0).waiting, row(store, "a", 1.0).in_flight) == (3.0, 1)

    store.apply(Upsert("test", pod("a", url="http://engine:8000", address="")))
    assert (row(store, "a", 1.0).waiting, row(store, "a", 1.0).in_flight) == (3.0, 1)


def test_removed_while_requests_are_on_it_and_rejoining() -> None:
    store = datastore(pod("a"))
    for key in (1, 2):
        store.reserve(request(key), "a", 1.0)

    store.apply(Remove("test", "a"))
    assert store.snapshot(1.0).states == ()
    assert store.ended(1, 2.0) is not None, "an end is booked although the endpoint is gone"

    store.apply(Upsert("test", pod("a")))
    assert row(store, "a", 2.0).in_flight == 1, "the request that is still there counts"
    store.failed(2, FailureKind.RESET, 3.0)
    assert (row(store, "a", 3.0).in_flight, row(store, "a", 3.0).in_flight_tokens) == (0, 0)
    assert len(store.ledger) == 0


def test_rejoining_under_another_address_does_not_inherit_requests() -> None:
    """The next pod of a stateful set has its predecessor's name and none of its work."""
    store = datastore(pod("a"))
    store.reserve(request(1), "a", 1.0)
    store.apply(Remove("test", "a"))

    store.apply(Upsert("test", pod("a", url="http://10.9.9.9:8000", address="10.9.9.9:8000")))

    assert row(store, "a", 2.0).in_flight == 0
    assert store.ended(1, 3.0) is not None
    assert len(store.ledger) == 0


def test_endpoints_that_come_and_go_leave_nothing_behind() -> None:
    store = datastore()
    for turn in range(50):
        name = f"pod-{turn}"
        store.apply(Upsert("test", pod(name)))
        store.apply(scraped(name, float(turn), waiting=0.0, running=0.0))
        store.reserve(request(turn), name, turn + 0.1)
        store.apply(Remove("test", name))
        store.tick(turn + 0.2)
        assert store.in_flight(name) == 1
        store.ended(turn, turn + 0.3)
        store.apply(scraped(name, turn + 0.4, waiting=0.0))
        assert store.in_flight(name) == 0
    store.tick(60.0)

    assert store.ledger._loads == {}
    assert store._departed == {}
    assert store._by_address == {}


# -- estimates -----------------------------------------------------------------------------------------


def test_estimate_is_the_scrape_plus_dispatched_minus_finished_since() -> None:
    store = datastore(pod("a"))
    for key in range(4):
        store.reserve(request(key), "a", 0.5)
    store.apply(scraped("a", 1.0, waiting=0.0, running=10.0))
    assert row(store, "a", 1.0).running == 10.0, "what went before is in the scrape"

    for key in range(4, 7):
        store.reserve(request(key), "a", 1.5)
    assert row(store, "a", 1.5).running == 13.0

    store.ended(0, 1.6)
    assert row(store, "a", 1.6).running == 12.0

    store.apply(scraped("a", 1.55, waiting=0.0, running=13.0))
    assert row(store, "a", 1.7).running == 12.0, "the end came after this scrape was sent"


def test_new_work_joins_the_queue_where_there_is_one_and_ends_drain_it() -> None:
    store = datastore(pod("a"))
    for key in range(3):
        store.reserve(request(key), "a", 0.5)
    store.apply(scraped("a", 1.0, waiting=2.0, running=8.0))

    store.reserve(request(9), "a", 1.1)
    assert (row(store, "a", 1.1).waiting, row(store, "a", 1.1).running) == (3.0, 8.0)

    for key in (0, 1, 2, 9):
        store.ended(key, 1.2)
    assert (row(store, "a", 1.2).waiting, row(store, "a", 1.2).running) == (0.0, 7.0)


def test_estimate_is_never_below_our_own_requests_nor_below_zero() -> None:
    store = datastore(pod("a"))
    for key in range(5):
        store.reserve(request(key), "a", 0.5)
    store.apply(scraped("a", 1.0, waiting=0.0, running=0.0))
    assert row(store, "a", 1.0).running == 5.0, "a frozen engine says 0"

    store.apply(scraped("a", 1.1, waiting=1.0, running=0.0))
    for key in range(5):
        store.ended(key, 1.2)
    assert (row(store, "a", 1.2).waiting, row(store, "a", 1.2).running) == (0.0, 0.0)


def test_what_the_engine_does_not_tell_stays_unknown() -> None:
    store = datastore(pod("a"), pod("b"), pod("c"))
    store.apply(scraped("a", 1.0, running=3.0))
    store.apply(scraped("b", 1.0, waiting=3.0))
    store.apply(scraped("c", 1.0, kv_usage=0.5))
    for key, name in enumerate("abc"):
        store.reserve(request(key), name, 1.1)

    a, b, c = (row(store, name, 1.1) for name in "abc")
    assert (a.waiting, a.running) == (None, 4.0)
    assert (b.waiting, b.running) == (4.0, None)
    assert (c.waiting, c.running) == (None, None)
    assert c.in_flight == 1


def test_stale_signals_are_no_signals() -> None:
    store = datastore(pod("a"))
    lora = Lora(frozenset({"x"}), frozenset(), 2)
    store.apply(scraped("a", 1.0, waiting=3.0, running=4.0, kv_usage=0.5, lora=lora))
    store.reserve(request(1), "a", 1.0)
    store.tick(6.0)
    assert row(store, "a", 6.0).signals is not None

    store.tick(6.1)

    stale = row(store, "a", 6.1)
    assert (stale.waiting, stale.running, stale.signals, stale.in_flight) == (None, None, None, 1)


def test_model_lists_age_and_configured_ones_do_not() -> None:
    store = datastore(pod("a"), pod("b", models=frozenset({"fixed"})))
    assert row(store, "a", 0.0).models is None

    store.apply(ModelsListed("a", 1.0, frozenset({"m"})))
    store.apply(ModelsListed("b", 1.0, frozenset({"other"})))
    assert row(store, "a", 1.0).models == frozenset({"m"})
    assert dict(store.models()) == {"a": frozenset({"m"}), "b": frozenset({"fixed"})}

    store.tick(61.5)
    assert row(store, "a", 61.5).models is None
    assert row(store, "b", 61.5).models == frozenset({"fixed"})


def test_a_tick_rebuilds_only_rows_that_time_made_wrong() -> None:
    store = datastore(pod("a"), pod("b"))
    store.apply(scraped("a", 1.0, waiting=3.0))
    before = store.snapshot(1.0).states

    store.tick(1.1)
    assert store.snapshot(1.1).states is before

    store.tick(7.0)
    after = store.snapshot(7.0).states
    assert after[0] is not before[0]
    assert after[1] is before[1]


def test_snapshots_do_not_change_afterwards() -> None:
    store = datastore(pod("a"), pod("b"))
    before = store.snapshot(1.0)
    store.reserve(request(1), "a", 1.0)

    assert [each.in_flight for each in before.states] == [0, 0]
    assert [each.in_flight for each in store.snapshot(1.0).states] == [1, 0]


# -- requests and health -------------------------------------------------------------------------------


def test_signals_about_strangers_are_ignored() -> None:
    store = datastore()
    store.apply(scraped("x", 1.0, waiting=1.0, running=1.0))
    store.apply(ScrapeFailed("x", 1.0, 1.1, ProbeFailure.REFUSED))
    store.apply(Alive("x", 1.0))
    store.apply(ModelsListed("x", 1.0, frozenset()))
    store.progressed(1, 1.0)
    assert store.failed(1, FailureKind.RESET, 1.0) is None
    assert store.ended(1, 1.0) is None
    assert store.left(1, 1.0) is None
    assert store.served_by(1, "10.0.0.1:8000", 1.0) is None
    assert store.ledger._loads == {}


def test_standing_changes_are_told_once() -> None:
    store = datastore(pod("a"))
    for _ in range(2):
        store.apply(ScrapeFailed("a", 1.0, 1.6, ProbeFailure.TIMEOUT))

    changes = store.tick(1.7).changes
    assert [(each.endpoint_id, each.before, each.after) for each in changes] == [("a", Standing.READY, Standing.OUT)]
    assert store.tick(1.8).changes == ()

    store.apply(Alive("a", 2.0))
    assert [each.after for each in store.tick(2.1).changes] == [Standing.READY]


def test_overload_ends_with_a_tick() -> None:
    store = datastore(pod("a"))
    store.reserve(request(1), "a", 1.0)
    store.failed(1, FailureKind.OVERLOADED, 1.1)
    assert row(store, "a", 1.1).standing is Standing.DEGRADED

    store.tick(1.7)
    assert row(store, "a", 1.7).standing is Standing.READY


@pytest.mark.parametrize(
    ("metrics_url", "kind", "standing"),
    [
        ("", ProbeFailure.REFUSED, Standing.OUT),
        ("http://10.0.0.98:8000/custom/metrics", ProbeFailure.REFUSED, Standing.OUT),
        ("http://10.0.0.98:9400/metrics", ProbeFailure.REFUSED, Standing.DEGRADED),
        ("http://10.0.0.98:9400/metrics", ProbeFailure.TIMEOUT, Standing.DEGRADED),
    ],
)
def test_metrics_on_another_port_do_not_judge_the_api(metrics_url: str, kind: ProbeFailure, standing: Standing) -> None:
    endpoint = pod("a", metrics_url=metrics_url)
    assert endpoint.url == "http://10.0.0.98:8000"
    store = datastore(endpoint)
    for _ in range(2):
        store.apply(ScrapeFailed("a", 1.0, 1.6, kind))
    assert row(store, "a", 1.6).standing is standing


def test_a_dead_metrics_port_does_not_cure_a_failed_connect_but_time_does() -> None:
    store = datastore(pod("a", metrics_url="http://10.0.0.98:9400/metrics"))
    store.reserve(request(1), "a", 1.0)
    store.failed(1, FailureKind.CONNECT, 1.1)
    store.apply(ScrapeFailed("a", 1.2, 1.3, ProbeFailure.REFUSED))
    assert row(store, "a", 1.3).standing is Standing.OUT

    store.tick(1.1 + LIMITS.breaker_open_s)
    assert row(store, "a", 7.0).standing is Standing.READY


def test_a_trial_that_leaves_or_moves_makes_room() -> None:
    store = datastore(pod("a"), pod("b"))
    for key in range(LIMITS.breaker_failures):
        store.reserve(request(key), "a", 1.0)
        store.failed(key, FailureKind.RESET, 1.0)
    assert row(store, "a", 1.0).standing is Standing.DEGRADED
    now = 1.0 + LIMITS.breaker_open_s
    store.tick(now)
    assert row(store, "a", now).standing is Standing.READY

    store.reserve(request(10), "a", now)
    assert row(store, "a", now).standing is Standing.DEGRADED
    store.left(10, now)
    assert row(store, "a", now).standing is Standing.READY, "nobody will hear of this trial's end"

    store.reserve(request(11), "a", now)
    store.reserve(request(11), "b", now)
    assert row(store, "a", now).standing is Standing.READY, "the trial went elsewhere"
    assert (row(store, "a", now).in_flight, row(store, "b", now).in_flight) == (1, 1)


def test_a_whole_good_answer_proves_a_trial() -> None:
    """Where the response body is not seen there is only the end to tell."""
    store = datastore(pod("a"))
    for key in range(LIMITS.breaker_failures):
        store.reserve(request(key), "a", 1.0)
        store.failed(key, FailureKind.RESET, 1.0)
    store.tick(7.0)
    store.reserve(request(10), "a", 7.0)
    store.ended(10, 8.0, worked=True)
    store.reserve(request(11), "a", 8.0)
    assert row(store, "a", 8.0).standing is Standing.READY, "no trial any more"


def test_served_by_moves_the_request() -> None:
    store = datastore(pod("a"), pod("b"))
    store.reserve(request(1), "a", 1.0)
    store.progressed(1, 1.2)

    assert store.served_by(1, pod("b").address, 1.3) == "b"
    assert store.served_by(1, pod("b").address, 1.3) is None, "it is there already"
    assert store.served_by(1, "10.7.7.7:1", 1.3) is None
    assert (row(store, "a", 1.3).in_flight, row(store, "b", 1.3).in_flight) == (0, 1)

    store.ended(1, 2.0)
    assert (row(store, "a", 2.0).in_flight, row(store, "b", 2.0).in_flight) == (0, 0)


def test_departed_requests_are_learnt_from_scrapes() -> None:
    store = datastore(pod("a"))
    for key in range(3):
        store.reserve(request(key), "a", 1.0)
        store.left(key, 1.0)
    store.apply(scraped("a", 2.0, waiting=0.0, running=1.0))

    now = row(store, "a", 2.0)
    assert (now.in_flight, now.running) == (1, 1.0)


def test_observing_after_release_changes_nothing() -> None:
    store = datastore(pod("a"))
    store.reserve(request(1), "a", 1.0)
    store.ended(1, 2.0)
    before = row(store, "a", 2.0)

    store.progressed(1, 2.1)
    for _ in range(10):
        assert store.failed(1, FailureKind.CONNECT, 2.2) is None
    assert store.ended(1, 2.3, worked=True) is None

    assert row(store, "a", 2.3) == before


def test_adapters_are_those_any_engine_lists() -> None:
    store = datastore(pod("a"), pod("b"))
    assert store.adapters == frozenset()
    store.apply(ModelsListed("a", 1.0, frozenset({"m", "x"}), frozenset({"x"})))
    store.apply(ModelsListed("b", 1.0, frozenset({"m", "y"}), frozenset({"y"})))
    assert store.adapters == {"x", "y"}
    store.apply(ModelsListed("a", 2.0, frozenset({"m"})))
    assert store.adapters == {"y"}


def test_the_load_of_other_replicas_counts_beside_ours() -> None:
    store = datastore(pod("a"), pod("b"))
    store.set_others({"a": (3, 700), "gone": (9, 9)})
    found = {each.endpoint.id: each for each in store.snapshot(1.0).states}
    assert (found["a"].others, found["a"].all_in_flight, found["a"].all_in_flight_tokens) == (3, 3, 700)
    assert (found["b"].others, found["b"].in_flight) == (0, 0)
    store.set_others({})
    assert all(each.others == 0 for each in store.snapshot(1.0).states)
