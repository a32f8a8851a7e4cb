"""The keys doors get: which, when, and how long they wait for them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tokenizers

from picker.core.prefix.keys import Namespace, byte_root, chain, token_root
from picker.core.prefix.prompt import PromptKeys
from picker.openai.routes import RouteKind
from picker.signals.tokens.agreement import Agreement
from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.encoder import Encoder, Encoding
from picker.signals.tokens.local import LocalTokenizer
from picker.signals.tokens.reader import CHUNK_BYTES, MAX_KEYS, WAITING, PromptReader, token_budget_s
from picker.signals.tokens.remote import EngineTokens
from tests.unit.signals.fakes import Answer
from tests.unit.signals.tokens import rig
from tests.unit.signals.tokens.rig import assistant, is_prefix, user
from tests.unit.signals.tokens.test_tokens_remote import ONE, Clock, FakeEngines, tokens

SECRET = b"fleet"
SIZES = frozenset((16, 64))
LONG = "All happy families are alike. " * 100


class SlowTokenizer:
    """Waits for `gate` in each encode once it is armed; counts its calls."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0

    def encode_batch_fast(self, texts: list[str], /, *, add_special_tokens: bool) -> list[Encoding]:
        self.calls += 1
        assert self.gate.wait(30)
        return list(self.inner.encode_batch_fast(texts, add_special_tokens=add_special_tokens))


@contextmanager
def stuck(slow: SlowTokenizer) -> Iterator[None]:
    slow.gate.clear()
    try:
        yield
    finally:
        slow.gate.set()


async def idle(reader: PromptReader) -> None:
    async with asyncio.timeout(10):
        while reader.pending:
            await asyncio.sleep(0.001)


@pytest.fixture
def slow(plain: tokenizers.Tokenizer) -> SlowTokenizer:
    return SlowTokenizer(plain)


def slow_local(slow: SlowTokenizer) -> LocalTokenizer:
    return LocalTokenizer(Encoder(slow, (), IdCache(1 << 22), seed=1), None)


async def read(
    reader: PromptReader, kind: RouteKind, *, budget_s: float = 30.0, lora: bool = False, **members: Any
) -> PromptKeys:
    body, parsed = rig.request(kind, **members)
    keys = await reader.read(body, parsed, target_model="tiny", lora=lora, block_sizes=SIZES, budget_s=budget_s)
    assert keys is not None
    return keys


def read_now(reader: PromptReader, kind: RouteKind, *, lora: bool = False, **members: Any) -> PromptKeys:
    body, parsed = rig.request(kind, **members)
    keys = reader.read_now(body, parsed, target_model="tiny", lora=lora, block_sizes=SIZES)
    assert keys is not None
    return keys


async def test_exact_keys_are_those_of_the_reference_encode(local: LocalTokenizer, plain: tokenizers.Tokenizer) -> None:
    reader = PromptReader(SECRET, tokenizers={"tiny": local})
    keys = await read(reader, RouteKind.CHAT, messages=[user(LONG)])
    ids = plain.encode(f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\n").ids
    packed = b"".join(ident.to_bytes(4, "little") for ident in ids)
    for size in SIZES:
        assert keys.exact[size] == chain(token_root(SECRET, Namespace(), size), packed, 4 * size)
        assert len(keys.exact[size]) == len(ids) // size
    assert keys.tokens == len(ids)
    assert keys.learned == read_now(reader, RouteKind.CHAT, messages=[user(LONG)]).learned
    assert keys.chunk_tokens * len(keys.learned) <= keys.tokens
    assert reader.counts.tokenizer == 1
    await reader.close()


async def test_keys_of_a_turn_begin_with_those_of_the_turn_before(local: LocalTokenizer) -> None:
    rng = random.Random(3)
    reader = PromptReader(SECRET, tokenizers={"tiny": local})
    messages: list[dict[str, Any]] = [{"role": "system", "content": LONG}]
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 300, "parameters": {}}}]
    last = PromptKeys()
    for turn in range(6):
        messages.append(user("".join(rng.choices("abc é漢\n", k=400))))
        keys = await read(reader, RouteKind.CHAT, messages=messages, tools=tools)
        assert is_prefix(last.learned, keys.learned)
        assert len(keys.learned) > len(last.learned)
        for size, known in last.exact.items():
            # The generation prompt at the end of a turn is where the answer begins in the next.
            assert is_prefix(known, keys.exact[size])
        last = keys
        messages.append(assistant(f"answer {turn} " + "x" * 300, tool_calls=None))
    await reader.close()


