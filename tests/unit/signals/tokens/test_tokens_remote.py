"""What engines are asked, in which order, and who is left alone after what answer."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.openai.routes import RouteKind
from picker.signals.tokens.canonical import canonical
from picker.signals.tokens.check import SAMPLES, compare
from picker.signals.tokens.content import Ids
from picker.signals.tokens.local import LocalTokenizer
from picker.signals.tokens.remote import MAX_ASKING, Asking, EngineTokens
from tests.unit.signals.fakes import Answer
from tests.unit.signals.tokens import rig
from tests.unit.signals.tokens.rig import user

ONE = Endpoint(id="one", url="http://one", path_prefix="/openai")
TWO = Endpoint(id="two", url="http://two")

Handler = Callable[[str, dict[str, Any]], Answer | ProbeFailure]


class FakeEngines:
    """Answers POSTs by a function of URL and body."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.gate: Awaitable[object] | None = None

    async def post(
        self, endpoint: Endpoint, url: str, body: bytes, *, timeout_s: float, limit_bytes: int = 0
    ) -> Answer | ProbeFailure:
        self.asked.append((url, json.loads(body)))
        if self.gate is not None:
            await self.gate
        return self.handler(url, json.loads(body))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tokens(*ids: int) -> Answer:
    return Answer(200, json.dumps({"count": len(ids), "tokens": ids, "max_model_len": 9, "token_strs": None}).encode())


def rendered(*ids: int) -> Answer:
    return Answer(200, json.dumps({"request_id": "r", "token_ids": ids, "sampling_params": {}}).encode())


def asking(kind: RouteKind, **members: Any) -> Asking:
    body, _ = rig.request(kind, **members)
    prompt = rig.prompt(kind, **members)
    assert not isinstance(prompt, Ids)
    return Asking(kind=kind, model="tiny", prompt=prompt, canonical=canonical(prompt), body=body)


def engine_tokens(
    handler: Handler, *, endpoints: tuple[Endpoint, ...] = (ONE,)
) -> tuple[EngineTokens, FakeEngines, Clock]:
    fake, clock = FakeEngines(handler), Clock()
    return EngineTokens(fake, lambda model: endpoints, clock=clock, cache_bytes=1 << 20), fake, clock


async def answer(engines: EngineTokens, question: Asking) -> tuple[int, ...] | None:
    started = engines.start(question)
    packed = started if isinstance(started, bytes | None) else await asyncio.wait_for(started, 5)
    return None if packed is None else struct.unpack(f"<{len(packed) // 4}I", packed)


async def test_rendering_gets_the_request_as_it_is_and_is_asked_once() -> None:
    engines, fake, _ = engine_tokens(lambda url, body: rendered(1, 2, 3))
    question = asking(RouteKind.CHAT, messages=[user("hi")], temperature=0.5)
    assert await answer(engines, question) == (1, 2, 3)
    assert await answer(engines, question) == (1, 2, 3)
    assert fake.asked == [("http://one/openai/v1/chat/completions/render", json.loads(question.body))]


async def test_rendered_completions_come_as_a_list() -> None:
    engines, _, _ = engine_tokens(lambda url, body: Answer(200, b'[{"token_ids":[4]},{"token_ids":[5]}]'))
    assert await answer(engines, asking(RouteKind.COMPLETIONS, prompt=["a", "b"])) == (4,)


async def test_without_rendering_it_is_tokenised_with_all_that_matters() -> None:
    engines, fake, _ = engine_tokens(lambda url, body: tokens(7) if url.endswith("/tokenize") else Answer(403))
    chat = asking(
        RouteKind.CHAT, messages=[user("hi")], tools=[{"a": 1}], chat_template_kwargs={"b": 2}, reasoning_effort="low"
    )
    assert await answer(engines, chat) is None
    assert await answer(engines, chat) == (7,)
    assert await answer(engines, asking(RouteKind.COMPLETIONS, prompt="x", add_special_tokens=False)) == (7,)
    url, body = fake.asked[1]
    assert url == "http://one/tokenize"
    assert body == {
        "model": "tiny",
        "messages": [user("hi")],
        "add_special_tokens": False,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": [{"a": 1}],
        "chat_template_kwargs": {"b": 2, "reasoning_effort": "low"},
    }
    # The render endpoint of completions is another one, but as far away.
    assert fake.asked[2] == ("http://one/tokenize", {"model": "tiny", "prompt": "x", "add_special_tokens": False})


async def test_other_dialects_are_only_rendered() -> None:
    engines, fake, _ = engine_tokens(lambda url, body: Answer(404))
    for _ in range(3):
        assert await answer(engines, asking(RouteKind.MESSAGES, messages=[user("hi")])) is None
    assert [url for url, _ in fake.asked] == ["http://one/openai/v1/messages/render"]


