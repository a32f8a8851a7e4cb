"""Whose events are heard, from when to when, and what is said of those that are not. A scripted network and clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from picker.core.prefix.deltas import Op, Tier, pack
from picker.core.prefix.index import PrefixIndex
from picker.core.prefix.prompt import Match, PromptKeys
from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.kv.discover import KvPorts
from picker.signals.kv.events import KvHooks
from picker.signals.kv.follow import ASK_S, FOLLOW_S, PLACES, RETRY_S, KvFollower
from picker.signals.kv.messages import Facts, Spec
from tests.unit.signals.fakes import Answer, Network, Store
from tests.unit.signals.virtual_time import VirtualTime

KEYS = PromptKeys(exact={16: [7, 8]}, tokens=33)
NOBODY = b"{}"


def endpoint(name: str, **fields: Any) -> Endpoint:
    return Endpoint(**{"id": name, "url": f"http://{name}:8000", "address": f"{name}:8000", **fields})


def sources(*ports: int) -> Answer:
    """What vLLM says; a port per rank."""
    told = {str(rank): {"endpoint": f"tcp://*:{port}", "topic": "t"} for rank, port in enumerate(ports)}
    return Answer(200, json.dumps(told).encode())


class FakeEvents:
    """Notes who is heard, and speaks for the worker. `most` bounds the publishers."""

    def __init__(self, hooks: KvHooks, most: int) -> None:
        self.hooks = hooks
        self.most = most
        self.heard: dict[int, Spec] = {}
        self.left: list[int] = []

    def subscribe(self, publisher: int, spec: Spec) -> bool:
        if publisher not in self.heard and len(self.heard) >= self.most:
            return False
        self.heard[publisher] = spec
        return True

    def unsubscribe(self, publisher: int) -> None:
        del self.heard[publisher]
        self.left.append(publisher)

    def holds(self, publisher: int, *keys: int) -> None:
        """It tells of blocks; from now on it is heard."""
        self.hooks.on_delta(pack(Op.ONLINE, publisher) + pack(Op.ADD, publisher, Tier.GPU, keys))


class Rig:
    """A follower over a scripted fleet: vLLM everywhere unless `engines` says otherwise."""

    def __init__(self, *known: Endpoint, ports: KvPorts | None = None, most: int = 100) -> None:
        self.time = VirtualTime(100.0)
        self.network = Network(self.time.clock)
        self.store = Store(list(known))
        self.engines = {each.id: "vllm" for each in known}
        self.index = PrefixIndex()
        self.facts: list[tuple[str, Facts | None]] = []
        self.troubles: list[tuple[str, str]] = []
        self.listening: list[FakeEvents] = []
        self.most = most
        self.follower = KvFollower(
            self.index,
            self._listen,
            self.network,
            self.store,
            ports=ports or KvPorts(),
            engines=lambda: self.engines,
            clock=self.time.clock,
            on_facts=lambda name, facts: self.facts.append((name, facts)),
            on_trouble=lambda what, text: self.troubles.append((what, text)),
            sleep=self.time.sleep,
            rng=Random(1),
        )

    def _listen(self, hooks: KvHooks) -> FakeEvents:
        self.listening.append(FakeEvents(hooks, self.most))
        return self.listening[-1]

    @property
    def events(self) -> FakeEvents:
        [only] = self.listening
        return only

    @property
    def heard(self) -> dict[int, str]:
        """Addresses by publisher."""
        return {number: spec.endpoint for number, spec in self.events.heard.items()}

    def says(self, name: str, *ports: int) -> None:
        """From now on the endpoint says that it publishes there; without ports, nowhere."""
        self.network.replies[f"http://{name}:8000/kv_event_sources"] = sources(*ports)

    def asked(self, name: str) -> list[float]:
        return [at for at, url in self.network.asked if url.startswith(f"http://{name}:8000/kv_event")]

    def add(self, *more: Endpoint) -> None:
        self.store.set(*self.store.known, *more)
        self.engines |= {each.id: "vllm" for each in more}

    def held(self) -> dict[str, Match]:
        return self.index.lookup(KEYS)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    """The follower at work; cancelling it must leave no task."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(rig.follower.run())
    await rig.time.advance(FOLLOW_S)
    try:
        yield rig
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert asyncio.all_tasks() == before
        assert rig.index.statistics().publishers == 0


