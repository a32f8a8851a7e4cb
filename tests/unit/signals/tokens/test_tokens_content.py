"""Which prompt is in which body, and that nothing a client sends raises or shows."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.openai.routes import RouteKind
from picker.signals.tokens.canonical import canonical
from picker.signals.tokens.content import Chat, Ids, Text, read_prompt
from tests.unit.signals.tokens.rig import prompt, user


def u32(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (RouteKind.COMPLETIONS, {"prompt": [1, 2, 70000]}),
        (RouteKind.TOKEN_GENERATE, {"token_ids": [1, 2, 70000]}),
        (RouteKind.NATIVE_GENERATE, {"input_ids": [1, 2, 70000]}),
        (RouteKind.NATIVE_GENERATE, {"text": None, "input_ids": [[1, 2, 70000]]}),
    ],
)
def test_token_ids_are_taken_as_they_are(kind: RouteKind, members: dict[str, Any]) -> None:
    found = prompt(kind, **members)
    assert isinstance(found, Ids)
    assert found.tokens == u32(1, 2, 70000)
    assert not found.batch


def test_of_a_batch_the_first_prompt_counts() -> None:
    ids = prompt(RouteKind.COMPLETIONS, prompt=[[7, 8], [9]])
    text = prompt(RouteKind.COMPLETIONS, prompt=["first", "second"])
    assert isinstance(ids, Ids)
    assert isinstance(text, Text)
    assert (ids.tokens, ids.batch, text.text, text.batch) == (u32(7, 8), True, "first", True)


def test_members_that_change_the_tokens_are_heeded() -> None:
    bare = prompt(RouteKind.COMPLETIONS, prompt="x", add_special_tokens=False)
    cut = prompt(RouteKind.COMPLETIONS, prompt="x", truncate_prompt_tokens=5)
    chat = prompt(
        RouteKind.CHAT, messages=[user("x")], add_generation_prompt=False, chat_template_kwargs={"a": 1}, tools=[]
    )
    effort = prompt(RouteKind.CHAT, messages=[user("x")], reasoning_effort="low")
    own = prompt(RouteKind.CHAT, messages=[user("x")], chat_template="{{ messages }}")
    assert isinstance(bare, Text)
    assert isinstance(cut, Text)
    assert (bare.add_special_tokens, bare.exact, cut.exact) == (False, True, False)
    assert isinstance(chat, Chat)
    assert isinstance(effort, Chat)
    assert isinstance(own, Chat)
    assert (chat.add_generation_prompt, chat.template_kwargs, chat.tools) == (False, {"a": 1}, None)
    assert effort.template_kwargs == {"reasoning_effort": "low"}
    assert not own.exact


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (RouteKind.EMBEDDINGS, {"input": "text"}),
        (RouteKind.RESPONSES, {"input": "text", "previous_response_id": "resp_1"}),
        (RouteKind.RESPONSES, {"input": "text", "conversation": "conv_1"}),
        (RouteKind.COMPLETIONS, {"prompt_embeds": "AAAA"}),
        (RouteKind.NATIVE_GENERATE, {"text": "x", "input_embeds": [[0.5]]}),
        (RouteKind.COMPLETIONS, {"prompt": []}),
        (RouteKind.COMPLETIONS, {"prompt": [[]]}),
        (RouteKind.COMPLETIONS, {"prompt": [1, -2]}),
        (RouteKind.COMPLETIONS, {"prompt": [1, 2**32]}),
        (RouteKind.COMPLETIONS, {"prompt": [1, "two"]}),
        (RouteKind.COMPLETIONS, {"prompt": 5}),
        (RouteKind.CHAT, {"messages": "text"}),
    ],
)
def test_what_has_no_prompt_of_ours_has_no_keys(kind: RouteKind, members: dict[str, Any]) -> None:
    assert read_prompt(kind, json.dumps(members).encode()) is None


def test_reprs_show_nothing_of_a_prompt() -> None:
    for found in (
        prompt(RouteKind.COMPLETIONS, prompt="s3cret"),
        prompt(RouteKind.CHAT, messages=[user("s3cret")]),
        prompt(RouteKind.COMPLETIONS, prompt=[12345]),
    ):
        assert "s3cret" not in repr(found)
        assert "12345" not in repr(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ("role", "content", "type", "text", "image_url", "tool_calls", "name", "source", "tool_use_id", "x")
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
MEMBERS = st.sampled_from(
    ("messages", "prompt", "input", "text", "input_ids", "token_ids", "system", "instructions", "tools", "documents")
)


@given(kind=st.sampled_from(list(RouteKind)), body=st.dictionaries(MEMBERS, JSON, max_size=4))
def test_any_json_is_read_or_left(kind: RouteKind, body: dict[str, Any]) -> None:
    found = read_prompt(kind, json.dumps(body).encode())
    if found is not None:
        assert isinstance(canonical(found), bytes)


@given(kind=st.sampled_from(list(RouteKind)), body=st.binary(max_size=40))
def test_any_bytes_are_read_or_left(kind: RouteKind, body: bytes) -> None:
    read_prompt(kind, body)
    read_prompt(kind, b'{"messages": [' + body + b"]}")


@pytest.mark.parametrize("depth", [100, 500, 900, 5_000, 200_000])
def test_deep_nesting_does_not_raise(depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    for kind in (RouteKind.CHAT, RouteKind.RESPONSES, RouteKind.COMPLETIONS):
        read_prompt(kind, b'{"messages":[' + nested + b'],"input":' + nested + b',"prompt":' + nested + b"}")
