"""Where an endpoint publishes its KV-cache events: what it says itself, or what is usual. Sans-IO, given a GET.

vLLM says it at `/kv_event_sources`, SGLang at `/server_info`; older ones do not, so ports and topic can be configured,
and 5557 with replays at 5558 is what examples use. It opens no sockets of its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.getter import Answer
from picker.signals.kv.messages import Spec

EVENTS_PORT, REPLAY_PORT = 5557, 5558
# Data-parallel ranks of one deployment; the largest known have a few hundred.
MAX_RANKS = 1024
_MAX_TOPIC_CHARS = 512
_MAX_PORT = 65_535

Ask = Callable[[str], Awaitable[Answer | ProbeFailure]]
"""GET of one URL of the endpoint in question."""


class KvPorts(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says. `port` is that of rank 0, 0 to ask the engine; `replay_port` likewise, 0 for none;
    `topic` is what topics begin with, None for what the engine says or any.
    """

    port: int = 0
    replay_port: int = 0
    topic: str | None = None


class Source(msgspec.Struct, frozen=True):
    """One publisher and the data-parallel rank it belongs to."""

    rank: int
    spec: Spec


async def discover(
    endpoint: Endpoint, ask: Ask, ports: KvPorts, *, siblings: int = 1
) -> tuple[Source, ...] | ProbeFailure:
    """The publishers of this endpoint, most often one; none when the engine says that there is none.

    `siblings` counts the endpoints of its pod, itself included. A failure means that nobody could be asked; what is
    usual is not tried then.
    """
    host = host_of(endpoint)
    if ports.port:
        return (configured(endpoint, ports),) if host else ()
    says_nothing = True
    for path, read in (
        ("/kv_event_sources", read_vllm),
        ("/server_info", read_sglang),
        ("/get_server_info", read_sglang),
    ):
        answer = await ask(endpoint.url + path)
        if isinstance(answer, ProbeFailure):
            return answer
        if answer.status >= 500:
            return ProbeFailure.HTTP
        sources = read(answer.body, host) if answer.status == 200 else None
        if sources is not None:
            says_nothing = False
            if sources:
                return mine(_with_topic(sources, ports), endpoint.rank, siblings)
    return (configured(endpoint, ports),) if says_nothing and host else ()


def configured(endpoint: Endpoint, ports: KvPorts) -> Source:
    """Where the publisher is by the configured ports, or the usual ones: each rank adds one to the port."""
    host, rank = host_of(endpoint), endpoint.rank
    port = ports.port or EVENTS_PORT
    # The usual replay port is the events port of rank 1, so with ranks it must be configured.
    replay = ports.replay_port or (REPLAY_PORT if not ports.port and not rank else 0)
    return Source(
        rank,
        Spec(
            endpoint=_address(host, port + rank),
            replay_endpoint=_address(host, replay + rank) if replay else "",
            topic=ports.topic or "",
        ),
    )


def mine(sources: Sequence[Source], rank: int, siblings: int) -> tuple[Source, ...]:
    """Which of an engine's publishers belong to its endpoint with this rank, of so many endpoints.

    An engine with one port balances over its ranks itself, so all of them are behind it. Where each rank has a port
    they belong together by order, since a pod's ranks need not begin at 0.
    """
    ordered = tuple(sorted(sources, key=lambda source: source.rank))
    if len(ordered) == 1 or siblings <= 1:
        return ordered
    if len(ordered) == siblings:
        return ordered[rank : rank + 1]
    return tuple(source for source in ordered if source.rank == rank)


# -- what engines say --------------------------------------------------------------------------------------------------


class _VllmSource(msgspec.Struct):
    endpoint: str | None = None
    replay_endpoint: str | None = None
    topic: str | None = None
    data_parallel_rank: int | None = None


class _VllmSources(msgspec.Struct):
    sources: list[_VllmSource]


class _SglangEvents(msgspec.Struct):
    endpoint_port_base: int
    endpoint_host: str = "*"
    topic: str | None = None
    dp_size: int = 1
    publisher: str | None = None


class _SglangInfo(msgspec.Struct):
    kv_events: _SglangEvents | msgspec.UnsetType | None = msgspec.UNSET


_VLLM = msgspec.json.Decoder(_VllmSources | list[_VllmSource])
_VLLM_BY_RANK = msgspec.json.Decoder(dict[int, _VllmSource])
_SGLANG = msgspec.json.Decoder(_SglangInfo)


def read_vllm(body: bytes, host: str) -> list[Source] | None:
    """The answer of `/kv_event_sources`; None when it is none. Sources that nobody can reach are left out.

    Three forms are known: objects by rank (0.32), a list of them, and a list as `sources`.
    """
    by_rank: Mapping[int, _VllmSource]
    try:
        said = _VLLM.decode(body)
        listed = said if isinstance(said, list) else said.sources
        by_rank = {
            number if source.data_parallel_rank is None else source.data_parallel_rank: source
            for number, source in enumerate(listed[:MAX_RANKS])
        }
    except (msgspec.DecodeError, RecursionError):
        try:
            by_rank = _VLLM_BY_RANK.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return None
    sources = []
    for rank, said_of_it in sorted(by_rank.items())[:MAX_RANKS]:
        events = reachable(said_of_it.endpoint or "", host)
        if events:
            replays = reachable(said_of_it.replay_endpoint or "", host)
            topic = (said_of_it.topic or "")[:_MAX_TOPIC_CHARS]
            sources.append(Source(rank, Spec(endpoint=events, replay_endpoint=replays, topic=topic)))
    return sources


def read_sglang(body: bytes, host: str) -> list[Source] | None:
    """The `kv_events` part of `/server_info`; None when the page has no such part. There, null says that nothing is
    published.
    """
    try:
        said = _SGLANG.decode(body).kv_events
    except (msgspec.DecodeError, RecursionError):
        return None
    if said is msgspec.UNSET:
        return None
    if said is None or said.publisher not in (None, "zmq"):
        return []
    sources = []
    for rank in range(min(said.dp_size, MAX_RANKS)):
        port = said.endpoint_port_base + rank
        events = reachable(f"tcp://{_bracketed(said.endpoint_host)}:{port}", host)
        if events:
            sources.append(Source(rank, Spec(endpoint=events, topic=(said.topic or "")[:_MAX_TOPIC_CHARS])))
    return sources


def reachable(address: str, host: str) -> str:
    """The address as others can reach it; empty when they cannot.

    Engines tell what they bound: wildcards, loopback and names of nodes are replaced by `host`, the endpoint's own. A
    literal address is kept: ranks may run on other hosts.
    """
    try:
        parts = urlsplit(address)
        port = parts.port or 0
    except ValueError:
        return ""
    if parts.scheme != "tcp" or not 0 < port <= _MAX_PORT:
        return ""
    said = parts.hostname or ""
    try:
        literal = ipaddress.ip_address(said)
    except ValueError:
        chosen = host
    else:
        chosen = host if literal.is_unspecified or literal.is_loopback else said
    return _address(chosen, port) if chosen else ""


def host_of(endpoint: Endpoint) -> str:
    """The endpoint's address without its port, else the host of its URL."""
    try:
        return urlsplit(f"//{endpoint.address}").hostname or urlsplit(endpoint.url).hostname or ""
    except ValueError:
        return ""


def _address(host: str, port: int) -> str:
    return f"tcp://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _with_topic(sources: list[Source], ports: KvPorts) -> list[Source]:
    if ports.topic is None:
        return sources
    return [Source(source.rank, msgspec.structs.replace(source.spec, topic=ports.topic)) for source in sources]
