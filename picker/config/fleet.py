"""Endpoints and credentials: which model servers there are and how to talk to them.

The same entry is used in the configuration and in the watched endpoints file. Nothing is resolved or contacted here.
"""

from __future__ import annotations

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
from picker.config.values import EndpointUrl, FilePath, Host, HostPort, PageUrl, context_of, refuse

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


Name = Annotated[str, StringConstraints(min_length=1, max_length=253), AfterValidator(_name)]
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
    credentials: Annotated[Name, BeforeValidator(_credentials_exist)] | None = Field(
        default=None, description="Name of an entry under credentials:."
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
