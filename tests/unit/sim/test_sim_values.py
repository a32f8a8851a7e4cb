"""Toy tokeniser, fault switches and the recorder."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.faults import Command, Faults, command_from
from sim.http1 import HttpRequest
from sim.recorder import MAX_RECORDED_BYTES, Recorder
from sim.tokens import SPEECH_TOKENS, WORDS, as_tokens, chat_tokens, decode, encode, said


@given(st.text())
def test_tokens_are_reversible(text: str) -> None:
    clean = text.encode("utf-8", "replace").decode().replace("\0", "")
    assert decode(encode(clean)) == clean


@given(st.text(min_size=1), st.text())
def test_longer_text_keeps_the_tokens_of_its_start(start: str, more: str) -> None:
    whole = len(start.encode("utf-8", "replace")) // 4
    assert encode(start + more)[:whole] == encode(start)[:whole]


def test_an_answer_sent_back_is_the_same_tokens() -> None:
    words = said(SPEECH_TOKENS - 20, 50)
    assert len(words) == 50
    assert words[20:] == said(0, 30), "the speech begins again"
    text = decode(words)
    assert encode(text) == words
    assert set(text.split()) <= {word.strip() for word in WORDS}
    first = chat_tokens([("user", "hi")])
    second = chat_tokens([("user", "hi"), ("assistant", text), ("user", "more")])
    assert second[: len(first) + len(words)] == first + words


@pytest.mark.parametrize("wrong", [[-1], [1 << 32], ["a"], [1.5]])
def test_tokens_are_unsigned_32_bit(wrong: list[Any]) -> None:
    with pytest.raises((OverflowError, TypeError)):
        as_tokens(wrong)


def test_fault_switches_patch_and_reset() -> None:
    broken = command_from(b'{"slow": 3, "hang": "engine", "error_rate": {"500": 0.5}}', Faults())
    assert broken == Command(faults=Faults(slow=3.0, hang="engine", error_rate={"500": 0.5}))
    assert isinstance(broken, Command)
    mended = command_from(b'{"hang": null, "restart": 2.5, "forget": true}', broken.faults)
    assert mended == Command(faults=Faults(slow=3.0, error_rate={"500": 0.5}), restart_after_s=2.5, forget=True)
    assert command_from(b'{"reset": true}', broken.faults) == Command(faults=Faults())
    assert command_from(b'{"reset": true, "slow": 2}', broken.faults) == Command(faults=Faults(slow=2.0))
    dropping = command_from(b'{"kv_replay": "off", "drop_kv_batches": 2}', Faults())
    assert dropping == Command(faults=Faults(kv_replay="off"), drop_kv_batches=2)
    assert command_from(b"", broken.faults) == Command(faults=broken.faults)


@pytest.mark.parametrize(
    "body",
    [
        b"[",
        b"[]",
        b'{"slwo": 1}',
        b'{"slow": 0}',
        b'{"slow": "fast"}',
        b'{"hang": "sockets"}',
        b'{"error_rate": {"teapot": 1}}',
        b'{"error_rate": {"200": 1}}',
        b'{"error_rate": {"500": 0.8, "503": 0.3}}',
        b'{"error_rate": {"500": -0.1}}',
        b'{"reset_after_chunks": -1}',
        b'{"restart": -1}',
        b'{"restart": "now"}',
        b'{"kv_replay": "maybe"}',
        b'{"drop_kv_batches": -1}',
        b'{"drop_kv_batches": 1.5}',
    ],
)
def test_wrong_switches_are_refused(body: bytes) -> None:
    assert isinstance(command_from(body, Faults()), str)


def test_errors_are_drawn_at_their_rates() -> None:
    faults, rng = Faults(error_rate={"500": 0.2, "503": 0.1}), random.Random(1)
    drawn = [faults.drawn_error(rng) for _ in range(10_000)]
    assert drawn.count(500) == pytest.approx(2_000, rel=0.1)
    assert drawn.count(503) == pytest.approx(1_000, rel=0.1)
    assert drawn.count(None) + drawn.count(500) + drawn.count(503) == 10_000
    assert Faults().drawn_error(rng) is None


def test_recorder_is_bounded() -> None:
    recorder = Recorder(3)
    for index in range(5):
        recorder.note(HttpRequest("POST", f"/{index}", "", ((b"a", b"1"),), b"\xff" if index == 4 else b"x"))
    shown = recorder.as_json()
    assert [entry["path"] for entry in shown] == ["/2", "/3", "/4"]
    assert shown[0]["body"] == "x"
    assert shown[2]["body"] is None
    assert shown[2]["body_base64"] == "/w=="
    assert shown[0]["headers"] == [["a", "1"]]
    big = HttpRequest("POST", "/big", "", (), bytes(MAX_RECORDED_BYTES // 2 + 1))
    recorder.note(big)
    recorder.note(big)
    assert [entry["path"] for entry in recorder.as_json()] == ["/big"]
    recorder.forget()
    assert (recorder.as_json(), recorder.total) == ([], 0)
