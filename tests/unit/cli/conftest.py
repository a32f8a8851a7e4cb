"""The fixture of the room `cli`."""

from __future__ import annotations

import sys
import types

import pytest

from tests.unit.cli.doors import Doors


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Doors:
    fake = Doors()
    module = types.ModuleType("gateway.serve")
    module.__dict__.update(serve_gateway=fake.serve_gateway, serve_picker=fake.serve_picker)
    monkeypatch.setitem(sys.modules, "gateway.serve", module)
    return fake
