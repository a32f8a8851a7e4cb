"""The next turn's text continues the last one's, other prompts' texts differ where the prompts do."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from picker.openai.routes import RouteKind
from picker.signals.tokens.canonical import canonical, holds_media
from tests.unit.signals.tokens.rig import assistant, prompt, user

TEXT = st.text(max_size=30)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": TEXT})}),
    max_size=3,
)
CONTENT = TEXT | PARTS | st.none()
CALL = st.fixed_dictionaries(
    {"id": TEXT, "type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT})}
)
MESSAGE = (
    st.fixed_dictionaries({"role": st.sampled_from(("user", "system", "developer", "tool")), "content": CONTENT})
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": CONTENT},
        optional={"tool_calls": st.lists(CALL, max_size=2), "reasoning_content": TEXT, "refusal": st.none()},
    )
    | st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": TEXT, "content": CONTENT})
)
TOOLS = st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2)
BLOCK = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}) | st.fixed_dictionaries(
    {"type": st.just("tool_result"), "tool_use_id": TEXT, "content": TEXT}
)


def text(kind: RouteKind, **members: Any) -> bytes:
    return canonical(prompt(kind, **members))


@given(
    system=st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": CONTENT}), max_size=2),
    first=st.fixed_dictionaries({"role": st.just("user"), "content": CONTENT}),
    turns=st.lists(MESSAGE, min_size=1, max_size=5),
    tools=TOOLS,
)
def test_chat_turns_extend(
    system: list[dict[str, Any]], first: dict[str, Any], turns: list[dict[str, Any]], tools: list[Any]
) -> None:
    texts = [
        text(RouteKind.CHAT, messages=[*system, first, *turns[:count]], tools=tools) for count in range(len(turns) + 1)
    ]
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)
        assert len(after) > len(before)


@given(
    system=TEXT | st.lists(BLOCK, max_size=2),
    turns=st.lists(st.lists(BLOCK, min_size=1, max_size=3), min_size=2, max_size=4),
    tools=TOOLS,
)
def test_anthropic_turns_extend_wherever_the_cache_mark_is(
    system: Any, turns: list[list[dict[str, Any]]], tools: list[Any]
) -> None:
    def body(count: int) -> bytes:
        messages: list[dict[str, Any]] = copy.deepcopy(
            [{"role": ("user", "assistant")[index % 2], "content": turns[index]} for index in range(count)]
        )
        # As agents do: the mark is on the newest block.
        messages[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
        return text(RouteKind.MESSAGES, system=system, messages=messages, tools=tools)

    for count in range(1, len(turns)):
        assert body(count + 1).startswith(body(count))


def test_responses_items_extend() -> None:
    items: list[dict[str, Any]] = [
        user([{"type": "input_text", "text": "What is the weather?"}]),
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
        assistant([{"type": "output_text", "text": "It rains."}]),
    ]
    texts = [text(RouteKind.RESPONSES, instructions="Be brief.", input=items[:count]) for count in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)
    assert text(RouteKind.RESPONSES, input="Hello") == text(RouteKind.CHAT, messages=[user("Hello")])


def test_the_same_prompt_in_other_words_is_the_same() -> None:
    plain = text(RouteKind.CHAT, messages=[user("Grüße")])
    assert plain == text(RouteKind.CHAT, messages=[user([{"type": "text", "text": "Grüße"}])])
    assert plain == text(RouteKind.CHAT, messages=[{"content": "Grüße", "role": "user", "name": None}])
    assert text(RouteKind.MESSAGES, system="S", messages=[user("x")]) == text(
        RouteKind.MESSAGES, system=[{"type": "text", "text": "S"}], messages=[user("x")]
    )


def test_a_message_cannot_imitate_two() -> None:
    two = text(RouteKind.CHAT, messages=[user("a"), assistant("b")])
    for sly in ("a\xff\xfeb", "aassistantb", "a\x00b", json.dumps([user("a"), assistant("b")])):
        assert text(RouteKind.CHAT, messages=[user(sly)]) != two
    assert text(RouteKind.CHAT, messages=[user("ab")]) != text(RouteKind.CHAT, messages=[user("a"), user("b")])


def test_tools_come_after_the_system_text_and_before_the_talk() -> None:
    shared = text(RouteKind.CHAT, messages=[{"role": "system", "content": "S" * 50}], tools=[{"name": "t"}])
    longer = text(
        RouteKind.CHAT, messages=[{"role": "system", "content": "S" * 50}, user("hello")], tools=[{"name": "t"}]
    )
    other = text(RouteKind.CHAT, messages=[{"role": "system", "content": "S" * 50}, user("hello")])
    assert longer.startswith(shared)
    assert not other.startswith(shared)
    assert other[:50] == longer[:50]


def test_images_count_by_a_digest() -> None:
    def seen(url: str) -> bytes:
        parts = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": url}}]
        return text(RouteKind.CHAT, messages=[user(parts)])

    big = "data:image/png;base64," + "A" * 100_000
    assert len(seen(big)) < 200
    assert seen(big) == seen(big)
    assert seen(big) != seen(big + "B")
    assert holds_media(seen(big))
    assert not holds_media(text(RouteKind.CHAT, messages=[user("\u00fc \u00ff image_url")]))


def test_texts_and_ids_are_themselves() -> None:
    assert text(RouteKind.COMPLETIONS, prompt="Once é") == "Once é".encode()
    assert text(RouteKind.COMPLETIONS, prompt=[1, 258]) == b"\x01\0\0\0\x02\x01\0\0"
