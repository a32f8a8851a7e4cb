"""The small sections of the configuration: one model per section, every key with a default.

The description of each field is what `config example` and `config schema` print. No section knows another one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from picker.config.secrets import Secret
from picker.config.values import (
    Address,
    Count,
    Delay,
    Duration,
    FilePath,
    Host,
    HostPort,
    Memory,
    MemoryBound,
    Port,
    Size,
    not_bool,
    refuse,
)


class Section(BaseModel):
    """What all parts of a configuration share: frozen, unknown keys refused, no value means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


def _route(value: object) -> str:
    if (
        not isinstance(value, str)
        or not value.startswith("/")
        or any(c in value for c in "?#% ")
        or "//" in value
        or "/." in value
    ):
        raise refuse("must be a path such as /v1/foo")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Route = Annotated[str, BeforeValidator(_route)]
SmallCount = Annotated[Count, Field(le=100)]
Fallbacks = Annotated[int, BeforeValidator(not_bool), Field(ge=0, le=16)]


class AdminSection(Section):
    """Health, metrics and debug pages."""

    listen: Address = Field(
        default=HostPort("127.0.0.1", 9090),
        description="HOST:PORT of /healthz, /readyz, /metrics and /debug for `waypost run`.",
    )
    reference_metrics: bool = Field(
        default=False,
        description="Show metrics under the names of the reference picker too (inference_pool_*, llm_d_epp_*).",
    )
    token: Secret | None = Field(
        default=None,
        description="Bearer token for the debug pages and x-waypost-explain. Without one they answer on loopback only.",
        examples=["${WAYPOST_ADMIN_TOKEN}"],
    )


class GatewaySection(Section):
    """The HTTP door."""

    allow_paths: tuple[Route, ...] = Field(
        default=(),
        max_length=100,
        description="Paths to relay besides the known ones. Everything else is 404.",
        examples=[["/v1/foo"]],
    )
    expose_headers: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Send x-waypost-endpoint and x-waypost-decision-ms. auto: only to clients on loopback.",
    )
    max_attempts: SmallCount = Field(
        default=3, description="How many endpoints one request may try before its first byte."
    )


class LimitsSection(Section):
    """Bounds on what clients may make Waypost hold."""

    body: Size = Field(default=64 * 2**20, description="Largest request body; above it 413.")
    bodies_in_memory: Memory = Field(
        default=MemoryBound(ratio=0.25),
        description="All request bodies together: a share of the memory this process may use, or a size. Above it 429.",
    )
    headers: Size = Field(default=64 * 2**10, description="Size of all headers of one request; above it 431.")
    header_count: Count = Field(default=100, description="Number of headers of one request; above it 431.")
    response_ids: Count = Field(
        default=10_000, description="How many stored responses are remembered with the endpoint that holds them."
    )
    response_id_ttl: Duration = Field(default=3600.0, description="How long a stored response is remembered.")
    concurrent_requests: Count = Field(default=4096, description="Requests in progress at once; above it 429.")


class TimeoutsSection(Section):
    """Deadlines on clients and on model servers."""

    connect: Duration = Field(default=2.0, description="Opening a connection to a model server.")
    first_byte: Duration = Field(default=300.0, description="From sending a request to the first byte of its answer.")
    between_chunks: Duration = Field(default=120.0, description="Longest silence in the middle of an answer.")
    total: Duration = Field(default=3600.0, description="From receiving a request to the end of its answer.")
    request_headers: Duration = Field(default=10.0, description="How long a client may take to send its headers.")
    request_body: Duration = Field(default=60.0, description="How long a client may take to send its body.")
    keep_alive: Duration = Field(default=75.0, description="How long an idle client connection stays open.")


