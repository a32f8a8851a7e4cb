"""The layers of a configuration (file, environment, flags) and how they are laid over each other.

Every layer is plain nested data plus, for each value, where it came from. Mappings merge key by key; everything else is
replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from picker.config.fields import annotation_at, is_mapping, is_path, item_of, model_of, variable_paths
from picker.config.locate import Document, parse_document
from picker.config.problems import KeyPath, Problem, closest
from picker.config.secrets import REFERENCE

PREFIX = "WAYPOST_"
CONFIG_VARIABLE = "WAYPOST_CONFIG"
"""Names the configuration file; read by the command line, not a key."""
_MAX_VARIABLE_CHARS = 64 * 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from. `where` is `FILE:LINE:COL`, a variable, a flag, or empty for a default."""

    kind: Literal["default", "file", "env", "flag"]
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}" if self.where else self.kind


@dataclass(slots=True)
class Layers:
    """The merged data while they are built. `origins` holds the paths where something was set outside the file."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def put(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Set `value` at `path` over what is there; mappings merge."""
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                self.put((*path, key), inner, origin)
            return
        target = self.data
        if value == {} and isinstance(self.at(path), dict):
            return
        for key in path[:-1]:
            child = target.get(str(key))
            if not isinstance(child, dict):
                child = target[str(key)] = {}
            target = child
        target[str(path[-1])] = value
        for old in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[old]
        self.origins[path] = origin

    def at(self, path: KeyPath) -> Any:
        """The merged value at `path`, None if there is none."""
        value: Any = self.data
        for key in path:
            if isinstance(value, dict):
                value = value.get(str(key))
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def origin_of(self, path: KeyPath) -> Origin | None:
        """The origin of the value at `path` if it is not the file's; None otherwise."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None


def add_file(layers: Layers, document: Document) -> None:
    """The lowest layer. Problems of the text itself come along."""
    layers.problems.extend(document.problems)
    if isinstance(document.data, dict):
        layers.data = _copy(document.data)


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}


def add_environment(layers: Layers, root: type[BaseModel], environ: Mapping[str, str]) -> None:
    """`WAYPOST_SECTION__KEY` variables. Lists and mappings are written as YAML; an empty variable counts as not set."""
    referenced = set(references(layers.data))
    names = variable_paths(root)
    for variable in sorted(environ):
        value = environ[variable]
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or not value:
            continue
        path = _path_of(variable.removeprefix(PREFIX), root, layers.data)
        if path is None:
            if variable not in referenced:
                close = closest(variable, (PREFIX + name for name in names))
                layers.warnings.append(
                    f"{variable}: unknown variable, ignored" + (f"; did you mean {close}?" if close else "")
                )
            continue
        annotation = annotation_at(root, path)
        if len(value) > _MAX_VARIABLE_CHARS:
            layers.problems.append(Problem(variable, "is longer than 64KiB"))
        elif model_of(annotation) is None and item_of(annotation) is None:
            layers.put(path, _anchored(annotation, value), Origin("env", variable))
        else:
            _put_yaml(layers, path, variable, value)


def _put_yaml(layers: Layers, path: KeyPath, variable: str, value: str) -> None:
    document = parse_document(value, name=variable)
    for problem in document.problems:
        layers.problems.append(Problem(variable, problem.message))
    if not document.broken:
        layers.put(path, document.data, Origin("env", variable))


def _path_of(name: str, root: type[BaseModel], data: Mapping[str, Any]) -> KeyPath | None:
    """The path a variable means. Free keys match the file's without regard to case, or are taken in lower case."""
    path: KeyPath = ()
    there: Any = data
    for part in name.split("__"):
        annotation = annotation_at(root, path)
        model = model_of(annotation)
        if model is None and not is_mapping(annotation):
            return None
        choices = tuple(model.model_fields) if model else tuple(there) if isinstance(there, dict) else ()
        key = next((c for c in choices if c.upper().replace("-", "_") == part), None)
        if not part or (key is None and model is not None):
            return None
        path = (*path, key or part.lower())
        there = there.get(path[-1]) if isinstance(there, dict) else None
    return path


def add_flags(
    layers: Layers,
    root: type[BaseModel],
    flags: Mapping[tuple[str, ...] | str, object],
    flag_names: Mapping[tuple[str, ...], str],
) -> None:
    """Command line flags by path (a tuple, or text with dots). None means not given."""
    for key, value in flags.items():
        path = tuple(key.split(".")) if isinstance(key, str) else key
        if value is None:
            continue
        flag = flag_names.get(path) or "--" + path[-1].replace("_", "-")
        plain = list(value) if isinstance(value, tuple) else value
        layers.put(path, _anchored(annotation_at(root, path), plain), Origin("flag", flag))


def _anchored(annotation: Any, value: Any) -> Any:
    """Relative paths in flags and variables start at the working directory, not at the file's."""
    if isinstance(value, str) and value and is_path(annotation):
        return str(Path.cwd() / value)
    return value


def references(value: Any) -> list[str]:
    """The names of all `${NAME}` in nested data."""
    if isinstance(value, dict):
        return [name for inner in value.values() for name in references(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in references(inner)]
    return REFERENCE.findall(value) if isinstance(value, str) else []
