"""The shipped Kubernetes manifests: real API types, references that meet, restricted pods, arguments that are known.

No cluster is asked. Field names, types and required fields are those of the official client's models; what only an API
server knows (admission, CRDs) is stated here as far as the manifests use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml
from kubernetes import client
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from picker.config import Config, Loaded, load
from picker.extproc.health import LIVENESS, READY_NAMES
from picker.sources.kubernetes.objects import PoolV1
from tests.unit.manifests_rig import DEPLOY, MANIFESTS, Document, container_of, documents, of_kind, pods, started

GUIDE = DEPLOY.parents[1] / "docs" / "kubernetes.md"
PLACEHOLDER = "waypost:latest"


# -- types -------------------------------------------------------------------------------------------------------------


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PoolPort(Part):
    number: Annotated[int, Field(ge=1, le=65535)]


class PoolSelector(Part):
    matchLabels: Annotated[dict[str, str], Field(min_length=1, max_length=64)]


class PickerRef(Part):
    name: str
    port: PoolPort
    group: Literal[""] = ""
    kind: Literal["Service"] = "Service"
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"


class PoolSpec(Part):
    selector: PoolSelector
    targetPorts: Annotated[list[PoolPort], Field(min_length=1, max_length=8)]
    appProtocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpointPickerRef: PickerRef | None = None


class Pool(Part):
    """InferencePool v1 as its CRD defines it, without status."""

    apiVersion: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    metadata: dict[str, Any]
    spec: PoolSpec


TYPES: Mapping[tuple[str, str], type[BaseModel]] = {
    ("v1", "Service"): client.V1Service,
    ("v1", "ServiceAccount"): client.V1ServiceAccount,
    ("apps/v1", "Deployment"): client.V1Deployment,
    ("policy/v1", "PodDisruptionBudget"): client.V1PodDisruptionBudget,
    ("rbac.authorization.k8s.io/v1", "Role"): client.V1Role,
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): client.V1RoleBinding,
    ("rbac.authorization.k8s.io/v1", "ClusterRole"): client.V1ClusterRole,
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): client.V1ClusterRoleBinding,
    ("inference.networking.k8s.io/v1", "InferencePool"): Pool,
}


def keys(value: Any) -> Iterator[str]:
    """Every key, however deep."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield from value
    for child in children:
        yield from keys(child)


