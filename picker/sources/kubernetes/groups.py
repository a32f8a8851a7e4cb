"""Replicas made of several pods: LeaderWorkerSet, RoleBasedGroup, AIBrix PodSet, Ray. One of them, the leader, serves.

Which pods belong together is read off their labels, so that it is known whatever the pool selects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from picker.sources.kubernetes.objects import Pod

_LWS = "leaderworkerset.sigs.k8s.io/"
_RBG = "rbg.workloads.x-k8s.io/"
_RBG_V1_COMPONENT = "component.rolebasedgroup.workloads.x-k8s.io/"
_RBG_V1_INSTANCES = ("instance.workloads.x-k8s.io/instance-name", "instanceset.workloads.x-k8s.io/instance-name")
_AIBRIX = "stormservice.orchestration.aibrix.ai/"
_RAY = "ray.io/"

_NO_MAP: Mapping[str, str] = {}


class Membership(msgspec.Struct, frozen=True):
    """`key` is the same for all pods of one replica; `size` is how many pods it has when whole, 0 if nobody says."""

    key: str
    leader: bool
    size: int = 0


def membership(pod: Pod) -> Membership | None:
    """The replica over several pods that this pod is part of; None for a pod that is one by itself."""
    labels = pod.metadata.labels or _NO_MAP
    return _of_lws(pod, labels) or _of_rbg(labels) or _of_aibrix(pod, labels) or _of_ray(labels)


def instance_of(uids: Iterable[str]) -> str:
    """A short digest of all members: another pod in the replica means other processes, with empty caches."""
    return hashlib.blake2s("\n".join(sorted(uids)).encode(), digest_size=8).hexdigest()


def is_excluded(labels: Mapping[str, str]) -> bool:
    """Ray's operator marks pods of a RayService whose proxy does not work or shall not be used."""
    return labels.get(_RAY + "serve") == "false"


def _of_lws(pod: Pod, labels: Mapping[str, str]) -> Membership | None:
    worker_index = labels.get(_LWS + "worker-index")
    if worker_index is None:
        return None
    key = labels.get(_LWS + "group-key") or f"{labels.get(_LWS + 'name', '')}/{labels.get(_LWS + 'group-index', '')}"
    size = (pod.metadata.annotations or _NO_MAP).get(_LWS + "size", "")
    return Membership(f"lws {key}", worker_index == "0", _count(size))


def _of_rbg(labels: Mapping[str, str]) -> Membership | None:
    """Leader-worker pattern only: components with names of a user's own need not be one engine. The size label counts
    the whole instance in this pattern.
    """
    instance = labels.get(_RBG + "role-instance-name")
    prefix = _RBG + "component-"
    if not instance:
        instance = next((labels[key] for key in _RBG_V1_INSTANCES if labels.get(key)), "")
        prefix = _RBG_V1_COMPONENT
    name = labels.get(prefix + "name") or labels.get("instance.workloads.x-k8s.io/component-name", "")
    if not instance or name not in ("leader", "worker"):
        return None
    return Membership(f"rbg {instance}", name == "leader", _count(labels.get(prefix + "size", "")))


def _of_aibrix(pod: Pod, labels: Mapping[str, str]) -> Membership | None:
    podset = labels.get(_AIBRIX + "podset-name")
    index = labels.get(_AIBRIX + "pod-group-index")
    if not podset or index is None:
        return None
    sizes = (
        variable.value
        for container in pod.spec.containers or ()
        for variable in container.env or ()
        if variable.name == "POD_GROUP_SIZE" and variable.value
    )
    return Membership(f"podset {podset}", index == "0", _count(next(sizes, "")))


def _of_ray(labels: Mapping[str, str]) -> Membership | None:
    """Pods with a Serve proxy (`ray.io/serve`) take requests one by one; Ray spreads them itself."""
    cluster = labels.get(_RAY + "cluster")
    node_type = labels.get(_RAY + "node-type")
    if not cluster or node_type not in ("head", "worker") or _RAY + "serve" in labels:
        return None
    return Membership(f"ray {cluster}", node_type == "head")


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
