"""Arbitrary requests and rows, as hostile as clients and engines can make them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st

from picker.core.prefix.prompt import Match, PromptKeys
from picker.core.values import Endpoint, EndpointState, InferenceRequest, Lora, Role, Signals, Standing

NAMES = st.sampled_from(["m", "adapter", "", "\ud800", "\x00", "a" * 5000, "ü🦊", "10.0.0.1", "[::1]:80", "pod-1", " "])
SETS = st.frozensets(NAMES, max_size=3)
COUNTS = st.floats(0, 1e9, allow_nan=False) | st.integers(0, 50).map(float)


def signals() -> st.SearchStrategy[Signals]:
    """What one scrape may say. Ranges are those the reader of metrics pages lets through."""
    return st.builds(
        Signals,
        at=st.floats(-1e6, 1e6),
        waiting=st.none() | COUNTS,
        running=st.none() | COUNTS,
        kv_usage=st.none() | st.floats(0, 1),
        lora=st.none() | st.builds(Lora, running=SETS, waiting=SETS, slots=st.integers(0, 10_000)),
        progress_tokens=st.none() | COUNTS,
    )


@st.composite
def states(draw: st.DrawFn, *, min_size: int = 0, max_size: int = 4) -> list[EndpointState]:
    """Rows with distinct ids."""
    count = draw(st.integers(min_size, max_size))
    return [draw(_state(f"pod-{index}")) for index in range(count)]


def _state(name: str) -> st.SearchStrategy[EndpointState]:
    endpoint = st.builds(
        Endpoint,
        id=st.just(name),
        url=st.just("http://10.0.0.1:8000"),
        address=st.sampled_from(["", "10.0.0.1:8000", "10.0.0.2:8000", "[fd00::1]:8000"]),
        role=st.sampled_from(list(Role)),
        pool=NAMES,
        labels=st.dictionaries(NAMES, NAMES, max_size=2),
    )
    fields: dict[str, st.SearchStrategy[Any]] = {
        "endpoint": endpoint,
        "standing": st.sampled_from(list(Standing)),
        "standing_reason": st.sampled_from(["", "hung"]),
        "signals": st.none() | signals(),
        "models": st.none() | SETS,
        "waiting": st.none() | COUNTS,
        "running": st.none() | COUNTS,
        "in_flight": st.integers(0, 10**6),
        "in_flight_tokens": st.integers(0, 10**12),
    }
    return st.builds(EndpointState, **fields)


KEYS = st.builds(
    PromptKeys,
    exact=st.dictionaries(st.integers(1, 64), st.lists(st.integers(0, 2**64 - 1), max_size=4), max_size=2),
    learned=st.lists(st.integers(0, 2**64 - 1), max_size=4),
    tokens=st.integers(-1, 10**15),
)


def requests() -> st.SearchStrategy[InferenceRequest]:
    """What a door may hand over when its client is hostile."""
    return st.builds(
        InferenceRequest,
        key=st.integers(0, 2**63),
        id=NAMES,
        received_at=st.floats(allow_nan=False, allow_infinity=False),
        path=NAMES,
        model=st.none() | NAMES,
        target_model=st.none() | NAMES,
        stream=st.booleans(),
        prompt_tokens=st.integers(-10, 10**15),
        max_output_tokens=st.none() | st.integers(-(10**30), 10**30),
        session=st.none() | NAMES,
        subset=st.none() | SETS,
        pool=st.none() | NAMES,
        objective=st.none() | NAMES,
        priority=st.integers(-(2**31), 2**31),
        pinned=st.none() | NAMES,
        tried=SETS,
        strict_model=st.booleans(),
        sees_body=st.booleans(),
        keys=st.none() | KEYS,
        matches=st.dictionaries(NAMES, st.builds(Match, st.integers(0, 10**15), st.integers(0, 10**15), st.booleans())),
    )
