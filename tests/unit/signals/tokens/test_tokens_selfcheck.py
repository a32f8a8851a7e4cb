"""Who is asked whether it tokenises as we do, when, and what is said of it. The engines here really tokenise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint, Snapshot, Standing
from picker.openai.routes import RouteKind
from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.check import SAMPLES
from picker.signals.tokens.content import Chat, Text, read_prompt
from picker.signals.tokens.local import LocalTokenizer, load_tokenizer
from picker.signals.tokens.remote import EngineTokens
from picker.signals.tokens.selfcheck import AGAIN_S, LOOK_S, SelfCheck
from tests.unit.core.builders import state
from tests.unit.signals.fakes import Answer
from tests.unit.signals.kv.test_kv_follow import sources
from tests.unit.signals.tokens import rig
from tests.unit.signals.virtual_time import VirtualTime

MODEL = "tiny"


@pytest.fixture(scope="module")
def right_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.save(tmp_path_factory.mktemp("right"), rig.byte_level())


@pytest.fixture(scope="module")
def wrong_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another revision of the model's files."""
    return rig.save(tmp_path_factory.mktemp("wrong"), rig.byte_level(vocab=600))


def local(directory: Path) -> LocalTokenizer:
    made = load_tokenizer(directory, IdCache(1 << 22))
    assert isinstance(made, LocalTokenizer)
    return made


