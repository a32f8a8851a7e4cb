"""One pool as a state machine: pods, nodes and the pool's spec go in, changes of endpoints come out.

Pure: no I/O, no clock. The endpoints depend on the last state of everything only, never on the order it came in. One
change costs the work for one replica, not for the pool.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from picker.config import KubernetesSection, PoolEntry
from picker.core.updates import EndpointUpdate, Remove, Upsert
from picker.core.values import Endpoint
from picker.sources.kubernetes.derive import PodFacts, Scope, endpoints_of, facts_of
from picker.sources.kubernetes.hardware import node_facts
from picker.sources.kubernetes.objects import Changed, Gone, Listed, Node, Pod
from picker.sources.kubernetes.pools import PoolSpec
from picker.sources.kubernetes.roles import RoleReader

# Pods named in a problem; a person needs an example, not the list.
_MAX_NAMED = 3


class _Claim(msgspec.Struct, frozen=True):
    """An endpoint that wants its address. A younger pod's claim beats an older one's: addresses are used again."""

    born_at: str
    endpoint: Endpoint


class PoolView:
    """The endpoints of one pool. `pool_id` is `namespace/name` and also the source of the updates.

    The view wants to hear of all pods of the pool's namespace: parts of a replica need not be in the pool. Pods of
    other namespaces are passed over.
    """

    def __init__(self, pool_id: str, entry: PoolEntry, section: KubernetesSection) -> None:
        self._id = pool_id
        self._namespace = pool_id.partition("/")[0]
        self._entry = entry
        self._class_labels = section.class_labels
        self._role_of = RoleReader(section.role_labels)
        self._scope: Scope | None = None
        self._pods: dict[str, PodFacts] = {}
        self._nodes: dict[str, dict[str, str]] = {}
        # Names of pods, by what they are looked up with when something changes.
        self._replicas: dict[str, set[str]] = {}
        self._on_node: dict[str, set[str]] = {}
        # Names of the pods the pool selects. Front ends serve only where there are no servers behind them.
        self._servers: set[str] = set()
        self._front_ends: set[str] = set()
        self._front_ends_serve = True
        # What each replica wants; the same by address and id; who got the address.
        self._wanted: dict[str, list[_Claim]] = {}
        self._claims: dict[str, dict[str, _Claim]] = {}
        self._holders: dict[str, str] = {}
        self._listed: dict[str, Endpoint] = {}

    def __repr__(self) -> str:
        return f"<PoolView {self._id} [{len(self._pods)} pods | {len(self._listed)} endpoints]>"

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All endpoints now, by id."""
        return tuple(self._listed[name] for name in sorted(self._listed))

    @property
    def problem(self) -> str:
        """What a person should put right about this pool; empty if nothing."""
        if not self._servers or not self._front_ends:
            return ""
        names = sorted(self._front_ends)
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        return (
            f"selects front ends ({', '.join(names[:_MAX_NAMED])}{more}) beside the model servers they route to;"
            " the front ends get no requests"
        )

    def set_spec(self, spec: PoolSpec | None) -> list[EndpointUpdate]:
        """The pool is like this now; None: there is none, so there are no endpoints."""
        scope = None if spec is None else Scope(self._id, spec, self._entry, self._class_labels)
        if scope == self._scope:
            return []
        self._scope = scope
        for facts in self._pods.values():
            self._classify(facts)
        return self._settle(self._replicas)

    def pods(self, event: Listed[Pod] | Changed[Pod] | Gone[Pod]) -> list[EndpointUpdate]:
        """Takes in what is new about the pods of the namespace."""
        touched: set[str] = set()
        match event:
            case Listed(objects):
                kept = {pod.metadata.name for pod in objects if pod.metadata.namespace == self._namespace}
                for name in [name for name in self._pods if name not in kept]:
                    touched |= self._drop(name)
                for pod in objects:
                    touched |= self._put(pod)
            case Changed(pod):
                touched = self._put(pod)
            case Gone(pod):
                known = self._pods.get(pod.metadata.name)
                # A pod of the same name may have taken its place already.
                if known is not None and self._is_same(known.pod, pod):
                    touched = self._drop(pod.metadata.name)
        return self._settle(touched)

    def nodes(self, event: Listed[Node] | Changed[Node] | Gone[Node]) -> list[EndpointUpdate]:
        """Takes in what is new about nodes."""
        match event:
            case Listed(objects):
                found = {node.metadata.name: self._read(node) for node in objects}
                changed = {name for name in self._nodes.keys() | found if self._nodes.get(name) != found.get(name)}
                self._nodes = found
            case Changed(node):
                read = self._read(node)
                changed = {node.metadata.name} if self._nodes.get(node.metadata.name) != read else set()
                self._nodes[node.metadata.name] = read
            case Gone(node):
                changed = {node.metadata.name} if self._nodes.pop(node.metadata.name, None) is not None else set()
        pods = (self._pods[name] for node_name in changed for name in self._on_node.get(node_name, ()))
        return self._settle({facts.replica for facts in pods})

    # -- pods ------------------------------------------------------------------------------------------------------

    def _put(self, pod: Pod) -> set[str]:
        """The replicas to look at again, now that this pod is like this."""
        name = pod.metadata.name
        known = self._pods.get(name)
        if pod.metadata.namespace != self._namespace or not name or (known is not None and known.pod == pod):
            return set()
        touched = self._drop(name)
        facts = facts_of(pod, self._role_of)
        self._pods[name] = facts
        self._replicas.setdefault(facts.replica, set()).add(name)
        if pod.spec.node_name:
            self._on_node.setdefault(pod.spec.node_name, set()).add(name)
        self._classify(facts)
        return touched | {facts.replica}

    def _drop(self, name: str) -> set[str]:
        facts = self._pods.pop(name, None)
        if facts is None:
            return set()
        _discard(self._replicas, facts.replica, name)
        _discard(self._on_node, facts.pod.spec.node_name or "", name)
        self._servers.discard(name)
        self._front_ends.discard(name)
        return {facts.replica}

    def _classify(self, facts: PodFacts) -> None:
        """Pods count whether they are ready or not: a front end does not take over while its servers start."""
        name = facts.pod.metadata.name
        self._servers.discard(name)
        self._front_ends.discard(name)
        selected = self._scope is not None and self._scope.spec.selector.matches(facts.labels)
        if selected and not facts.ended and not facts.duty.ignored:
            (self._front_ends if facts.duty.front_end else self._servers).add(name)

    @staticmethod
    def _is_same(known: Pod, gone: Pod) -> bool:
        return known.metadata.namespace == gone.metadata.namespace and known.metadata.uid == gone.metadata.uid

    def _read(self, node: Node) -> dict[str, str]:
        return node_facts(node.metadata.labels or {}, self._class_labels)

    # -- endpoints -------------------------------------------------------------------------------------------------

    def _settle(self, touched: Iterable[str]) -> list[EndpointUpdate]:
        """Derives these replicas again and tells what is other than before."""
        replicas = set(touched)
        if self._front_ends_serve != (not self._servers):
            self._front_ends_serve = not self._servers
            replicas |= {self._pods[name].replica for name in self._front_ends}
        wishes = {replica: self._wants(replica) for replica in replicas}
        changed = {replica: wish for replica, wish in wishes.items() if wish != self._wanted.get(replica, [])}
        return self._elect(self._claim(changed))

    def _claim(self, wishes: dict[str, list[_Claim]]) -> set[str]:
        """Puts up what these replicas want instead of what they wanted before; the addresses where this matters."""
        # First all old ones go: a pod that joins another replica takes its address along.
        old = [claim for replica in wishes for claim in self._wanted.pop(replica, ())]
        for claim in old:
            claims = self._claims[claim.endpoint.address]
            del claims[claim.endpoint.id]
            if not claims:
                del self._claims[claim.endpoint.address]
        self._wanted |= {replica: wish for replica, wish in wishes.items() if wish}
        new = [claim for wish in wishes.values() for claim in wish]
        for claim in new:
            self._claims.setdefault(claim.endpoint.address, {})[claim.endpoint.id] = claim
        return {claim.endpoint.address for claim in (*old, *new)}

    def _wants(self, replica: str) -> list[_Claim]:
        if self._scope is None:
            return []
        names = sorted(self._replicas.get(replica, ()))
        takes = self._servers or self._front_ends
        members = [self._pods[name] for name in names]
        chosen = [self._pods[name] for name in names if name in takes]
        return [
            _Claim(self._pods[endpoint.pod].pod.metadata.creation_timestamp or "", endpoint)
            for endpoint in endpoints_of(members, chosen, self._scope, self._nodes)
        ]

    def _elect(self, addresses: set[str]) -> list[EndpointUpdate]:
        """Gives each address to its youngest claim, by name among equals. Who goes is told before who comes."""
        gone: set[str] = set()
        there: dict[str, Endpoint] = {}
        for address in addresses:
            holder = self._holders.pop(address, None)
            if holder is not None:
                gone.add(holder)
            claims = self._claims.get(address)
            if claims:
                endpoint = max(claims.values(), key=lambda claim: (claim.born_at, claim.endpoint.id)).endpoint
                self._holders[address] = endpoint.id
                there[endpoint.id] = endpoint
        updates: list[EndpointUpdate] = []
        for name in sorted(gone - there.keys()):
            del self._listed[name]
            updates.append(Remove(self._id, name))
        for name, endpoint in sorted(there.items()):
            if self._listed.get(name) != endpoint:
                self._listed[name] = endpoint
                updates.append(Upsert(self._id, endpoint))
        return updates


def _discard(index: dict[str, set[str]], key: str, name: str) -> None:
    names = index.get(key)
    if names is not None:
        names.discard(name)
        if not names:
            del index[key]
