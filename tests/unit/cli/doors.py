"""The command line without what it starts: how tests call it, and what stands in for the doors."""

from __future__ import annotations

import os

from typer.testing import CliRunner, Result

from gateway.cli import app
from picker.config import Config, Loaded

QUEUE_AND_KV = """\
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
schedulingProfiles:
- name: default
  plugins: [{pluginRef: queue-scorer, weight: 2}, {pluginRef: kv-cache-utilization-scorer, weight: 3}]
"""


def waypost(*args: str, env: dict[str, str] | None = None) -> Result:
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("WAYPOST_")}
    return CliRunner().invoke(app, list(args), env={**cleared, **(env or {})}, prog_name="waypost")


class Doors:
    """Stands in for the module that serves, and keeps what it was given."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.called: list[tuple[str, Loaded]] = []

    @property
    def config(self) -> Config:
        """What the only door that was opened was given."""
        ((_, loaded),) = self.called
        return loaded.config

    def serve_gateway(self, loaded: Loaded) -> int:
        self.called.append(("gateway", loaded))
        return self.code

    def serve_picker(self, loaded: Loaded) -> int:
        self.called.append(("picker", loaded))
        return self.code
