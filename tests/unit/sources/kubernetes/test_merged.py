"""Endpoints of several pools under one roof: the first pool keeps what two select."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from picker.core.updates import EndpointUpdate, Remove, Upsert
from picker.core.values import Endpoint
from picker.sources.kubernetes.merged import Merged

POOLS = ("ns/first", "ns/second", "ns/third")


def upsert(pool: int, name: str, version: int = 0) -> Upsert:
    return Upsert(POOLS[pool], Endpoint(id=name, url="http://10.0.0.1:1", pool=POOLS[pool], instance=str(version)))


def test_the_first_pool_keeps_what_two_select() -> None:
    merged = Merged("k")
    assert merged.apply(1, upsert(1, "a")) == Upsert("k", upsert(1, "a").endpoint)
    assert merged.shared == 0
    assert merged.apply(0, upsert(0, "a")) == Upsert("k", upsert(0, "a").endpoint)
    assert merged.shared == 1
    assert merged.apply(1, upsert(1, "a", 2)) is None
    assert merged.apply(0, Remove(POOLS[0], "a")) == Upsert("k", upsert(1, "a", 2).endpoint)
    assert merged.shared == 0
    assert merged.apply(1, Remove(POOLS[1], "a")) == Remove("k", "a")
    assert merged.endpoints() == ()


def test_removing_what_nobody_has_is_no_change() -> None:
    merged = Merged("k")
    assert merged.apply(0, Remove(POOLS[0], "a")) is None
    merged.apply(0, upsert(0, "a"))
    assert merged.apply(1, Remove(POOLS[1], "a")) is None
    assert [endpoint.id for endpoint in merged.endpoints()] == ["a"]


CHANGES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=40)


@given(CHANGES)
def test_readers_of_the_changes_know_the_same_as_the_merger(changes: list[tuple[int, str, int, bool]]) -> None:
    merged = Merged("k")
    truth: list[dict[str, Endpoint]] = [{}, {}, {}]
    reader: dict[str, Endpoint] = {}
    for pool, name, version, gone in changes:
        update: EndpointUpdate = Remove(POOLS[pool], name) if gone else upsert(pool, name, version)
        if isinstance(update, Remove):
            truth[pool].pop(name, None)
        else:
            truth[pool][name] = upsert(pool, name, version).endpoint
        told = merged.apply(pool, update)
        if isinstance(told, Upsert):
            reader[name] = told.endpoint
        elif isinstance(told, Remove):
            del reader[name]
        expected = {**truth[2], **truth[1], **truth[0]}
        assert reader == expected
        assert {endpoint.id: endpoint for endpoint in merged.endpoints()} == expected
        assert merged.shared == sum(sum(name in pool for pool in truth) > 1 for name in "abc")
