"""YAML text to plain data, with the place of every key and value.

Stricter and smaller than full YAML: no tags, no merge keys, no dates, `yes` and `no` are text (booleans are true and
false), duplicate keys are errors, nesting, aliases and size are bounded. Knows nothing about what the data mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from picker.config.problems import KeyPath, Problem, in_reading_order

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_VALUES = 100_000

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_SLOW_CHARS = 64 * 1024
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")} | {
    None,
    "!",
}
_QUOTED = re.compile(r"\s?(?P<quote>['\"])(?P<inside>.*?)(?P=quote)")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a text; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """The content of one YAML text. `keys` and `values` say where the key and the value of each path stand."""

    name: str
    data: Any = None
    keys: Mapping[KeyPath, Mark] = field(default_factory=dict)
    values: Mapping[KeyPath, Mark] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    broken: bool = False
    """The text could not be read at all, so checking `data` makes no sense."""

    def nearest(self, path: KeyPath) -> tuple[KeyPath, Mark]:
        """The longest part of `path` that has a place, and that place."""
        for length in range(len(path), 0, -1):
            mark = self.values.get(path[:length]) or self.keys.get(path[:length])
            if mark:
                return path[:length], mark
        return (), self.values.get((), Mark(1, 1))


class _Refused(yaml.MarkedYAMLError):
    """Our own limits, reported like syntax errors."""


class _Composer:
    """Builds a node tree from parser events without recursion, and bounds depth and aliases while doing so."""

    def __init__(self) -> None:
        self.root: Any = None
        self.open: list[Any] = []
        self.anchors: dict[str, Any] = {}
        self.aliases = 0

    def feed(self, event: Any) -> None:
        """Take one event. Raises yaml.MarkedYAMLError for what is not allowed."""
        place: Any = event.start_mark
        tag: Any = getattr(event, "tag", None)
        if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise _Refused(problem="not valid YAML: a second document starts here", problem_mark=place)
        if isinstance(event, yaml.AliasEvent):
            self._attach(self._referenced(event))
        elif isinstance(event, yaml.ScalarEvent):
            node: Any = yaml.ScalarNode(tag, event.value, place, style=event.style)
            self._remember(event, node)
            self._attach(node)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) >= MAX_DEPTH:
                raise _Refused(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=place)
            kind: Any = yaml.MappingNode if isinstance(event, yaml.MappingStartEvent) else yaml.SequenceNode
            node = kind(tag, [], place)
            self._remember(event, node)
            self._attach(node)
            self.open.append(node)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.open.pop()

    def _referenced(self, event: Any) -> Any:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise _Refused(problem=f"more than {MAX_ALIASES} aliases", problem_mark=event.start_mark)
        if event.anchor not in self.anchors:
            problem = "alias without an anchor (text that starts with * needs quotes)"
            raise _Refused(problem=problem, problem_mark=event.start_mark)
        return self.anchors[event.anchor]

    def _remember(self, event: Any, node: Any) -> None:
        if event.anchor is not None:
            self.anchors[event.anchor] = node

    def _attach(self, node: Any) -> None:
        if not self.open:
            self.root = node
        elif isinstance(self.open[-1], yaml.MappingNode):
            pairs = self.open[-1].value
            if pairs and len(pairs[-1]) == 1:
                pairs[-1] = (pairs[-1][0], node)
            else:
                pairs.append((node,))
        else:
            self.open[-1].value.append(node)


def read_document(path: Path) -> Document:
    """The document in a file of at most 1 MiB; one that cannot be read is a broken document with its problem."""
    name = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return _broken(name, Problem(name, f"cannot read the file: {error.strerror}"))
    if len(raw) > MAX_FILE_BYTES:
        return _broken(name, Problem(name, "is larger than 1MiB"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
        return _broken(name, _at(name, _mark_of_offset(before, len(before)), "is not UTF-8 text"))
    return parse_document(text, name=name)


def parse_document(text: str, *, name: str) -> Document:
    """The document in a text. Never raises for what the text holds."""
    odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if odd:
        return _broken(name, _at(name, _mark_of_offset(text, odd.start()), "has a character that YAML does not allow"))
    try:
        root = _compose(text, _FAST_LOADER)
    except yaml.MarkedYAMLError as error:
        return _broken(name, _syntax_problem(name, text, _clearer(text, error)))
    if root is None:
        return Document(name)
    builder = _Builder(name)
    data = builder.build(root, ())
    problems = tuple(in_reading_order(builder.problems))
    return Document(name, data, builder.keys, builder.values, problems, broken=builder.stopped)


def _compose(text: str, loader: Any) -> Any:
    composer = _Composer()
    for event in yaml.parse(text, Loader=loader):
        composer.feed(event)
    return composer.root


def _clearer(text: str, error: yaml.MarkedYAMLError) -> yaml.MarkedYAMLError:
    """The slow parser's account of the same mistake: it says better what was found and where."""
    if isinstance(error, _Refused) or len(text) > _MAX_SLOW_CHARS:
        return error
    try:
        _compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as better:
        return better
    return error


