"""Where engines publish: what they say in all known forms, what is configured, and whose is whose."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.kv.discover import KvPorts, Source, discover, host_of, mine, reachable, read_sglang, read_vllm
from picker.signals.kv.messages import Spec
from tests.unit.signals.fakes import Answer

POD = Endpoint(id="pod", url="http://10.0.0.7:8000", address="10.0.0.7:8000")
NOBODY = KvPorts()


def source(rank: int, endpoint: str, replay: str = "", topic: str = "") -> Source:
    return Source(rank, Spec(endpoint=endpoint, replay_endpoint=replay, topic=topic))


async def found(
    answers: dict[str, Any], ports: KvPorts = NOBODY, endpoint: Endpoint = POD, siblings: int = 1
) -> tuple[Source, ...] | ProbeFailure:
    async def ask(url: str) -> Answer | ProbeFailure:
        reply = answers.get(url.removeprefix(endpoint.url), Answer(404))
        return reply if isinstance(reply, Answer | ProbeFailure) else Answer(200, msgspec.json.encode(reply))

    return await discover(endpoint, ask, ports, siblings=siblings)


SAID = {"endpoint": "tcp://*:39075", "replay_endpoint": "tcp://127.0.0.1:5558", "topic": "kv@x"}
EXPECTED = source(0, "tcp://10.0.0.7:39075", "tcp://10.0.0.7:5558", "kv@x")


@pytest.mark.parametrize(
    "body",
    [
        {"0": SAID},
        [SAID],
        [SAID | {"data_parallel_rank": 0, "new_field": 1}],
        {"sources": [SAID | {"data_parallel_rank": 0}]},
    ],
)
async def test_vllm_says_it_in_three_forms(body: Any) -> None:
    assert await found({"/kv_event_sources": body}) == (EXPECTED,)


async def test_sglang_says_it_by_base_port() -> None:
    said = {"endpoint_host": "*", "endpoint_port_base": 5557, "topic": "kv", "dp_size": 2, "publisher": "zmq"}
    assert await found({"/server_info": {"page_size": 64, "kv_events": said}}) == (
        source(0, "tcp://10.0.0.7:5557", topic="kv"),
        source(1, "tcp://10.0.0.7:5558", topic="kv"),
    )
    assert await found({"/get_server_info": {"kv_events": said | {"dp_size": 1}}}) == (
        source(0, "tcp://10.0.0.7:5557", topic="kv"),
    )


@pytest.mark.parametrize(
    "answers",
    [
        {"/kv_event_sources": {}},
        {"/kv_event_sources": []},
        {"/server_info": {"kv_events": None}},
        {"/server_info": {"kv_events": {"endpoint_port_base": 1, "publisher": "null"}}},
        {"/kv_event_sources": {"0": {"endpoint": "ipc:///run/x"}}},
    ],
)
async def test_an_engine_that_says_none_has_none(answers: dict[str, Any]) -> None:
    assert await found(answers) == ()


@pytest.mark.parametrize("answers", [{}, {"/kv_event_sources": Answer(200, b"<html>")}, {"/server_info": {"x": 1}}])
async def test_an_engine_that_says_nothing_may_be_at_the_usual_place(answers: dict[str, Any]) -> None:
    assert await found(answers) == (source(0, "tcp://10.0.0.7:5557", "tcp://10.0.0.7:5558"),)


@pytest.mark.parametrize("reply", [ProbeFailure.REFUSED, ProbeFailure.TIMEOUT, Answer(503)])
async def test_nobody_to_ask_is_a_failure(reply: Answer | ProbeFailure) -> None:
    assert isinstance(await found({"/kv_event_sources": reply}), ProbeFailure)


async def test_configuration_is_not_asked_for_again() -> None:
    ports = KvPorts(port=7000, replay_port=7100, topic="kv@")
    rank = msgspec.structs.replace(POD, rank=2)

    assert await found({"/kv_event_sources": ProbeFailure.REFUSED}, ports, rank) == (
        source(2, "tcp://10.0.0.7:7002", "tcp://10.0.0.7:7102", "kv@"),
    )
    assert await found({}, KvPorts(port=7000)) == (source(0, "tcp://10.0.0.7:7000"),)


async def test_configured_topic_replaces_what_is_said() -> None:
    assert await found({"/kv_event_sources": {"0": SAID}}, KvPorts(topic="")) == (
        source(0, "tcp://10.0.0.7:39075", "tcp://10.0.0.7:5558"),
    )


async def test_the_usual_replay_port_is_another_ranks_events_port() -> None:
    rank = msgspec.structs.replace(POD, rank=1)
    assert await found({}, endpoint=rank, siblings=2) == (source(1, "tcp://10.0.0.7:5558"),)


@pytest.mark.parametrize(
    ("ranks", "rank", "siblings", "expected"),
    [
        ([0], 0, 1, [0]),
        ([5], 0, 1, [5]),  # a pod of a deployment over several pods
        ([3], 1, 2, [3]),  # each rank's own server tells of itself only
        ([0, 1], 0, 1, [0, 1]),  # one port that balances over ranks
        ([0, 1], 1, 2, [1]),
        ([3, 2], 0, 2, [2]),
        ([0, 1, 2, 3], 2, 3, [2]),
        ([0, 1, 2], 7, 8, []),
        ([], 0, 1, []),
    ],
)
def test_whose_is_whose(ranks: list[int], rank: int, siblings: int, expected: list[int]) -> None:
    sources = [source(n, f"tcp://h:{n + 1}") for n in ranks]
    assert [s.rank for s in mine(sources, rank, siblings)] == expected


@pytest.mark.parametrize(
    ("said", "reached"),
    [
        ("tcp://*:5557", "tcp://10.0.0.7:5557"),
        ("tcp://0.0.0.0:5557", "tcp://10.0.0.7:5557"),
        ("tcp://[::]:5557", "tcp://10.0.0.7:5557"),
        ("tcp://127.0.0.1:5557", "tcp://10.0.0.7:5557"),
        ("tcp://node-3:5557", "tcp://10.0.0.7:5557"),
        ("tcp://10.0.9.9:5557", "tcp://10.0.9.9:5557"),
        ("tcp://[fd00::9]:5557", "tcp://[fd00::9]:5557"),
        ("tcp://*:0", ""),
        ("tcp://*:99999", ""),
        ("tcp://*", ""),
        ("tcp://[::", ""),
        ("ipc:///run/events", ""),
        ("inproc://events", ""),
        ("5557", ""),
        ("", ""),
    ],
)
def test_reachable(said: str, reached: str) -> None:
    assert reachable(said, "10.0.0.7") == reached


def test_hosts() -> None:
    six = Endpoint(id="e", url="http://[fd00::7]:8000", address="[fd00::7]:8000")
    assert host_of(POD) == "10.0.0.7"
    assert host_of(six) == "fd00::7"
    assert host_of(Endpoint(id="e", url="http://engine.ns.svc:8000")) == "engine.ns.svc"
    assert reachable("tcp://*:1", "fd00::7") == "tcp://[fd00::7]:1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(["tcp://*:1", "tcp://[::"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "0",
                    "1",
                    "sources",
                    "endpoint",
                    "replay_endpoint",
                    "topic",
                    "kv_events",
                    "endpoint_port_base",
                    "dp_size",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=60) | JSON.map(msgspec.json.encode))
def test_any_answer_is_read_or_refused(body: bytes) -> None:
    for read in (read_vllm, read_sglang):
        for one in read(body, "h") or ():
            assert one.spec.endpoint.startswith("tcp://")
