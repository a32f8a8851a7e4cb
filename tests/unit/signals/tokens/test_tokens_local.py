"""A local tokenizer gives the ids of one encode of the whole rendered text, with pieces cached or not."""

from __future__ import annotations

import builtins
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from picker.openai.routes import RouteKind
from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.content import Chat, Text
from picker.signals.tokens.local import LoadProblem, LocalTokenizer, load_tokenizer, load_tokenizers
from tests.unit.signals.tokens import rig
from tests.unit.signals.tokens.rig import assistant, user

SNIPPETS = st.sampled_from(
    (
        "",
        " ",
        "\n",
        "\n\n",
        "hello",
        " world ",
        "é",
        "\u0301",
        "漢字",
        "🎉",
        "12345",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_",
    )
)
MESSY = st.lists(SNIPPETS, max_size=8).map("".join)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city": "Køge", "n": 1.5}'}}


def ids_of(packed: bytes | None) -> list[int]:
    assert packed is not None
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


def text_prompt(**members: Any) -> Text:
    found = rig.prompt(RouteKind.COMPLETIONS, **members)
    assert isinstance(found, Text)
    return found


def chat_prompt(**members: Any) -> Chat:
    found = rig.prompt(RouteKind.CHAT, **members)
    assert isinstance(found, Chat)
    return found


def load(directory: Path, cache_bytes: int = 1 << 22) -> LocalTokenizer:
    loaded = load_tokenizer(directory, IdCache(cache_bytes))
    assert isinstance(loaded, LocalTokenizer), loaded
    return loaded


def test_chats_are_encoded_as_the_whole_rendered_text_is(plain: tokenizers.Tokenizer, local: LocalTokenizer) -> None:
    chat = chat_prompt(
        messages=[
            {"role": "system", "content": "Be brief."},
            user("Weather?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "Rain"}]},
        ],
        tools=[TOOL],
    )
    text = local.text(chat)
    assert text is not None
    assert '# Tools\n{"type": "function", "function": {"name": "f", "description": null, "parameters"' in text
    assert "[('city', 'Køge'), ('n', 1.5)]" in text
    assert text.endswith("<|im_start|>tool\nRain<|im_end|>\n<|im_start|>assistant\n")
    assert local.splits
    assert ids_of(local.encode(chat)) == plain.encode(text, add_special_tokens=False).ids


@given(turns=st.lists(MESSY, min_size=1, max_size=4))
def test_any_turns_are_encoded_as_a_whole(turns: list[str], plain: tokenizers.Tokenizer, model_dir: Path) -> None:
    local = load_once(model_dir)
    chat = chat_prompt(messages=[user(turn) if index % 2 == 0 else assistant(turn) for index, turn in enumerate(turns)])
    text = local.text(chat)
    assert text is not None
    for _ in ("cold", "warm"):
        assert ids_of(local.encode(chat)) == plain.encode(text, add_special_tokens=False).ids


@given(text=MESSY, special=st.booleans())
def test_any_text_is_encoded_as_a_whole(text: str, special: bool, bos: tuple[tokenizers.Tokenizer, Path]) -> None:
    reference, directory = bos
    prompt = text_prompt(prompt=text or "x", add_special_tokens=special)
    got = ids_of(load_once(directory).encode(prompt))
    assert got == reference.encode(text or "x", add_special_tokens=special).ids
    assert (got[0] == 0) == special


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, Path]:
    reference = rig.byte_level(bos=True)
    return reference, rig.save(tmp_path_factory.mktemp("bos"), reference)


@cache
def load_once(directory: Path) -> LocalTokenizer:
    return load(directory)


def test_a_tokenizer_that_looks_across_special_tokens_is_not_split(tmp_path: Path) -> None:
    reference = rig.metaspace()
    local = load(rig.save(tmp_path, reference))
    chat = chat_prompt(messages=[user("hello there"), assistant("well"), user("so")])
    text = local.text(chat)
    assert text is not None
    assert not local.splits
    assert ids_of(local.encode(chat)) == reference.encode(text, add_special_tokens=False).ids


def test_the_next_turn_costs_only_its_new_messages(model_dir: Path) -> None:
    ids = IdCache(1 << 22)
    local = load_tokenizer(model_dir, ids)
    assert isinstance(local, LocalTokenizer)
    messages = [user(f"question {number}") for number in range(20)]
    local.encode(chat_prompt(messages=messages))
    before = len(ids)
    local.encode(chat_prompt(messages=[*messages, assistant("one more")]))
    assert len(ids) - before == 1


def test_the_cache_does_not_grow_beyond_its_bound(model_dir: Path) -> None:
    ids = IdCache(20_000)
    local = load_tokenizer(model_dir, ids)
    assert isinstance(local, LocalTokenizer)
    for number in range(300):
        assert local.encode(chat_prompt(messages=[user(f"question {number}")])) is not None
        assert ids.used_bytes <= 20_000
    assert local.encode(text_prompt(prompt="long " * 20_000)) is not None
    assert ids.used_bytes <= 20_000
    assert len(ids) > 10


