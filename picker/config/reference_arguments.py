"""Finding the flags of the reference endpoint picker in a list of arguments, however they are spelled.

What a flag means is `reference_flags.py`'s matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from picker.config.flag_values import FlagValues, Given
from picker.config.problems import closest
from picker.config.reference_flags import FLAGS, Kind


@dataclass(slots=True)
class Reading:
    """A list of arguments taken apart: what the command itself shall parse, and the flags of the table by name."""

    rest: list[str] = field(default_factory=list)
    given: dict[str, Given] = field(default_factory=dict)
    said: FlagValues = field(default_factory=FlagValues)


_ARGUMENT = re.compile(r"--?(?P<name>[A-Za-z][A-Za-z0-9_-]*)(?:=(?P<value>.*))?", re.DOTALL)
_GLUED = re.compile(r"-v(?P<value>[0-9]+)")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def read_flags(args: Sequence[str], own: Mapping[str, bool]) -> Reading:
    """Takes the flags of the table out of a list of arguments.

    One dash or two, kebab-case or camelCase, `=` or a separate value, as Go's flag packages take them; a `true` or
    `false` after a switch is its value too, though not to Go. `own` names the command's own options without dashes and
    says which take a value: they stay, spelled as the command knows them. Empty arguments and values are dropped.
    """
    reading = Reading()
    at = 0
    while at < len(args):
        arg, following = args[at], args[at + 1] if at + 1 < len(args) else None
        at += 1
        if arg == "--":
            reading.rest.extend(args[at - 1 :])
            break
        name, value = _taken_apart(arg, own)
        if name is None:
            reading.rest.extend([arg] if arg else [])
            continue
        spelled = arg.partition("=")[0]
        if name not in FLAGS and name not in own:
            _unknown(reading, spelled, own)
            continue
        if value is None and _is_switch(name):
            value = "true"
            if following is not None and following.lower() in ("true", "false"):
                value, at = following, at + 1
        elif value is None and own.get(name, True):
            if following is None or _is_known(following, own):
                reading.said.refuse(spelled, "needs a value")
                continue
            value, at = following, at + 1
        _keep(reading, name, value, spelled, own)
    return reading


def _taken_apart(arg: str, own: Mapping[str, bool]) -> tuple[str | None, str | None]:
    """The flag's name as the tables know it, and its value if it is in the same argument. No name: not a flag."""
    if glued := _GLUED.fullmatch(arg):
        return "v", glued["value"]
    if not (match := _ARGUMENT.fullmatch(arg)):
        return None, None
    name = match["name"]
    if name not in FLAGS and name not in own:
        name = _HUMP.sub("-", name).lower()
    if name not in FLAGS and name not in own and not arg.startswith("--") and arg[1] in own:
        return None, None  # A short option with its value behind it, such as -cFILE.
    return name, match["value"]


def _is_switch(name: str) -> bool:
    return name in FLAGS and FLAGS[name].kind is Kind.SWITCH


def _is_known(arg: str, own: Mapping[str, bool]) -> bool:
    name, _ = _taken_apart(arg, own)
    return name in FLAGS or name in own


def _keep(reading: Reading, name: str, value: str | None, spelled: str, own: Mapping[str, bool]) -> None:
    if value == "":
        return
    if name not in own:
        reading.given[name] = Given(value or "", spelled)
    elif value is None:
        reading.rest.append(f"--{name}" if len(name) > 1 else f"-{name}")
    elif len(name) > 1:
        reading.rest.append(f"--{name}={value}")
    else:
        reading.rest.extend((f"-{name}", value))


def _unknown(reading: Reading, spelled: str, own: Mapping[str, bool]) -> None:
    close = closest(_HUMP.sub("-", spelled.lstrip("-")), (*FLAGS, *(name for name in own if len(name) > 1)))
    reading.said.refuse(spelled, "there is no such flag" + (f"; did you mean --{close}?" if close else ""))
