"""The rights the shipped manifests grant are those the Kubernetes source uses, and no others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest

from picker.config import KubernetesSection
from picker.sources.kubernetes.source import KubernetesSource
from tests.unit.manifests_rig import DEPLOY, Document, documents, of_kind, pods, started

NAMESPACE = "inference"

Right = tuple[str, str]
"""API group and resource."""


class EmptyCluster:
    """An API server that serves every kind and has no objects; it keeps what was asked for."""

    def __init__(self) -> None:
        self.listed: set[str] = set()
        self.watched: set[str] = set()

    async def get(self, path: str, params: Mapping[str, str], *, timeout_s: float) -> bytes:
        """An empty list."""
        self.listed.add(path)
        return b'{"metadata": {"resourceVersion": "1"}, "items": []}'

    async def watch(
        self, path: str, params: Mapping[str, str], *, timeout_s: float, idle_s: float
    ) -> AsyncGenerator[bytes, None]:
        """A watch without events."""
        self.watched.add(path)
        yield b""
        await asyncio.Event().wait()


async def asked(section: KubernetesSection) -> set[Right]:
    """What the source lists and watches; all of it must be in the namespace, but nodes."""
    cluster = EmptyCluster()
    source = KubernetesSource(
        section, cluster, namespace=NAMESPACE, h2c=True, clock=lambda: 0.0, on_trouble=lambda what, text: None
    )
    async with asyncio.timeout(10), aclosing(source.updates()) as updates:
        await anext(updates)
        while not cluster.watched or cluster.watched != cluster.listed:
            await asyncio.sleep(0.001)
    rights = set()
    for path in cluster.listed:
        _, _, group, _, *place, resource = path.replace("/api/", "/apis//").split("/")
        assert place == ([] if resource == "nodes" else ["namespaces", NAMESPACE])
        rights.add((group, resource))
    return rights


def granted(path: Path, account: str) -> list[Document]:
    """The rules an account has: those of its manifest's Role and those of nodes.yaml."""
    subject = {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}
    rules: list[Document] = []
    for file, kind in ((path, "Role"), (DEPLOY / "nodes.yaml", "ClusterRole")):
        (binding,), (role,) = of_kind(file, f"{kind}Binding"), of_kind(file, kind)
        assert binding["roleRef"] == {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": kind,
            "name": role["metadata"]["name"],
        }
        assert subject in binding["subjects"]
        rules += role["rules"]
    return rules


@pytest.mark.parametrize(("path", "deployment"), pods())
async def test_rights_are_what_is_used(path: Path, deployment: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    section = started(deployment, monkeypatch).kubernetes
    account = deployment["spec"]["template"]["spec"].get("serviceAccountName")
    if account is None:
        assert section.pools == ()
        assert not {document["kind"] for document in documents(path)} & {"Role", "RoleBinding", "ServiceAccount"}
        return
    rules = granted(path, account)
    assert all(rule.keys() == {"apiGroups", "resources", "verbs"} for rule in rules)
    assert all(rule["verbs"] == ["get", "list", "watch"] for rule in rules)
    rights = [(group, kind) for rule in rules for group in rule["apiGroups"] for kind in rule["resources"]]
    assert len(set(rights)) == len(rights)
    assert set(rights) == await asked(section)
