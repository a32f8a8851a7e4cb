"""Whatever a file or a variable holds, loading answers with a configuration or with problems; it never raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picker.config import Config, KnownNames, Loaded, Problem, load
from picker.config.fields import walk

KEYS = sorted({str(part) for path, _ in walk(Config) for part in path} | {"x", "$", "0", "", "a\nb\x1b[31m"})
WORDS = [
    "2s",
    "10MiB",
    "25%",
    ":8080",
    "http://a:1",
    "http://[::1",
    "file:/",
    "file:/proc",
    "${A}",
    "a\x00b",
    "both",
    "balanced",
]
NAMES = frozenset({"balanced", "health", "max-score"})

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=20)
trees: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=15,
)
sections = st.sampled_from(list(Config.model_fields))


def check(result: Loaded | list[Problem]) -> None:
    if isinstance(result, list):
        assert result
        assert all(str(problem) and str(problem).isprintable() for problem in result)
    else:
        assert result.config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "w.yaml"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.dictionaries(sections, trees, max_size=4))
def test_any_file(data: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
    check(load(path, environ={"A": "1"}, flags={}, known=KnownNames(NAMES, NAMES, NAMES, NAMES)))


@settings(max_examples=200, deadline=None)
@given(section=sections, key=st.sampled_from(KEYS), value=st.text(max_size=30) | st.sampled_from(WORDS))
def test_any_variable_and_flag(section: str, key: str, value: str) -> None:
    environ = {f"WAYPOST_{section}__{key}".upper(): value, f"WAYPOST_{section}".upper(): value}
    check(load(None, environ=environ, flags={}))
    check(load(None, environ={}, flags={(section, key): value}))
