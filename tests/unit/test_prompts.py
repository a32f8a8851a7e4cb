"""What a request has after the doors awaited the keys of its prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from picker.core.prefix.keys import Namespace, byte_root, chain, token_root
from picker.core.values import InferenceRequest
from picker.openai.parse import ParsedBody, parse_body
from picker.openai.routes import RouteKind, match_suffix
from picker.prompts import Engines, Prompts
from picker.signals.tokens.reader import CHUNK_BYTES, PromptReader
from tests.unit.core.builders import request
from tests.unit.signals.tokens import rig

SECRET = b"fleet"
IDS = list(range(100))


def prompts(*, loras: tuple[str, ...] = (), sizes: tuple[int, ...] = (16,)) -> Prompts:
    engines = Engines(block_tokens={"a": sizes, "b": sizes[:1]}, loras={"a": loras, "b": ()})
    made = Prompts(engines)
    made.begin(PromptReader(SECRET))
    return made


async def keyed(made: Prompts, kind: RouteKind = RouteKind.COMPLETIONS, *, more: Any = (), **members: Any) -> Any:
    """The request after it was given keys, with an estimate of 10 tokens before."""
    body, parsed = rig.request(kind, **members)
    return await made.keyed(request(model=members.get("model", "tiny"), **dict(more)), body, parsed)


def exact(ids: list[int], size: int = 16, *, lora: str = "", salt: str = "") -> list[int]:
    """The keys an engine's events would have."""
    packed = b"".join(number.to_bytes(4, "little") for number in ids)
    return chain(token_root(SECRET, Namespace(lora, salt), size), packed, 4 * size)


async def test_before_the_index_runs_requests_pass_as_they_are() -> None:
    made = Prompts(Engines())
    body, parsed = rig.request(RouteKind.COMPLETIONS, prompt=IDS)
    asked = request()
    assert await made.keyed(asked, body, parsed) is asked
    assert made.counts == {}
    await made.close()


async def test_token_ids_give_exact_keys_of_all_block_sizes_and_the_true_length() -> None:
    made = prompts(sizes=(16, 32))
    got = await keyed(made, prompt=IDS)
    assert got.keys.exact == {16: exact(IDS), 32: exact(IDS, 32)}
    assert (got.prompt_tokens, got.keys.tokens) == (100, 100)
    assert made.counts["given"] == 1
    await made.close()


async def test_a_text_nobody_can_tokenise_has_learned_keys_and_keeps_its_estimate() -> None:
    made = prompts()
    text = "All happy families are alike. " * 100
    got = await keyed(made, prompt=text)
    root = byte_root(SECRET, Namespace(), CHUNK_BYTES)
    assert (got.keys.exact, len(got.keys.learned)) == ({}, len(text) // CHUNK_BYTES)
    assert got.keys.learned[0] == chain(root, text.encode()[:CHUNK_BYTES], CHUNK_BYTES)[0]
    assert got.prompt_tokens == 10
    await made.close()


async def test_without_a_block_size_there_are_no_exact_keys() -> None:
    made = Prompts(Engines())
    made.begin(PromptReader(SECRET))
    got = await keyed(made, prompt=IDS)
    assert got.keys.exact == {}
    assert got.keys.learned
    assert got.prompt_tokens == 10
    await made.close()


async def test_adapters_have_keys_of_their_own_by_the_name_the_engines_know() -> None:
    made = prompts(loras=("sql",))
    assert (await keyed(made, prompt=IDS)).keys.exact == {16: exact(IDS)}
    assert (await keyed(made, prompt=IDS, model="sql")).keys.exact == {16: exact(IDS, lora="sql")}
    renamed = await keyed(made, prompt=IDS, model="sql", more={"target_model": "tiny"})
    assert renamed.keys.exact == {16: exact(IDS)}
    renamed = await keyed(made, prompt=IDS, model="alias", more={"target_model": "sql"})
    assert renamed.keys.exact == {16: exact(IDS, lora="sql")}
    salted = await keyed(made, prompt=IDS, model="sql", cache_salt="mine")
    assert salted.keys.exact == {16: exact(IDS, lora="sql", salt="mine")}
    await made.close()


async def test_adapters_that_engines_list_need_not_have_been_heard_of() -> None:
    made = Prompts(Engines(block_tokens={"a": (16,)}))
    made.begin(PromptReader(SECRET), lambda: frozenset({"sql"}))
    assert (await keyed(made, prompt=IDS, model="sql")).keys.exact == {16: exact(IDS, lora="sql")}
    assert (await keyed(made, prompt=IDS)).keys.exact == {16: exact(IDS)}
    await made.close()


async def test_what_was_heard_of_an_endpoint_goes_with_it() -> None:
    engines = Engines(block_tokens={"a": (16,), "b": (32,)}, loras={"a": ("sql",)})
    assert engines.sizes() == {16, 32}
    engines.forget("a")
    engines.forget("a")
    assert engines.sizes() == {32}
    assert not engines.loras


HOSTILE = (
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"model":"tiny","prompt":null}',
    b'{"model":"tiny","prompt":{}}',
    b'{"model":"tiny","prompt":[1,2,-1]}',
    b'{"model":"tiny","prompt":[1,2,4294967296]}',
    b'{"model":"tiny","prompt":[[],[]]}',
    b'{"model":"tiny","prompt":[true,1.5,"x",null]}',
    b'{"model":"tiny","prompt":"\\ud800"}',
    b'{"model":"tiny","prompt":"\xff\xfe"}',
    b'{"model":"tiny","prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model":"tiny","messages":"x"}',
    b'{"model":"tiny","messages":[1,null,{"role":7,"content":{"a":[]}}]}',
    b'{"model":"tiny","messages":[{"role":"user","content":[{"type":"text"}]}],"tools":7}',
    b'{"model":"tiny","prompt":"x","cache_salt":["y"]}',
)


@pytest.mark.parametrize("kind", [RouteKind.CHAT, RouteKind.COMPLETIONS, RouteKind.MESSAGES, RouteKind.RESPONSES])
@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_bodies_are_the_engines_to_refuse(kind: RouteKind, body: bytes) -> None:
    """As in the door: what does not parse is refused before, and what parses never makes keys raise."""
    parsed = parse_body(match_suffix(rig.PATHS[kind]), body, strict=False)
    if not isinstance(parsed, ParsedBody):
        return
    made = prompts()
    got = await made.keyed(request(), body, parsed)
    assert isinstance(got, InferenceRequest)
    assert got.key == 1
    # Even where what was parsed belongs to another body.
    _, other = rig.request(kind, messages=[rig.user("x")], prompt="x")
    assert isinstance(await made.keyed(request(), body, other), InferenceRequest)
    await made.close()


async def test_nothing_shows_a_prompt() -> None:
    made = prompts()
    got = await keyed(made, RouteKind.CHAT, messages=[rig.user("a secret " * 100)])
    assert got.keys.learned
    assert "secret" not in repr((made, got))
    assert "secret" not in json.dumps([str(got), repr(got.keys)])
    await made.close()
