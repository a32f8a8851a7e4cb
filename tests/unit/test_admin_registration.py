"""`/endpoints`: who may, what is taken, and what is said about the rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from picker.admin import app, registration
from picker.config import EndpointEntry, RegistrationSection
from picker.core.updates import Replace
from picker.sources import registered as registered_source
from picker.sources.endpoints import endpoint_of
from picker.sources.follow import follow
from picker.sources.registered import RegisteredSource
from tests.unit.director_rig import Rig as DirectorRig

TOKEN = "a-secret-token"
BEARER = {"authorization": f"Bearer {TOKEN}"}
ENTRY = {
    "url": "http://10.0.0.7:8000",
    "name": "node7/rank:0",
    "labels": {"zone": "x"},
    "role": "decode",
    "models": ["b", "a"],
    "engine": "vllm",
    "group": "g",
    "path_prefix": "/openai",
    "bootstrap_port": 8998,
    "endpoint_class": "H100",
    "metrics_url": "http://10.0.0.7:9000/metrics",
    "credentials": "main",
}


class Rig:
    """An admin app in this process, the registrations behind it, and who follows them."""

    def __init__(self, *, token: str | None = TOKEN, enabled: bool = True) -> None:
        self.behind = DirectorRig("")
        section = RegistrationSection.model_validate({"enabled": True, "ttl": "20s", "ttl_max": "1m"})
        self.source = RegisteredSource(section, on_change=lambda *_: None)
        self.app = app.build(
            self.behind.director,
            self.behind.metrics,
            checks=dict,
            engines=dict,
            token=token,
            version="test",
            registered=self.source if enabled else None,
            credentials=frozenset({"main"}),
        )

    @contextlib.asynccontextmanager
    async def client(self, host: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
        """A client that holds the token, and the source followed meanwhile."""
        task = asyncio.create_task(follow(self.source, self.behind.store, self.behind.director.rules))
        await self.settle()
        transport = httpx.ASGITransport(self.app, client=(host, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin", headers=BEARER) as client:
            yield client
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    @property
    def known(self) -> list[str]:
        return [endpoint.id for endpoint in self.behind.store.endpoints()]


async def test_an_entry_is_taken_as_the_configuration_would() -> None:
    rig = Rig()
    async with rig.client() as client:
        got = await client.post("/endpoints", json=ENTRY | {"ttl": "45s"})
        assert (got.status_code, got.json()) == (201, {"id": "node7/rank:0", "expires_in_s": 45.0})
        await rig.settle()
        assert rig.behind.store.endpoints() == (endpoint_of(EndpointEntry.model_validate(ENTRY)),)
        (listed,) = (await client.get("/endpoints")).json()
        assert 44 < listed.pop("expires_in_s") <= 45
        assert listed == {
            "id": "node7/rank:0",
            "url": "http://10.0.0.7:8000",
            **{key: ENTRY[key] for key in ENTRY if key not in ("name", "models")},
            "models": ["a", "b"],
        }


async def test_renewals_and_changes_answer_200() -> None:
    rig = Rig()
    async with rig.client() as client:
        for body, status, expires_in_s in (
            ({"url": "http://10.0.0.1:8000"}, 201, 20),
            ({"url": "http://10.0.0.1:8000", "ttl": 7}, 200, 7),
            ({"url": "http://10.0.0.1:8000", "ttl": 0.5, "model": "m"}, 200, 0.5),
        ):
            got = await client.post("/endpoints", json=body)
            assert (got.status_code, got.json()["expires_in_s"]) == (status, expires_in_s)
        await rig.settle()
        assert rig.behind.store.endpoints()[0].models == {"m"}


@pytest.mark.parametrize(
    "name", ["10.0.0.1:8000", "[::1]:8000", "a/b/c", "/a", "a%2Fb", "ünï 🦊".replace(" ", "-"), "a?b#c"]
)
async def test_any_id_can_be_removed(name: str) -> None:
    rig = Rig()
    async with rig.client() as client:
        assert (await client.post("/endpoints", json={"url": "http://h:1", "name": name})).status_code == 201
        await rig.settle()
        assert rig.known == [name]
        path = "/endpoints/" + "".join(
            f"%{byte:02X}" if chr(byte) in "%?# " or byte > 127 else chr(byte) for byte in name.encode()
        )
        got = await client.delete(path)
        assert (got.status_code, got.content) == (204, b"")
        await rig.settle()
        assert rig.known == []
        assert (await client.delete(path)).status_code == 404


async def test_only_the_token_opens_it_on_loopback_too() -> None:
    rig = Rig()
    for host in ("127.0.0.1", "10.1.2.3"):
        async with rig.client(host) as client:
            for header in (
                "",
                "Bearer",
                "Bearer ",
                f"Bearer {TOKEN}x",
                f"Bearer {TOKEN[:-1]}",
                TOKEN,
                f"Basic {TOKEN}",
                "Bearer café",
            ):
                for method, path in (("POST", "/endpoints"), ("GET", "/endpoints"), ("DELETE", "/endpoints/a")):
                    got = await client.request(method, path, headers={b"authorization": header.encode()}, content=b"{")
                    assert got.status_code == 401, (header, method)
                    assert got.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/endpoints", headers={"authorization": f"bearer  {TOKEN}"})).status_code == 200


@pytest.mark.parametrize(
    ("options", "why"), [({"enabled": False}, "endpoints.registration.enabled"), ({"token": None}, "admin.token")]
)
async def test_where_it_is_off_it_says_so(options: dict[str, Any], why: str) -> None:
    rig = Rig(**options)
    async with rig.client() as client:
        for method, path in (("POST", "/endpoints"), ("GET", "/endpoints"), ("DELETE", "/endpoints/a")):
            got = await client.request(method, path, json={"url": "http://10.0.0.1:8000"})
            assert got.status_code == 403
            assert why in got.json()["detail"]
    assert rig.known == []


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        ({}, ["body: url: is required"]),
        ([], ["body: must be a JSON object"]),
        ("http://10.0.0.1:8000", ["body: must be a JSON object"]),
        ({"url": "10.0.0.1:8000"}, ["body: url: must start with http:// or https://; did you mean http://10.0.0.1:8000?"]),
        ({"url": "http://a:1", "role": "prefil", "labls": {}}, ["body: role: must be one of", "body: labls: unknown"]),
        ({"url": "http://a:1", "ttl": "2h"}, ["body: ttl: must be at most 1m"]),
        ({"url": "http://a:1", "ttl": 61}, ["body: ttl: must be at most 1m"]),
        ({"url": "http://a:1", "ttl": 0}, ["body: ttl: must be longer than 0 seconds"]),
        ({"url": "http://a:1", "ttl": -1}, ["body: ttl: must be longer than 0 seconds"]),
        ({"url": "http://a:1", "ttl": True}, ["body: ttl: must be a duration"]),
        ({"url": "http://a:1", "ttl": {}}, ["body: ttl: must be a duration"]),
        ({"url": "http://a:1", "model": "m", "models": ["n"]}, ["body: model: must not be set together with models"]),
        ({"url": "http://a:1", "name": "a\nb"}, ["body: name: must not contain spaces or control characters"]),
        ({"url": "http://user:password@a:1"}, ["body: url: must not hold a user or password"]),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_said_as_the_configuration_says_it(body: object, problems: list[str]) -> None:
    rig = Rig()
    async with rig.client() as client:
        got = await client.post("/endpoints", json=body)
        assert got.status_code == 422
        found = got.json()["problems"]
        assert len(found) == len(problems), found
        assert all(text.startswith(start) for text, start in zip(found, problems, strict=True)), found
        assert "password@" not in got.text
    assert rig.known == []


async def test_credentials_must_exist_and_are_not_repeated() -> None:
    async with Rig().client() as client:
        got = await client.post("/endpoints", json={"url": "http://a:1", "credentials": "sk-oops"})
        assert got.status_code == 422
        assert got.json()["problems"] == ["body: credentials: no such entry under credentials: (there: main)"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"url": "\\ud800"}', b"[" * 60_000, b'{"ttl": ' + b"1" * 60_000 + b"}", b'{"ttl": NaN}'],
)
async def test_what_is_no_json_is_400(body: bytes) -> None:
    async with Rig().client() as client:
        got = await client.post("/endpoints", content=body)
        assert got.status_code == 400
        assert len(got.content) < 500


async def test_bodies_are_bounded() -> None:
    async with Rig().client() as client:
        fits = json.dumps({"url": "http://a:1"}).encode().ljust(registration.BODY_MAX_BYTES)
        assert (await client.post("/endpoints", content=fits)).status_code == 201
        assert (await client.post("/endpoints", content=fits + b" ")).status_code == 413


async def test_a_full_house_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered_source, "REGISTERED_MAX", 1)
    async with Rig().client() as client:
        assert (await client.post("/endpoints", json={"url": "http://a:1"})).status_code == 201
        assert (await client.post("/endpoints", json={"url": "http://b:1"})).status_code == 503
        assert (await client.post("/endpoints", json={"url": "http://a:1"})).status_code == 200


async def test_other_sources_endpoints_are_not_theirs() -> None:
    rig = Rig()
    other = endpoint_of(EndpointEntry.model_validate("http://10.0.0.1:8000"))
    rig.behind.store.apply(Replace("static", (other,)))
    async with rig.client() as client:
        got = await client.post("/endpoints", json={"url": "http://10.0.0.1:8000", "model": "m"})
        assert got.status_code == 409
        assert (await client.delete("/endpoints/10.0.0.1:8000")).status_code == 404
        assert (await client.get("/endpoints")).json() == []
        await rig.settle()
        assert rig.behind.store.endpoints() == (other,)


async def test_leaving_and_coming_back_at_once() -> None:
    rig = Rig()
    async with rig.client() as client:
        for _ in range(3):
            assert (await client.post("/endpoints", json={"url": "http://a:1"})).status_code == 201
            rig.source.deregister("a:1")
        await rig.settle()
        assert rig.known == []


def test_the_other_pages_are_still_there() -> None:
    paths: set[Any] = {getattr(route, "path", None) for route in Rig().app.routes}
    assert paths >= {"/healthz", "/readyz", "/metrics", "/debug/endpoints"}
