"""The ports of a pod: which of the pool's are in use, which it declares, where its metrics and SGLang's bootstrap are.

What a person or program wrote into an annotation may be anything: what makes no sense is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from picker.config import HostPort, PoolEntry
from picker.core.values import Role
from picker.sources.kubernetes.commands import Commands
from picker.sources.kubernetes.objects import Pod

SGLANG_BOOTSTRAP_PORT = 8998
_TRITON_METRICS_PORT = 8002
# In Knative pods of KServe this is the queue proxy's own page, without a word from the engine.
_QUEUE_PROXY_METRICS_PORT = 9091

_ACTIVE = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
_BOOTSTRAP = ("sglang.ai/bootstrap-port", "model.aibrix.ai/sglang-bootstrap-port")
_PROMETHEUS = "prometheus.io/"
# As long as a path of the configuration may be.
_MAX_PATH = 253

_NO_MAP: Mapping[str, str] = {}


def active_ports(pod: Pod, ports: tuple[int, ...]) -> tuple[int, ...]:
    """The pool's ports that the pod serves on now: all, or those its annotation lists. An empty list is none."""
    annotations = pod.metadata.annotations or _NO_MAP
    text = next((annotations[key] for key in _ACTIVE if key in annotations), None)
    if text is None:
        return ports
    listed = {port_number(item) for item in text.split(",")}
    return tuple(port for port in ports if port in listed)


def declares(pod: Pod, port: int) -> bool:
    """Whether a container, or a sidecar that starts before them, declares this port."""
    containers = (*(pod.spec.containers or ()), *(pod.spec.init_containers or ()))
    return any(declared.container_port == port for container in containers for declared in container.ports or ())


def bootstrap_port(pod: Pod, role: Role, engine: str, entry: PoolEntry) -> int:
    """Where SGLang's bootstrap server listens; 0 for a pod that is not asked for it."""
    if role not in (Role.PREFILL, Role.BOTH) or engine not in ("sglang", "auto"):
        return 0
    commands = Commands(pod)
    told = next((port for port in map(port_number, _bootstrap_texts(pod, commands)) if port), 0) or _named(pod)
    if told or entry.bootstrap_port:
        return told or entry.bootstrap_port or 0
    is_sglang = engine == "sglang" or commands.runs_sglang()
    return SGLANG_BOOTSTRAP_PORT if is_sglang and role is Role.PREFILL else 0


def metrics_url(pod: Pod, endpoint_url: str, ip: str, ports: tuple[int, ...], engine: str, entry: PoolEntry) -> str:
    """Where the metrics page is if not at the endpoint's URL, else empty. Without a path it is at the engine's usual.

    The configuration counts before the pod's annotations. Their port is passed over in pools of several ports, where
    every port has a page of its own.
    """
    annotations = pod.metadata.annotations or _NO_MAP
    wanted = annotations.get(_PROMETHEUS + "scrape", "").strip().lower() != "false"
    port = entry.metrics_port or (_annotated_port(pod, annotations) if wanted and len(ports) == 1 else 0)
    scheme = entry.metrics_scheme or (_annotated_scheme(annotations) if wanted else "")
    path = entry.metrics_path or (_annotated_path(annotations) if wanted else "")
    if engine == "triton" and not port:
        port, scheme = _TRITON_METRICS_PORT, scheme or "http"
    own_scheme, _, own_host = endpoint_url.partition("://")
    root = f"{scheme or own_scheme}://{HostPort(ip, port) if port else own_host}"
    return "" if root == endpoint_url and not path else root + path


def port_number(text: str) -> int:
    """A TCP port, or 0 for a text that is none."""
    text = text.strip()
    if not text.isascii() or not text.isdigit() or len(text) > 5:
        return 0
    return int(text) if int(text) <= 65535 else 0


def _bootstrap_texts(pod: Pod, commands: Commands) -> Iterator[str]:
    annotations = pod.metadata.annotations or _NO_MAP
    for key in _BOOTSTRAP:
        yield annotations.get(key, "")
    for container in pod.spec.containers or ():
        for variable in container.env or ():
            if variable.name == "SGLANG_BOOTSTRAP_PORT":
                yield variable.value or ""
    yield commands.bootstrap_port()


def _named(pod: Pod) -> int:
    named = (
        port.container_port
        for container in pod.spec.containers or ()
        for port in container.ports or ()
        if port.name == "bootstrap" and 1 <= port.container_port <= 65535
    )
    return next(named, 0)


def _annotated_port(pod: Pod, annotations: Mapping[str, str]) -> int:
    port = port_number(annotations.get(_PROMETHEUS + "port", ""))
    if port == _QUEUE_PROXY_METRICS_PORT and any(each.name == "queue-proxy" for each in pod.spec.containers or ()):
        return 0
    return port


def _annotated_scheme(annotations: Mapping[str, str]) -> str:
    scheme = annotations.get(_PROMETHEUS + "scheme", "").strip().lower()
    return scheme if scheme in ("http", "https") else ""


def _annotated_path(annotations: Mapping[str, str]) -> str:
    path = annotations.get(_PROMETHEUS + "path", "").strip()
    odd = not path.startswith("/") or not path.isprintable() or any(c in path for c in " #?") or len(path) > _MAX_PATH
    return "" if odd or path == "/" else path
