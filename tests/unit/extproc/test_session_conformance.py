"""What conformance tests of gateways ask of a picker, and that nobody else can have it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.extproc.headers import in_both
from picker.extproc.messages import BodyMode, Direction, HeadersReply, Mutation
from picker.extproc.settings import SessionSettings
from tests.unit.extproc.extproc_fakes import FakeDirector, allows
from tests.unit.extproc.talk import Talk, only_immediate

ON = SessionSettings(conformance=True)
SELECTION = "test-epp-endpoint-selection"
SERVED = "x-conformance-test-served-endpoint"
PODS = ["10.0.0.1:3000", "10.0.0.1:3002", "10.0.0.2:3000", "[fd00::1]:3000"]


def chosen_from(selection: str | None, subset: tuple[str, ...] | None = None) -> list[str]:
    """The pods a request may go to."""
    talk = Talk(FakeDirector(PODS), ON, subset=subset)
    talk.headers({} if selection is None else {SELECTION: selection}, end=True)
    return [pod for pod in PODS if allows(talk.director.requests[0].subset, pod)]


@pytest.mark.parametrize(
    ("selection", "subset", "expected"),
    [
        (None, None, PODS),
        ("", None, PODS),
        ("10.0.0.1:3002", None, PODS[1:2]),
        (" 10.0.0.1:3002 ,, 10.0.0.2 ", None, PODS[1:3]),
        ("10.0.0.1", None, PODS[:2]),
        ("fd00::1", None, PODS[3:]),
        ("[fd00:0::1]:3000", None, PODS[3:]),
        ("10.0.0.1,10.9.9.9:3000", None, PODS[:2]),
        ("10.9.9.9", None, []),
        (",", None, []),
        ("10.0.0.1", ("10.0.0.1:3002", "10.0.0.2"), PODS[1:2]),
        ("10.0.0.1:3000,fd00::1", ("10.0.0.1",), PODS[:1]),
        ("10.0.0.1", ("10.0.0.2",), []),
        ("10.0.0.1", (), []),
        (None, ("10.0.0.2",), PODS[2:3]),
    ],
)
def test_the_selection_restricts_what_the_proxy_allows(
    selection: str | None, subset: tuple[str, ...] | None, expected: list[str]
) -> None:
    assert chosen_from(selection, subset) == expected


def test_a_selection_of_nobody_is_503() -> None:
    assert only_immediate(Talk(settings=ON).headers({SELECTION: "10.9.9.9:1"}, end=True)).status == 503


@pytest.mark.parametrize("mode", list(BodyMode))
def test_the_request_asks_the_echo_server_to_name_the_choice(mode: BodyMode) -> None:
    talk = Talk(FakeDirector(PODS), ON, request=mode)
    [head] = talk.headers({SELECTION: PODS[2]}, end=True)

    assert isinstance(head, HeadersReply)
    assert ("x-echo-set-header", f"{SERVED}:{PODS[2]}") in head.mutation.set_headers
    assert head.mutation.remove_headers == (SELECTION,)


@pytest.mark.parametrize(("served", "expected"), [(None, PODS[0]), (PODS[2], PODS[2])])
@pytest.mark.parametrize("mode", list(BodyMode))
def test_the_response_names_who_served_or_else_the_choice(mode: BodyMode, served: str | None, expected: str) -> None:
    talk = Talk(FakeDirector(PODS[:1]), ON, response=mode)
    talk.ask()

    head = talk.response_headers(served=served)[0]
    assert head == HeadersReply(Direction.RESPONSE, Mutation(set_headers=((SERVED, expected),)))


def test_a_response_nobody_was_chosen_for_is_left_alone() -> None:
    assert Talk(settings=ON).response_headers() == [HeadersReply(Direction.RESPONSE)]


def test_without_the_setting_a_client_can_neither_choose_nor_see() -> None:
    talk = Talk(FakeDirector(PODS[:2]), subset=("10.0.0.1:3000",))
    [head] = talk.headers({SELECTION: PODS[1], "x-echo-set-header": "theirs:1"}, end=True)

    assert isinstance(head, HeadersReply)
    assert head.mutation.destination == PODS[0]
    assert talk.director.requests[0].subset == frozenset(PODS[:1])
    assert head.mutation.remove_headers == (SELECTION,)
    assert "x-echo-set-header" not in dict(head.mutation.set_headers)
    assert talk.response_headers(served=PODS[1]) == [HeadersReply(Direction.RESPONSE)]


ENTRIES = st.none() | st.lists(st.sampled_from([*PODS, "10.0.0.1", "10.0.0.2", "fd00::1", "odd", "odd:1"])).map(tuple)


@given(one=ENTRIES, other=ENTRIES)
def test_an_address_is_in_both_exactly_when_it_is_in_each(
    one: tuple[str, ...] | None, other: tuple[str, ...] | None
) -> None:
    def names(entries: tuple[str, ...] | None, pod: str) -> bool:
        return allows(None if entries is None else frozenset(entries), pod)

    both = in_both(one, other)
    for pod in [*PODS, "10.0.0.2:1", "odd:1", "odd:2"]:
        assert names(both, pod) == (names(one, pod) and names(other, pod))