def _broken(name: str, problem: Problem) -> Document:
    return Document(name, problems=(problem,), broken=True)


def _at(name: str, mark: Mark, message: str, path: str = "") -> Problem:
    return Problem(name, message, path=path, line=mark.line, column=mark.column)


def _mark_of_offset(text: str, offset: int) -> Mark:
    before = text[:offset]
    return Mark(before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)


def _syntax_problem(name: str, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)
    if isinstance(error, _Refused):
        return _at(name, place, str(error.problem))
    lines = text.splitlines()
    line = lines[place.line - 1] if place.line <= len(lines) else ""
    hint = ""
    if "${" in line:
        hint = '; inside {...} a reference needs quotes: "${NAME}"'
    elif re.search(r":\s*\[[0-9a-fA-F]*:", line):
        hint = '; an address with brackets needs quotes: "[::1]:8080"'
    elif "\t" in line[: place.column]:
        hint = "; indent with spaces, not tabs"
    return _at(name, place, f"not valid YAML: {_without_content(error.problem or 'cannot be read')}{hint}")


def _without_content(problem: str) -> str:
    """PyYAML's sentence without pieces of the text, which may be secret; names of its tokens stay."""
    return _QUOTED.sub(
        lambda m: m[0] if len(m["inside"]) == 1 or re.fullmatch(r"<[a-z ]+>", m["inside"]) else "", problem
    )


class _Builder:
    """Walks a node tree once and collects data, places and problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[KeyPath, Mark] = {}
        self.values: dict[KeyPath, Mark] = {}
        self.problems: list[Problem] = []
        self.count = 0
        self.stopped = False

    def build(self, node: Any, path: KeyPath) -> Any:
        mark = _mark(node)
        self.values[path] = mark
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            if not self.stopped:
                self.stopped = True
                self._refuse(mark, (), f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, counting aliases in full")
            return None
        if node.tag not in _PLAIN_TAGS:
            self._refuse(mark, path, "YAML tags (words that start with !) are not allowed")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value) if not self.stopped]
        return node.value if node.style else plain_value(node.value)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if self.stopped:
                break
            mark = _mark(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(mark, path, "a key must be plain text")
                continue
            key = key_node.value
            here = (*path, key)
            if key == "<<" and not key_node.style:
                self._refuse(mark, here, "merge keys (<<) are not supported")
                continue
            if key in data:
                self._refuse(mark, here, f"duplicate key; it is already on line {self.keys[here].line}")
                continue
            self.keys[here] = mark
            data[key] = self.build(value_node, here)
        return data

    def _refuse(self, mark: Mark, path: KeyPath, message: str) -> None:
        self.problems.append(_at(self.name, mark, message, ".".join(map(str, path))))


def _mark(node: Any) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted YAML word means: null, true, false, a decimal number, otherwise text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INTEGER.fullmatch(text):
        return int(text)
    if len(text) <= 40 and _FLOAT.fullmatch(text) and isfinite(float(text)):
        return float(text)
    return text
