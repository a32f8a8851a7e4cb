"""From the pods of one replica to its endpoints. A replica is one pod, or the pods of one engine over several nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from picker.config import HostPort, PoolEntry
from picker.config.values import is_ip
from picker.core.values import Endpoint
from picker.sources.kubernetes.commands import Commands
from picker.sources.kubernetes.engines import engine_of
from picker.sources.kubernetes.groups import Membership, instance_of, is_excluded, membership
from picker.sources.kubernetes.hardware import class_of, place_of
from picker.sources.kubernetes.objects import Pod
from picker.sources.kubernetes.pairing import group_of, revision_of
from picker.sources.kubernetes.pools import PoolSpec
from picker.sources.kubernetes.ports import active_ports, bootstrap_port, declares, metrics_url
from picker.sources.kubernetes.roles import Duty, RoleReader

# Labels of one endpoint; the same bound as in the configuration.
MAX_LABELS = 64

# RoleBasedGroup's in-place updates and deletions announce themselves: the pod still is Ready, but about to stop. The
# key is documented for the RoleInstance, as a label; that pods carry it is unverified. Updated pods serve again.
_LIFECYCLE = "rbg.workloads.x-k8s.io/role-instance-lifecycle-state"
_DRAINING = frozenset({"PreparingUpdate", "Updating", "PreparingDelete"})

_NO_MAP: Mapping[str, str] = {}


class PodFacts(msgspec.Struct, frozen=True):
    """What a pod says by itself, whichever pool looks at it. `ended` pods run no more and are only remembered."""

    pod: Pod
    labels: Mapping[str, str]
    duty: Duty
    member: Membership | None
    ready: bool
    ended: bool

    @property
    def replica(self) -> str:
        """The same for all pods of one replica."""
        return self.member.key if self.member else f"pod {self.pod.metadata.name}"


class Scope(msgspec.Struct, frozen=True):
    """The pool that looks at pods, with what the configuration says of it."""

    pool_id: str
    spec: PoolSpec
    entry: PoolEntry
    class_labels: tuple[str, ...] = ()


def facts_of(pod: Pod, role_of: RoleReader) -> PodFacts:
    """Reads one pod."""
    labels = pod.metadata.labels or _NO_MAP
    ended = pod.status.phase in ("Succeeded", "Failed")
    ready = not ended and _is_ready(pod, labels)
    return PodFacts(pod, labels, role_of(labels), membership(pod), ready, ended)


def endpoints_of(
    replica: Sequence[PodFacts], chosen: Sequence[PodFacts], scope: Scope, nodes: Mapping[str, Mapping[str, str]]
) -> list[Endpoint]:
    """The endpoints of one replica: none unless all its pods are there and ready. `chosen` are the pods among them that
    the pool selects. `nodes` are labels by name.
    """
    if not chosen or not _is_whole(replica):
        return []
    uids = [facts.pod.metadata.uid for facts in replica]
    instance = uids[0] if replica[0].member is None else instance_of(uids)
    return [endpoint for facts in chosen for endpoint in _of_pod(facts, instance, scope, nodes)]


def _of_pod(facts: PodFacts, instance: str, scope: Scope, nodes: Mapping[str, Mapping[str, str]]) -> list[Endpoint]:
    pod, labels, entry, spec = facts.pod, facts.labels, scope.entry, scope.spec
    ports = [port for port in active_ports(pod, spec.ports) if _serves(facts, port, entry)]
    if not ports:
        return []
    ip = pod.status.pod_ip or ""
    node = nodes.get(pod.spec.node_name or "", _NO_MAP)
    engine = engine_of(labels, spec.engine, entry.engine)
    common = Endpoint(
        id="",
        url="",
        path_prefix=entry.path_prefix or "",
        role=facts.duty.role,
        engine=engine,
        pool=scope.pool_id,
        pod=pod.metadata.name,
        instance=instance,
        group=group_of(labels),
        revision=revision_of(labels),
        endpoint_class=class_of(pod, node, scope.class_labels),
        place=place_of(pod, node),
        bootstrap_port=0 if facts.duty.front_end else bootstrap_port(pod, facts.duty.role, engine, entry),
        credentials=entry.credentials or "",
        labels=_bounded(labels),
    )
    return [_at(common, pod, ip, port, scope) for port in ports]


def _at(common: Endpoint, pod: Pod, ip: str, port: int, scope: Scope) -> Endpoint:
    address = str(HostPort(ip, port))
    url = f"{scope.entry.scheme}://{address}"
    ports = scope.spec.ports
    return msgspec.structs.replace(
        common,
        id=f"{pod.metadata.namespace}/{pod.metadata.name}:{port}",
        url=url,
        address=address,
        # By the pool's list, so that a rank keeps its number while another is hidden.
        rank=ports.index(port),
        metrics_url=metrics_url(pod, url, ip, ports, common.engine, scope.entry),
    )


def _is_whole(replica: Sequence[PodFacts]) -> bool:
    if not all(facts.ready for facts in replica):
        return False
    members = [facts.member for facts in replica if facts.member is not None]
    if not members:
        return True
    return any(member.leader for member in members) and len(members) >= max(member.size for member in members)


def _serves(facts: PodFacts, port: int, entry: PoolEntry) -> bool:
    """Whether requests may go to this port: always to a leader's, to a worker's as the configuration says."""
    if facts.member is None or facts.member.leader or entry.workers == "always":
        return True
    return entry.workers == "auto" and declares(facts.pod, port) and not Commands(facts.pod).is_rank()


def _is_ready(pod: Pod, labels: Mapping[str, str]) -> bool:
    meta, status = pod.metadata, pod.status
    ip = status.pod_ip or ""
    return (
        meta.deletion_timestamp is None
        and any(each.type == "Ready" and each.status == "True" for each in status.conditions or ())
        # An address with a zone (`%eth0`) fits into no URL.
        and is_ip(ip)
        and "%" not in ip
        and not is_excluded(labels)
        and labels.get(_LIFECYCLE) not in _DRAINING
        and (meta.annotations or _NO_MAP).get(_LIFECYCLE) not in _DRAINING
    )


def _bounded(labels: Mapping[str, str]) -> Mapping[str, str]:
    return labels if len(labels) <= MAX_LABELS else dict(sorted(labels.items())[:MAX_LABELS])