async def test_engines_are_heard_where_they_say_and_nothing_starts_without_one() -> None:
    rig = Rig(endpoint("a"), endpoint("b"), endpoint("c"), endpoint("d"))
    rig.engines |= {"b": "sglang", "c": "trtllm"}
    del rig.engines["d"]
    for name in "ac":
        rig.says(name)
    info = {"kv_events": {"endpoint_port_base": 6001, "topic": "kv", "dp_size": 1}}
    rig.network.replies["http://b:8000/server_info"] = Answer(200, json.dumps({"kv_events": None}).encode())
    async with running(rig):
        assert (rig.listening, rig.asked("c"), rig.asked("d")) == ([], [], [])
        rig.says("a", 5001)
        rig.network.replies["http://b:8000/server_info"] = Answer(200, json.dumps(info).encode())
        await rig.time.advance(1.2 * ASK_S + FOLLOW_S)
        assert sorted(rig.heard.values()) == ["tcp://a:5001", "tcp://b:6001"]
        assert rig.index.statistics().publishers == 2
        assert rig.troubles == []


async def test_an_endpoint_is_asked_now_and_then_and_sooner_when_it_does_not_answer() -> None:
    rig = Rig(endpoint("a"))
    rig.network.down["a:8000"] = ProbeFailure.REFUSED
    async with running(rig):
        await rig.time.advance(4 * RETRY_S)
        assert 4 <= len(rig.asked("a")) <= 6
        del rig.network.down["a:8000"]
        rig.says("a", 5001)
        await rig.time.advance(1.2 * RETRY_S + FOLLOW_S)
        assert rig.heard == {1: "tcp://a:5001"}
        before = len(rig.asked("a"))
        await rig.time.advance(3 * ASK_S)
        assert 2 <= len(rig.asked("a")) - before <= 4
        rig.network.down["a:8000"] = ProbeFailure.TIMEOUT
        await rig.time.advance(2 * ASK_S)
        # Silence about it is no reason to hear it no more.
        assert rig.heard == {1: "tcp://a:5001"}


async def test_what_was_just_sent_counts_in_the_blocks_of_the_engine() -> None:
    """Fleets mix block sizes: 47 blocks of 16 tokens are 23 blocks of 32, and the half one is not cached."""
    rig = Rig(endpoint("a"))
    rig.says("a", 5001)
    async with running(rig):
        rig.events.hooks.on_facts(Facts(1, block_tokens=(32,)))
        rig.events.hooks.on_facts(Facts(1))
        keys = PromptKeys(exact={16: list(range(47)), 32: list(range(100, 123))}, tokens=800)
        rig.index.tick(100.0)
        rig.index.routed("a", keys, 100.0)
        assert rig.index.lookup(keys) == {"a": Match(736)}
        rig.index.observed("a", keys, 800, 736, 100.0)
        rig.index.tick(110.0)
        assert rig.index.lookup(keys) == {"a": Match(736)}
        # What it told of itself needs no word of ours, in blocks of any size.
        rig.events.holds(1, *keys.exact[32])
        rig.index.observed("a", keys, 800, 736, 170.0)
        rig.index.tick(170.0)
        assert rig.index.lookup(keys) == {"a": Match(736, exact=True)}


async def test_a_socket_that_moved_is_found_soon_after_its_engine_went_silent() -> None:
    rig = Rig(endpoint("a"))
    rig.says("a", 5001)
    async with running(rig):
        rig.events.holds(1, 7)
        assert rig.held() == {"a": Match(16, exact=True)}
        rig.says("a", 5002)
        rig.events.hooks.on_delta(pack(Op.CLEAR, 1) + pack(Op.OFFLINE, 1))
        await rig.time.advance(RETRY_S + 2 * FOLLOW_S)
        assert rig.heard == {1: "tcp://a:5002"}
        assert rig.events.left == []


