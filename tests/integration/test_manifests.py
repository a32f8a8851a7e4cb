"""What the guide says about an Envoy of one's own in a cluster: Envoy takes deploy/envoy.yaml with those changes.

Only the configuration is checked; there is no cluster behind the names.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import yaml

from tests.integration.envoy import envoy_binary

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "manifests"


def host_of(name: str, manifest: str) -> tuple[str, int]:
    """The DNS name and port of a headless Service of a manifest."""
    found: list[Any] = list(yaml.safe_load_all((MANIFESTS / manifest).read_text(encoding="utf-8")))
    (service,) = (each for each in found if each["kind"] == "Service" and each["metadata"]["name"] == name)
    assert service["spec"]["clusterIP"] == "None"
    return f"{name}.{service['metadata']['namespace']}.svc.cluster.local", service["spec"]["ports"][0]["port"]


def in_cluster(config: Any) -> Any:
    """The changes that the guide names."""
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"]["address"] = "0.0.0.0"
    model_servers, picker = config["static_resources"]["clusters"]
    for cluster, (host, port) in (
        (model_servers, host_of("llama-pods", "gateway-dns.yaml")),
        (picker, host_of("waypost-picker", "picker-selector.yaml")),
    ):
        cluster["type"] = "STRICT_DNS"
        (group,) = cluster["load_assignment"]["endpoints"]
        group["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}},
        ]
    return config


def test_the_guide_names_the_same_hosts() -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for host, port in (host_of("llama-pods", "gateway-dns.yaml"), host_of("waypost-picker", "picker-selector.yaml")):
        assert f"{host}:{port}" in guide


async def test_envoy_takes_the_configuration_for_a_cluster(tmp_path: Path) -> None:
    shipped = yaml.safe_load((ROOT / "deploy" / "envoy.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(in_cluster(shipped)), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(str(envoy_binary()), "--mode", "validate", "--config-path", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, said.decode()
