"""The index and what feeds it, put together: starting, stopping, another secret, keys that are exact or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from picker import prefixes
from picker.config import IndexSection
from picker.core.prefix.deltas import Op, Tier, pack
from picker.core.values import InferenceRequest
from picker.openai.routes import RouteKind
from picker.prefixes import Prefixes
from picker.signals.kv import follow
from picker.signals.kv.messages import Facts
from picker.signals.tokens.check import SAMPLES
from tests.unit.core.builders import request
from tests.unit.signals.fakes import Store
from tests.unit.signals.kv.test_kv_follow import FakeEvents
from tests.unit.signals.tokens import rig
from tests.unit.signals.tokens.test_tokens_selfcheck import MODEL, Fleet, local

LONG = "All happy families are alike. " * 100


@pytest.fixture(scope="module")
def right_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.save(tmp_path_factory.mktemp("right"), rig.byte_level())


@pytest.fixture(scope="module")
def wrong_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another revision of the model's files."""
    return rig.save(tmp_path_factory.mktemp("wrong"), rig.byte_level(vocab=600))


class Listening(FakeEvents):
    """What stands for the worker."""

    made: list[Listening]

    def __init__(self, *, secret: bytes, hooks: Any, clock: Any) -> None:
        super().__init__(hooks, 100)
        self.secret = secret
        self.closed = False
        self.made.append(self)

    def start(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True


class Listed(Store):
    """Endpoints, and the adapters they list."""

    adapters: frozenset[str] = frozenset()


class Site:
    """`Prefixes` before one endpoint `a`, whose events are at hand."""

    def __init__(self, fleet: Fleet, section: dict[str, Any]) -> None:
        self.fleet = fleet
        self.store = Listed([each.endpoint for each in fleet.states])
        self.troubles: list[tuple[str, str]] = []
        self.prefixes = Prefixes(
            IndexSection.model_validate(section),
            clock=asyncio.get_running_loop().time,
            on_trouble=lambda *what: self.troubles.append(what),
        )

    async def start(self) -> None:
        await self.prefixes.start(
            self.fleet,  # type: ignore[arg-type]
            self.store,
            recognised=lambda: dict.fromkeys(self.fleet.tokenizers, "vllm"),
            snapshot=self.fleet.snapshot,
        )

    async def heard(self) -> Listening:
        """The events of `a`, which told its block size and a first block."""
        await until(lambda: bool(Listening.made and Listening.made[-1].heard))
        events = Listening.made[-1]
        [publisher] = events.heard
        events.hooks.on_facts(Facts(publisher, block_tokens=(16,)))
        events.hooks.on_delta(pack(Op.ONLINE, publisher) + pack(Op.ADD, publisher, Tier.GPU, [1]))
        return events

    async def keyed(self, **members: Any) -> InferenceRequest:
        assert self.prefixes.prompts is not None
        body, parsed = rig.request(RouteKind.COMPLETIONS, **members)
        return await self.prefixes.prompts.keyed(request(model=MODEL, prompt_tokens=10_000), body, parsed)

    async def exact(self, **members: Any) -> bool:
        keys = (await self.keyed(**members)).keys
        assert keys is not None
        assert keys.learned
        return bool(keys.exact)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def site(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, **section: Any) -> AsyncIterator[Site]:
    Listening.made = []
    monkeypatch.setattr(prefixes, "KvEvents", Listening)
    before = asyncio.all_tasks()
    made = Site(fleet, section)
    try:
        yield made
    finally:
        await made.prefixes.close()
        await made.prefixes.close()
    assert asyncio.all_tasks() == before
    assert all(each.closed for each in Listening.made)


async def test_switched_off_nothing_runs(monkeypatch: pytest.MonkeyPatch, right_dir: Path) -> None:
    async with site(Fleet({"a": local(right_dir)}), monkeypatch, enabled=False) as made:
        tasks = asyncio.all_tasks()
        await made.start()
        assert made.prefixes.prompts is None
        assert asyncio.all_tasks() == tasks
        assert made.prefixes.figures().prompts() == {}


async def test_without_events_prompts_are_still_read(monkeypatch: pytest.MonkeyPatch, right_dir: Path) -> None:
    async with site(Fleet({"a": local(right_dir)}), monkeypatch, kv_events="off") as made:
        await made.start()
        assert not await made.exact(prompt=LONG)
        assert Listening.made == []


async def test_what_engines_tell_makes_keys_exact_until_they_are_gone(
    monkeypatch: pytest.MonkeyPatch, right_dir: Path
) -> None:
    fleet = Fleet({"a": local(right_dir)})
    async with site(fleet, monkeypatch, ask_engines=False) as made:
        await made.start()
        assert not await made.exact(prompt=list(range(4000)))
        events = await made.heard()
        assert await made.exact(prompt=list(range(4000)))
        assert made.prefixes.figures().prompts()["given"] == 2
        assert made.prefixes.index.statistics().online == 1
        # A cache that was emptied has no blocks, and will have such blocks again.
        events.hooks.on_facts(Facts(1))
        assert await made.exact(prompt=list(range(4000)))
        made.store.set()
        await until(lambda: not Listening.made[-1].heard)
        assert not await made.exact(prompt=list(range(4000)))


async def test_a_tokenizer_that_cannot_be_loaded_is_told_and_the_others_work(
    monkeypatch: pytest.MonkeyPatch, right_dir: Path, tmp_path: Path
) -> None:
    fleet = Fleet({"a": local(right_dir)})
    tokenizers = {MODEL: right_dir, "other": tmp_path}
    async with site(fleet, monkeypatch, tokenizers=tokenizers, ask_engines=False) as made:
        await made.start()
        [(model, text)] = made.troubles
        assert model == "other"
        assert "tokenizer.json" in text
        await made.heard()
        assert await made.exact(prompt=LONG)
        await until(lambda: len(fleet.asked) == len(SAMPLES))
        assert await made.exact(prompt=LONG)
        assert len(made.troubles) == 1


async def test_a_wrong_tokenizer_switches_exact_keys_of_its_model_off(
    monkeypatch: pytest.MonkeyPatch, right_dir: Path, wrong_dir: Path
) -> None:
    fleet = Fleet({"a": local(right_dir)})
    async with site(fleet, monkeypatch, tokenizers={MODEL: wrong_dir}, ask_engines=False) as made:
        await made.start()
        await made.heard()
        await until(lambda: bool(made.troubles))
        assert [model for model, _ in made.troubles] == [MODEL]
        assert not await made.exact(prompt=LONG)


async def test_another_secret_makes_other_keys_and_voids_what_was_known(
    monkeypatch: pytest.MonkeyPatch, right_dir: Path
) -> None:
    fleet = Fleet({"a": local(right_dir)})
    async with site(fleet, monkeypatch, tokenizers={MODEL: right_dir}) as made:
        await made.prefixes.use(b"first")
        assert Listening.made == []
        await made.start()
        first = await made.heard()
        before = (await made.keyed(prompt=LONG)).keys
        assert before is not None
        made.prefixes.index.routed("a", before, 1.0)
        await made.prefixes.use(b"second")
        assert first.closed
        assert made.prefixes.index.lookup(before) == {}
        second = await made.heard()
        assert (first.secret, second.secret) == (b"first", b"second")
        after = (await made.keyed(prompt=LONG)).keys
        assert after is not None
        assert not set(before.learned) & set(after.learned)
        assert not set(before.exact[16]) & set(after.exact[16])


async def test_a_task_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, right_dir: Path) -> None:
    async def dies(self: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(follow.KvFollower, "run", dies)
    async with site(Fleet({"a": local(right_dir)}), monkeypatch) as made:
        await made.start()
        await until(lambda: bool(made.troubles))
        assert made.troubles == [("kv events", "ended: RuntimeError('a bug')")]
