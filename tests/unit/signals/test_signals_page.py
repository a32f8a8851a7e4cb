"""The wanted-lines filter against the official parser, and against pages nobody should write."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from picker.signals.engines import BUILTIN
from picker.signals.page import MAX_LINE_BYTES, MAX_SAMPLES, PageFilter, Sample, looks_like_page, parse_line

CAPTURES = sorted((Path(__file__).parents[2] / "data" / "vllm-0.32").glob("metrics*.txt"))

# Other jobs share the machine: slowness of the generator is not a failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

Row = tuple[str, tuple[tuple[str, str], ...], str]


def row(name: str, labels: dict[str, str], value: float) -> Row:
    return name, tuple(sorted(labels.items())), repr(float(value))


def official(page: bytes, names: Iterable[str] | None = None) -> list[Row]:
    wanted = None if names is None else set(names)
    return sorted(
        row(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if wanted is None or sample.name in wanted
    )


def ours(page: bytes, names: Iterable[str]) -> list[Row]:
    return sorted(row(sample.name, sample.labels, sample.value) for sample in PageFilter(names).read(page))


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
def test_every_family_of_a_captured_page_reads_as_by_the_official_parser(capture: Path) -> None:
    page = capture.read_bytes()
    expected = official(page)
    assert len(expected) > 400
    names = {name for name, _, _ in expected}
    assert ours(page, names) == expected
    for name in names:
        assert ours(page, [name]) == official(page, [name])


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("engine", BUILTIN.values(), ids=lambda engine: engine.name)
def test_what_each_engine_wants_reads_as_by_the_official_parser(capture: Path, engine: object) -> None:
    table = BUILTIN[engine.name]  # type: ignore[attr-defined]
    figures = (table.waiting, table.running, table.kv_usage, table.block_tokens, table.blocks, table.progress)
    names = {figure.name for places in figures for figure in places} | ({table.lora} if table.lora else set())
    page = capture.read_bytes()
    assert sorted(row(s.name, s.labels, s.value) for s in table.lines.read(page)) == official(page, names)


def test_there_are_captured_pages() -> None:
    assert len(CAPTURES) == 3


NAMES = ["a:running", "a:waiting", "a:waiting_by_reason", "a:tokens_total", "a:tokens_created", "b"]
WANTED = ["a:running", "a:waiting", "a:tokens_total", "absent"]

label_values = st.text(st.sampled_from('abn,={}#"\\\n 1é\u2028\u00a0😀'), max_size=12)
labels = st.dictionaries(st.sampled_from(["x", "le", "engine", "_b", "model_name", "Q9"]), label_values)
numbers = (
    st.floats().map(repr)
    | st.integers(-(2**53), 2**53).map(str)
    | st.sampled_from(["NaN", "+Inf", "-Inf", "inf", "1e5", "1.5E-3", "+7", "1.79517548301e+09", "00.5", ".5", "5."])
)
gaps = st.sampled_from(["", " ", "  ", "\t"])


def escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


@st.composite
def sample_lines(draw: st.DrawFn) -> str:
    name, pairs = draw(st.sampled_from(NAMES)), draw(labels)
    empty_braces, trailing_comma = draw(st.booleans()), draw(st.booleans())
    text = draw(gaps) + name
    if pairs or empty_braces:
        gap = draw(gaps)
        inside = ("," + gap).join(f'{key}{gap}={gap}"{escaped(value)}"' for key, value in pairs.items())
        comma = "," if pairs and trailing_comma else ""
        text += f"{draw(gaps)}{{{gap}{inside}{comma}{gap}}}" + draw(gaps)
    else:
        text += " "
    stamp = draw(st.sampled_from(["", " 1395066363000", "  -3"]))
    return text + draw(numbers) + stamp + draw(st.sampled_from(["", " ", "\r"]))


comments = st.sampled_from(
    ["", "  ", "# HELP a:running Running 3.", "# TYPE a:running gauge", "# a:running 7", "#", "# EOF", "# TYPE b gauge"]
)


@patient
@given(st.lists(sample_lines() | comments, max_size=30))
def test_generated_pages_read_as_by_the_official_parser(lines: list[str]) -> None:
    page = "".join(line + "\n" for line in lines).encode()
    assert ours(page, WANTED) == official(page, WANTED)


GARBAGE = [
    "a:running",
    "a:running ",
    "a:running{} ",
    "a:running{x} 1",
    'a:running{x="1} 1',
    'a:running{x="1",x="2"} 1',
    'a:running{x="1"y="2"} 1',
    "a:running{,} 1",
    'a:running{x="1"',
    "a:running 1_000",
    "a:running 0x10",
    "a:running one",
    "a:running 1 2 3",
    "a:running 1 soon",
    "a:running{}} 1",
    "a:running{{} 1",
    "a:running -",
    'a:running{="1"} 1',
    'a:running{9="1"} 1',
    "<html><body>a:running 1</body></html>",
    '{"a:running": 1}',
    "\x00\x01\x02",
]


@patient
@given(
    st.lists(sample_lines() | comments, max_size=8),
    st.lists(st.sampled_from(GARBAGE), min_size=1, max_size=8),
    st.randoms(),
)
def test_garbage_lines_are_skipped_and_spoil_nothing(good: list[str], garbage: list[str], random: object) -> None:
    clean = "".join(line + "\n" for line in good).encode()
    mixed = [*good]
    for line in garbage:
        mixed.insert(random.randint(0, len(mixed)), line)  # type: ignore[attr-defined]
    dirty = "".join(line + "\n" for line in mixed).encode()
    assert ours(dirty, WANTED) == ours(clean, WANTED)


@patient
@given(st.binary(max_size=400) | st.text('a:running{}"\\=, 1e\n#', max_size=200).map(str.encode))
def test_no_bytes_at_all_make_it_raise(page: bytes) -> None:
    PageFilter(WANTED).read(page)
    looks_like_page(page)


def test_a_truncated_last_line_is_not_half_read() -> None:
    page = b'a:running{x="1"} 12\na:waiting 34'
    assert ours(page, WANTED) == [row("a:running", {"x": "1"}, 12)]
    assert len(ours(page + b"\n", WANTED)) == 2


def test_longer_names_with_a_wanted_beginning_are_other_families() -> None:
    page = b'a:waiting_by_reason{reason="capacity"} 5\na:waiting 5\na:waitingx 1\n'
    assert ours(page, ["a:waiting"]) == [row("a:waiting", {}, 5)]


def test_exemplars_do_not_hide_the_value() -> None:
    assert parse_line(b'a:tokens_total{x="1"} 7 # {trace="y"} 0.5') == Sample("a:tokens_total", {"x": "1"}, 7)


def test_invalid_utf_8_in_a_label_is_replaced() -> None:
    assert PageFilter(["b"]).read(b'b{x="\xff"} 1\n') == [Sample("b", {"x": "�"}, 1)]


def test_samples_and_lines_are_bounded() -> None:
    assert len(PageFilter(["b"]).read(b'b{x="1"} 1\n' * (MAX_SAMPLES + 10))) == MAX_SAMPLES
    long = b'b{x="' + b"y" * MAX_LINE_BYTES + b'"} 1\n'
    assert PageFilter(["b"]).read(long + b"b 2\n") == [Sample("b", {}, 2)]


@pytest.mark.parametrize(
    "line",
    [
        b"b{" + b'x="' * 20_000,
        b"b{" + b'x="1",' * 10_000,
        b'b{x="' + b'\\"' * 30_000,
        b"b " + b" " * 60_000 + b"x",
        b"b" * 60_000,
    ],
    ids=["quotes", "labels", "escapes", "spaces", "name"],
)
def test_hostile_lines_take_no_time(line: bytes) -> None:
    started = time.perf_counter()
    PageFilter(["b"]).read((line + b"\n") * 10)
    assert time.perf_counter() - started < 1.0


def test_a_filter_without_names_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PageFilter([])


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (b"", True),
        (b"\n\n", True),
        (b"# HELP x y\n", True),
        (b"garbage line\nx 1\n", True),
        (b'x{a="b"} 1\n', True),
        (b"x NaN\n", True),
        (b"<!DOCTYPE html>\n<p>x 1</p>\n", False),
        (b'{"status": "ok"}', False),
        (b'[{"iter": 1}]', False),
        (b"Not Found", False),
    ],
)
def test_pages_are_told_from_other_answers(page: bytes, expected: bool) -> None:
    assert looks_like_page(page) is expected


def test_not_a_number_stays_one() -> None:
    (sample,) = PageFilter(["b"]).read(b"b NaN\n")
    assert math.isnan(sample.value)