def misspelt(document: Document) -> list[str]:
    """Fields the API does not have, misses, or has with another type."""
    # The client takes its own spelling of a field (snake_case) as well; the API does not.
    snakes = [f"{key}: not a name of the API" for key in keys(document) if "_" in key]
    try:
        TYPES[document["apiVersion"], document["kind"]].model_validate(document)
    except ValidationError as error:
        return snakes + [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return snakes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_documents_are_what_the_api_knows(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        assert misspelt(document) == [], document["kind"]
        assert document["metadata"]["name"]
        assert ("namespace" in document["metadata"]) is not document["kind"].startswith("Cluster")
    names = [(document["kind"], document["metadata"]["name"]) for document in found]
    assert len(set(names)) == len(names)


def test_a_misspelt_field_is_found() -> None:
    (deployment,) = of_kind(DEPLOY / "picker.yaml", "Deployment")
    probe = container_of(deployment)["readinessProbe"]
    probe["periodSecond"] = 1
    probe["timeoutSeconds"] = "2"
    probe["success_threshold"] = 1
    del probe["grpc"]["port"]
    wrong = " ".join(misspelt(deployment))
    assert all(name in wrong for name in ("periodSecond:", "timeoutSeconds", "success_threshold", "grpc.port"))
    (pool,) = of_kind(DEPLOY / "picker.yaml", "InferencePool")
    pool["spec"]["targetPortNumber"] = 8000
    assert "spec.targetPortNumber" in misspelt(pool)[0]


def test_a_key_that_is_there_twice_is_found(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("kind: A\nspec: {a: 1, b: 2, a: 3}\n")
    with pytest.raises(yaml.constructor.ConstructorError, match="twice"):
        documents(path)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_image_and_namespace_are_one_word_to_change(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "Change: " in text
    moved = text.replace("namespace: inference", "namespace: mine")
    for document in yaml.safe_load_all(moved):
        spaces = [document["metadata"].get("namespace", "mine")]
        spaces += [subject["namespace"] for subject in document.get("subjects", [])]
        assert set(spaces) == {"mine"}
        if document["kind"] == "Deployment":
            assert container_of(document)["image"] == PLACEHOLDER
            # Flags must not name it a second time.
            assert "inference/" not in " ".join(container_of(document)["args"])


# -- references --------------------------------------------------------------------------------------------------------


def selects(selector: Mapping[str, str], deployment: Document) -> bool:
    labels: Mapping[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return selector.items() <= labels.items()


@pytest.mark.parametrize(("path", "deployment"), pods())
def test_selectors_and_ports_meet(path: Path, deployment: Document) -> None:
    assert selects(deployment["spec"]["selector"]["matchLabels"], deployment)
    spec = deployment["spec"]["template"]["spec"]
    for constraint in spec.get("topologySpreadConstraints", []):
        assert selects(constraint["labelSelector"]["matchLabels"], deployment)
    for budget in of_kind(path, "PodDisruptionBudget"):
        assert selects(budget["spec"]["selector"]["matchLabels"], deployment)
    ports = {port["name"]: port["containerPort"] for port in container_of(deployment)["ports"]}
    own = [service for service in of_kind(path, "Service") if selects(service["spec"]["selector"], deployment)]
    assert [service["metadata"]["name"] for service in own] == [deployment["metadata"]["name"]]
    assert all(port["targetPort"] in ports for port in own[0]["spec"]["ports"])
    assert len(ports) == len(set(ports.values()))
    # Debug pages and metrics are not for those who use the service.
    assert ports["metrics"] not in [ports[port["targetPort"]] for port in own[0]["spec"]["ports"]]


def test_the_pool_names_the_picker() -> None:
    path = DEPLOY / "picker.yaml"
    (pool,), (service,) = of_kind(path, "InferencePool"), of_kind(path, "Service")
    reference = pool["spec"]["endpointPickerRef"]
    assert reference["name"] == service["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    assert (reference["port"]["number"], port["appProtocol"]) == (port["port"], "http2")
    (deployment,) = of_kind(path, "Deployment")
    assert not selects(pool["spec"]["selector"]["matchLabels"], deployment)
    read = msgspec.convert(pool, PoolV1)
    assert read.spec.selector.match_labels == {"app": "llama"}
    assert [port.number for port in read.spec.target_ports] == [8000]


# -- pods --------------------------------------------------------------------------------------------------------------

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def unrestricted(spec: Document) -> Iterator[str]:
    """What a pod violates of the Pod Security Standard `restricted` (and of a root filesystem that is read-only)."""
    whole = spec.get("securityContext", {})
    yield from (field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field))
    for volume in spec.get("volumes", []):
        yield from (f"volume {kind}" for kind in volume.keys() - {"name"} - VOLUMES)
    if whole.get("sysctls"):
        yield "sysctls"
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        wrong = {
            "privileged": own.get("privileged", False),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "capabilities.drop": capabilities.get("drop") != ["ALL"],
            "capabilities.add": not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True,
            "runAsUser": own.get("runAsUser", whole.get("runAsUser", 0)) == 0,
            "seccompProfile": own.get("seccompProfile", whole.get("seccompProfile")) != {"type": "RuntimeDefault"},
            "procMount": own.get("procMount", "Default") != "Default",
            "hostPort": any("hostPort" in port for port in container.get("ports", [])),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is not True,
        }
        yield from (field for field, is_wrong in wrong.items() if is_wrong)


@pytest.mark.parametrize(("path", "deployment"), pods())
def test_pods_are_restricted(path: Path, deployment: Document) -> None:
    spec = deployment["spec"]["template"]["spec"]
    assert list(unrestricted(spec)) == []
    # A Service named waypost-* would otherwise become WAYPOST_* variables, which are settings.
    assert spec["enableServiceLinks"] is False
    accounts = [account["metadata"]["name"] for account in of_kind(path, "ServiceAccount")]
    assert accounts == ([spec["serviceAccountName"]] if "serviceAccountName" in spec else [])
    assert bool(accounts) is spec.get("automountServiceAccountToken", True)


@pytest.mark.parametrize(
    ("name", "loosen"),
    [
        ("hostNetwork", lambda spec: spec.update(hostNetwork=True)),
        ("volume hostPath", lambda spec: spec.update(volumes=[{"name": "x", "hostPath": {"path": "/"}}])),
        ("runAsNonRoot", lambda spec: spec["securityContext"].pop("runAsNonRoot")),
        ("runAsUser", lambda spec: spec["securityContext"].pop("runAsUser")),
        ("seccompProfile", lambda spec: spec["securityContext"].update(seccompProfile={"type": "Unconfined"})),
        ("capabilities.drop", lambda spec: spec["containers"][0]["securityContext"].pop("capabilities")),
        ("privileged", lambda spec: spec["containers"][0]["securityContext"].update(privileged=True)),
        ("hostPort", lambda spec: spec["containers"][0]["ports"][0].update(hostPort=80)),
    ],
)
def test_a_loose_pod_is_found(name: str, loosen: Callable[[Document], object]) -> None:
    (deployment,) = of_kind(DEPLOY / "picker.yaml", "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    loosen(spec)
    assert name in list(unrestricted(spec))


# -- the command line --------------------------------------------------------------------------------------------------


def addresses(config: Config, verb: str) -> dict[str, int]:
    """The ports a door serves on, by the names the manifests give them."""
    if verb == "run":
        return {"http": config.listen.port, "metrics": config.admin.listen.port}
    picker = config.picker
    return {"grpc": picker.grpc_port, "grpc-health": picker.grpc_health_port, "metrics": picker.metrics_port}


@pytest.mark.parametrize(("path", "deployment"), pods())
def test_the_command_line_takes_the_arguments(
    path: Path, deployment: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = started(deployment, monkeypatch)
    container = container_of(deployment)
    verb = container["command"][1]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == addresses(config, verb)
    if verb == "run":
        assert {config.listen.host, config.admin.listen.host} == {"0.0.0.0"}
    pools = config.kubernetes.pools
    match path.stem:
        case "gateway-dns":
            assert not pools
            (entry,) = config.endpoints.dns
            (service,) = (each for each in of_kind(path, "Service") if "app" in each["spec"]["selector"])
            assert str(entry.name) == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
            assert service["spec"]["clusterIP"] == "None"
        case "picker-selector":
            assert [(pool.selector, pool.target_ports) for pool in pools] == [("app=llama", (8000,))]
        case _:
            assert [(pool.name.rpartition("/")[2], pool.selector) for pool in pools] == [("llama", None)]
    # The kubelet's patience is longer than ours, with time to close.
    patience_s = config.drain.delay + config.drain.timeout
    assert config.drain.delay > 0
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= patience_s + 10


@pytest.mark.parametrize(("path", "deployment"), pods())
def test_probes_ask_what_is_served(path: Path, deployment: Document) -> None:
    container = container_of(deployment)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    live, ready = container["livenessProbe"], container["readinessProbe"]
    if container["command"][1] == "picker":
        assert (live["grpc"]["service"], ready["grpc"]["service"]) == (LIVENESS, "readiness")
        assert "readiness" in READY_NAMES
        assert {live["grpc"]["port"], ready["grpc"]["port"]} == {ports["grpc-health"]}
    else:
        assert (live["httpGet"]["path"], ready["httpGet"]["path"]) == ("/healthz", "/readyz")
        assert {live["httpGet"]["port"], ready["httpGet"]["port"]} == {"metrics"}
    # A busy loop is not a dead one: the first picture of a cluster and a burst of requests each take seconds.
    assert live["periodSeconds"] * live.get("failureThreshold", 3) >= 30


# -- the guide ---------------------------------------------------------------------------------------------------------


def test_the_configuration_in_the_guide_is_valid(tmp_path: Path) -> None:
    key = tmp_path / "engine-key"
    key.write_text("k")
    (text,) = (block.partition("```")[0] for block in GUIDE.read_text(encoding="utf-8").split("```yaml\n")[1:])
    path = tmp_path / "waypost.yaml"
    path.write_text(text.replace("/etc/waypost/engine-key", str(key)))
    loaded = load(path, environ={}, flags={})
    assert isinstance(loaded, Loaded), loaded
    assert [pool.name for pool in loaded.config.kubernetes.pools][:2] == ["inference/llama", "inference/qwen"]
