"""Endpoints and credentials: which model servers there are and how to talk to them.

The same entry is used in the configuration and in the watched endpoints file. Nothing is resolved or contacted here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from picker.config.secrets import Secret
from picker.config.sections import Section
from picker.config.values import (
    Duration,
    EndpointUrl,
    FilePath,
    Host,
    HostPort,
    PageUrl,
    Port,
    ServiceName,
    context_of,
    refuse,
)

Engine = Literal["auto", "vllm", "sglang", "trtllm", "triton", "nim", "none"]
EndpointRole = Literal["both", "prefill", "decode", "encode"]
MAX_ENDPOINTS = 4096


def _name(value: str) -> str:
    if any(c.isspace() or not c.isprintable() for c in value):
        raise refuse("must not contain spaces or control characters")
    return value


def _credentials_exist(value: object, info: ValidationInfo) -> object:
    # The value is not repeated: people write the key itself here by mistake.
    known = context_of(info).credentials
    if isinstance(value, str) and known is not None and value not in known:
        names = ", ".join(sorted(known)) or "none"
        raise refuse(f"no such entry under credentials: (there: {names})", hide=True)
    return value


def _prefix(value: object) -> object:
    if value in ("", "/"):
        return ""
    if not isinstance(value, str) or not _PREFIX.fullmatch(value):
        raise refuse("must be a path such as /openai, without a slash at its end")
    return value


_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]*[A-Za-z0-9_~-])+")
Name = Annotated[str, StringConstraints(min_length=1, max_length=253), AfterValidator(_name)]
CredentialsName = Annotated[Name, BeforeValidator(_credentials_exist)]
PathPrefix = Annotated[str, BeforeValidator(_prefix), StringConstraints(max_length=253)]
LabelText = Annotated[str, StringConstraints(max_length=253)]


class EndpointEntry(Section):
    """One model server. In YAML a bare URL stands for an entry with only `url`."""

    url: EndpointUrl = Field(description="Scheme, host and port; no path.")
    name: Name | None = Field(default=None, description="Unique and stable; HOST:PORT if not set.")
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict, max_length=64, description="Free labels for filters."
    )
    role: EndpointRole = Field(default="both", description="What the server does with a request.")
    model: Name | None = Field(
        default=None, description="The one model served; read from the server if neither model nor models is set."
    )
    models: tuple[Name, ...] = Field(default=(), max_length=1000, description="The models served.")
    engine: Engine = Field(default="auto", description="Which engine it is; auto probes, none means it has no metrics.")
    group: Name | None = Field(default=None, description="Name of a group of endpoints that belong together.")
    credentials: CredentialsName | None = Field(default=None, description="Name of an entry under credentials:.")
    path_prefix: PathPrefix | None = Field(default=None, description="Put before /v1 for this server.")
    bootstrap_port: Port | None = Field(default=None, description="Port of SGLang's bootstrap server (prefill).")
    endpoint_class: Name | None = Field(
        default=None, description="Name of its hardware; servers of one class cost alike."
    )
    metrics_url: PageUrl | None = Field(
        default=None, description="Where its metrics are, if not at the engine's usual place."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_url(cls, data: Any) -> Any:
        return {"url": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> EndpointEntry:
        if self.model is not None and self.models:
            raise refuse("must not be set together with models", at="model")
        seen = context_of(info).seen_endpoints
        if self.id in seen:
            raise refuse(
                "is the same endpoint as an earlier one; give each a name of its own", at="name" if self.name else "url"
            )
        seen.add(self.id)
        return self

    @property
    def id(self) -> str:
        """The name, or HOST:PORT."""
        return self.name or str(self.host_port)

    @property
    def host_port(self) -> HostPort:
        """Host and port of the URL, with the scheme's port if it names none."""
        parts = urlsplit(self.url)
        return HostPort(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))

    @property
    def served_models(self) -> tuple[str, ...]:
        """The models named by `model` or `models`; empty means ask the server."""
        return (self.model,) if self.model is not None else self.models

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "description": "URL of a model server."}, handler(core_schema)]}


