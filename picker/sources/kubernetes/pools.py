"""What a pool asks for: which pods, on which ports. From an InferencePool of either version, or from the configuration.

Nothing here looks at a pod.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from picker.config import LabelSelector, PoolEntry, matching, parse_selector
from picker.sources.kubernetes.objects import PoolV1, PoolV1Alpha2

# The API's own limit; one pod is at most this many endpoints.
MAX_PORTS = 8

_H2C = "kubernetes.io/h2c"
_RUNTIME = "inference.networking.x-k8s.io/model-server-runtime"
# Alibaba Cloud's gateway knows these. Its trt-llm is Triton with the TensorRT-LLM backend, not trtllm-serve.
_RUNTIMES = {"vllm": "vllm", "sglang": "sglang", "trt-llm": "triton"}


class PoolSpec(msgspec.Struct, frozen=True):
    """Pods that `selector` matches serve on `ports`; `h2c` if they speak HTTP/2 without TLS. `engine` is what the pool
    says of its engine, empty if nothing.
    """

    selector: LabelSelector
    ports: tuple[int, ...]
    h2c: bool = False
    engine: str = ""


def read_pool(pool: PoolV1 | PoolV1Alpha2) -> PoolSpec | str:
    """The spec of an InferencePool; a text that says what is wrong with it (`has no ...`) if it cannot be used."""
    if isinstance(pool, PoolV1):
        labels = pool.spec.selector.match_labels
        ports = [port.number for port in pool.spec.target_ports]
        h2c = pool.spec.app_protocol == _H2C
    else:
        labels = pool.spec.selector
        ports = [pool.spec.target_port_number] if pool.spec.target_port_number else []
        h2c = False
    refusal = _refusal(labels, ports)
    if refusal or not labels:
        return refusal
    engine = _RUNTIMES.get((pool.metadata.annotations or {}).get(_RUNTIME, "").strip().lower(), "")
    return PoolSpec(matching(labels), tuple(dict.fromkeys(ports)), h2c, engine)


def _refusal(labels: Mapping[str, str] | None, ports: Sequence[int]) -> str:
    if not labels:
        return "has no selector"
    if not ports:
        return "has no target port"
    if len(ports) > MAX_PORTS:
        return f"has {len(ports)} target ports; at most {MAX_PORTS} are possible"
    wrong = next((port for port in ports if not 1 <= port <= 65535), None)
    return "" if wrong is None else f"has the target port {wrong}; ports are 1 to 65535"


def spec_of(entry: PoolEntry) -> PoolSpec:
    """The spec of an entry with a selector of its own. Raises ValueError for one that names an InferencePool."""
    if entry.selector is None:
        raise ValueError(f"{entry.name} has no selector; its spec is in the cluster")
    return PoolSpec(parse_selector(entry.selector), entry.target_ports)
