"""Which prefill and decode pods were deployed as one, and in which version. From labels that all roles share."""

from __future__ import annotations

from collections.abc import Mapping

_RBG_V1 = "rolebasedgroup.workloads.x-k8s.io/"
_RBG = "rbg.workloads.x-k8s.io/"
_DISAGGREGATED_SET = "disaggregatedset.x-k8s.io/"

# The hash of a pod's own template (`pod-template-hash`, LeaderWorkerSet's `template-revision-hash`) is not here: each
# role has a template, so by it no prefill pod would ever be of the same revision as a decode pod. RBG documents its
# revision for the revisions of a group; that pods carry it is unverified.
_REVISIONS = (
    _DISAGGREGATED_SET + "revision",
    _RBG + "group-revision",
    _RBG_V1 + "controller-revision-hash",
    "storm-service-revision",
    "nvidia.com/dynamo-worker-hash",
)


def group_of(labels: Mapping[str, str]) -> str:
    """The deployment that prefill and decode pods share; empty if the labels name none."""
    name = labels.get(_RBG + "group-name") or labels.get(_RBG_V1 + "name")
    if name:
        return name
    name = labels.get(_DISAGGREGATED_SET + "name")
    if name:
        slice_index = labels.get(_DISAGGREGATED_SET + "slice")
        return f"{name}/{slice_index}" if slice_index else name
    name = labels.get("roleset-name") or labels.get("nvidia.com/dynamo-namespace")
    if not name and labels.get("app.kubernetes.io/part-of") == "llminferenceservice":
        name = labels.get("app.kubernetes.io/name")
    return name or ""


def revision_of(labels: Mapping[str, str]) -> str:
    """The version of that deployment; empty if the labels name none."""
    return next((labels[key] for key in _REVISIONS if labels.get(key)), "")