class DnsEntry(Section):
    """A name with many addresses, each a model server. In YAML a bare HOST:PORT stands for its `name` alone."""

    name: ServiceName = Field(description="HOST:PORT; every address of HOST is an endpoint.")
    scheme: Literal["http", "https"] = Field(default="http", description="How to talk to them.")
    engine: Engine = Field(default="auto", description="Which engine they run.")
    model: Name | None = Field(default=None, description="The one model they serve, if they shall not be asked.")
    credentials: CredentialsName | None = Field(default=None, description="Name of an entry under credentials:.")
    path_prefix: PathPrefix | None = Field(default=None, description="Put before /v1 for these servers.")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "description": "HOST:PORT."}, handler(core_schema)]}


class RegistrationSection(Section):
    """Model servers that announce themselves, for clusters of other kinds (Slurm, RL jobs)."""

    enabled: bool = Field(default=False, description="Accept registrations; needs admin.token.")
    ttl: Duration = Field(default=30.0, description="How long an entry lives if its registrant names no time.")
    ttl_max: Duration = Field(default=3600.0, description="Longest time a registrant may name.")


class EndpointsSection(Section):
    """Where endpoints come from."""

    static: tuple[EndpointEntry, ...] = Field(
        default=(),
        max_length=MAX_ENDPOINTS,
        description="Model servers, each a URL or a mapping. `--to URL` replaces this list.",
        examples=[
            [
                "http://10.0.0.1:8000",
                {
                    "url": "http://10.0.0.2:8000",
                    "name": "b",
                    "labels": {"zone": "x"},
                    "role": "both",
                    "models": ["llama-3-8b"],
                    "engine": "vllm",
                    "group": "g",
                    "credentials": "main",
                    "path_prefix": "/openai",
                    "bootstrap_port": 8998,
                    "endpoint_class": "H100",
                    "metrics_url": "http://10.0.0.2:8000/metrics",
                },
            ]
        ],
    )
    file: FilePath | None = Field(
        default=None,
        description="A file that is watched; it holds `endpoints:` with the same entries.",
        examples=["endpoints.yaml"],
    )
    dns: tuple[DnsEntry, ...] = Field(
        default=(),
        max_length=64,
        description="Names whose every address is a model server (headless Services), each HOST:PORT or a mapping.",
        examples=[["vllm.default.svc.cluster.local:8000"]],
    )
    registration: RegistrationSection = Field(
        default=RegistrationSection(), description="POST and DELETE /endpoints on the admin port."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> EndpointsSection:
        names = [str(entry.name) for entry in self.dns]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refuse(f"{twice} is there twice", at="dns")
        return self


class EndpointFile(Section):
    """The watched endpoints file."""

    endpoints: tuple[EndpointEntry, ...] = Field(default=(), max_length=MAX_ENDPOINTS, description="Model servers.")


class CredentialsEntry(Section):
    """How to talk to some endpoints. Paths are PEM files."""

    api_key: Secret | None = Field(
        default=None, description="Sent as a bearer token. ${NAME}, file:/path or the key itself."
    )
    ca: FilePath | None = Field(default=None, description="Certificates to trust instead of the system's.")
    client_cert: FilePath | None = Field(default=None, description="Client certificate.")
    client_key: FilePath | None = Field(default=None, description="Key of the client certificate.")
    server_name: Host | None = Field(
        default=None, description="Name expected in the server's certificate, if not the URL's host."
    )
    verify: bool = Field(default=True, description="Check the server's certificate.")

    @model_validator(mode="after")
    def _pair(self) -> CredentialsEntry:
        if (self.client_cert is None) != (self.client_key is None):
            given, other = ("client_cert", "client_key") if self.client_key is None else ("client_key", "client_cert")
            raise refuse(f"needs {other} too", at=given)
        return self
