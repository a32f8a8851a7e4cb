"""The parts of the reflector: pauses, failures, and a decoder that takes any bytes."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.sources.kubernetes.backoff import Backoff
from picker.sources.kubernetes.decode import Decoder, Page, Told
from picker.sources.kubernetes.failure import MESSAGE_MAX, ApiFailure, failure_of
from picker.sources.kubernetes.objects import Pod
from tests.unit.sources.kubernetes.scripted_api import added, bookmark, error, page


def test_delays_fill_the_whole_range_and_grow() -> None:
    rng = Random(1)
    backoff = Backoff(least_s=0.25, most_s=30, uniform=rng.uniform)
    for limit in (0.5, 1, 2, 4, 8, 16, 30, 30, 30):
        assert 0.25 <= backoff.next() <= limit
    late = [backoff.next() for _ in range(500)]
    assert min(late) < 2
    assert max(late) > 28
    backoff.reset()
    assert backoff.next() <= 0.5


def test_a_status_tells_what_is_wrong() -> None:
    body = b'{"kind":"Status","code":429,"reason":"TooManyRequests","message":"slow\\n down"}'
    assert failure_of(429, body, {"Retry-After": "3"}) == ApiFailure(429, "slow down", "TooManyRequests", 3.0)


@pytest.mark.parametrize("body", [b"", b"<html>" * 1000, b"[]", b'{"message":5}', b"\xff", b"[" * 100_000])
def test_an_error_page_is_a_failure_too(body: bytes) -> None:
    assert failure_of(502, body) == ApiFailure(502, "HTTP 502")


@pytest.mark.parametrize("text", ["", "-1", "1.5", "Fri, 31 Dec 1999 23:59:59 GMT", "9" * 400, "٣", "nan"])
def test_an_odd_retry_after_is_none(text: str) -> None:
    assert failure_of(503, b"", {"Retry-After": text}).retry_after_s is None


def test_messages_have_a_bound() -> None:
    body = msgspec.json.encode({"message": "x" * 10_000, "reason": "y" * 10_000})
    failure = failure_of(500, body)
    assert (len(failure.message), len(failure.reason)) == (MESSAGE_MAX, MESSAGE_MAX)


def test_a_code_from_nowhere_is_not_taken_over() -> None:
    told = Decoder(Pod).line(error(-7))
    assert isinstance(told, ApiFailure)
    assert told.status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PIECES = st.sampled_from(
    [added("a", "1"), bookmark("2"), error(410), page("a", "b", more="x"), b"\xff", b"{}", b"\x00"]
)
MANGLED = st.tuples(PIECES, st.integers(0, 200), PIECES).map(lambda p: p[0][: p[1]] + p[2] + p[0][p[1] :])
EVENTS = st.builds(
    lambda kind, found: msgspec.json.encode({"type": kind, "object": found}),
    st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "?"]),
    JSON | st.fixed_dictionaries({"metadata": JSON}) | st.fixed_dictionaries({"metadata": st.just({}), "spec": JSON}),
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | MANGLED | EVENTS)
def test_no_bytes_raise(data: bytes) -> None:
    decoder = Decoder(Pod)
    assert isinstance(decoder.line(data), Told | ApiFailure)
    assert isinstance(decoder.page(data), Page | ApiFailure)
