"""The Kubernetes part of the configuration: which pools to follow, and how their pods are to be read and talked to.

Nothing is contacted here. An entry holds what an InferencePool does not say.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from picker.config.fleet import CredentialsName, EndpointRole, Engine, LabelText, Name, PathPrefix
from picker.config.sections import Route, Section
from picker.config.selector import parse_selector
from picker.config.values import FilePath, not_bool, refuse

POOL_GROUPS = ("inference.networking.k8s.io", "inference.networking.x-k8s.io")

_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_POOL = re.compile(rf"(?:{_DNS_LABEL}/)?[a-z0-9](?:[-a-z0-9.]{{0,251}}[a-z0-9])?")
_NAMESPACE = re.compile(_DNS_LABEL)


def _pool_name(value: object) -> object:
    if not isinstance(value, str) or not _POOL.fullmatch(value):
        raise refuse("must be NAME or NAMESPACE/NAME, as Kubernetes spells them")
    return value


def _namespace(value: object) -> object:
    if not isinstance(value, str) or not _NAMESPACE.fullmatch(value):
        raise refuse("must be the name of a Kubernetes namespace")
    return value


PoolName = Annotated[str, BeforeValidator(_pool_name)]
Namespace = Annotated[str, BeforeValidator(_namespace)]
PodPort = Annotated[int, BeforeValidator(not_bool), Field(ge=1, le=65535)]


def _selector(value: object) -> object:
    if isinstance(value, str):
        try:
            parse_selector(value)
        except ValueError as error:
            raise refuse(str(error)) from None
    return value


SelectorText = Annotated[str, BeforeValidator(_selector), StringConstraints(max_length=4096)]


class PoolEntry(Section):
    """One pool of pods. In YAML a bare `namespace/name` stands for an entry with only `name`."""

    name: PoolName = Field(description="Name of the InferencePool, or namespace/name.")
    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = Field(
        default="inference.networking.k8s.io",
        description="API group of the InferencePool; the one with x is v1alpha2.",
    )
    selector: SelectorText | None = Field(
        default=None,
        description="Select pods by this label selector instead of reading an InferencePool; needs target_ports.",
        examples=["app=vllm,tier in (gold, silver)"],
    )
    target_ports: tuple[PodPort, ...] = Field(
        default=(), max_length=8, description="Ports of the pods; each is an endpoint of its own. Only with selector."
    )
    scheme: Literal["http", "https"] = Field(default="http", description="How to talk to the pods.")
    credentials: CredentialsName | None = Field(
        default=None, description="Name of an entry under credentials:, for requests, probes and scrapes."
    )
    path_prefix: PathPrefix | None = Field(
        default=None, description="Put before /v1 for these pods.", examples=["/openai"]
    )
    engine: Engine = Field(default="auto", description="Which engine the pods run, if their labels do not say.")
    metrics_scheme: Literal["http", "https"] | None = Field(
        default=None, description="Scheme of the metrics page, if other than of the requests."
    )
    metrics_port: PodPort | None = Field(
        default=None, description="Port of the metrics page, if other than the target's."
    )
    metrics_path: Route | None = Field(default=None, description="Path of the metrics page, if not the engine's usual.")
    bootstrap_port: PodPort | None = Field(
        default=None, description="SGLang's bootstrap port, if the pods do not say. [8998]"
    )
    workers: Literal["auto", "never", "always"] = Field(
        default="auto",
        description="Send requests to workers of multi-node groups too. auto: to those that declare a target port "
        "and do not run headless.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @field_validator("target_ports")
    @classmethod
    def _ports_differ(cls, ports: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ports)) < len(ports):
            raise refuse("names a port twice")
        return ports

    @model_validator(mode="after")
    def _fits_together(self) -> PoolEntry:
        if self.selector is not None and not self.target_ports:
            raise refuse("needs target_ports too", at="selector")
        if self.selector is None and self.target_ports:
            raise refuse("an InferencePool names its ports itself; only with selector", at="target_ports")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "description": "Name, or namespace/name."}, handler(core_schema)]}


class RoleLabel(Section):
    """A label that says what a pod does with a request."""

    label: LabelText = Field(description="Key of the label.")
    values: dict[LabelText, EndpointRole | Literal["ignore"]] = Field(
        default_factory=dict,
        max_length=64,
        description="What its values mean; the usual names of roles are known without this.",
    )


class KubernetesSection(Section):
    """Pods of a cluster as endpoints."""

    pools: tuple[PoolEntry, ...] = Field(
        default=(),
        max_length=64,
        description="InferencePools to follow, each namespace/name or a mapping. `--pool` replaces this list.",
        examples=[["default/llama", {"name": "default/qwen", "path_prefix": "/openai"}]],
    )
    namespace: Namespace | None = Field(
        default=None,
        description="Namespace of pools named without one. [$NAMESPACE, else the pod's own, else default]",
    )
    kubeconfig: FilePath | None = Field(
        default=None, description="Outside a cluster: this file instead of $KUBECONFIG or ~/.kube/config."
    )
    context: Name | None = Field(default=None, description="Context of the kubeconfig, if not its current one.")
    role_labels: tuple[RoleLabel, ...] = Field(
        default=(),
        max_length=16,
        description="Labels that name roles, asked before the known ones.",
        examples=[[{"label": "example.com/stage", "values": {"first": "prefill", "second": "decode"}}]],
    )
    class_labels: tuple[LabelText, ...] = Field(
        default=(),
        max_length=16,
        description="Labels of pods or nodes that name the hardware, asked before the known ones.",
    )
    nodes: bool = Field(
        default=True, description="Read the labels of nodes (accelerator, zone). Needs a ClusterRole; without it: off."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> KubernetesSection:
        names = [entry.name for entry in self.pools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refuse(f"{twice} is there twice", at="pools")
        return self
