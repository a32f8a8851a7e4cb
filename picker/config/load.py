"""From a file, the environment and flags to one `Config`, or to the list of everything that is wrong.

Precedence: flags, then environment, then file, then defaults. Reads files; prints nothing and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from picker.config.announcement import Announcement
from picker.config.fields import annotation_at, around_secret, at_secret, keys_at, secret_patterns
from picker.config.fleet import EndpointEntry, EndpointFile
from picker.config.layers import Layers, Origin, add_environment, add_file, add_flags
from picker.config.locate import Document, read_document
from picker.config.model import Config
from picker.config.problems import KeyPath, Problem, in_reading_order, sentence, shown
from picker.config.secrets import REFERENCE
from picker.config.show import leaves
from picker.config.values import Context, KnownNames, format_duration


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration. `origins` has one entry per value, by path; `warnings` are for the caller to print."""

    config: Config
    origins: Mapping[KeyPath, Origin]
    warnings: tuple[str, ...] = ()
    path: Path | None = None


M = TypeVar("M", bound=BaseModel)
# Where the problems of an announcement are.
_BODY = "body"


@dataclass(frozen=True, slots=True)
class _Sources(Generic[M]):
    """What is needed to say where a path of the merged data came from."""

    root: type[M]
    document: Document
    layers: Layers = field(default_factory=Layers)


def load(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    flags: Mapping[tuple[str, ...] | str, object],
    known: KnownNames | None = None,
    flag_names: Mapping[tuple[str, ...], str] | None = None,
) -> Loaded | list[Problem]:
    """The configuration, or every problem at once in reading order.

    `flags` maps paths (`("admin", "listen")` or `"admin.listen"`) to values, None meaning not given; `flag_names`
    maps paths to how the flag is spelled in messages. `known` are the names of policies and plugins; None skips those
    checks. Never raises for bad input.
    """
    document = read_document(path) if path is not None else Document("")
    if document.broken:
        return list(document.problems)
    sources = _Sources(Config, document)
    layers = sources.layers
    add_file(layers, document)
    add_environment(layers, Config, environ)
    add_flags(layers, Config, flags, flag_names or {})
    if document.data is not None and not isinstance(document.data, dict):
        layers.problems.append(_not_a_mapping(document))
    context = Context(
        environ=environ,
        base_dir=path.parent if path is not None else Path(),
        known=known,
        profiles=_keys(layers.data.get("profiles")),
        credentials=_keys(layers.data.get("credentials")),
    )
    config, problems = _validate(sources, context)
    if config is None or problems:
        return problems
    origins = {leaf: _origin(sources, leaf) for leaf, _ in leaves(config)}
    return Loaded(config, origins, tuple(layers.warnings), path)


def load_endpoint_file(path: Path, *, credentials: frozenset[str] | None = None) -> list[EndpointEntry] | list[Problem]:
    """The entries of a watched endpoints file, or its problems. `credentials` are the names entries may use; None: any.

    `is_problems` tells the two apart. Parsing takes about a second for 1 MiB, so call it off the event loop.
    """
    document = read_document(path)
    if document.broken:
        return list(document.problems)
    sources = _Sources(EndpointFile, document)
    add_file(sources.layers, document)
    if document.data is not None and not isinstance(document.data, dict):
        return [_not_a_mapping(document)]
    context = Context(base_dir=path.parent, credentials=credentials)
    found, problems = _validate(sources, context)
    return list(found.endpoints) if found is not None and not problems else problems


def parse_announcement(data: object, *, credentials: frozenset[str], ttl_max_s: float) -> Announcement | list[Problem]:
    """What a model server says of itself, as decoded JSON, or everything that is wrong with it.

    The same keys and messages as for an entry of the configuration. `credentials` are the names it may use.
    """
    if not isinstance(data, dict):
        return [Problem(_BODY, "must be a JSON object")]
    sources = _Sources(Announcement, Document("", data))
    add_file(sources.layers, sources.document)
    found, problems = _validate(sources, Context(credentials=credentials))
    if found is not None and found.ttl is not None and found.ttl > ttl_max_s:
        problems.append(Problem(_BODY, f"must be at most {format_duration(ttl_max_s)}", path="ttl"))
    if found is None or problems:
        return [replace(problem, source=_BODY) for problem in problems]
    return found


