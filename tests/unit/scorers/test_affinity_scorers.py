"""The scorers of affinity: loaded adapters and homes of sessions."""

from __future__ import annotations

from collections import Counter

import pytest

from picker.core.values import EndpointState, Lora
from scorers.lora_affinity import LoraAffinity
from scorers.session_affinity import SessionAffinity
from tests.unit.core.builders import request, state


def lora(running: str = "", waiting: str = "", slots: int = 2) -> EndpointState:
    return state(lora=Lora(frozenset(running.split()), frozenset(waiting.split()), slots))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (lora("m x"), 1.0),
        (lora("m x", "m"), 1.0),
        (lora("x"), 0.8),
        (lora(), 0.8),
        (lora("x", "m"), 0.6),
        (lora("x y", "m"), 0.6),
        (lora("x y"), 0.0),
        (lora("x", "y"), 0.0),
        (lora("x", "x"), 0.8),
        (lora(slots=0), 0.0),
        (state(kv_usage=0.1), None),
        (state(), None),
    ],
)
def test_lora_affinity(row: EndpointState, expected: float | None) -> None:
    assert list(LoraAffinity().score(request(1, model="m"), [row])) == [expected]


def test_the_adapter_is_the_name_the_engines_see() -> None:
    asked = request(1, model="alias", target_model="m")
    assert list(LoraAffinity().score(asked, [lora("m"), lora("alias")])) == [1.0, 0.8]


def test_a_request_without_a_model_is_no_adapter() -> None:
    assert list(LoraAffinity().score(request(1), [lora("m"), lora("m x")])) == [0.8, 0.0]


def homes(sessions: list[str], pods: list[str]) -> dict[str, str]:
    """Session -> the one endpoint that scores 1."""
    states = [state(name) for name in pods]
    found = {}
    for session in sessions:
        scores = list(SessionAffinity().score(request(1, session=session), states))
        assert sorted(score for score in scores if score is not None) == [0.0] * (len(pods) - 1) + [1.0]
        found[session] = pods[scores.index(1.0)]
    return found


SESSIONS = [f"session-{number}" for number in range(3000)]
PODS = [f"pod-{number}" for number in range(10)]


def test_no_session_no_data() -> None:
    states = [state("a"), state("b")]
    assert list(SessionAffinity().score(request(1), states)) == [None, None]
    assert list(SessionAffinity().score(request(1, session=""), states)) == [None, None]
    assert list(SessionAffinity().score(request(1, session="s"), [])) == []


def test_homes_are_spread_evenly() -> None:
    counts = Counter(homes(SESSIONS, PODS).values())
    assert min(counts.values()) > 0.8 * 300
    assert max(counts.values()) < 1.2 * 300


def test_only_the_sessions_of_a_lost_pod_move() -> None:
    before, after = homes(SESSIONS, PODS), homes(SESSIONS, PODS[1:])
    moved = {session for session in SESSIONS if before[session] != after[session]}
    assert moved == {session for session in SESSIONS if before[session] == PODS[0]}


def test_homes_do_not_depend_on_the_order_of_pods() -> None:
    assert homes(SESSIONS[:200], PODS) == homes(SESSIONS[:200], PODS[::-1])


def test_similar_pod_names_and_similar_sessions_still_spread() -> None:
    """CRCs alone are linear: without mixing, pods would win whole families of sessions together."""
    counts = Counter(homes([f"{number:08x}" for number in range(2000)], [f"vllm-{n}" for n in range(4)]).values())
    assert min(counts.values()) > 0.8 * 500


@pytest.mark.parametrize("session", ["\ud800", "\x00", "🦊" * 1000, " "])
def test_hostile_sessions(session: str) -> None:
    assert homes([session], PODS)[session] in PODS
