"""The Kubernetes objects read here, with the fields used and no others.

Decoding a full pod costs many times more than these. Every field may be missing or null: objects come from many
controllers and versions, and one odd object must not hide the others.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec


class Object(msgspec.Struct, frozen=True, rename="camel"):
    """What all these structs share: frozen, names as the API spells them."""


class Owner(Object, frozen=True):
    """One owner of an object, such as the StatefulSet of a pod."""

    kind: str = ""
    name: str = ""
    uid: str = ""


class Meta(Object, frozen=True):
    """The metadata of any object. Times are RFC 3339 texts in UTC, so that they sort."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: tuple[Owner, ...] | None = None


class Condition(Object, frozen=True):
    """One condition of a pod's status."""

    type: str = ""
    status: str = ""


class ContainerPort(Object, frozen=True):
    """One port a container declares."""

    container_port: int = 0
    name: str | None = None


class EnvVar(Object, frozen=True):
    """One environment variable; `value` is None when it comes from elsewhere."""

    name: str = ""
    value: str | None = None

    def __repr__(self) -> str:
        # Values may be secrets.
        return f"EnvVar({self.name!r})"


class Container(Object, frozen=True):
    """What a container declares that tells how to talk to it."""

    name: str = ""
    image: str | None = None
    command: tuple[str, ...] | None = None
    args: tuple[str, ...] | None = None
    ports: tuple[ContainerPort, ...] | None = None
    env: tuple[EnvVar, ...] | None = None


class PodSpec(Object, frozen=True):
    """Where a pod runs and what is in it. Sidecars that start first are among the init containers."""

    node_name: str | None = None
    containers: tuple[Container, ...] | None = None
    init_containers: tuple[Container, ...] | None = None


class PodIp(Object, frozen=True):
    """One address of a pod."""

    ip: str = ""


class PodStatus(Object, frozen=True):
    """Whether a pod is ready, and its addresses."""

    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    conditions: tuple[Condition, ...] | None = None


class Pod(Object, frozen=True):
    """A pod."""

    metadata: Meta = Meta()
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class Node(Object, frozen=True):
    """A node; its labels name accelerator and zone."""

    metadata: Meta = Meta()


class TargetPort(Object, frozen=True):
    """One port of an InferencePool."""

    number: int


class Selector(Object, frozen=True):
    """A pool's selector (v1)."""

    match_labels: dict[str, str] | None = None


class PoolSpecV1(Object, frozen=True):
    """`inference.networking.k8s.io/v1`."""

    selector: Selector = Selector()
    target_ports: tuple[TargetPort, ...] = ()
    app_protocol: str | None = None


class PoolV1(Object, frozen=True):
    """An InferencePool."""

    metadata: Meta = Meta()
    spec: PoolSpecV1 = PoolSpecV1()


class PoolSpecV1Alpha2(Object, frozen=True):
    """`inference.networking.x-k8s.io/v1alpha2`: one port, a flat selector."""

    selector: dict[str, str] | None = None
    target_port_number: int = 0


class PoolV1Alpha2(Object, frozen=True):
    """An InferencePool as it was before v1."""

    metadata: Meta = Meta()
    spec: PoolSpecV1Alpha2 = PoolSpecV1Alpha2()


class PoolRef(Object, frozen=True):
    """The pool that an objective, rewrite or model belongs to; same namespace."""

    name: str = ""
    group: str | None = None


class TargetModel(Object, frozen=True):
    """One target of an InferenceModel."""

    name: str = ""
    weight: int | None = None


class InferenceModelSpec(Object, frozen=True):
    """`inference.networking.x-k8s.io/v1alpha2`."""

    model_name: str = ""
    criticality: str | None = None
    target_models: tuple[TargetModel, ...] | None = None
    pool_ref: PoolRef = PoolRef()


class InferenceModel(Object, frozen=True):
    """A model, its importance and its targets, from before objectives and rewrites."""

    metadata: Meta = Meta()
    spec: InferenceModelSpec = InferenceModelSpec()


class ObjectiveSpec(Object, frozen=True):
    """`llm-d.ai/v1alpha2`, and the same under the older group."""

    priority: int | None = None
    pool_ref: PoolRef = PoolRef()


class InferenceObjective(Object, frozen=True):
    """A named priority."""

    metadata: Meta = Meta()
    spec: ObjectiveSpec = ObjectiveSpec()


class ModelMatch(Object, frozen=True):
    """The model of a match; `type` has only the value Exact."""

    value: str = ""
    type: str | None = None


class RewriteMatch(Object, frozen=True):
    """One condition of a rewrite rule."""

    model: ModelMatch | None = None


class RewriteTarget(Object, frozen=True):
    """One target of a rewrite rule."""

    model_rewrite: str = ""
    weight: int | None = None


class RewriteRule(Object, frozen=True):
    """Any match, then one of the targets. No matches: any model."""

    matches: tuple[RewriteMatch, ...] | None = None
    targets: tuple[RewriteTarget, ...] | None = None


class ModelRewriteSpec(Object, frozen=True):
    """`llm-d.ai/v1alpha2`, and the same under the older group."""

    rules: tuple[RewriteRule, ...] | None = None
    pool_ref: PoolRef = PoolRef()


class InferenceModelRewrite(Object, frozen=True):
    """Names of models that stand for others."""

    metadata: Meta = Meta()
    spec: ModelRewriteSpec = ModelRewriteSpec()


AnyObject = Pod | Node | PoolV1 | PoolV1Alpha2 | InferenceModel | InferenceObjective | InferenceModelRewrite
T = TypeVar("T", bound=AnyObject)


class ListMeta(Object, frozen=True):
    """`more` continues a list that came in pages."""

    resource_version: str = ""
    more: str | None = msgspec.field(default=None, name="continue")


class RawList(Object, frozen=True):
    """A page of a list; items are decoded one by one, so that an odd one does not lose the others."""

    metadata: ListMeta = ListMeta()
    items: tuple[msgspec.Raw, ...] | None = None


class WatchEvent(Object, frozen=True):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR, and the object (a Status for ERROR)."""

    type: str
    object: msgspec.Raw


class Status(Object, frozen=True):
    """What the API server says when it cannot do what was asked."""

    code: int = 0
    reason: str | None = None
    message: str | None = None


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """These are all objects there are."""

    objects: tuple[T, ...]


class Changed(msgspec.Struct, Generic[T], frozen=True):
    """One object is new or other than it was."""

    object: T


class Gone(msgspec.Struct, Generic[T], frozen=True):
    """One object was deleted; `object` is its last state."""

    object: T
