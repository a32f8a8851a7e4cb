"""The table of scorers: complete, named alike, and closed to replacement from outside."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

import scorers

FILES = sorted(path.stem for path in Path(scorers.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("stem", FILES)
def test_every_file_is_in_the_table_under_its_own_name(stem: str) -> None:
    name = stem.replace("_", "-")
    assert name in scorers.BUILTIN
    made = scorers.build(name)
    assert made.name == name
    assert type(made).__module__ == f"scorers.{stem}"
    assert importlib.import_module(f"scorers.{stem}").__doc__


def test_the_table_names_nothing_else() -> None:
    assert sorted(scorers.BUILTIN) == sorted(stem.replace("_", "-") for stem in FILES)


@pytest.mark.parametrize("stem", FILES)
def test_a_scorer_is_small(stem: str) -> None:
    path = Path(scorers.__file__).parent / f"{stem}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("name", sorted(scorers.BUILTIN))
def test_scorers_are_values(name: str) -> None:
    made = scorers.build(name)
    assert made == scorers.build(name)
    assert isinstance(made, msgspec.Struct)
    with pytest.raises(AttributeError):
        setattr(made, "name", "x")  # noqa: B010


def test_unknown_names_and_parameters() -> None:
    with pytest.raises(KeyError):
        scorers.build("nope")
    with pytest.raises(TypeError):
        scorers.build("kv-usage", {"x": 1})


class _Entry:
    """An installed package's registration."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Any:
        return scorers.BUILTIN["kv-usage"]


def test_outside_scorers_are_found_and_cannot_replace_built_in_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(*, group: str) -> list[_Entry]:
        assert group == "waypost.scorers"
        return [_Entry("mine"), _Entry("queue-depth")]

    monkeypatch.setattr(scorers, "entry_points", entries)

    assert scorers.build("mine").name == "kv-usage"
    assert scorers.available()["queue-depth"] is scorers.BUILTIN["queue-depth"]
    assert scorers.build("queue-depth").name == "queue-depth"
