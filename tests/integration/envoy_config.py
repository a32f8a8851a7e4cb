"""Writes the configuration of a real Envoy from a few listener specifications.

Pure: values in, a mapping for Envoy's static bootstrap out. Every address is a loopback address; listeners and the
admin page get port 0, so that the kernel chooses and nothing races for a port. Starting Envoy is `envoy.py`'s job.
Checked against Envoy 1.40.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from protos import SERVICE

Config = dict[str, Any]
BodyMode = Literal["NONE", "STREAMED", "BUFFERED", "BUFFERED_PARTIAL", "FULL_DUPLEX_STREAMED"]
ClusterKind = Literal["original_dst", "override_host"]

DESTINATION = "x-gateway-destination-endpoint"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
LB_NAMESPACE = "envoy.lb"
POOL_KEY = "x-waypost-pool"
FULL_DUPLEX = "FULL_DUPLEX_STREAMED"

PICKER_CLUSTER = "picker"
CHECKED_PICKER_CLUSTER = "picker_checked"
HEALTH_INTERVAL = "0.25s"

_TYPES = "type.googleapis.com/envoy"
_EXTENSIONS = f"{_TYPES}.extensions"
_NEVER = "86400s"
# Above what any test opens at once, so that Envoy's circuit breakers never answer in our place.
_BREAKERS = {
    "thresholds": [
        {"max_connections": 20_000, "max_pending_requests": 20_000, "max_requests": 20_000, "max_retries": 1_000}
    ]
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Envoy's own retries on the route. Under override_host they walk the comma list of the destination."""

    attempts: int = 2
    on: str = "connect-failure,refused-stream,reset,5xx"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyListener:
    """One listener and the route behind it.

    `endpoints` are `host:port`, only for `override_host`; the fallback there is round robin over them.
    `ext_proc=False` makes a plain proxy: over `original_dst` the client then sets the destination header itself.
    `fail_open` uses a picker cluster with gRPC health checks and no panic routing, and `failure_mode_allow`;
    together with `override_host` it serves without a picker. `subset` is what a gateway would put into the subset
    hint: a comma string or a list; `pool` what its route would say about the pool. `message_timeout_s` means
    nothing in full duplex. `response_trailers` SEND keeps the picker's stream open to the end of a response whose
    body it does not see.
    """

    name: str
    ext_proc: bool = True
    request_body_mode: BodyMode = "FULL_DUPLEX_STREAMED"
    response_body_mode: BodyMode = "NONE"
    response_headers: bool = True
    response_trailers: bool = True
    cluster: ClusterKind = "original_dst"
    endpoints: tuple[str, ...] = ()
    fail_open: bool = False
    subset: str | tuple[str, ...] | None = None
    pool: str | None = None
    message_timeout_s: float = 10.0
    retries: Retries | None = None
    allow_mode_override: bool = False
    observability: bool = False
    buffer_bytes: int | None = None


def envoy_config(
    listeners: Sequence[EnvoyListener], *, picker_address: str | None = None, picker_tls: bool = False
) -> Config:
    """The bootstrap. Raises ValueError for specifications Envoy would refuse or misread."""
    names = [listener.name for listener in listeners]
    if len(set(names)) != len(names):
        raise ValueError(f"listener names are not unique: {names}")
    clusters = [_upstream_cluster(listener) for listener in listeners]
    if any(listener.ext_proc for listener in listeners):
        if picker_address is None:
            raise ValueError("a listener with ext_proc needs picker_address")
        clusters.append(_picker_cluster(PICKER_CLUSTER, picker_address, tls=picker_tls))
        if any(listener.fail_open for listener in listeners):
            clusters.append(_checked(_picker_cluster(CHECKED_PICKER_CLUSTER, picker_address, tls=picker_tls)))
    return {
        "admin": {"address": _address("127.0.0.1:0")},
        "static_resources": {"listeners": [_listener(listener) for listener in listeners], "clusters": clusters},
    }


def _address(address: str) -> Config:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _typed(name: str, path: str, settings: Mapping[str, object] | None = None) -> Config:
    """An extension by name, with its configuration message `path` below envoy.extensions."""
    return {"name": name, "typed_config": {"@type": f"{_EXTENSIONS}.{path}", **(settings or {})}}


def _load(name: str, endpoints: Sequence[str]) -> Config:
    members = [{"endpoint": {"address": _address(endpoint)}} for endpoint in endpoints]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]}


def _cluster_name(spec: EnvoyListener) -> str:
    return f"{spec.cluster}_{spec.name}"


def _listener(spec: EnvoyListener) -> Config:
    manager = {
        "stat_prefix": spec.name,
        "generate_request_id": True,
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "stream_idle_timeout": "0s",
        "route_config": {
            "name": spec.name,
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [_route(spec)]}],
        },
        "http_filters": _filters(spec),
    }
    network = "filters.network.http_connection_manager.v3.HttpConnectionManager"
    chain = {"filters": [_typed("envoy.filters.network.http_connection_manager", network, manager)]}
    listener: Config = {"name": spec.name, "address": _address("127.0.0.1:0"), "filter_chains": [chain]}
    if spec.buffer_bytes is not None:
        listener["per_connection_buffer_limit_bytes"] = spec.buffer_bytes
    return listener


