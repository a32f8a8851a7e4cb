"""From a configuration entry to an endpoint. Entries are validated before; nothing is resolved or contacted here."""

from __future__ import annotations

from urllib.parse import urlsplit

from picker.config import EndpointEntry
from picker.config.values import HostPort, is_ip
from picker.core.values import Endpoint, Role


def endpoint_of(entry: EndpointEntry) -> Endpoint:
    """The endpoint an entry describes. `address` is set if the URL holds an IP address, and empty for a host name."""
    host_port = entry.host_port
    return Endpoint(
        id=entry.id,
        url=f"{urlsplit(entry.url).scheme}://{host_port}",
        address=str(host_port) if is_ip(host_port.host) else "",
        role=Role(entry.role),
        engine=entry.engine,
        group=entry.group or "",
        credentials=entry.credentials or "",
        path_prefix=entry.path_prefix or "",
        bootstrap_port=entry.bootstrap_port or 0,
        endpoint_class=entry.endpoint_class or "",
        models=frozenset(entry.served_models),
        metrics_url=entry.metrics_url or "",
        labels=dict(entry.labels),
    )


def host_of(endpoint: Endpoint) -> str:
    """The host name to resolve; empty when the URL holds an IP address."""
    host = urlsplit(endpoint.url).hostname or ""
    return "" if is_ip(host) else host


def address_at(endpoint: Endpoint, ip: str) -> str:
    """`ip` with the port of the endpoint's URL, as Envoy writes it."""
    port = urlsplit(endpoint.url).port
    if port is None:
        raise ValueError(f"endpoint {endpoint.id} has a URL without a port: {endpoint.url}")
    return str(HostPort(ip, port))
