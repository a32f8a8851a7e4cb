"""What `deploy/` ships is what the tests with a real Envoy prove: the same settings, and Envoy takes it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import yaml

from tests.integration.envoy import envoy_binary
from tests.integration.envoy_config import EnvoyListener, envoy_config

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "envoy.yaml"


def found(config: Any, key: str) -> list[Any]:
    """All values of a key, however deep."""
    if isinstance(config, dict):
        own = [config[key]] if key in config else []
        return own + [value for child in config.values() for value in found(child, key)]
    return [value for child in config for value in found(child, key)] if isinstance(config, list) else []


async def test_envoy_takes_the_shipped_configuration() -> None:
    process = await asyncio.create_subprocess_exec(
        *(str(envoy_binary()), "--mode", "validate", "--config-path", str(SHIPPED)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, said.decode()


def test_the_shipped_configuration_has_the_settings_that_are_tested() -> None:
    listener = EnvoyListener(
        name="tested", cluster="override_host", endpoints=("127.0.0.1:8000", "127.0.0.1:8001"), fail_open=True
    )
    tested = envoy_config([listener], picker_address="127.0.0.1:9002", picker_tls=True)
    shipped = yaml.safe_load(SHIPPED.read_text())
    for key in (
        "processing_mode",
        "metadata_options",
        "failure_mode_allow",
        "override_host_sources",
        "common_lb_config",
    ):
        assert found(shipped, key) == found(tested, key)[: len(found(shipped, key))] != [], key
    for key in ("grpc_health_check", "alpn_protocols", "fallback_policy"):
        assert found(tested, key)[0] in found(shipped, key), key
