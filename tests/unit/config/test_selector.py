"""Label selectors as text: the syntax of kubectl, and what they match."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.config import LabelSelector, matching, parse_selector

LABELS = {"app": "vllm", "tier": "gold", "llm-d.ai/model": "qwen", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("app=vllm", True),
        ("app==vllm", True),
        ("app=sglang", False),
        ("app!=sglang", True),
        ("app!=vllm", False),
        ("absent!=anything", True),
        ("app=vllm,llm-d.ai/model=qwen", True),
        ("app=vllm,llm-d.ai/model=llama", False),
        (" app = vllm , tier in ( gold , silver ) ", True),
        ("tier in (silver)", False),
        ("tier notin (silver,bronze)", True),
        ("absent notin (x)", True),
        ("tier notin (gold)", False),
        ("app", True),
        ("absent", False),
        ("!absent", True),
        ("!app", False),
        ("empty=", True),
        ("app=", False),
        ("empty in (,x)", True),
    ],
)
def test_what_a_selector_matches(text: str, matches: bool) -> None:
    assert parse_selector(text).matches(LABELS) is matches


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "a,",
        ",a",
        "a,,b",
        "=b",
        "a b",
        "a in b",
        "a in (b",
        "a in (b c)",
        "-a",
        "a=-b",
        "!",
        "!a=b",
        "a=b=c",
    ],
)
def test_what_is_no_selector(text: str) -> None:
    with pytest.raises(ValueError, match="not a label"):
        parse_selector(text)


def test_a_selector_without_requirements_matches_nothing() -> None:
    assert not LabelSelector().matches(LABELS)
    assert not matching({}).matches(LABELS)


def test_match_labels_are_all_needed() -> None:
    assert matching({"app": "vllm", "tier": "gold"}).matches(LABELS)
    assert not matching({"app": "vllm", "tier": "silver"}).matches(LABELS)


@given(st.text(alphabet="ab=!,() intoX.-/_", max_size=40))
def test_any_text_is_a_selector_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_selector(text).requirements
