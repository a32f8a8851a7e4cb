"""The example and the schema are generated, so they are checked against the loader and the models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from picker.config import Config, example, load, schema
from picker.config.fields import ANY, variable_paths, walk


def test_example_is_valid_and_says_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(example())
    result = load(path, environ={}, flags={})
    assert not isinstance(result, list), [str(problem) for problem in result]
    assert result.config == Config()
    assert result.warnings == ()


def test_example_with_everything_switched_on_is_valid_too(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(re.sub(r"(?m)^( *)#(?! )", r"\1", _with_indented_examples(example())))
    result = load(path, environ={"WAYPOST_ADMIN_TOKEN": "t", "ENGINE_API_KEY": "k", "REDIS_URL": "redis://r"}, flags={})
    assert not isinstance(result, list), [str(problem) for problem in result]
    config = result.config
    assert set(config.profiles) == {"mine"}
    assert config.endpoints.static[1].credentials == "main"
    assert config.endpoints.file == tmp_path / "endpoints.yaml"
    assert config.picker.cert_path == Path("/etc/waypost/tls")
    assert result.warnings == ()


def _with_indented_examples(text: str) -> str:
    """Example lines whose own text is indented have spaces after the #; documentation lines have exactly one."""
    return re.sub(r"(?m)^( *)#(  +)", r"\1\2", text)


def test_example_has_every_key() -> None:
    text = example()
    for path, field in walk(Config):
        if ANY in path:
            continue
        assert re.search(rf"(?m)^{'  ' * (len(path) - 1)}#?{path[-1]}:", text), path
        assert field.description, path


def test_every_fixed_key_has_a_variable() -> None:
    assert variable_paths(Config)["PICKER__GRPC_PORT"] == ("picker", "grpc_port")
    assert variable_paths(Config)["LISTEN"] == ("listen",)


def test_schema_describes_what_is_written() -> None:
    made = schema()
    assert made["title"] == "Waypost configuration"
    assert made["additionalProperties"] is False
    assert made["properties"]["listen"]["default"] == "127.0.0.1:8080"
    assert made["$defs"]["TimeoutsSection"]["properties"]["connect"]["default"] == "2s"
    assert made["$defs"]["LimitsSection"]["properties"]["bodies_in_memory"]["default"] == "25%"
    pattern = made["$defs"]["TimeoutsSection"]["properties"]["connect"]["pattern"]
    assert re.search(pattern, "1m30s")
    assert not re.search(pattern, "5")
    bare, mapping = made["$defs"]["EndpointEntry"]["anyOf"]
    assert bare["type"] == "string"
    assert mapping["required"] == ["url"]


def test_schema_has_no_dangling_reference() -> None:
    made = schema()
    references = {node["$ref"].removeprefix("#/$defs/") for node in _nodes(made) if "$ref" in node}
    assert references == set(made["$defs"])


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _nodes(inner)
