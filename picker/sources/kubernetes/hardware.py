"""What a pod runs on: the class of its accelerator, and where it stands. From labels of pods and nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from picker.core.values import Place
from picker.sources.kubernetes.objects import Pod

_KSERVE_NODE_GROUP = "serving.kserve.io/nodegroup"
_LOCAL_MODEL = "internal.serving.kserve.io/localmodel"
_LOCAL_MODEL_CLAIM = "internal.serving.kserve.io/localmodel-pvc-name"

# Names of a product, so that mixed nodes differ. NVIDIA, AMD and Google say it themselves; the next two are written by
# Alibaba Cloud and Karpenter on AWS, which also names Gaudi, Inferentia and Trainium. Intel's operator for Gaudi
# documents no label with the product; the type of the instance stands for it.
_PRODUCTS = (
    "nvidia.com/gpu.product",
    "amd.com/gpu.product-name",
    "beta.amd.com/gpu.product-name",
    "cloud.google.com/gke-accelerator",
    "cloud.google.com/gke-tpu-accelerator",
    "aliyun.accelerator/nvidia_name",
    "karpenter.k8s.aws/instance-gpu-name",
    "karpenter.k8s.aws/instance-accelerator-name",
    "node.kubernetes.io/instance-type",
)
# llm-d's words are as coarse as `gpu` and `nvidia`: better than nothing where nodes may not be read.
_COARSE = ("llm-d.ai/accelerator-variant", "llm-d.ai/accelerator-vendor")

_ZONE = "topology.kubernetes.io/zone"
# What is closest first: an NVLink domain, then a rack, then the network behind one switch.
_RACKS = (
    "nvidia.com/gpu.clique",
    "network.topology.nvidia.com/accelerator",
    "topology.kubernetes.io/rack",
    "oci.oraclecloud.com/host.rack_id",
    "cloud.google.com/gce-topology-subblock",
    "topology.k8s.aws/network-node-layer-3",
)
_READ = frozenset((*_PRODUCTS, _ZONE, *_RACKS))

# Names from annotations are free text; a label's value has at most 63 characters, a name of an object 253.
_MAX_NAME = 253

_NO_MAP: Mapping[str, str] = {}


def node_facts(labels: Mapping[str, str], class_labels: Sequence[str]) -> dict[str, str]:
    """The labels of a node that mean something here. All others change without effect."""
    return {key: value for key, value in labels.items() if key in _READ or key in class_labels}


def class_of(pod: Pod, node: Mapping[str, str], class_labels: Sequence[str]) -> str:
    """The name of the hardware; empty if nobody says. `class_labels` are the user's, asked first."""
    labels = pod.metadata.labels or _NO_MAP
    for label in class_labels:
        name = labels.get(label) or node.get(label)
        if name:
            return name
    return (
        _node_group(labels, pod.metadata.annotations or _NO_MAP)
        or labels.get("inference.optimization/acceleratorName")
        or _first(node, _PRODUCTS)
        or _first(labels, _COARSE)
    )


def place_of(pod: Pod, node: Mapping[str, str]) -> Place:
    """Node, zone and rack. Newer clusters copy the zone onto the pod."""
    labels = pod.metadata.labels or _NO_MAP
    return Place(
        node=pod.spec.node_name or "", zone=node.get(_ZONE) or labels.get(_ZONE, ""), rack=_first(node, _RACKS)
    )


def _node_group(labels: Mapping[str, str], annotations: Mapping[str, str]) -> str:
    """KServe's node group: said, or the end of the name of the claim its local model cache made for the group."""
    name = annotations.get(_KSERVE_NODE_GROUP, "")
    cache = labels.get(_LOCAL_MODEL)
    claim = annotations.get(_LOCAL_MODEL_CLAIM, "")
    if not name and cache and claim.startswith(f"{cache}-"):
        name = claim.removeprefix(f"{cache}-")
    name = name.strip()
    return name if name.isprintable() and len(name) <= _MAX_NAME else ""


def _first(labels: Mapping[str, str], keys: Iterable[str]) -> str:
    return next((labels[key] for key in keys if labels.get(key)), "")