class ScrapeSection(Section):
    """Reading the metrics of model servers."""

    busy_interval: Duration = Field(
        default=0.2, description="Time between two scrapes of an endpoint with requests in flight."
    )
    idle_interval: Duration = Field(default=1.0, description="Time between two scrapes of an idle endpoint.")
    timeout: Duration = Field(default=0.6, description="Longest wait for one metrics page.")
    stale_after: Duration = Field(default=5.0, description="Figures older than this count as unknown.")
    models_interval: Duration = Field(default=15.0, description="Time between two reads of an endpoint's model list.")

    @model_validator(mode="after")
    def _idle_is_slower(self) -> ScrapeSection:
        if self.idle_interval < self.busy_interval:
            raise refuse("must not be shorter than scrape.busy_interval", at="idle_interval")
        return self


class HealthSection(Section):
    """When an endpoint loses traffic."""

    hung_after: Duration = Field(
        default=2.0,
        description="In-flight requests but no data and no engine progress for this long (plus prefill): hung.",
    )
    probe_failures: SmallCount = Field(
        default=2, description="Probes in a row that find nobody before an endpoint is out of rotation."
    )
    breaker_failures: Count = Field(default=5, description="Failures in a row that open the circuit breaker.")
    breaker_open: Duration = Field(
        default=5.0, description="How long the breaker stays open the first time; doubles each time."
    )
    breaker_open_max: Duration = Field(default=60.0, description="Longest time the breaker stays open.")

    @model_validator(mode="after")
    def _longest_is_longest(self) -> HealthSection:
        if self.breaker_open_max < self.breaker_open:
            raise refuse("must not be shorter than health.breaker_open", at="breaker_open_max")
        return self


class PickerSection(Section):
    """The ext-proc door (`waypost picker`)."""

    host: Host = Field(default="0.0.0.0", description="Address all three ports bind to.")
    grpc_port: Port = Field(default=9002, description="ext-proc and gRPC health.")
    grpc_health_port: Port = Field(default=9003, description="gRPC health alone, without TLS.")
    metrics_port: Port = Field(default=9090, description="/healthz, /readyz, /metrics and /debug.")
    secure_serving: bool = Field(
        default=True, description="TLS on grpc_port; with a self-signed certificate unless cert_path is set."
    )
    cert_path: FilePath | None = Field(
        default=None, description="Directory with tls.crt and tls.key.", examples=["/etc/waypost/tls"]
    )
    cert_reload: bool = Field(default=False, description="Read the certificate again when its files change.")
    response_path: Literal["observe", "leave"] = Field(
        default="observe",
        description="observe: follow responses to their end. leave: close the ext-proc stream after the request phase.",
    )
    fallbacks: Fallbacks = Field(
        default=0, description="How many further endpoints to name after the chosen one, separated by commas."
    )
    deadline: Duration = Field(default=10.0, description="Longest time for one exchange with the proxy.")
    subset_filter: bool = Field(default=True, description="Obey the endpoint subset the proxy names.")
    emit_scores: bool = Field(default=False, description="Put the scores of the decision into the dynamic metadata.")
    max_message: Size = Field(default=64 * 2**20, description="Largest gRPC message accepted.")
    max_streams: Count = Field(default=10_000, description="ext-proc streams open at once.")
    conformance: bool = Field(
        default=False,
        description="Obey test-epp-endpoint-selection and say who served, as conformance tests of gateways want it.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> PickerSection:
        if self.grpc_health_port and self.grpc_health_port == self.grpc_port:
            raise refuse("must differ from picker.grpc_port", at="grpc_health_port")
        if self.metrics_port and self.metrics_port in (self.grpc_port, self.grpc_health_port):
            raise refuse("must differ from picker.grpc_port and picker.grpc_health_port", at="metrics_port")
        if self.cert_reload and self.cert_path is None:
            raise refuse("needs picker.cert_path", at="cert_reload")
        return self


class DrainSection(Section):
    """What SIGTERM does."""

    delay: Delay = Field(
        default=0.0, description="Between not being ready and refusing new requests, so that load balancers notice."
    )
    timeout: Duration = Field(default=30.0, description="Longest wait for requests in progress; then they are cut.")


class LogSection(Section):
    """One line per request on stderr; prompts are never logged."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info", description="Least important level to print."
    )
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, json elsewhere."
    )
