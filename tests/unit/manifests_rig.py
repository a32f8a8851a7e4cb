"""The shipped Kubernetes manifests as tests read them, and what the program makes of their command lines."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gateway.cli import app
from picker.config import Config, Loaded

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "manifests"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))

Document = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, which YAML forbids and PyYAML takes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """One mapping."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"a key is there twice in {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


def documents(path: Path) -> list[Document]:
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=StrictLoader))


def of_kind(path: Path, kind: str) -> list[Document]:
    return [document for document in documents(path) if document["kind"] == kind]


def pods() -> list[Any]:
    """Every Deployment, under the name of its file."""
    return [
        pytest.param(path, found, id=f"{path.stem}-{found['metadata']['name']}")
        for path in MANIFESTS
        for found in of_kind(path, "Deployment")
    ]


def container_of(deployment: Document) -> Document:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def started(deployment: Document, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the program makes of a container's command, arguments and variables, stopped where it would serve."""
    container = container_of(deployment)
    served: list[Loaded] = []

    def serve(loaded: Loaded) -> int:
        served.append(loaded)
        return 0

    module = types.ModuleType("gateway.serve")
    module.__dict__.update(serve_gateway=serve, serve_picker=serve)
    monkeypatch.setitem(sys.modules, "gateway.serve", module)
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("WAYPOST_")}
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    program, *verb = container["command"]
    assert program == "waypost"
    result = CliRunner().invoke(app, [*verb, *container["args"]], env={**cleared, **own}, prog_name="waypost")
    assert (result.exit_code, result.stderr) == (0, "")
    (loaded,) = served
    return loaded.config