async def test_namespaces_keep_keys_apart() -> None:
    reader = PromptReader(SECRET)
    seen = [
        read_now(reader, RouteKind.COMPLETIONS, prompt=LONG),
        read_now(reader, RouteKind.COMPLETIONS, prompt=LONG, cache_salt="tenant"),
        read_now(reader, RouteKind.COMPLETIONS, prompt=LONG, lora=True),
        read_now(PromptReader(b"other"), RouteKind.COMPLETIONS, prompt=LONG),
    ]
    assert len({keys.learned[0] for keys in seen}) == 4
    root = byte_root(SECRET, Namespace(lora="tiny", salt=""), CHUNK_BYTES)
    assert seen[2].learned == chain(root, LONG.encode(), CHUNK_BYTES)
    await reader.close()


async def test_ids_in_the_request_need_no_tokenizer() -> None:
    reader = PromptReader(SECRET)
    ids = list(range(200))
    for keys in (
        read_now(reader, RouteKind.COMPLETIONS, prompt=ids),
        await read(reader, RouteKind.NATIVE_GENERATE, input_ids=ids),
        await read(reader, RouteKind.TOKEN_GENERATE, token_ids=ids),
    ):
        packed = b"".join(ident.to_bytes(4, "little") for ident in ids)
        assert keys.exact[16] == chain(token_root(SECRET, Namespace(), 16), packed, 64)
        assert (keys.tokens, keys.chunk_tokens, len(keys.learned)) == (200, 64.0, 3)
    assert reader.counts.given == 3
    await reader.close()


async def test_of_a_batch_the_first_prompt_has_keys_and_all_have_a_length() -> None:
    reader = PromptReader(SECRET)
    keys = read_now(reader, RouteKind.COMPLETIONS, prompt=[list(range(64)), list(range(100))])
    texts = read_now(reader, RouteKind.COMPLETIONS, prompt=[LONG, LONG])
    assert (len(keys.exact[16]), keys.tokens, keys.chunk_tokens) == (4, 164, 64.0)
    assert texts.tokens > 2 * len(texts.learned) * 60
    await reader.close()


async def test_a_slow_tokenizer_is_not_waited_for_and_fills_the_cache_behind(slow: SlowTokenizer) -> None:
    reader = PromptReader(SECRET, tokenizers={"tiny": slow_local(slow)})
    with stuck(slow):
        began = time.monotonic()
        keys = await read(reader, RouteKind.COMPLETIONS, prompt=LONG, budget_s=0.02)
        assert 0.015 < time.monotonic() - began < 1.0
        assert not keys.exact
        assert keys.learned
        assert reader.counts.late == 1
    await idle(reader)
    calls = slow.calls
    keys = await read(reader, RouteKind.COMPLETIONS, prompt=LONG)
    assert keys.exact[16]
    assert slow.calls == calls
    await reader.close()


async def test_a_busy_pool_declines_at_once(slow: SlowTokenizer) -> None:
    reader = PromptReader(SECRET, tokenizers={"tiny": slow_local(slow)}, threads=1)
    with stuck(slow):
        waiting = [
            asyncio.create_task(read(reader, RouteKind.COMPLETIONS, prompt=f"{n} {LONG}")) for n in range(1 + WAITING)
        ]
        await asyncio.sleep(0)
        keys = await asyncio.wait_for(read(reader, RouteKind.COMPLETIONS, prompt=LONG), 5)
        assert not keys.exact
        assert reader.counts.declined == 1
    assert all(keys.exact for keys in await asyncio.wait_for(asyncio.gather(*waiting), 30))
    await reader.close()


async def test_a_client_that_leaves_stops_waiting_only(slow: SlowTokenizer) -> None:
    reader = PromptReader(SECRET, tokenizers={"tiny": slow_local(slow)})
    with stuck(slow):
        waiting = asyncio.create_task(read(reader, RouteKind.COMPLETIONS, prompt=LONG))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await idle(reader)
    calls = slow.calls
    assert (await read(reader, RouteKind.COMPLETIONS, prompt=LONG)).exact
    assert slow.calls == calls
    await reader.close()


