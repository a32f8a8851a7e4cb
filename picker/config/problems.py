"""What is wrong with a configuration, as values that render themselves.

Turns pydantic's errors into sentences for people. A value is repeated in a message only where it cannot be or contain a
secret; unknown keys never show their value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]
_MAX_GOT = 60

_SENTENCES = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "model_type": "must be a mapping (lines of key: value)",
    "model_attributes_type": "must be a mapping (lines of key: value)",
    "dict_type": "must be a mapping (lines of key: value)",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "missing": "is required",
}
_TEMPLATES = {
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. `source` is a file name, a variable or a flag; line and column count from 1."""

    source: str
    message: str
    path: str = ""
    line: int | None = None
    column: int | None = None
    got: str = ""

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"
        parts = [place, self.path, self.message] if self.path else [place, self.message]
        text = ": ".join(parts) + (f" (got {self.got})" if self.got else "")
        # Keys and file names are somebody's text; they must not start lines or colours of their own.
        return "".join(c if c.isprintable() else "?" for c in text)

    def as_dict(self) -> dict[str, Any]:
        """For JSON output; `text` is the line people see."""
        return {
            "source": self.source,
            "line": self.line,
            "column": self.column,
            "path": self.path,
            "message": self.message,
            "text": str(self),
        }


def in_reading_order(problems: Iterable[Problem]) -> list[Problem]:
    """Files by line first, then variables and flags in the order they were found."""
    return sorted(problems, key=lambda p: (p.line is None, p.line or 0, p.column or 0))


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` that `word` was probably meant to be."""
    folded = {choice.lower().replace("-", "_"): choice for choice in choices}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that a section does not have."""
    names = sorted(known)
    close = closest(key, names)
    if close:
        return f"unknown key; did you mean {close}?"
    return f"unknown key (keys here: {', '.join(names)})" if len(names) <= 16 else "unknown key"


def sentence(error: ErrorDetails, known_keys: Iterable[str]) -> str:
    """What to tell a person. `known_keys` are the keys of the mapping an unknown key stands in."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    if kind in _TEMPLATES:
        return _TEMPLATES[kind].format(**context)
    if kind == "extra_forbidden":
        return unknown_key(str(error["loc"][-1]), known_keys)
    if kind == "string_type":
        return "must be text" + (": put it in quotes" if isinstance(error["input"], bool | int | float) else "")
    if kind == "literal_error":
        return _one_of(error["input"], context)
    return error["msg"]


def _one_of(value: object, context: Mapping[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
    close = closest(value, choices) if isinstance(value, str) else None
    return f"must be one of {', '.join(choices)}" + (f"; did you mean {close}?" if close else "")


def shown(value: object) -> str:
    """A value for `(got ...)`: short, one line, and never the inside of a mapping or list."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value) and ("@" in value or "?" in value):
            return "a URL"  # It may hold a password.
        return repr(value if len(value) <= _MAX_GOT else value[: _MAX_GOT - 3] + "...")
    return str(value)
