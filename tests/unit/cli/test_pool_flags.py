"""The flags that name pools: of both doors, of the reference endpoint picker, and as real deployments give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from picker.config import PoolEntry
from tests.unit.cli.doors import QUEUE_AND_KV, Doors, waypost

ARGV = Path(__file__).parents[2] / "data" / "argv" / "epp-argv.yaml"
LISTS: dict[str, list[str]] = {name: each["argv"] for name, each in yaml.safe_load(ARGV.read_text()).items()}


def pools(doors: Doors) -> list[dict[str, object]]:
    return [entry.model_dump(exclude_defaults=True) for entry in doors.config.kubernetes.pools]


@pytest.mark.parametrize("verb", ["run", "picker"])
def test_pools_of_both_doors(verb: str, doors: Doors) -> None:
    result = waypost(
        verb, "--pool", "ns/a", "--pool", "b", "--endpoint-selector", "app=vllm",
        "--endpoint-target-ports", "8000,8001", "--endpoint-target-ports", "8000",
        "--namespace", "n", "--kubeconfig", "/k", "--dns", "vllm:8000",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    assert pools(doors) == [
        {"name": "ns/a"},
        {"name": "b"},
        {"name": "endpoint-selector", "selector": "app=vllm", "target_ports": (8000, 8001)},
    ]
    assert (doors.config.kubernetes.namespace, doors.config.kubernetes.kubeconfig) == ("n", Path("/k"))
    assert [str(entry.name) for entry in doors.config.endpoints.dns] == ["vllm:8000"]


@pytest.mark.parametrize("verb", ["run", "picker"])
@pytest.mark.parametrize(
    "source",
    [["--to", "a:1"], ["--dns", "a:1"], ["--pool", "a"], ["--endpoint-selector=a=b", "--endpoint-target-ports=1"]],
)
def test_each_source_of_endpoints_is_enough(verb: str, source: list[str], doors: Doors) -> None:
    assert waypost(verb, *source).exit_code == 0
    assert len(doors.called) == 1


def test_registration_is_a_source_of_endpoints(doors: Doors, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("admin: {token: abcdefgh}\nendpoints: {registration: {enabled: true}}\n")
    assert waypost("run", "-c", str(path)).exit_code == 0
    assert waypost("run").stderr.startswith("no endpoints: give --to URL, --pool NAMESPACE/NAME, or endpoints: in")


def test_ports_and_metric_flags_without_a_pool_are_told(doors: Doors) -> None:
    result = waypost("picker", "--endpoint-target-ports=1", "--model-server-metrics-scheme=https", "--to", "http://a:1")
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: --endpoint-target-ports: without effect, there is no --endpoint-selector\n"
        "warning: --model-server-metrics-scheme: without effect, no flag names a pool\n"
    )
    assert (doors.config.kubernetes.pools, doors.config.credentials) == ((), {})


@pytest.mark.parametrize(
    ("args", "entry", "verify"),
    [
        (["--model-server-metrics-scheme=http"], {"metrics_scheme": "http"}, None),
        (
            ["--model-server-metrics-scheme=https"],
            {"metrics_scheme": "https", "scheme": "https", "credentials": "model-servers"},
            False,
        ),
        (
            ["--modelServerMetricsScheme", "https", "--modelServerMetricsHttpsInsecureSkipVerify"],
            {"metrics_scheme": "https", "scheme": "https", "credentials": "model-servers"},
            False,
        ),
        (
            ["--model-server-metrics-scheme=https", "--model-server-metrics-https-insecure-skip-verify=false"],
            {"metrics_scheme": "https", "scheme": "https"},
            None,
        ),
        (
            ["--model-server-metrics-scheme=https", "--model-server-metrics-port=9", "--modelServerMetricsPath=/m"],
            {"metrics_scheme": "https", "metrics_port": 9, "metrics_path": "/m", "credentials": "model-servers"},
            False,
        ),
        (["--model-server-metrics-port=0"], {}, None),
        (["--pool-group", "inference.networking.x-k8s.io"], {"group": "inference.networking.x-k8s.io"}, None),
    ],
)
def test_how_a_pools_metrics_are_read(
    args: list[str], entry: dict[str, object], verify: bool | None, doors: Doors
) -> None:
    result = waypost("picker", "--pool-name", "p", "--pool-namespace", "n", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    assert doors.config.kubernetes.namespace == "n"
    assert pools(doors) == [{"name": "p", **entry}]
    made = doors.config.credentials.get("model-servers")
    assert (made.verify if made else None) is verify


KSERVE: dict[str, object] = {"name": "llama-inference-pool"}
OVER_TLS: dict[str, object] = {"metrics_scheme": "https", "scheme": "https", "credentials": "model-servers"}
EXPECTED: dict[str, tuple[dict[str, object], str | None, str, str]] = {
    "kserve-llmisvc-v1alpha2-tls": ({**KSERVE, **OVER_TLS}, "demo", "info", ""),
    "kserve-llmisvc-v1alpha2-plain": (KSERVE, "demo", "info", "--ha-enable-leader-election"),
    "kserve-0.16": ({**KSERVE, **OVER_TLS}, "demo", "info", ""),
    "gie-conformance": ({"name": "primary-inference-pool"}, "inference-conformance-app-backend", "info", ""),
    "llm-d-chart-pool": ({"name": "release"}, "ns", "info", "--ha-enable-leader-election --tracing"),
    "llm-d-chart-selector": (
        {"name": "endpoint-selector", "selector": "app=vllm,llm-d.ai/model=qwen", "target_ports": (8000, 8001)},
        None,
        "info",
        "",
    ),
    "llm-d-kustomize": ({"name": "pool"}, "ns", "debug", "--allow-experimental-plugins"),
    "envoy-ai-gateway-example": ({"name": "mistral"}, "default", "debug", ""),
    "envoy-ai-gateway-old-example": ({"name": "mistral"}, "default", "debug", ""),
}


def test_every_list_has_its_expectation() -> None:
    assert set(LISTS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_real_deployments_get(name: str, doors: Doors, tmp_path: Path) -> None:
    path = tmp_path / "plugins.yaml"
    path.write_text(QUEUE_AND_KV)
    argv = [QUEUE_AND_KV if "<" in arg else str(path) if arg.endswith(".yaml") else arg for arg in LISTS[name]]
    result = waypost("picker", *argv)
    entry, namespace, level, ignored = EXPECTED[name]
    assert result.exit_code == 0, result.stderr
    told = [f"{flag} (" in result.stderr for flag in ignored.split()]
    assert (all(told), result.stderr.count(" (")) == (True, len(told))
    config = doors.config
    assert pools(doors) == [PoolEntry.model_validate(entry).model_dump(exclude_defaults=True)]
    assert config.kubernetes.namespace == namespace
    assert (config.log.level, config.log.format) == (level, "json")
    assert (config.picker.grpc_port, config.picker.grpc_health_port, config.picker.secure_serving) == (9002, 9003, True)
    configured = any("onfig" in arg for arg in argv)
    assert config.policy == ("endpoint-picker-config" if configured else "balanced")
    assert config.picker.cert_reload is ("--enable-cert-reload=true" in argv)
