"""Finding the cluster, and credentials that change: kubeconfigs, service accounts, exec plugins, certificates."""

from __future__ import annotations

import asyncio
import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from picker.sources.kubernetes.access import SERVICE_ACCOUNT
from picker.sources.kubernetes.api import ClusterApi, NoCluster
from picker.sources.kubernetes.failure import ApiFailure
from tests.fakes.kube_api import FakeKube
from tests.fakes.kube_mirror import PODS, Mirror, connected, mirrored, started, until
from tests.fakes.kube_tls import Authority, service_account

SECRET = "s3cr3t-t0ken"
OUTSIDE = {"HOME": "/nonexistent"}


class Clock:
    """The real clock, and more when a test wants it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def edited(config: Path, **changes: Any) -> Path:
    """The kubeconfig with its only cluster, user or context changed."""
    content = yaml.safe_load(config.read_text())
    for name, change in changes.items():
        content[f"{name}s"][0][name] = change
    config.write_text(yaml.safe_dump(content))
    return config


def inside(kube: FakeKube, account: Path, **options: Any) -> ClusterApi:
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(kube.port)}
    return ClusterApi(service_account=account, environ=environ, **options)


def statuses(kube: FakeKube) -> list[int]:
    return [seen.status for seen in kube.requests]


async def seen_after(kube: FakeKube, mirror: Mirror, name: str) -> None:
    """Whether a change arrives over a new connection."""
    await until(lambda: bool(kube.state.watchers))
    kube.drop()
    kube.put("pods", "default", {"metadata": {"name": name}})
    await until(lambda: mirror.shows(kube))


# -- tokens that are replaced ------------------------------------------------------------------------------------------


async def test_a_replaced_token_is_read_at_once_after_a_401(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with FakeKube(token="first") as kube, connected(kube.kubeconfig(tmp_path, token_file=token)) as api:
        async with mirrored(api) as (mirror, reflector):
            await until(lambda: mirror.lists == 1)
            for number in range(3):
                kube.token = f"token-{number}"
                token.write_text(f"token-{number}\n")
                await seen_after(kube, mirror, f"p{number}")
            assert (mirror.lists, reflector.problem) == (1, "")
            assert not any("credentials" in trouble for trouble in mirror.troubles)
        assert statuses(kube).count(401) == 3


async def test_a_token_that_is_replaced_late(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    clock = Clock()
    async with (
        FakeKube(token="first") as kube,
        connected(kube.kubeconfig(tmp_path, token_file=token), clock=clock) as api,
        mirrored(api) as (mirror, reflector),
    ):
        await until(lambda: bool(kube.state.watchers))
        kube.token = "second"
        kube.drop()
        await until(lambda: "credentials" in reflector.problem)
        token.unlink()
        clock.ahead_s += 3
        await until(lambda: "tokenFile" in reflector.problem or "token" in reflector.problem)
        assert mirror.lists == 1
        token.write_text("second")
        clock.ahead_s += 3
        await seen_after(kube, mirror, "p")
        assert reflector.problem == ""


async def test_a_replaced_token_is_read_before_anybody_refuses_the_old_one(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    clock = Clock()
    async with FakeKube(token="first") as kube:
        async with connected(kube.kubeconfig(tmp_path, token_file=token), clock=clock) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
            token.write_text("second")
            kube.token = "second"
            clock.ahead_s += 61
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
        assert statuses(kube) == [200, 200]


async def test_many_refused_at_once_read_the_configuration_once(tmp_path: Path) -> None:
    async with FakeKube(token="never") as kube:
        config, runs = plugin(kube, tmp_path, tokens=["wrong"] * 50)
        async with connected(config) as api:
            answers = await asyncio.gather(*(api.get(PODS, {}, timeout_s=5) for _ in range(20)))
            assert {each.status for each in answers if isinstance(each, ApiFailure)} == {401}
            assert await api.get(PODS, {}, timeout_s=5) == answers[0]
        assert int(runs.read_text()) == 2


# -- exec plugins ------------------------------------------------------------------------------------------------------


def plugin(
    kube: FakeKube, directory: Path, *, tokens: list[str], expires: datetime | None = None, script: str = ""
) -> tuple[Path, Path]:
    """A kubeconfig whose user is a command that gives one token after the other, and the count of its runs."""
    runs = directory / "runs"
    runs.write_text("0")
    for number, token in enumerate(tokens):
        status = {"token": token, **({"expirationTimestamp": expires.isoformat()} if expires else {})}
        credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
        (directory / f"credential-{number}").write_text(json.dumps(credential))
    command = directory / "plugin"
    command.write_text(
        script or f"#!/bin/sh\ncd {directory}\nn=$(cat runs)\necho $((n + 1)) > runs\ncat credential-$n\n"
    )
    command.chmod(0o755)
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(command)}}
    return edited(kube.kubeconfig(directory), user=user), runs


async def test_an_exec_plugin_is_asked_again_after_a_401(tmp_path: Path) -> None:
    async with FakeKube(token="one") as kube:
        config, runs = plugin(kube, tmp_path, tokens=["one", "two"])
        async with connected(config) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
            kube.token = "two"
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
        assert statuses(kube) == [200, 401, 200]
        assert int(runs.read_text()) == 2


async def test_an_exec_plugin_is_asked_again_before_what_it_gave_ends(tmp_path: Path) -> None:
    clock = Clock()
    async with FakeKube(token="one") as kube:
        config, runs = plugin(kube, tmp_path, tokens=["one", "two"], expires=datetime.now(UTC) + timedelta(hours=1))
        async with connected(config, clock=clock) as api:
            clock.ahead_s = 3500
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
            kube.token = "two"
            clock.ahead_s = 3550
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
        assert statuses(kube) == [200, 200]
        assert int(runs.read_text()) == 2


@pytest.mark.parametrize("script", ["#!/bin/sh\necho no >&2\nexit 1\n", "#!/bin/sh\necho 'no json'\n"])
async def test_an_exec_plugin_that_fails_is_no_usable_configuration(tmp_path: Path, script: str) -> None:
    async with FakeKube(token="x") as kube:
        config, _ = plugin(kube, tmp_path, tokens=[], script=script)
        with pytest.raises(NoCluster, match=r"exec plugin .* gave no credentials"):
            await ClusterApi(kubeconfig=config).start()


# -- finding the cluster -----------------------------------------------------------------------------------------------


async def test_the_context_names_cluster_and_namespace(tmp_path: Path) -> None:
    async with FakeKube(token=SECRET) as kube:
        config = kube.kubeconfig(tmp_path, namespace="team-a")
        content = yaml.safe_load(config.read_text())
        content["clusters"].append({"name": "dead", "cluster": {"server": "http://127.0.0.1:1"}})
        content["contexts"].append({"name": "dead", "context": {"cluster": "dead", "user": "fake"}})
        content["current-context"] = "dead"
        config.write_text(yaml.safe_dump(content))
        async with connected(config) as api:
            assert api.namespace is None
            answer = await api.get(PODS, {}, timeout_s=5)
            assert isinstance(answer, ApiFailure)
            assert answer.status == 0
        async with connected(config, context="fake") as api:
            assert api.namespace == "team-a"
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
            assert SECRET not in repr(api)
            assert SECRET not in repr(vars(api))


async def test_the_environment_names_the_kubeconfig(tmp_path: Path) -> None:
    async with FakeKube() as kube:
        config = kube.kubeconfig(tmp_path)
        async with started(ClusterApi(environ={"KUBECONFIG": f"{tmp_path / 'missing'}:{config}"})) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)


BROKEN = {
    "not YAML": "users: [{user: {token: s3cr3t-t0ken}}]]",
    "a list": "- s3cr3t-t0ken",
    "empty": "",
    "no context": "{clusters: [], contexts: [], users: [{name: u, user: {token: s3cr3t-t0ken}}]}",
    "a user without one": "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], clusters: "
    "[{name: k, cluster: {server: 'https://x'}}], users: [{name: u, token: s3cr3t-t0ken}]}",
    "no server": "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], clusters: "
    "[{name: k, cluster: {}}], users: [{name: u, user: {token: s3cr3t-t0ken}}]}",
    "a server that is none": "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], clusters: "
    "[{name: k, cluster: {server: 'ftp://x'}}], users: [{name: u, user: {token: s3cr3t-t0ken}}]}",
    "no certificate": "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], clusters: "
    "[{name: k, cluster: {server: 'https://x', certificate-authority: /nonexistent/ca}}], "
    "users: [{name: u, user: {token: s3cr3t-t0ken}}]}",
    "a certificate that is none": "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], "
    "clusters: [{name: k, cluster: {server: 'https://x', certificate-authority-data: YWJj}}], "
    "users: [{name: u, user: {token: s3cr3t-t0ken}}]}",
    "an OIDC provider with half of it": "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], "
    "clusters: [{name: k, cluster: {server: 'https://x'}}], users: [{name: u, user: {auth-provider: {name: oidc, "
    "config: {refresh-token: s3cr3t-t0ken}}}}]}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_kubeconfig_is_one_line_without_secrets(tmp_path: Path, text: str) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text(text)
    with pytest.raises(NoCluster) as raised:
        await ClusterApi(kubeconfig=config, environ=OUTSIDE).start()
    assert str(config) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert SECRET not in str(raised.value)


async def test_no_configuration_at_all(tmp_path: Path) -> None:
    for api in (
        ClusterApi(kubeconfig=tmp_path / "missing"),
        ClusterApi(environ={"KUBECONFIG": str(tmp_path / "missing")}),
    ):
        with pytest.raises(NoCluster, match=r"there is no kubeconfig at .*missing"):
            await api.start()


@pytest.mark.parametrize("missing", ["token", "ca.crt"])
async def test_a_service_account_that_is_not_whole(tmp_path: Path, missing: str) -> None:
    account = service_account(tmp_path / "account", SECRET, Authority("ca"))
    (account / missing).write_text("")
    with pytest.raises(NoCluster, match="service account cannot be used"):
        await inside(FakeKube(), account).start()


# -- in the cluster ----------------------------------------------------------------------------------------------------


def test_pods_find_their_service_account_where_the_library_does() -> None:
    from kubernetes.aio.config import incluster_config

    assert str(SERVICE_ACCOUNT / "token") == incluster_config.SERVICE_TOKEN_FILENAME
    assert str(SERVICE_ACCOUNT / "ca.crt") == incluster_config.SERVICE_CERT_FILENAME


async def test_a_pod_of_the_cluster_with_a_token_that_rotates(tmp_path: Path) -> None:
    authority = Authority("ca")
    account = service_account(tmp_path / "account", "first", authority)
    async with FakeKube(token="first", tls=authority.server(tmp_path)) as kube:
        async with started(inside(kube, account)) as api, mirrored(api) as (mirror, _):
            assert api.namespace == "pods-own"
            await until(lambda: mirror.lists == 1)
            service_account(account, "second", authority)
            kube.token = "second"
            await seen_after(kube, mirror, "p")
            assert mirror.lists == 1
        assert statuses(kube).count(401) == 1


async def test_a_stranger_with_the_address_of_the_server_gets_no_token(tmp_path: Path) -> None:
    account = service_account(tmp_path / "account", SECRET, Authority("ca"))
    async with FakeKube(tls=Authority("stranger").server(tmp_path)) as kube:
        async with started(inside(kube, account)) as api:
            answer = await api.get(PODS, {}, timeout_s=5)
        assert isinstance(answer, ApiFailure)
        assert (answer.status, SECRET in answer.message) == (0, False)
        assert statuses(kube) == []


async def test_a_cluster_with_a_new_authority(tmp_path: Path) -> None:
    old, new = Authority("old"), Authority("new")
    account = service_account(tmp_path / "account", SECRET, old)
    async with (
        FakeKube(token=SECRET, tls=new.server(tmp_path)) as kube,
        started(inside(kube, account)) as api,
        mirrored(api) as (mirror, reflector),
    ):
        await until(lambda: reflector.problem != "")
        service_account(account, SECRET, new)
        await until(lambda: mirror.lists == 1)


async def test_a_server_that_need_not_prove_itself(tmp_path: Path) -> None:
    async with FakeKube(token=SECRET, tls=Authority("stranger").server(tmp_path)) as kube:
        config = kube.kubeconfig(tmp_path)
        async with connected(config) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), ApiFailure)
        edited(config, cluster={"server": kube.url, "insecure-skip-tls-verify": True})
        async with connected(config) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)


async def test_client_certificates_and_the_name_of_the_server(tmp_path: Path) -> None:
    servers, clients = Authority("servers"), Authority("clients")
    certificate, key = clients.issue("me", tmp_path)
    (tmp_path / "ca.crt").write_bytes(servers.pem)
    async with FakeKube(tls=servers.server(tmp_path, clients=clients)) as kube:
        config = edited(
            kube.kubeconfig(tmp_path),
            cluster={"server": kube.url, "certificate-authority": "ca.crt", "tls-server-name": "kubernetes"},
            user={"client-certificate": str(certificate), "client-key": str(key)},
        )
        async with connected(config) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)
        edited(config, user={})
        async with connected(config) as api:
            assert isinstance(await api.get(PODS, {}, timeout_s=5), ApiFailure)


async def test_what_a_netrc_says_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password mine\n")
    monkeypatch.setitem(os.environ, "NETRC", str(netrc))
    async with FakeKube(token=SECRET) as kube, connected(kube.kubeconfig(tmp_path)) as api:
        assert isinstance(await api.get(PODS, {}, timeout_s=5), bytes)


async def test_a_proxy_of_the_environment_is_used_outside_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeKube() as proxy:
        proxy.fail(502, times=9)
        config = edited(proxy.kubeconfig(tmp_path), cluster={"server": "http://api.example"})
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        async with connected(config) as api:
            answer = await api.get(PODS, {}, timeout_s=5)
        assert isinstance(answer, ApiFailure)
        assert answer.status == 502
        monkeypatch.setenv("no_proxy", "api.example")
        async with connected(config) as api:
            answer = await api.get(PODS, {}, timeout_s=1)
        assert isinstance(answer, ApiFailure)
        assert answer.status == 0
