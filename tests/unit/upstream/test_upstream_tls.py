"""TLS of the upstream client: which context is made when, and pages of probes on another port than the requests."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from picker.core.updates import ProbeFailure
from picker.upstream import client as client_module
from picker.upstream.client import Fetched, Upstream
from picker.upstream.credentials import Credentials, tls_context
from tests.unit.upstream.certificates import Authority
from tests.unit.upstream.hostile import PATIENCE_S, Peer, answer, hostile
from tests.unit.upstream.rig import ask, endpoint, upstream

NAME = "engine.internal"


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Credentials]:
    """The credentials contexts were made for, in order."""
    seen: list[Credentials] = []

    def noting(credentials: Credentials) -> ssl.SSLContext:
        seen.append(credentials)
        return tls_context(credentials)

    monkeypatch.setattr(client_module, "tls_context", noting)
    return seen


async def page(peer: Peer) -> None:
    while (request := await peer.request()) is not None:
        await peer.send(answer(request.header(b"authorization") or b"none"))


async def scrape(client: Upstream, requests_url: str, metrics_url: str) -> Fetched | ProbeFailure:
    """What a probe fetches of an endpoint whose metrics are elsewhere."""
    probed = msgspec.structs.replace(endpoint(requests_url, "main"), metrics_url=metrics_url)
    return await client.get(probed, metrics_url + "/metrics", timeout_s=PATIENCE_S)


async def test_no_context_is_made_where_everything_is_plain(made: list[Credentials]) -> None:
    key = Credentials(api_key="k3y", verify=False)
    async with hostile(page) as server, upstream(main=key) as client:
        assert await ask(client, server.url) == b"none"
        assert made == []


async def test_a_context_is_made_once_when_it_is_needed(made: list[Credentials], ours: Authority) -> None:
    unverified = Credentials(verify=False)
    async with (
        hostile(page, tls=ours.server(NAME)) as one,
        hostile(page, tls=ours.server(NAME)) as two,
        upstream(main=unverified, idle=Credentials(api_key="x")) as client,
    ):
        assert made == []
        for server in (one, two, one):
            assert await scrape(client, server.url, server.url) == Fetched(200, b"none")
        assert made == [unverified]


@pytest.mark.parametrize(
    "reads", [lambda path: Credentials(ca=path), lambda path: Credentials(client_cert=path)], ids=["ca", "client_cert"]
)
async def test_unusable_files_are_told_at_the_start_even_if_nothing_has_https(
    reads: Callable[[str], Credentials], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for path, trouble in ((tmp_path / "missing.pem", FileNotFoundError), (broken, ssl.SSLError)):
        client = Upstream({"main": reads(str(path))}, connect_timeout_s=1)
        with pytest.raises(trouble):
            await client.start()
        await client.close()


@pytest.mark.parametrize(
    ("credentials", "trusted"),
    [
        ({"verify": False}, True),
        ({"verify": False, "server_name": "other.internal"}, True),
        ({"ca": "ours", "server_name": NAME}, True),
        ({"ca": "ours", "server_name": "other.internal"}, False),
        ({"ca": "ours"}, False),
        ({"server_name": NAME}, False),
        ({}, False),
    ],
)
async def test_metrics_on_another_port_go_by_the_endpoints_credentials(
    credentials: dict[str, str | bool], trusted: bool, ours: Authority
) -> None:
    fields = {name: str(ours.ca) if value == "ours" else value for name, value in credentials.items()}
    secret = Credentials(api_key="k3y", **fields)  # type: ignore[arg-type]
    async with (
        hostile(page) as requests,
        hostile(page, tls=ours.server(NAME)) as metrics,
        upstream(main=secret) as client,
    ):
        fetched = await scrape(client, requests.url, metrics.url)
        assert fetched == (Fetched(200, b"Bearer k3y") if trusted else ProbeFailure.REFUSED)


async def test_the_server_is_asked_for_by_its_name(ours: Authority) -> None:
    asked: list[str | None] = []
    context = ours.server(NAME)
    context.sni_callback = lambda connection, name, _: asked.append(name)
    unverified = Credentials(verify=False, server_name=NAME)
    async with hostile(page, tls=context) as metrics, upstream(main=unverified) as client:
        assert isinstance(await scrape(client, "http://127.0.0.1:1", metrics.url), Fetched)
    assert asked == [NAME]


async def test_another_host_never_gets_the_key(ours: Authority) -> None:
    secret = Credentials(api_key="k3y", verify=False)
    async with hostile(page, host="::1", tls=ours.server(NAME)) as metrics, upstream(main=secret) as client:
        assert await scrape(client, "http://127.0.0.1:1", metrics.url) == Fetched(200, b"none")
