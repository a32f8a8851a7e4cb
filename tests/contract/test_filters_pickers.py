"""What every filter and every picker promises, asked of every registered one."""

from __future__ import annotations

import copy
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from picker.core import filters, pickers
from picker.core.values import EndpointState, InferenceRequest, RejectionCode
from tests.contract.strategies import requests, states
from tests.unit.core.builders import request

# Times every plugin, and each example is a whole pool of endpoints.
EXAMPLES = settings(max_examples=20)
every_filter = pytest.mark.parametrize("name", sorted(filters.BUILTIN))
every_picker = pytest.mark.parametrize("name", sorted(pickers.BUILTIN))
# The rest may remember: whose turn it is.
STATELESS = sorted(pickers.BUILTIN.keys() - {"round-robin"})


@every_filter
@EXAMPLES
@given(asked=requests(), rows=states())
def test_one_verdict_per_row_whatever_the_client_sends(
    name: str, asked: InferenceRequest, rows: list[EndpointState]
) -> None:
    verdicts = filters.build(name).reject(asked, rows)
    assert len(verdicts) == len(rows)
    for verdict in verdicts:
        assert verdict is None or (isinstance(verdict, str) and 0 < len(verdict) < 100)


@every_filter
@EXAMPLES
@given(asked=requests(), rows=states())
def test_filters_are_pure(name: str, asked: InferenceRequest, rows: list[EndpointState]) -> None:
    made = filters.build(name)
    asked_before, rows_before = copy.deepcopy(asked), copy.deepcopy(rows)
    first = list(made.reject(asked, rows))
    assert (asked, rows) == (asked_before, rows_before)
    assert list(made.reject(asked, rows)) == first


@every_filter
@EXAMPLES
@given(data=st.data(), asked=requests(), rows=states(max_size=4))
def test_the_order_of_rows_does_not_matter(
    name: str, data: st.DataObject, asked: InferenceRequest, rows: list[EndpointState]
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    made = filters.build(name)
    straight = made.reject(asked, rows)
    assert list(made.reject(asked, [rows[index] for index in order])) == [straight[index] for index in order]


@every_filter
def test_filters_work_without_rows_and_say_what_refusing_means(name: str) -> None:
    made = filters.build(name)
    assert list(made.reject(request(1, model="m", subset=frozenset(), pinned="x"), [])) == []
    assert made.name == name
    assert isinstance(made.refusal, RejectionCode)


@every_picker
@EXAMPLES
@given(data=st.data(), rows=states(min_size=1), seed=st.integers(0, 99))
def test_a_ranking_names_rows_at_most_once(
    name: str, data: st.DataObject, rows: list[EndpointState], seed: int
) -> None:
    totals = data.draw(st.lists(st.floats(-1e300, 1e300), min_size=len(rows), max_size=len(rows)))
    ranking = list(pickers.build(name).rank(rows, totals, random.Random(seed)))
    assert 1 <= len(ranking) <= len(rows)
    assert len(set(ranking)) == len(ranking)
    assert set(ranking) <= set(range(len(rows)))


@pytest.mark.parametrize("name", STATELESS)
@EXAMPLES
@given(data=st.data(), rows=states(min_size=1), seed=st.integers(0, 99))
def test_a_seed_reproduces_a_ranking(name: str, data: st.DataObject, rows: list[EndpointState], seed: int) -> None:
    totals = data.draw(st.lists(st.floats(0, 20), min_size=len(rows), max_size=len(rows)))
    made = pickers.build(name)
    first = list(made.rank(rows, totals, random.Random(seed)))
    assert list(made.rank(rows, totals, random.Random(seed))) == first


@every_picker
def test_pickers_are_named_as_in_the_table(name: str) -> None:
    assert pickers.build(name).name == name


@EXAMPLES
@given(data=st.data(), rows=states(min_size=1))
def test_max_score_never_ranks_a_worse_one_first(data: st.DataObject, rows: list[EndpointState]) -> None:
    totals = data.draw(st.lists(st.floats(0, 20), min_size=len(rows), max_size=len(rows)))
    ranking = pickers.build("max-score").rank(rows, totals, random.Random(1))
    assert totals[ranking[0]] >= max(totals) - pickers.TIE