def is_problems(result: Loaded | Sequence[EndpointEntry] | Sequence[Problem]) -> TypeGuard[list[Problem]]:
    """Whether a load failed. An empty list is an endpoints file without entries, which is valid."""
    return isinstance(result, list) and bool(result) and isinstance(result[0], Problem)


def _keys(value: object) -> frozenset[str]:
    return frozenset(value) if isinstance(value, dict) else frozenset()


def _not_a_mapping(document: Document) -> Problem:
    _, mark = document.nearest(())
    return Problem(document.name, "must be a mapping (lines of key: value)", line=mark.line, column=mark.column)


def _validate(sources: _Sources[M], context: Context) -> tuple[M | None, list[Problem]]:
    """The model and the problems of all layers, one per path."""
    layers = sources.layers
    stray = dict(_stray_references(sources))
    found: M | None = None
    problems = [*layers.problems, *stray.values()]
    try:
        found = sources.root.model_validate(layers.data, context=context)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            path = _blamed_path(layers, error)
            if path not in stray:
                problems.append(_problem(sources, path, error))
    return found, in_reading_order(dict.fromkeys(problems))


def _stray_references(sources: _Sources[M]) -> Iterator[tuple[KeyPath, Problem]]:
    """`${NAME}` where no secret belongs: it would be taken as it stands, which nobody wants."""
    secrets = ", ".join(".".join(map(str, pattern)) for pattern in secret_patterns(sources.root))
    message = f"${{NAME}} is read for secrets only ({secrets}); set this key with a WAYPOST_... variable instead"
    for path, value in _texts(sources.layers.data, ()):
        known = annotation_at(sources.root, path) is not None
        if REFERENCE.search(value) and known and not at_secret(sources.root, path):
            yield path, _placed(sources, path, message)


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*path, index))


def _blamed_path(layers: Layers, error: ErrorDetails) -> KeyPath:
    """The path a person wrote. A bare URL or plugin name has no keys below it, though its model does."""
    path = tuple(part for part in error["loc"] if part != "[key]")
    at_key = error.get("ctx", {}).get("at_key")
    if at_key:
        path = (*path, at_key)
    for length in range(len(path)):
        if isinstance(layers.at(path[:length]), str | int | float | bool):
            return path[:length]
    return path


def _problem(sources: _Sources[M], path: KeyPath, error: ErrorDetails) -> Problem:
    root, context = sources.root, error.get("ctx", {})
    quiet = error["type"] in ("extra_forbidden", "missing", "too_long") or context.get("at_key") or context.get("hide")
    if at_secret(root, path) or (around_secret(root, path) and isinstance(error["input"], str)):
        quiet = True
    message = sentence(error, keys_at(root, path[:-1]))
    at_key = bool(error["type"] == "extra_forbidden" or context.get("at_key") or "[key]" in error["loc"])
    return _placed(sources, path, message, got="" if quiet else shown(error["input"]), at_key=at_key)


def _placed(sources: _Sources[M], path: KeyPath, message: str, *, got: str = "", at_key: bool = False) -> Problem:
    """A problem with the place of `path`: the layer that set it, or the closest place in the file."""
    layers, document = sources.layers, sources.document
    origin = layers.origin_of(path)
    if origin is None and path not in document.keys and path not in document.values:
        # A default that does not fit what somebody set beside it: blame what was set.
        origin = next((o for p, o in layers.origins.items() if p[:-1] == path[:-1]), None)
    if origin is not None:
        base = next((len(p) for p in layers.origins if p == path[: len(p)]), 0)
        rest = ".".join(map(str, path[base:])) if origin.kind == "env" else ""
        return Problem(origin.where, message, path=rest, got=got)
    dotted = ".".join(map(str, path))
    if not document.name:
        return Problem("configuration", message, path=dotted, got=got)
    mark = (document.keys.get(path) if at_key else None) or document.nearest(path)[1]
    return Problem(document.name, message, path=dotted, line=mark.line, column=mark.column, got=got)


def _origin(sources: _Sources[M], path: KeyPath) -> Origin:
    origin = sources.layers.origin_of(path)
    if origin is not None:
        return origin
    mark = sources.document.keys.get(path)
    if mark is None or sources.layers.at(path) is None:
        return Origin("default")
    return Origin("file", f"{sources.document.name}:{mark.line}:{mark.column}")
