"""The `index:` section: what it takes, and what it says about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from picker.config import Loaded
from tests.unit.config.test_kubernetes_section import loaded, messages


def test_nothing_needs_to_be_said(tmp_path: Path) -> None:
    result = loaded(tmp_path, "index: {}\n")
    assert isinstance(result, Loaded), result
    index = result.config.index
    assert (index.enabled, index.kv_events, index.ask_engines, index.backend) == (True, "auto", True, "memory")
    assert (index.kv_events_port, index.kv_replay_port, index.tokenizers, index.redis_url) == (None, None, {}, None)


def test_everything_can_be_said(tmp_path: Path) -> None:
    result = loaded(
        tmp_path,
        f"""
        index:
          enabled: false
          blocks: 1000
          kv_events: off
          kv_events_port: 5600
          kv_replay_port: 65535
          tokenizers: {{llama-3-8b: {tmp_path}, "org/sql-adapter": {tmp_path}}}
          ask_engines: false
          backend: redis
          redis_url: "redis://user:hidden@redis:6379/0"
          redis_prefix: "way{{east}}:1"
        """,
    )
    assert isinstance(result, Loaded), result
    index = result.config.index
    assert (index.enabled, index.blocks, index.kv_events) == (False, 1000, "off")
    assert (index.kv_events_port, index.kv_replay_port) == (5600, 65535)
    assert index.tokenizers == {"llama-3-8b": tmp_path, "org/sql-adapter": tmp_path}
    assert (index.ask_engines, index.backend, index.redis_prefix) == (False, "redis", "way{east}:1")
    assert index.redis_url is not None
    assert index.redis_url.get_secret_value() == "redis://user:hidden@redis:6379/0"
    assert "hidden" not in repr(result.config)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("enabled: 7", "index.enabled"),
        ("blocks: -1", "index.blocks"),
        ("blocks: 1.5", "index.blocks"),
        ("kv_events: on", "index.kv_events"),
        ("kv_events: sometimes", "must be one of auto, off"),
        ("kv_events_port: 0", "index.kv_events_port"),
        ("kv_events_port: 65536", "index.kv_events_port"),
        ("kv_events_port: true", "index.kv_events_port"),
        ("kv_replay_port: nine", "index.kv_replay_port"),
        ("tokenizers: [a, b]", "index.tokenizers"),
        ("tokenizers: {'': /models}", "index.tokenizers"),
        ("tokenizers: {a: 7}", "index.tokenizers.a"),
        ("ask_engines: maybe", "index.ask_engines"),
        ("backend: redis", "needs redis_url"),
        ("backend: etcd", "must be one of memory, redis"),
        ("redis_prefix: 'a b'", "index.redis_prefix"),
        ("redis_prefix: ''", "index.redis_prefix"),
        ("kv_event: auto", "kv_events"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, entry: str, said: str) -> None:
    found = messages(loaded(tmp_path, f"\nindex:\n  {entry}\n"))
    assert len(found) == 1, found
    assert found[0].startswith("3:"), found
    assert said in found[0]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    found = messages(loaded(tmp_path, "index:\n  blocks: x\n  kv_events_port: -5\n  surprise: 1\n"))
    assert [text.partition(":")[0] for text in found] == ["2", "3", "4"]


def test_too_many_tokenizers(tmp_path: Path) -> None:
    entries = "".join(f"    m{number}: /models\n" for number in range(101))
    found = messages(loaded(tmp_path, f"index:\n  tokenizers:\n{entries}"))
    assert len(found) == 1
    assert "index.tokenizers" in found[0]
    assert "100" in found[0]