async def test_a_tokenizer_that_fails_leaves_byte_keys(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(SlowTokenizer):
        def encode_batch_fast(self, texts: list[str], /, *, add_special_tokens: bool) -> list[Encoding]:
            if len(texts[0]) > 10:
                raise ValueError(texts[0])
            return super().encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    local = slow_local(Failing(rig.byte_level(vocab=300)))
    reader = PromptReader(SECRET, tokenizers={"tiny": local})
    keys = await read(reader, RouteKind.COMPLETIONS, prompt=LONG)
    assert keys.learned
    assert not keys.exact
    assert reader.counts.unknown == 1
    assert "happy" not in caplog.text
    await reader.close()


async def test_engines_are_asked_where_no_tokenizer_is() -> None:
    fake = FakeEngines(lambda url, body: tokens(*range(40)) if "/tokenize" in url else Answer(404))
    engines = EngineTokens(fake, lambda model: (ONE,), clock=Clock(), cache_bytes=1 << 20)
    reader = PromptReader(SECRET, engines=engines)
    assert not (await read(reader, RouteKind.COMPLETIONS, prompt=LONG)).exact
    keys = await read(reader, RouteKind.COMPLETIONS, prompt=LONG)
    assert (len(keys.exact[16]), keys.tokens) == (2, 40)
    again = await read(reader, RouteKind.COMPLETIONS, prompt=LONG, budget_s=0.0)
    assert again == keys
    assert (reader.counts.engine, reader.counts.unknown) == (2, 1)
    await reader.close()


async def test_images_have_no_exact_keys_whoever_might_know(local: LocalTokenizer) -> None:
    fake = FakeEngines(lambda url, body: tokens(*range(40)))
    engines = EngineTokens(fake, lambda model: (ONE,), clock=Clock(), cache_bytes=1 << 20)
    reader = PromptReader(SECRET, tokenizers={"other": local}, engines=engines)
    parts = [{"type": "text", "text": LONG}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    keys = await read(reader, RouteKind.CHAT, messages=[user(parts)])
    assert keys.learned
    assert not keys.exact
    assert fake.asked == []
    await reader.close()


async def test_a_model_whose_tokens_disagree_has_byte_keys_only(local: LocalTokenizer) -> None:
    agreement = Agreement(lambda model, endpoint: None)
    reader = PromptReader(SECRET, tokenizers={"tiny": local}, agreement=agreement)
    assert (await read(reader, RouteKind.COMPLETIONS, prompt=LONG)).exact
    agreement.compared("http://e", "tiny", False)
    assert not (await read(reader, RouteKind.COMPLETIONS, prompt=LONG)).exact
    await reader.close()


async def test_without_a_prompt_there_are_no_keys(local: LocalTokenizer) -> None:
    reader = PromptReader(SECRET, tokenizers={"tiny": local})
    for kind, members in (
        (RouteKind.EMBEDDINGS, {"input": "x"}),
        (RouteKind.CHAT, {"messages": 5}),
        (RouteKind.RESPONSES, {"input": "x", "previous_response_id": "r"}),
    ):
        body, parsed = rig.request(kind, **members)
        assert reader.read_now(body, parsed, target_model="tiny", lora=False, block_sizes=SIZES) is None
        keys = await reader.read(body, parsed, target_model="tiny", lora=False, block_sizes=SIZES, budget_s=1.0)
        assert keys is None
    await reader.close()


async def test_after_closing_there_are_byte_keys(local: LocalTokenizer) -> None:
    fake = FakeEngines(lambda url, body: tokens(1))
    engines = EngineTokens(fake, lambda model: (ONE,), clock=Clock(), cache_bytes=1 << 20)
    for reader in (PromptReader(SECRET, tokenizers={"tiny": local}), PromptReader(SECRET, engines=engines)):
        await reader.close()
        keys = await read(reader, RouteKind.COMPLETIONS, prompt=LONG)
        assert keys.learned
        assert not keys.exact
    assert fake.asked == []


async def test_nesting_near_the_limit_does_not_raise() -> None:
    reader = PromptReader(SECRET)
    _, parsed = rig.request(RouteKind.CHAT, messages=[user("x")])
    for depth in range(100, 1100, 7):
        nested = b'{"messages":[{"role":"user","content":[{"type":"x","v":' + b"[" * depth + b"]" * depth + b"}]}]}"
        reader.read_now(nested, parsed, target_model=None, lora=False, block_sizes=SIZES)
    await reader.close()


async def test_endless_prompts_have_a_bounded_number_of_keys() -> None:
    reader = PromptReader(SECRET)
    keys = read_now(reader, RouteKind.COMPLETIONS, prompt=[1] * (16 * MAX_KEYS + 160))
    assert len(keys.exact[16]) == MAX_KEYS
    assert keys.tokens == 16 * MAX_KEYS + 160
    assert len(read_now(reader, RouteKind.COMPLETIONS, prompt="x" * (CHUNK_BYTES * MAX_KEYS + 999)).learned) == MAX_KEYS
    await reader.close()


def test_the_budget_is_a_tenth_of_the_prefill_within_bounds() -> None:
    assert [token_budget_s(prefill_s) for prefill_s in (0.0, 0.01, 0.25, 3.0)] == [0.005, 0.005, 0.025, 0.05]


async def test_reprs_show_nothing_of_a_prompt(local: LocalTokenizer) -> None:
    reader = PromptReader(b"fleet-key", tokenizers={"tiny": local})
    await read(reader, RouteKind.CHAT, messages=[user("s3cret")])
    assert "s3cret" not in repr(reader)
    assert "fleet-key" not in repr(reader)
    await reader.close()
