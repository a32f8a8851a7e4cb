"""The health state machine: three causes, each with its own cure."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from picker.core.events import FailureKind
from picker.core.health import EndpointHealth, HealthLimits
from picker.core.updates import ProbeFailure
from picker.core.values import Standing

READY, DEGRADED, OUT = Standing.READY, Standing.DEGRADED, Standing.OUT
LIMITS = HealthLimits(
    probe_failures=2, breaker_failures=3, breaker_open_s=5.0, breaker_open_max_s=20.0, overloaded_s=0.5
)


@pytest.fixture
def health() -> EndpointHealth:
    return EndpointHealth(LIMITS)


def fail(health: EndpointHealth, times: int, now: float = 0.0, kind: FailureKind = FailureKind.RESET) -> None:
    for key in range(times):
        health.failed(1000 + key, kind, now)


def test_a_new_endpoint_is_ready(health: EndpointHealth) -> None:
    assert health.standing(0.0) == (READY, "")


@pytest.mark.parametrize("kind", [ProbeFailure.REFUSED, ProbeFailure.TIMEOUT])
def test_two_silent_probes_make_it_unreachable_and_one_answer_cures(health: EndpointHealth, kind: ProbeFailure) -> None:
    health.scrape_failed(kind)
    assert health.standing(1.0)[0] is READY

    health.scrape_failed(kind)
    assert health.standing(1.0)[0] is OUT
    assert "unreachable" in health.standing(1e9)[1], "time alone does not cure it"

    health.scraped()
    assert health.standing(1.0)[0] is READY
    health.scrape_failed(kind)
    assert health.standing(1.0)[0] is READY, "the count starts again"


@pytest.mark.parametrize("kind", [ProbeFailure.HTTP, ProbeFailure.PARSE])
def test_bad_metrics_of_a_live_front_end_only_degrade(health: EndpointHealth, kind: ProbeFailure) -> None:
    health.scrape_failed(kind)
    assert health.standing(0.0)[0] is READY
    health.scrape_failed(kind)
    assert health.standing(0.0) == (DEGRADED, "metrics failing")

    health.alive()
    assert health.standing(0.0)[0] is DEGRADED, "a sign of life does not bring the metrics back"
    health.scraped()
    assert health.standing(0.0)[0] is READY


def test_an_http_answer_is_a_sign_of_life(health: EndpointHealth) -> None:
    for _ in range(2):
        health.scrape_failed(ProbeFailure.REFUSED)
    health.scrape_failed(ProbeFailure.HTTP)
    assert health.standing(0.0)[0] is READY


def test_metrics_of_another_port_neither_kill_nor_cure(health: EndpointHealth) -> None:
    health.failed(1, FailureKind.CONNECT, 0.0)
    health.metrics_scraped()
    assert health.standing(0.1)[0] is OUT

    health.alive()
    for _ in range(5):
        health.metrics_failed()
    assert health.standing(0.1) == (DEGRADED, "metrics failing")


def test_a_failed_connect_takes_it_out_at_once(health: EndpointHealth) -> None:
    health.failed(1, FailureKind.CONNECT, 1.0)
    assert health.standing(1.0) == (OUT, "unreachable: connect failed")

    health.alive()
    assert health.standing(1.0)[0] is READY


def test_a_failed_connect_is_forgiven_by_time_where_no_probe_can_tell(health: EndpointHealth) -> None:
    """Otherwise an endpoint whose probes go elsewhere would never get a request again."""
    health.failed(1, FailureKind.CONNECT, 1.0)

    assert health.standing(1.0 + LIMITS.breaker_open_s - 0.1)[0] is OUT
    assert health.standing(1.0 + LIMITS.breaker_open_s)[0] is READY


def test_an_overloaded_endpoint_rests_a_moment(health: EndpointHealth) -> None:
    health.failed(1, FailureKind.OVERLOADED, 1.0)
    assert health.standing(1.4) == (DEGRADED, "overloaded")
    assert health.standing(1.5)[0] is READY


def test_overload_is_no_failure(health: EndpointHealth) -> None:
    fail(health, 50, kind=FailureKind.OVERLOADED)
    assert health.standing(10.0)[0] is READY


@pytest.mark.parametrize("kind", [FailureKind.RESET, FailureKind.TIMEOUT, FailureKind.SERVER_ERROR])
def test_failures_in_a_row_open_the_breaker(health: EndpointHealth, kind: FailureKind) -> None:
    fail(health, 2, kind=kind)
    assert health.standing(0.0)[0] is READY
    fail(health, 1, kind=kind)
    assert health.standing(0.0) == (DEGRADED, "3 failed requests in a row")


def test_a_success_between_failures_resets_the_row(health: EndpointHealth) -> None:
    fail(health, 2)
    health.succeeded(9)
    fail(health, 2)
    assert health.standing(0.0)[0] is READY


def test_one_trial_after_the_ejection_and_it_recovers(health: EndpointHealth) -> None:
    fail(health, 3)
    assert health.standing(4.9)[0] is DEGRADED
    assert health.standing(5.0)[0] is READY, "time for a trial"

    health.dispatched(7, 5.0)
    assert health.trial == 7
    assert health.standing(5.0)[0] is DEGRADED, "the only one until it ends"
    health.dispatched(8, 5.1)
    assert health.trial == 7

    health.succeeded(8)
    assert health.standing(5.1)[0] is DEGRADED, "it was sent when the endpoint still had a good name"
    health.succeeded(7)
    assert health.standing(5.2)[0] is READY
    assert health.trial is None


def test_a_trial_that_begins_to_answer_ends_and_the_next_failure_ejects_for_longer(health: EndpointHealth) -> None:
    fail(health, 3)
    health.dispatched(7, 5.0)
    health.began(7)
    assert health.standing(5.1)[0] is READY
    health.failed(7, FailureKind.RESET, 5.2)
    assert health.standing(15.1)[0] is DEGRADED
    assert health.standing(15.2)[0] is READY


def test_half_of_the_requests_failing_is_as_bad_as_a_row(health: EndpointHealth) -> None:
    for key in range(9):
        health.failed(key, FailureKind.RESET, 0.0)
        health.succeeded(100 + key)
    assert health.standing(0.0)[0] is READY
    health.failed(9, FailureKind.RESET, 0.0)
    assert health.standing(0.0) == (DEGRADED, "half of 20 requests failed")


def test_failed_trials_double_the_time_up_to_a_bound(health: EndpointHealth) -> None:
    fail(health, 3)
    now, open_s = 0.0, 5.0
    for expected_s in (10.0, 20.0, 20.0):
        now += open_s
        assert health.standing(now)[0] is READY
        health.dispatched(7, now)
        health.failed(7, FailureKind.RESET, now)
        assert health.standing(now + expected_s - 0.1)[0] is DEGRADED
        open_s = expected_s
    now += open_s
    health.dispatched(7, now)
    health.succeeded(7)
    fail(health, 3, now)
    assert health.standing(now + 5.0)[0] is READY, "a recovery starts over with the shortest time"


def test_a_trial_whose_client_left_makes_room_for_another(health: EndpointHealth) -> None:
    fail(health, 3)
    health.dispatched(7, 5.0)
    health.ended(7, 5.5)

    assert health.standing(5.5)[0] is READY
    health.dispatched(8, 5.6)
    assert health.trial == 8


def test_the_end_of_another_request_does_not_end_the_trial(health: EndpointHealth) -> None:
    fail(health, 3)
    health.dispatched(7, 5.0)
    health.ended(8, 5.5)
    health.failed(9, FailureKind.RESET, 5.5)
    assert health.trial == 7


def test_an_overloaded_trial_proves_nothing(health: EndpointHealth) -> None:
    fail(health, 3)
    health.dispatched(7, 5.0)
    health.failed(7, FailureKind.OVERLOADED, 5.2)
    assert health.trial is None
    assert health.standing(5.3) == (DEGRADED, "overloaded")
    assert health.standing(5.8)[0] is READY


def test_hung_is_out_and_any_progress_cures(health: EndpointHealth) -> None:
    health.eject("hung", 0.0)
    assert health.standing(1.0) == (OUT, "hung")
    assert health.hung

    health.progressed()
    assert health.standing(1.0)[0] is READY
    assert not health.hung


def test_progress_does_not_cure_failed_requests(health: EndpointHealth) -> None:
    fail(health, 3)
    health.progressed()
    assert health.standing(1.0)[0] is DEGRADED


def test_many_hung_requests_eject_once(health: EndpointHealth) -> None:
    """All victims report the same hang; it must not double the time for each."""
    for key in range(20):
        health.failed(key, FailureKind.HUNG, 0.0)
    assert health.standing(4.9)[0] is OUT
    assert health.standing(5.0)[0] is READY


def test_a_hang_outweighs_failed_requests(health: EndpointHealth) -> None:
    """Degraded endpoints get traffic when nobody is ready; a hung one must not."""
    fail(health, 3)
    health.eject("hung", 1.0)
    assert health.standing(1.0) == (OUT, "hung")


def test_headers_do_not_prove_that_a_hung_engine_works(health: EndpointHealth) -> None:
    health.eject("hung", 0.0)
    health.answered(7)
    assert health.standing(1.0)[0] is OUT

    health.progressed()
    fail(health, 2, 2.0)
    health.answered(7)
    fail(health, 2, 2.0)
    assert health.standing(2.0)[0] is READY, "but they are no failed request"


def test_a_restart_forgives(health: EndpointHealth) -> None:
    fail(health, 3)
    health.restarted()
    assert health.standing(0.0)[0] is READY
    fail(health, 2)
    assert health.standing(0.0)[0] is READY, "failures are counted anew"


def test_unreachable_comes_before_everything(health: EndpointHealth) -> None:
    health.eject("hung", 0.0)
    health.failed(1, FailureKind.OVERLOADED, 0.0)
    for _ in range(2):
        health.scrape_failed(ProbeFailure.TIMEOUT)
    assert health.standing(0.1) == (OUT, "unreachable: no answer to probes")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fail", "end", "dispatch", "succeed", "answer", "hung", "probe", "scraped", "progress"]),
        st.integers(0, 5),
        st.sampled_from(list(FailureKind)),
        st.sampled_from(list(ProbeFailure)),
        st.floats(-0.01, 3.0),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_history_takes_an_endpoint_out_for_ever(
    steps: list[tuple[str, int, FailureKind, ProbeFailure, float]],
) -> None:
    """Once all requests have ended, a scrape and the longest ejection later, it is ready. The clock may step back."""
    health, now = EndpointHealth(LIMITS), 0.0
    for what, key, kind, probe, wait_s in steps:
        now += wait_s
        match what:
            case "fail":
                health.failed(key, kind, now)
            case "end":
                health.ended(key, now)
            case "dispatch":
                health.dispatched(key, now)
            case "succeed":
                health.succeeded(key)
            case "answer":
                health.answered(key)
            case "hung":
                health.eject("hung", now)
            case "probe":
                health.scrape_failed(probe)
            case "scraped":
                health.scraped()
            case _:
                health.progressed()
        standing, reason = health.standing(now)
        assert (standing is READY) == (reason == "")
    for key in range(6):
        health.ended(key, now)
    health.scraped()

    assert health.standing(now + LIMITS.breaker_open_max_s + 1.0) == (READY, "")