def _route(spec: EnvoyListener) -> Config:
    route: Config = {"cluster": _cluster_name(spec), "timeout": _NEVER, "idle_timeout": _NEVER}
    if spec.retries is not None:
        route["retry_policy"] = {
            "retry_on": spec.retries.on,
            "num_retries": spec.retries.attempts,
            "retry_host_predicate": [
                _typed(
                    "envoy.retry_host_predicates.previous_hosts", "retry.host.previous_hosts.v3.PreviousHostsPredicate"
                )
            ],
            "host_selection_retry_max_attempts": 5,
        }
    return {"match": {"prefix": "/"}, "route": route}


def _filters(spec: EnvoyListener) -> list[Config]:
    filters: list[Config] = []
    hints: list[Config] = []
    if spec.subset is not None:
        value = spec.subset if isinstance(spec.subset, str) else list(spec.subset)
        hints.append({"metadata_namespace": SUBSET_NAMESPACE, "value": {SUBSET_KEY: value}, "allow_overwrite": True})
    if spec.pool is not None:
        hints.append({"metadata_namespace": LB_NAMESPACE, "value": {POOL_KEY: spec.pool}, "allow_overwrite": True})
    if hints:
        path = "filters.http.set_metadata.v3.Config"
        filters.append(_typed("envoy.filters.http.set_metadata", path, {"metadata": hints}))
    if spec.ext_proc:
        path = "filters.http.ext_proc.v3.ExternalProcessor"
        filters.append(_typed("envoy.filters.http.ext_proc", path, _ext_proc(spec)))
    filters.append(
        _typed("envoy.filters.http.router", "filters.http.router.v3.Router", {"suppress_envoy_headers": True})
    )
    return filters


def _ext_proc(spec: EnvoyListener) -> Config:
    full_duplex_response = spec.response_body_mode == FULL_DUPLEX
    cluster = CHECKED_PICKER_CLUSTER if spec.fail_open else PICKER_CLUSTER
    return {
        "grpc_service": {"envoy_grpc": {"cluster_name": cluster, "authority": "picker"}, "timeout": _NEVER},
        "failure_mode_allow": spec.fail_open,
        "message_timeout": f"{spec.message_timeout_s:.3f}s",
        "allow_mode_override": spec.allow_mode_override,
        "observability_mode": spec.observability,
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": spec.request_body_mode,
            # Envoy refuses full duplex without the trailers of the same direction.
            "request_trailer_mode": _send(spec.request_body_mode == FULL_DUPLEX),
            "response_header_mode": _send(spec.response_headers),
            "response_body_mode": spec.response_body_mode,
            "response_trailer_mode": _send(spec.response_trailers or full_duplex_response),
        },
        "metadata_options": {
            "forwarding_namespaces": {"untyped": [SUBSET_NAMESPACE, LB_NAMESPACE]},
            "receiving_namespaces": {"untyped": [LB_NAMESPACE]},
        },
    }


def _send(wanted: bool) -> str:
    return "SEND" if wanted else "SKIP"


def _upstream_cluster(spec: EnvoyListener) -> Config:
    name = _cluster_name(spec)
    cluster: Config = {"name": name, "connect_timeout": "5s", "circuit_breakers": _BREAKERS}
    if spec.cluster == "original_dst":
        if spec.endpoints:
            raise ValueError(f"listener {spec.name}: original_dst takes its one endpoint from the header")
        return cluster | {
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
        }
    if not spec.endpoints:
        raise ValueError(f"listener {spec.name}: override_host needs endpoints")
    policies = "load_balancing_policies"
    round_robin = _typed("envoy.load_balancing_policies.round_robin", f"{policies}.round_robin.v3.RoundRobin")
    override = {
        "override_host_sources": [
            {"metadata": {"key": LB_NAMESPACE, "path": [{"key": DESTINATION}]}},
            {"header": DESTINATION},
        ],
        "fallback_policy": {"policies": [{"typed_extension_config": round_robin}]},
    }
    policy = _typed(
        "envoy.load_balancing_policies.override_host", f"{policies}.override_host.v3.OverrideHost", override
    )
    return cluster | {
        "type": "STATIC",
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
        "load_assignment": _load(name, spec.endpoints),
    }


def _picker_cluster(name: str, address: str, *, tls: bool) -> Config:
    http2 = {"initial_stream_window_size": 1 << 20, "initial_connection_window_size": 1 << 24}
    options = {
        "@type": f"{_EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": http2},
    }
    cluster: Config = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": _BREAKERS,
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "load_assignment": _load(name, [address]),
    }
    if tls:
        # No validation context: the picker's certificate is self-signed, as gateways expect it to be.
        context = {"common_tls_context": {"alpn_protocols": ["h2"]}}
        path = "transport_sockets.tls.v3.UpstreamTlsContext"
        cluster["transport_socket"] = _typed("envoy.transport_sockets.tls", path, context)
    return cluster


def _checked(cluster: Config) -> Config:
    """With health checks, and without the panic routing that would try a picker known to be gone."""
    check = {
        "timeout": "1s",
        "interval": HEALTH_INTERVAL,
        "no_traffic_interval": HEALTH_INTERVAL,
        "unhealthy_interval": HEALTH_INTERVAL,
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": SERVICE},
    }
    return cluster | {"health_checks": [check], "common_lb_config": {"healthy_panic_threshold": {"value": 0}}}
