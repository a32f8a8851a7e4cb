"""Questions about the schema: what stands at a path, which paths hold secrets, which variable names a path.

Reads the annotations of the models; holds no list of keys of its own, so it cannot fall behind them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from picker.config.problems import KeyPath

ANY = "*"
"""Stands for any key of a mapping or any index of a list in a pattern."""


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The annotation without Annotated and without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    elif annotation is not type(None):
        yield annotation


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model behind an annotation, None for scalars, mappings and lists."""
    for part in _alternatives(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def item_of(annotation: Any) -> Any:
    """The annotation of the values of a mapping or list; None if it is neither."""
    for part in _alternatives(annotation):
        origin = get_origin(part)
        if origin is dict:
            return get_args(part)[1]
        if origin in (tuple, list):
            return get_args(part)[0]
    return None


def is_mapping(annotation: Any) -> bool:
    """Whether the annotation is a mapping with free keys."""
    return any(get_origin(part) is dict for part in _alternatives(annotation))


def is_secret(annotation: Any) -> bool:
    """Whether the annotation is that of a secret."""
    return any(part is SecretStr for part in _alternatives(annotation))


def is_path(annotation: Any) -> bool:
    """Whether the annotation is that of a file or directory."""
    return any(part is Path for part in _alternatives(annotation))


def annotation_at(root: type[BaseModel], path: KeyPath) -> Any:
    """The annotation of the value at `path`, None if the schema has no such path."""
    annotation: Any = root
    for key in path:
        model = model_of(annotation)
        if model is not None:
            field = model.model_fields.get(str(key))
            annotation = field.annotation if field else None
        else:
            annotation = item_of(annotation)
        if annotation is None:
            return None
    return annotation


def keys_at(root: type[BaseModel], path: KeyPath) -> tuple[str, ...]:
    """The keys the mapping at `path` may have; empty if they are free or it is not a mapping."""
    model = model_of(annotation_at(root, path))
    return tuple(model.model_fields) if model else ()


def walk(root: type[BaseModel], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key of the schema with its pattern, sections before their keys."""
    for name, field in root.model_fields.items():
        path = (*prefix, name)
        yield path, field
        annotation: Any = field.annotation
        while (inner := item_of(annotation)) is not None:
            path, annotation = (*path, ANY), inner
        model = model_of(annotation)
        if model:
            yield from walk(model, path)


@functools.cache
def secret_patterns(root: type[BaseModel]) -> tuple[KeyPath, ...]:
    """The patterns of all secrets of a schema."""
    return tuple(path for path, field in walk(root) if is_secret(field.annotation))


def _same(pattern: KeyPath, path: KeyPath) -> bool:
    return all(p in (ANY, k) for p, k in zip(pattern, path, strict=False))


def at_secret(root: type[BaseModel], path: KeyPath) -> bool:
    """Whether `path` is a secret or inside one."""
    return any(len(path) >= len(pattern) and _same(pattern, path) for pattern in secret_patterns(root))


def around_secret(root: type[BaseModel], path: KeyPath) -> bool:
    """Whether a secret belongs somewhere below `path`, so that text standing there may be one by mistake."""
    return any(len(path) < len(pattern) and _same(pattern, path) for pattern in secret_patterns(root))


def variable_paths(root: type[BaseModel]) -> Mapping[str, KeyPath]:
    """`SECTION__KEY` to path for every key that has a fixed name."""
    return {"__".join(map(str, path)).upper(): path for path, _ in walk(root) if ANY not in path}
