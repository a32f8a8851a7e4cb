"""A configuration for people and editors: what is in force and why, a commented example, and the JSON schema.

Everything is generated from the models. Secrets are printed as asterisks, here and everywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from picker.config.fields import item_of, model_of
from picker.config.layers import Origin
from picker.config.model import Config
from picker.config.problems import KeyPath

_EXAMPLE_HEAD = """\
# Waypost configuration. Every key is optional; the values shown are the defaults.
# Lines that start with # and no space are examples of keys without a default: remove the # to use them.
# Durations are 50ms, 2s, 5m, 1h; sizes are 64KiB, 10MiB, 4GiB. Check a file with `waypost validate FILE`.
"""
_COMMENT_WIDTH = 110


def leaves(config: Config) -> list[tuple[KeyPath, Any]]:
    """Every value in force by path, as it would be written in YAML. Lists are one value; secrets are masked."""
    return list(_leaves(config.model_dump(mode="json"), ()))


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        yield path, [_without_defaults(item) for item in value]
    else:
        yield path, value


def _without_defaults(item: Any) -> Any:
    """An entry of a list with only what says something, so that it fits on a line."""
    if not isinstance(item, dict):
        return item
    return {key: value for key, value in item.items() if value not in (None, {}, [])}


def effective_text(config: Config, origins: Mapping[KeyPath, Origin]) -> str:
    """The configuration as YAML with the origin of each value behind it."""
    rows: list[tuple[str, str]] = []
    open_sections: KeyPath = ()
    for path, value in leaves(config):
        common = 0
        while common < min(len(open_sections), len(path) - 1) and open_sections[common] == path[common]:
            common += 1
        for depth in range(common, len(path) - 1):
            rows.append((f"{'  ' * depth}{_inline(path[depth])}:", ""))
        open_sections = path[:-1]
        indent = "  " * (len(path) - 1)
        origin = str(origins.get(path, Origin("default")))
        if isinstance(value, list) and value:
            rows.append((f"{indent}{_inline(path[-1])}:", origin))
            rows.extend((f"{indent}  - {_inline(item)}", "") for item in value)
        else:
            rows.append((f"{indent}{_inline(path[-1])}: {_inline(value)}", origin))
    width = min(max(len(text) for text, _ in rows), 60)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows)


def effective_json(config: Config, origins: Mapping[KeyPath, Origin]) -> str:
    """A list of `{path, value, origin: {kind, where}}` as JSON."""
    rows = []
    for path, value in leaves(config):
        origin = origins.get(path, Origin("default"))
        dotted = ".".join(map(str, path))
        rows.append({"path": dotted, "value": value, "origin": {"kind": origin.kind, "where": origin.where}})
    return json.dumps(rows, indent=2, ensure_ascii=False)


def _inline(value: Any) -> str:
    """One value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    made = Config.model_json_schema()
    models = {model.__name__: model for model in _models(Config)}
    for name, definition in [("Config", made), *made.get("$defs", {}).items()]:
        objects = [definition, *definition.get("anyOf", [])]
        properties: dict[str, Any] = next((o["properties"] for o in objects if "properties" in o), {})
        for key, described in properties.items():
            described.pop("title", None)
            if "default" in described:
                described["default"] = _default(models[name], models[name].model_fields[key])
                if model_of(models[name].model_fields[key].annotation):
                    del described["default"]  # The section's own keys say it already.
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "Waypost configuration"}


def _models(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield root
    for field in root.model_fields.values():
        annotation: Any = field.annotation
        while (inner := item_of(annotation)) is not None:
            annotation = inner
        model = model_of(annotation)
        if model:
            yield from _models(model)


def _default(owner: type[BaseModel], field: FieldInfo) -> Any:
    """The default as it would be written in YAML."""
    name = next(key for key, candidate in owner.model_fields.items() if candidate is field)
    value = field.get_default(call_default_factory=True, validated_data={})
    return owner.model_construct(**{name: value}).model_dump(mode="json", include={name})[name]


def example() -> str:
    """A commented YAML file with every key. It is valid as it is, and also with every example line switched on."""
    return _EXAMPLE_HEAD + "".join(_section(Config, 0))


def _section(model: type[BaseModel], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in model.model_fields.items():
        if depth == 0:
            yield "\n"
        yield from _comment(field.description or "", indent)
        inner = model_of(field.annotation)
        if inner is not None:
            yield f"{indent}{name}:\n"
            yield from _section(inner, depth + 1)
            continue
        default = _default(model, field)
        if default in (None, [], {}):
            yield from _switched_off(name, field.examples or [default], indent)
        else:
            yield f"{indent}{name}: {_inline(default)}\n"


def _switched_off(name: str, examples: list[Any], indent: str) -> Iterator[str]:
    text: str = yaml.safe_dump({name: examples[0]}, sort_keys=False, allow_unicode=True, width=_COMMENT_WIDTH)
    for line in text.splitlines():
        yield f"{indent}#{line}\n"


def _comment(text: str, indent: str) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= _COMMENT_WIDTH:
            yield f"{indent}# {line}\n"
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield f"{indent}# {line}\n"