async def test_another_instance_is_another_publisher_at_once() -> None:
    rig = Rig(endpoint("a", instance="uid-1"))
    rig.says("a", 5001)
    async with running(rig):
        rig.events.holds(1, 7, 8)
        assert rig.held() == {"a": Match(32, exact=True)}
        slow = asyncio.Event()
        rig.network.replies["http://a:8000/kv_event_sources"] = replying(slow, sources(5001))
        rig.store.set(endpoint("a", instance="uid-2"))
        await rig.time.advance(FOLLOW_S)
        assert (rig.heard, rig.events.left) == ({}, [1])
        assert rig.facts == [("a", None)]
        # The old process may still be told of.
        rig.events.holds(1, 7)
        assert rig.held() == {}
        slow.set()
        await rig.time.advance(FOLLOW_S)
        assert rig.heard == {2: "tcp://a:5001"}


async def test_an_answer_of_the_process_before_is_not_believed() -> None:
    rig = Rig(endpoint("a", instance="uid-1"))
    slow = asyncio.Event()
    rig.network.replies["http://a:8000/kv_event_sources"] = replying(slow, sources(5001))
    async with running(rig):
        rig.says("a", 5002)
        rig.store.set(endpoint("a", instance="uid-2"))
        await rig.time.advance(FOLLOW_S)
        slow.set()
        await rig.time.advance(FOLLOW_S)
        assert list(rig.heard.values()) == ["tcp://a:5002"]


def replying(when: asyncio.Event, answer: Answer) -> Callable[[], Any]:
    async def reply() -> Answer:
        await when.wait()
        return answer

    return reply


async def test_an_endpoint_that_is_gone_is_heard_no_more() -> None:
    rig = Rig(endpoint("a"), endpoint("b"))
    rig.says("a", 5001)
    rig.says("b", 5001)
    async with running(rig):
        rig.events.holds(1, 7)
        rig.store.set(endpoint("b"))
        await rig.time.advance(FOLLOW_S)
        assert rig.heard == {2: "tcp://b:5001"}
        assert rig.facts == [("a", None)]
        assert rig.held() == {}
        # Removed and there again between two looks: the index forgot it, nobody said so here.
        rig.index.forget("b")
        await rig.time.advance(1.2 * ASK_S + FOLLOW_S)
        assert rig.heard == {3: "tcp://b:5001"}
        rig.says("b")
        await rig.time.advance(1.2 * ASK_S + FOLLOW_S)
        assert rig.heard == {}


async def test_an_endpoint_may_go_while_it_is_asked() -> None:
    rig = Rig(endpoint("a"))
    rig.network.replies["http://a:8000/kv_event_sources"] = replying(asyncio.Event(), sources(5001))
    async with running(rig):
        rig.store.set()
        await rig.time.advance(FOLLOW_S)
        assert rig.listening == []


async def test_ranks_behind_one_port_are_refused_with_one_line() -> None:
    rig = Rig(endpoint("a"))
    rig.says("a", 5001, 5002)
    async with running(rig):
        await rig.time.advance(3 * ASK_S)
        assert rig.listening == []
        assert rig.troubles == [("a", "2 data-parallel ranks behind one port; their events are not used")]


async def test_ranks_with_a_port_each_are_told_apart_before_all_are_recognised() -> None:
    pods = [endpoint(name, pod="pod", rank=rank, address="10.0.0.1:80") for rank, name in enumerate("ab")]
    rig = Rig(*pods)
    del rig.engines["b"]
    for name in "ab":
        rig.says(name, 5001, 5002)
    async with running(rig):
        assert rig.heard == {1: "tcp://10.0.0.1:5001"}
        rig.engines["b"] = "vllm"
        await rig.time.advance(FOLLOW_S)
        assert rig.heard == {1: "tcp://10.0.0.1:5001", 2: "tcp://10.0.0.1:5002"}
        assert rig.troubles == []


async def test_one_address_is_one_engine() -> None:
    """Old engines on one host, none of which says where it publishes: guessing would credit all of them."""
    first, second = (endpoint(name, address=f"10.0.0.1:{port}") for name, port in (("a", 8000), ("b", 8001)))
    rig = Rig(first)
    async with running(rig):
        assert rig.heard == {1: "tcp://10.0.0.1:5557"}
        rig.events.holds(1, 7)
        rig.add(second)
        await rig.time.advance(2 * FOLLOW_S)
        assert rig.heard == {}
        assert rig.held() == {}
        assert sorted(name for name, _ in rig.troubles) == ["a", "b"]
        await rig.time.advance(2 * ASK_S)
        assert rig.heard == {}
        assert len(rig.troubles) == 2
        rig.store.set(first)
        await rig.time.advance(RETRY_S + 2 * FOLLOW_S)
        assert list(rig.heard.values()) == ["tcp://10.0.0.1:5557"]


