"""What command line flags say, as values by path of the configuration, before they become its uppermost layer.

Holds and merges; reads nothing and prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from picker.config.problems import Problem, shown


@dataclass(frozen=True, slots=True)
class Given:
    """One flag as somebody gave it: its value, and how the flag was spelled, for messages."""

    value: str
    spelled: str


@dataclass(slots=True)
class FlagValues:
    """Values and the flags they came from, by path; what to tell people; what makes it impossible to go on."""

    values: dict[tuple[str, ...] | str, object] = field(default_factory=dict)
    names: dict[tuple[str, ...], str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def put(self, path: tuple[str, ...] | str, value: object, flag: str) -> None:
        """Set a value at a path (a tuple, or text with dots), over what was there."""
        path = tuple(path.split(".")) if isinstance(path, str) else path
        self.values[path] = value
        self.names[path] = flag

    def drop(self, path: str) -> None:
        """Forget a value."""
        key = tuple(path.split("."))
        self.values.pop(key, None)
        self.names.pop(key, None)

    def warn(self, text: str) -> None:
        """Note something to tell. It may hold somebody's text, which must not start lines or colours of its own."""
        self.warnings.append("".join(c if c.isprintable() else "?" for c in text))

    def refuse(self, flag: str, message: str, got: str | None = None) -> None:
        """Note a flag that cannot be obeyed."""
        self.problems.append(Problem(flag, message, got="" if got is None else shown(got)))

    def add(self, later: FlagValues) -> None:
        """Lay another set over this one."""
        self.values.update(later.values)
        self.names.update(later.names)
        self.warnings.extend(later.warnings)
        self.problems.extend(later.problems)
