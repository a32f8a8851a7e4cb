"""When exact keys of a model are switched off, and when they are not."""

from __future__ import annotations

import struct

import pytest

from picker.signals.tokens.agreement import PATIENCE_S, Agreement

URL = "http://e1"


def u32(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


OURS = u32(*range(64))
BLOCK = u32(*range(16))
OTHER = u32(*range(1000, 1016))


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def agreement(told: list[tuple[str, str]]) -> Agreement:
    return Agreement(lambda model, endpoint: told.append((model, endpoint)))


def miss(agreement: Agreement, times: int, *, endpoint: str = URL, ours: bytes = OURS) -> None:
    for number in range(times):
        start = 1000.0 * number
        agreement.routed(endpoint, "m", ours, start)
        agreement.stored(endpoint, OTHER, start + PATIENCE_S + 1)


def test_unknown_is_trusted(agreement: Agreement) -> None:
    assert agreement.trusted("m")


def test_a_comparison_decides_and_the_last_one_counts(agreement: Agreement, told: list[tuple[str, str]]) -> None:
    agreement.compared(URL, "m", False)
    agreement.compared(URL, "m", False)
    assert not agreement.trusted("m")
    assert agreement.trusted("other")
    assert told == [("m", URL)]
    agreement.compared(URL, "m", True)
    assert agreement.trusted("m")


def test_one_endpoint_is_enough_to_distrust_and_its_end_heals(agreement: Agreement) -> None:
    agreement.compared("http://a", "m", True)
    agreement.compared("http://b", "m", False)
    agreement.compared("http://c", "m", False)
    agreement.forget("http://b")
    assert not agreement.trusted("m")
    agreement.forget("http://c")
    assert agreement.trusted("m")


def test_first_blocks_that_never_come_add_up(agreement: Agreement, told: list[tuple[str, str]]) -> None:
    miss(agreement, 4)
    assert agreement.trusted("m")
    miss(agreement, 1)
    assert not agreement.trusted("m")
    assert told == [("m", URL)]


def test_one_first_block_that_came_settles_it(agreement: Agreement) -> None:
    miss(agreement, 4)
    agreement.routed(URL, "m", OURS, 9000)
    agreement.stored(URL, BLOCK, 9001)
    miss(agreement, 20)
    assert agreement.trusted("m")


def test_blocks_of_others_within_patience_prove_nothing(agreement: Agreement) -> None:
    for number in range(50):
        agreement.routed(URL, "m", OURS, 0.0)
        agreement.stored(URL, OTHER, PATIENCE_S * number / 50)
    assert agreement.trusted("m")


def test_silence_of_an_endpoint_proves_nothing(agreement: Agreement) -> None:
    for number in range(50):
        agreement.routed(URL, "m", OURS, 1000.0 * number)
    assert agreement.trusted("m")


def test_prompts_shorter_than_a_block_prove_nothing(agreement: Agreement) -> None:
    miss(agreement, 20, ours=u32(1, 2, 3))
    assert agreement.trusted("m")


def test_blocks_longer_than_the_sample_are_compared_as_far_as_it_goes(agreement: Agreement) -> None:
    long = u32(*range(600))
    agreement.routed(URL, "m", long, 0.0)
    agreement.stored(URL, u32(*range(512)), 1.0)
    miss(agreement, 20)
    assert agreement.trusted("m")


def test_memory_is_bounded(agreement: Agreement) -> None:
    for number in range(6000):
        agreement.routed(f"http://{number}", "m", OURS, 0.0)
        agreement.compared("http://x", f"m{number}", False)
    assert repr(agreement).startswith("<Agreement [4096 endpoints")
    assert repr(agreement).count("'m") <= 64


def test_models_beyond_the_bound_stay_trusted(agreement: Agreement) -> None:
    for number in range(100):
        agreement.compared(URL, f"m{number}", False)
    assert [agreement.trusted(f"m{number}") for number in (0, 63, 64, 99)] == [False, False, True, True]