async def test_configured_ports_need_no_question() -> None:
    rig = Rig(endpoint("a"), ports=KvPorts(port=7000, replay_port=7100))
    async with running(rig):
        [spec] = rig.events.heard.values()
        assert (spec.endpoint, spec.replay_endpoint) == ("tcp://a:7000", "tcp://a:7100")
        assert rig.network.asked == []


async def test_a_fleet_that_starts_at_once_takes_its_turn() -> None:
    rig = Rig(*(endpoint(f"e{number}") for number in range(3 * PLACES)))
    gate = asyncio.Event()
    for each in rig.store.known:
        rig.network.replies[f"{each.url}/kv_event_sources"] = replying(gate, sources(5001))
    async with running(rig):
        assert rig.network.most_under_way == PLACES
        gate.set()
        await rig.time.advance(FOLLOW_S)
        assert len(rig.heard) == 3 * PLACES
        assert rig.network.most_under_way == PLACES


async def test_cancelling_while_many_are_asked_leaves_nothing() -> None:
    rig = Rig(*(endpoint(f"e{number}") for number in range(2 * PLACES)))
    for each in rig.store.known:
        rig.network.replies[f"{each.url}/kv_event_sources"] = replying(asyncio.Event(), sources(5001))
    async with running(rig):
        assert rig.network.most_under_way == PLACES


async def test_more_publishers_than_can_be_heard() -> None:
    rig = Rig(endpoint("a"), endpoint("b"), most=1)
    rig.says("a", 5001)
    rig.says("b", 5001)
    async with running(rig):
        assert list(rig.heard.values()) == ["tcp://a:5001"]
        await rig.time.advance(2 * ASK_S)
        assert rig.troubles == [("b", "too many engines publish events; its events are not used")]
        assert rig.index.statistics().publishers == 1
        rig.store.set(endpoint("b"))
        await rig.time.advance(1.2 * ASK_S)
        assert list(rig.heard.values()) == ["tcp://b:5001"]


async def test_what_is_learnt_and_what_is_wrong_is_told_by_endpoint() -> None:
    rig = Rig(endpoint("a"), endpoint("b"))
    rig.says("a", 5001)
    rig.says("b", 5001)
    async with running(rig):
        facts = Facts(2, block_tokens=(16,), loras=("sql",))
        rig.events.hooks.on_facts(facts)
        rig.events.hooks.on_facts(Facts(99))
        assert rig.facts == [("b", facts)]
        rig.events.hooks.on_trouble(0, "ended with -9")
        rig.events.hooks.on_trouble(99, "nobody's")
        rig.events.hooks.on_trouble(1, "cannot be heard")
        assert rig.troubles == [("worker", "ended with -9"), ("a", "cannot be heard")]
        assert rig.facts[1:] == [("a", None)]
        assert rig.heard == {2: "tcp://b:5001"}
        await rig.time.advance(1.2 * ASK_S + FOLLOW_S)
        assert rig.heard == {2: "tcp://b:5001", 3: "tcp://a:5001"}
        rig.events.hooks.on_trouble(3, "cannot be heard")
        assert len(rig.troubles) == 2


@pytest.mark.parametrize("bad", [b"x", pack(Op.ADD, 1, Tier.GPU, [8])[:-1], bytes(16)])
async def test_a_bad_delta_is_told_and_everybody_is_heard_anew(bad: bytes) -> None:
    rig = Rig(endpoint("a"), endpoint("b"))
    rig.says("a", 5001)
    rig.says("b", 5001)
    async with running(rig):
        rig.events.holds(1, 7)
        rig.events.holds(2, 7, 8)
        rig.events.hooks.on_delta(pack(Op.REMOVE, 1, Tier.GPU, [7]) + bad)
        assert [what for what, _ in rig.troubles] == ["worker"]
        assert rig.held() == {}
        assert rig.heard == {}
        assert sorted(rig.events.left) == [1, 2]
        await rig.time.advance(RETRY_S + 2 * FOLLOW_S)
        assert sorted(rig.heard) == [3, 4]
        rig.events.holds(3, 7)
        assert rig.held() == {"a": Match(16, exact=True)}