async def test_prompts_that_differ_in_flags_are_not_mixed_up() -> None:
    engines, fake, _ = engine_tokens(lambda url, body: rendered(len(json.dumps(body))))
    changes: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"x": 1}},
        {"tools": [{}]},
    ]
    chats = [asking(RouteKind.CHAT, messages=[user("hi")], **change) for change in changes]
    assert len({await answer(engines, chat) for chat in chats}) == 4
    assert len(fake.asked) == 4


@pytest.mark.parametrize(
    ("bad", "silent_s"),
    [
        (Answer(404), 300.0),
        (Answer(403), 300.0),
        (Answer(400), 1.0),
        (Answer(500), 10.0),
        (ProbeFailure.TIMEOUT, 10.0),
        (Answer(200, b"not json"), 10.0),
        (Answer(200, b'{"tokens": [-1]}'), 10.0),
    ],
)
async def test_who_cannot_answer_is_left_alone_for_a_while(bad: Answer | ProbeFailure, silent_s: float) -> None:
    engines, fake, clock = engine_tokens(lambda url, body: bad)
    question = asking(RouteKind.NATIVE_GENERATE, text="x")
    assert await answer(engines, question) is None
    clock.now = silent_s - 0.1
    assert engines.start(question) is None
    assert len(fake.asked) == 1
    clock.now = silent_s
    assert await answer(engines, question) is None
    assert len(fake.asked) == 2


async def test_trouble_that_stays_is_asked_ever_more_rarely_and_forgotten_when_over() -> None:
    reply: list[Answer] = [Answer(500)]
    engines, fake, clock = engine_tokens(lambda url, body: reply[0])
    for number in range(2000):
        clock.now = float(number)
        await answer(engines, asking(RouteKind.NATIVE_GENERATE, text=str(number)))
    assert 8 <= len(fake.asked) <= 12
    reply[0] = tokens(1)
    clock.now = 4000.0
    assert await answer(engines, asking(RouteKind.NATIVE_GENERATE, text="y")) == (1,)
    assert await answer(engines, asking(RouteKind.NATIVE_GENERATE, text="z")) == (1,)


async def test_engines_take_turns_and_stand_in_for_one_another() -> None:
    engines, fake, _ = engine_tokens(
        lambda url, body: Answer(404) if "//one" in url else tokens(1), endpoints=(ONE, TWO)
    )
    for number in range(6):
        await answer(engines, asking(RouteKind.NATIVE_GENERATE, text=str(number)))
    hosts = [url.split("/")[2] for url, _ in fake.asked]
    assert hosts.count("one") == 1
    assert hosts.count("two") == 5


async def test_without_engines_nothing_is_asked() -> None:
    engines, _, _ = engine_tokens(lambda url, body: tokens(1), endpoints=())
    assert engines.start(asking(RouteKind.COMPLETIONS, prompt="x")) is None


async def test_too_many_questions_at_once_are_declined_and_closing_ends_them() -> None:
    engines, fake, _ = engine_tokens(lambda url, body: tokens(1))
    fake.gate = asyncio.get_running_loop().create_future()
    started = [engines.start(asking(RouteKind.COMPLETIONS, prompt=str(number))) for number in range(MAX_ASKING + 3)]
    assert [found is None for found in started] == [False] * MAX_ASKING + [True] * 3
    assert engines.declined == 3
    await asyncio.sleep(0)
    await engines.close()
    assert all(task.cancelled() for task in started if isinstance(task, asyncio.Task))
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_reprs_show_nothing_of_a_prompt() -> None:
    engines, _, _ = engine_tokens(lambda url, body: tokens(1))
    question = asking(RouteKind.COMPLETIONS, prompt="s3cret")
    await answer(engines, question)
    assert "s3cret" not in repr(question) + repr(engines)


def engine_like(local: LocalTokenizer, spoil: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Handler:
    """/tokenize as an engine with the same files would answer."""

    def handle(url: str, body: dict[str, Any]) -> Answer:
        prompt = rig.prompt(RouteKind.COMPLETIONS if "prompt" in body else RouteKind.CHAT, **body)
        assert not isinstance(prompt, Ids)
        packed = local.encode(prompt)
        assert packed is not None
        return tokens(*spoil(struct.unpack(f"<{len(packed) // 4}I", packed)))

    return handle


async def test_an_engine_with_the_same_files_agrees(local: LocalTokenizer) -> None:
    engines, _, _ = engine_tokens(engine_like(local, lambda ids: ids))
    found = await compare(local, engines, ONE, "tiny")
    assert set(found.same) == set(SAMPLES)
    assert found.verdict is True


async def test_an_engine_that_adds_a_token_disagrees_and_a_dumb_one_says_nothing(local: LocalTokenizer) -> None:
    engines, _, _ = engine_tokens(engine_like(local, lambda ids: (0, *ids)))
    assert (await compare(local, engines, ONE, "tiny")).verdict is False
    engines, _, _ = engine_tokens(lambda url, body: Answer(404))
    found = await compare(local, engines, ONE, "tiny")
    assert found.verdict is None
    assert set(found.unknown) == set(SAMPLES)