def test_two_models_do_not_share_ids(tmp_path: Path) -> None:
    paths = {
        "a": rig.save(tmp_path / "a", rig.byte_level(vocab=600)),
        "b": rig.save(tmp_path / "b", rig.byte_level(vocab=1500)),
    }
    loaded = load_tokenizers({**paths, "adapter": paths["a"]}, 1 << 20)
    first, second, adapter = (loaded[name] for name in ("a", "b", "adapter"))
    assert isinstance(first, LocalTokenizer)
    assert isinstance(second, LocalTokenizer)
    assert adapter is first
    prompt = text_prompt(prompt="An architecture of endpoints")
    assert first.encode(prompt) != second.encode(prompt)


def test_generation_prompt_thinking_and_prefill(local: LocalTokenizer) -> None:
    messages = [user("hi"), assistant("Once upon ")]
    closed = local.text(chat_prompt(messages=messages, add_generation_prompt=False))
    opened = local.text(chat_prompt(messages=messages, add_generation_prompt=False, continue_final_message=True))
    both = local.text(chat_prompt(messages=messages, continue_final_message=True))
    silent = local.text(chat_prompt(messages=messages[:1], chat_template_kwargs={"enable_thinking": False}))
    assert closed is not None
    assert opened is not None
    assert silent is not None
    assert closed == opened + "<|im_end|>\n"
    assert both is None
    assert silent.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["text"],
        [{"content": "no role"}],
        [user(5)],
        [user([{"type": "image_url", "image_url": {"url": "x"}}])],
        [user([{"no": "type"}])],
        [assistant("x", tool_calls=[{"function": {"name": "f", "arguments": "{broken"}}])],
        [assistant("x", tool_calls="text")],
    ],
)
def test_what_the_engine_would_refuse_or_change_has_no_ids(messages: list[Any], local: LocalTokenizer) -> None:
    assert local.encode(chat_prompt(messages=messages)) is None


def test_half_a_character_in_arguments_has_no_ids(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    local = load(rig.save(tmp_path, plain, template=source))
    assert local.encode(chat_prompt(messages=[assistant("x", tool_calls=[call])])) is None


def test_arguments_cannot_take_the_place_of_messages(local: LocalTokenizer) -> None:
    for name in ("messages", "tools", "add_generation_prompt"):
        assert local.encode(chat_prompt(messages=[user("x")], chat_template_kwargs={name: []})) is None


def test_templates_run_in_a_sandbox_and_may_refuse(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    sources = {
        "refuses": "{{ raise_exception('no: ' + messages[0].content) }}",
        "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "changes": "{{ messages.append(1) }}",
    }
    for name, source in sources.items():
        local = load(rig.save(tmp_path / name, plain, template=source))
        assert local.encode(chat_prompt(messages=[user("x")])) is None


def test_what_templates_may_use(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ tools | tojson(indent=2) }}{% generation %}"
        "{{ messages[0].content }}{% endgeneration %}{{ eos_token }}{{ documents[0].text }}"
    )
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    local = load(rig.save(tmp_path, plain, template=source, config=config))
    text = local.text(chat_prompt(messages=[user("<ü>")], tools=[TOOL], documents=[{"text": "doc"}]))
    assert text is not None
    assert text.startswith("<s>20")
    assert '"name": "f"' in text
    assert text.endswith("<ü></s>doc")


def test_templates_that_want_parts_get_parts(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    local = load(rig.save(tmp_path, plain, template=source))
    two = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    assert local.text(chat_prompt(messages=[user("a"), user(two)])) == "[a][b][c]"


def test_templates_in_the_configuration(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D {{ messages[0].content }}"}]
    for number, template in enumerate(("D {{ messages[0].content }}", named)):
        directory = rig.save(tmp_path / str(number), plain, template="", config={"chat_template": template})
        assert load(directory).text(chat_prompt(messages=[user("x")])) == "D x"


def test_without_a_template_only_texts_have_ids(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    local = load(rig.save(tmp_path, plain, template=""))
    assert local.encode(chat_prompt(messages=[user("x")])) is None
    assert ids_of(local.encode(text_prompt(prompt="x y"))) == plain.encode("x y").ids


def test_what_cannot_be_loaded_is_said(plain: tokenizers.Tokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')
    bad_template = rig.save(tmp_path / "template", plain, template="{% for %}")
    deaf = tmp_path / "deaf"
    deaf.mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(deaf / "tokenizer.json"))
    wanted = ((tmp_path / "none", "No such file"), (broken, "broken"), (bad_template, "template"), (deaf, "plain text"))
    for directory, word in wanted:
        found = load_tokenizer(directory, IdCache(1 << 20))
        assert isinstance(found, LoadProblem)
        assert word in found.message


def test_without_the_packages_it_says_what_to_install(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_tokenizers(name: str, *rest: Any, **named: Any) -> Any:
        if name == "tokenizers":
            raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    found = load_tokenizer(model_dir, IdCache(1 << 20))
    assert isinstance(found, LoadProblem)
    assert "waypost[tokenizer]" in found.message
