"""Pods, nodes and pools as the Kubernetes API gives them: plain JSON values, with what real objects have around them.

`pod` and its likes give the JSON; `read` decodes it into the structs of the source, as a reflector would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from picker.sources.kubernetes.objects import Node, Pod, PoolV1, PoolV1Alpha2

Json = dict[str, Any]
T = TypeVar("T", Pod, Node, PoolV1, PoolV1Alpha2)


def read(json_value: Mapping[str, Any], kind: type[T]) -> T:
    """The object as the source decodes it from the API server's bytes."""
    return msgspec.json.decode(json.dumps(json_value).encode(), type=kind)


def uid(*names: str) -> str:
    """A UID that is the same in every run."""
    digits = hashlib.sha256("/".join(names).encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"


def container(
    name: str = "server",
    *,
    ports: Sequence[int | tuple[str, int]] = (8000,),
    command: Sequence[str] | None = None,
    args: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    image: str = "vllm/vllm-openai:v0.11.0",
) -> Json:
    """A container; ports are numbers or (name, number)."""
    found: Json = {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [
            {"containerPort": port, "protocol": "TCP"}
            if isinstance(port, int)
            else {"name": port[0], "containerPort": port[1], "protocol": "TCP"}
            for port in ports
        ],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}},
            *({"name": key, "value": value} for key, value in (env or {}).items()),
        ],
        "resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    }
    if command is not None:
        found["command"] = list(command)
    if args is not None:
        found["args"] = list(args)
    return found


def pod(
    name: str = "vllm-0",
    *,
    ip: str | None = "10.0.0.1",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    namespace: str = "default",
    node: str | None = "node-1",
    ready: bool = True,
    phase: str = "Running",
    deleted: bool = False,
    created: str = "2026-03-01T10:00:00Z",
    pod_uid: str | None = None,
    containers: Sequence[Json] | None = None,
    init_containers: Sequence[Json] = (),
    version: str = "1000",
) -> Json:
    """A pod with one container that serves on port 8000, labelled `app: vllm`, unless told otherwise."""
    status = "True" if ready else "False"
    found: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "generateName": name.rpartition("-")[0] + "-",
            "namespace": namespace,
            "uid": uid(namespace, name) if pod_uid is None else pod_uid,
            "resourceVersion": version,
            "creationTimestamp": created,
            "labels": dict({"app": "vllm"} if labels is None else labels),
            "annotations": dict(annotations or {}),
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "vllm", "uid": uid("rs"), "controller": True}
            ],
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "containers": [container()] if containers is None else list(containers),
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "serviceAccountName": "default",
            "schedulerName": "default-scheduler",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        "status": {
            "phase": phase,
            "conditions": [
                {"type": "PodReadyToStartContainers", "status": "True", "lastTransitionTime": created},
                {"type": "Initialized", "status": "True", "lastTransitionTime": created},
                {"type": "Ready", "status": status, "lastTransitionTime": created},
                {"type": "ContainersReady", "status": status, "lastTransitionTime": created},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": created},
            ],
            "hostIP": "192.168.0.7",
            "startTime": created,
            "qosClass": "Burstable",
        },
    }
    if init_containers:
        found["spec"]["initContainers"] = list(init_containers)
    if node is not None:
        found["spec"]["nodeName"] = node
    if ip is not None:
        found["status"] |= {"podIP": ip, "podIPs": [{"ip": ip}]}
    if deleted:
        found["metadata"] |= {"deletionTimestamp": "2026-03-01T11:00:00Z", "deletionGracePeriodSeconds": 30}
    return found


def node(name: str = "node-1", *, labels: Mapping[str, str] | None = None, version: str = "1000") -> Json:
    """A node; an A100 in zone-a unless told otherwise."""
    given = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB", "topology.kubernetes.io/zone": "zone-a"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": uid("node", name),
            "resourceVersion": version,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/arch": "amd64",
                **(given if labels is None else labels),
            },
        },
        "spec": {"podCIDR": "10.0.0.0/24"},
        "status": {"allocatable": {"nvidia.com/gpu": "8"}, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def pool_v1(
    name: str = "pool",
    *,
    selector: Mapping[str, str] | None = None,
    ports: Sequence[int] = (8000,),
    namespace: str = "default",
    app_protocol: str | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Json:
    """An InferencePool that selects `app: vllm` on port 8000 unless told otherwise."""
    spec: Json = {
        "selector": {"matchLabels": dict({"app": "vllm"} if selector is None else selector)},
        "targetPorts": [{"number": port} for port in ports],
        "endpointPickerRef": {
            "group": "",
            "kind": "Service",
            "name": f"{name}-epp",
            "port": {"number": 9002},
            "failureMode": "FailClose",
        },
    }
    if app_protocol is not None:
        spec["appProtocol"] = app_protocol
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": _pool_metadata(name, namespace, annotations),
        "spec": spec,
        "status": {"parents": [{"parentRef": {"kind": "Gateway", "name": "gateway"}, "conditions": []}]},
    }


def pool_v1alpha2(
    name: str = "pool",
    *,
    selector: Mapping[str, str] | None = None,
    port: int = 8000,
    namespace: str = "default",
    annotations: Mapping[str, str] | None = None,
) -> Json:
    """The same, as it was before v1."""
    return {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferencePool",
        "metadata": _pool_metadata(name, namespace, annotations),
        "spec": {
            "selector": dict({"app": "vllm"} if selector is None else selector),
            "targetPortNumber": port,
            "extensionRef": {"group": "", "kind": "Service", "name": f"{name}-epp", "failureMode": "FailOpen"},
        },
    }


def _pool_metadata(name: str, namespace: str, annotations: Mapping[str, str] | None) -> Json:
    return {
        "name": name,
        "namespace": namespace,
        "uid": uid("pool", namespace, name),
        "resourceVersion": "1000",
        "generation": 1,
        "creationTimestamp": "2026-03-01T09:00:00Z",
        "annotations": dict(annotations or {}),
    }