class Fleet:
    """Engines that tokenise with `tokenizers` by host, and what is known of them."""

    def __init__(self, tokenizers: Mapping[str, LocalTokenizer], *, models: frozenset[str] | None = None) -> None:
        self.tokenizers = dict(tokenizers)
        self.states = [
            state(name, endpoint={"url": f"http://{name}"}, models=frozenset({MODEL}) if models is None else models)
            for name in tokenizers
        ]
        self.down: set[str] = set()
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    def snapshot(self) -> Snapshot:
        return Snapshot(0.0, tuple(self.states))

    def set(self, **fields: Any) -> None:
        """Changes the rows of all."""
        self.states = [state(each.endpoint.id, endpoint={"url": each.endpoint.url}, **fields) for each in self.states]

    async def get(
        self, endpoint: Endpoint, url: str, *, timeout_s: float, limit_bytes: int = 0
    ) -> Answer | ProbeFailure:
        return sources(5001) if url.endswith("/kv_event_sources") else Answer(404)

    async def post(
        self, endpoint: Endpoint, url: str, body: bytes, *, timeout_s: float, limit_bytes: int = 0
    ) -> Answer | ProbeFailure:
        self.asked.append(endpoint.id)
        await self.gate.wait()
        if endpoint.id in self.down:
            return ProbeFailure.REFUSED
        if not url.endswith("/tokenize"):
            return Answer(404)
        kind = RouteKind.CHAT if "messages" in json.loads(body) else RouteKind.COMPLETIONS
        prompt = read_prompt(kind, body)
        assert isinstance(prompt, Chat | Text)
        packed = self.tokenizers[endpoint.id].encode(prompt)
        assert packed is not None
        ids = [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
        return Answer(200, json.dumps({"tokens": ids}).encode())


class Checks:
    """A check at work, on a clock the test turns."""

    def __init__(self, fleet: Fleet, tokenizer: LocalTokenizer) -> None:
        self.fleet = fleet
        self.time = VirtualTime(100.0)
        self.heard = dict.fromkeys(fleet.tokenizers, 1)
        self.troubles: list[tuple[str, str]] = []
        self.check = SelfCheck(
            {MODEL: tokenizer, "other": tokenizer},
            EngineTokens(fleet, lambda model: (), clock=self.time.clock, cache_bytes=1 << 20),
            heard=self.heard,
            snapshot=fleet.snapshot,
            clock=self.time.clock,
            on_trouble=lambda *what: self.troubles.append(what),
            sleep=self.time.sleep,
        )

    def trusts(self) -> bool:
        """Whether the tokenizer of the model is used; that of another model always is."""
        assert self.check.agreement.trusted("other")
        return self.check.agreement.trusted(MODEL)

    def asked(self) -> list[str]:
        """Who was asked since the last call."""
        asked, self.fleet.asked = self.fleet.asked, []
        assert len(asked) % len(SAMPLES) == 0
        return asked[:: len(SAMPLES)]


@asynccontextmanager
async def checking(fleet: Fleet, tokenizer: LocalTokenizer) -> AsyncIterator[Checks]:
    made = Checks(fleet, tokenizer)
    task = asyncio.create_task(made.check.run())
    await made.time.advance(LOOK_S)
    try:
        yield made
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_engines_that_tokenise_as_we_do_are_asked_once(right_dir: Path) -> None:
    right = local(right_dir)
    async with checking(Fleet({"a": right, "b": right}), right) as made:
        assert made.asked() == ["a", "b"]
        await made.time.advance(3 * AGAIN_S)
        assert made.asked() == []
        assert made.trusts()
        assert made.troubles == []
        made.heard["b"] = 2
        await made.time.advance(LOOK_S)
        assert made.asked() == ["b"]


async def test_a_wrong_tokenizer_is_told_once_by_name_until_it_is_right(right_dir: Path, wrong_dir: Path) -> None:
    right, wrong = local(right_dir), local(wrong_dir)
    fleet = Fleet({"a": right, "b": right})
    async with checking(fleet, wrong) as made:
        assert not made.trusts()
        [(model, text)] = made.troubles
        assert model == MODEL
        assert text.startswith("a makes other tokens of samples (")
        assert "chat" in text
        made.asked()
        # Another engine is there, and then another one everywhere.
        fleet.tokenizers["a"] = wrong
        await made.time.advance(AGAIN_S + LOOK_S)
        assert made.asked() == ["a", "b"]
        assert not made.trusts()
        fleet.tokenizers["b"] = wrong
        await made.time.advance(AGAIN_S + LOOK_S)
        assert made.asked() == ["b"]
        assert made.trusts()
        assert len(made.troubles) == 1
        # Wrong again later: that is news.
        fleet.tokenizers["b"] = right
        made.heard["b"] = 2
        await made.time.advance(LOOK_S)
        assert not made.trusts()
        assert [text.partition(" ")[0] for _, text in made.troubles] == ["a", "b"]


async def test_who_disagreed_and_is_gone_has_no_say(right_dir: Path, wrong_dir: Path) -> None:
    right, wrong = local(right_dir), local(wrong_dir)
    async with checking(Fleet({"a": right, "b": wrong}), wrong) as made:
        assert not made.trusts()
        del made.heard["a"]
        await made.time.advance(LOOK_S)
        assert made.trusts()


@pytest.mark.parametrize("fields", [{"models": None}, {"models": frozenset()}, {"models": frozenset({"else"})}])
async def test_who_does_not_serve_the_model_is_not_asked(right_dir: Path, fields: dict[str, Any]) -> None:
    right = local(right_dir)
    fleet = Fleet({"a": right})
    fleet.set(**fields)
    async with checking(fleet, right) as made:
        assert made.asked() == []
        fleet.set(models=frozenset({MODEL}), standing=Standing.OUT)
        await made.time.advance(LOOK_S)
        assert made.asked() == []
        fleet.set(models=frozenset({MODEL}))
        made.heard.clear()
        await made.time.advance(LOOK_S)
        assert made.asked() == []


async def test_an_engine_that_does_not_answer_proves_nothing_and_is_asked_again(right_dir: Path) -> None:
    right = local(right_dir)
    fleet = Fleet({"a": right})
    fleet.down = {"a"}
    async with checking(fleet, right) as made:
        assert made.asked() == ["a"]
        assert made.trusts()
        await made.time.advance(AGAIN_S - 2 * LOOK_S)
        assert made.asked() == []
        fleet.down.clear()
        await made.time.advance(4 * LOOK_S)
        assert made.asked() == ["a"]


async def test_an_answer_of_an_engine_that_was_replaced_meanwhile_does_not_count(
    right_dir: Path, wrong_dir: Path
) -> None:
    right, wrong = local(right_dir), local(wrong_dir)
    fleet = Fleet({"a": right})
    fleet.gate.clear()
    async with checking(fleet, wrong) as made:
        made.heard["a"] = 2
        fleet.tokenizers["a"] = wrong
        made.fleet.gate.set()
        fleet.tokenizers["a"] = right
        await made.time.settle()
        assert made.trusts()
        await made.time.advance(LOOK_S)
        assert not made.trusts()
