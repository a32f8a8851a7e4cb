"""The whole configuration as one frozen value, and the profiles for those who choose plugins themselves.

This is the schema of the YAML file. It reads nothing; `load.py` fills it and says where each value came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from picker.config.fleet import CredentialsEntry, EndpointsSection, Name
from picker.config.index import IndexSection
from picker.config.kubernetes import KubernetesSection
from picker.config.sections import (
    AdminSection,
    DrainSection,
    GatewaySection,
    HealthSection,
    LimitsSection,
    LogSection,
    PickerSection,
    ScrapeSection,
    Section,
    TimeoutsSection,
)
from picker.config.values import Address, HostPort, KnownNames, Weight, context_of, refuse


def _check_name(value: object, names: Iterable[str], kind: str) -> object:
    """`value` if it is one of `names`; otherwise a refusal that lists them and suggests the closest."""
    known = sorted(names)
    if not isinstance(value, str) or value in known:
        return value
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f" (there are: {', '.join(known)})"
    raise refuse(f"unknown {kind}{hint}")


def _known(info: ValidationInfo) -> KnownNames | None:
    return context_of(info).known


def _known_filter(value: object, info: ValidationInfo) -> object:
    known = _known(info)
    return value if known is None else _check_name(value, known.filters, "filter")


def _known_scorer(value: object, info: ValidationInfo) -> object:
    known = _known(info)
    return value if known is None else _check_name(value, known.scorers, "scorer")


def _known_picker(value: object, info: ValidationInfo) -> object:
    known = _known(info)
    return value if known is None else _check_name(value, known.pickers, "picker")


def _known_policy(value: object, info: ValidationInfo) -> object:
    known = _known(info)
    return value if known is None else _check_name(value, known.policies | context_of(info).profiles, "policy")


def _own_name(value: str, info: ValidationInfo) -> str:
    known = _known(info)
    if known is not None and value in known.policies:
        raise refuse("is the name of a built-in policy; choose another one")
    return value


class PluginEntry(Section):
    """One plugin of a profile. In YAML a bare name stands for an entry with only `name`."""

    name: Name = Field(description="Name of the plugin.")
    params: dict[str, Any] = Field(default_factory=dict, max_length=100, description="Parameters of the plugin.")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "description": "Name of the plugin."}, handler(core_schema)]}


class FilterEntry(PluginEntry):
    """A filter of a profile."""

    name: Annotated[Name, BeforeValidator(_known_filter)] = Field(description="Name of the filter.")


class ScorerEntry(PluginEntry):
    """A scorer of a profile and how much it counts."""

    name: Annotated[Name, BeforeValidator(_known_scorer)] = Field(description="Name of the scorer.")
    weight: Weight = Field(default=1.0, description="How much its score counts, relative to the others.")


class PickerEntry(PluginEntry):
    """The picker of a profile."""

    name: Annotated[Name, BeforeValidator(_known_picker)] = Field(description="Name of the picker.")


class ProfileEntry(Section):
    """A policy made of plugins: filters in order, then weighted scorers, then one picker."""

    filters: tuple[FilterEntry, ...] = Field(default=(), max_length=100, description="Who may serve, in order.")
    scorers: tuple[ScorerEntry, ...] = Field(default=(), max_length=100, description="How good each endpoint is.")
    picker: PickerEntry = Field(default=PickerEntry(name="max-score"), description="Who is chosen from the totals.")


class Config(Section):
    """Everything Waypost can be told. Every key is optional."""

    listen: Address = Field(
        default=HostPort("127.0.0.1", 8080), description="HOST:PORT of the gateway (`waypost run`)."
    )
    admin: AdminSection = Field(default=AdminSection(), description="Health, metrics and debug pages.")
    policy: Annotated[Name, BeforeValidator(_known_policy)] = Field(
        default="balanced", description="balanced, least-loaded, round-robin, random, or the name of a profile below."
    )
    profiles: dict[Annotated[Name, AfterValidator(_own_name)], ProfileEntry] = Field(
        default_factory=dict,
        max_length=100,
        description="Policies of your own. Each plugin is a name or a mapping with name, weight (scorers) and params.",
        examples=[
            {
                "mine": {
                    "filters": ["health", {"name": "saturation", "params": {}}],
                    "scorers": [{"name": "queue-depth", "weight": 2}, "kv-usage"],
                    "picker": "max-score",
                }
            }
        ],
    )
    endpoints: EndpointsSection = Field(default=EndpointsSection(), description="The model servers.")
    kubernetes: KubernetesSection = Field(
        default=KubernetesSection(), description="Pods of a cluster as model servers."
    )
    credentials: dict[Name, CredentialsEntry] = Field(
        default_factory=dict,
        max_length=1000,
        description="Keys and certificates for endpoints, by name. Secrets are ${NAME} or file:/path.",
        examples=[
            {
                "main": {
                    "api_key": "${ENGINE_API_KEY}",
                    "ca": "/etc/waypost/ca.crt",
                    "client_cert": "/etc/waypost/client.crt",
                    "client_key": "/etc/waypost/client.key",
                    "server_name": "engines.internal",
                    "verify": True,
                }
            }
        ],
    )
    models: dict[Name, Name] = Field(
        default_factory=dict,
        max_length=10_000,
        description="Model names to rewrite: what clients ask for, then what the engines serve.",
        examples=[{"gpt-4o": "llama-3-8b"}],
    )
    gateway: GatewaySection = Field(default=GatewaySection(), description="The HTTP door (`waypost run`).")
    limits: LimitsSection = Field(default=LimitsSection(), description="Bounds on what clients may make Waypost hold.")
    timeouts: TimeoutsSection = Field(default=TimeoutsSection(), description="Deadlines.")
    scrape: ScrapeSection = Field(default=ScrapeSection(), description="Reading the metrics of model servers.")
    index: IndexSection = Field(default=IndexSection(), description="What endpoints hold of prompts.")
    health: HealthSection = Field(default=HealthSection(), description="When an endpoint loses traffic.")
    picker: PickerSection = Field(default=PickerSection(), description="The ext-proc door (`waypost picker`).")
    drain: DrainSection = Field(default=DrainSection(), description="What SIGTERM does.")
    log: LogSection = Field(
        default=LogSection(), description="One line per request on stderr; prompts are never logged."
    )

    @model_validator(mode="after")
    def _registration_is_guarded(self) -> Config:
        if self.endpoints.registration.enabled and self.admin.token is None:
            raise refuse("needs admin.token: whoever registers decides where requests go", at="endpoints")
        return self
