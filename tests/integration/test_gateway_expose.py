"""What the gateway tells about itself, and to whom."""

from __future__ import annotations

import json

import pytest

from gateway.serve import _exposure
from picker.config import Config
from tests.integration.gateway_rig import HELLO, JSON, backend, gateway, says
from tests.unit.upstream.hostile import answer

OK = answer(b"{}", JSON)
ASK = b"x-waypost-explain: 1"
TOKEN = {"token": "secret-token"}


async def test_the_explanation_needs_the_token_and_the_wish() -> None:
    async with backend(says(OK)) as one, backend(says(OK)) as two, gateway(one.url, two.url, admin=TOKEN) as door:
        right = b"x-waypost-admin-token: secret-token"
        for headers in (
            (),
            (ASK,),
            (right,),
            (ASK, b"x-waypost-admin-token: secret-tokem"),
            (ASK, b"x-waypost-admin-token: "),
            (ASK, b"x-waypost-admin-token: caf\xe9"),
            (ASK, b"Authorization: Bearer secret-token"),
            (b"x-waypost-explain: 0", right),
        ):
            assert "x-waypost-explain" not in (await door.post(HELLO, *headers)).headers, headers
        got = await door.post(HELLO, ASK, right)
        told = json.loads(got.headers["x-waypost-explain"])
        assert told["endpoint"] == got.headers["x-waypost-endpoint"]
        assert {row["endpoint"] for row in told["endpoints"]} == {
            url.removeprefix("http://") for url in (one.url, two.url)
        }
        assert all("total" in row for row in told["endpoints"])
        for request in (*one.received, *two.received):
            assert request.header(b"x-waypost-admin-token") is None
            assert request.header(b"x-waypost-explain") is None


async def test_without_a_token_there_is_no_explanation() -> None:
    async with backend(says(OK)) as engine, gateway(engine.url) as door:
        for headers in ((ASK,), (ASK, b"x-waypost-admin-token: "), (ASK, b"x-waypost-admin-token: None")):
            assert "x-waypost-explain" not in (await door.post(HELLO, *headers)).headers


@pytest.mark.parametrize(("mode", "shown"), [("auto", True), ("always", True), ("never", False)])
async def test_own_headers_go_to_loopback_by_default(mode: str, shown: bool) -> None:
    async with backend(says(OK)) as engine, gateway(engine.url, gateway={"expose_headers": mode}) as door:
        got = await door.post()
        assert ("x-waypost-endpoint" in got.headers) == shown
        assert ("x-waypost-decision-ms" in got.headers) == shown


def test_auto_means_loopback() -> None:
    expose = _exposure(Config())
    assert [expose(host) for host in ("127.0.0.1", "127.8.9.1", "::1")] == [True, True, True]
    assert not any(expose(host) for host in ("10.0.0.1", "fd00::1", "", "localhost", "127.0.0.1.evil"))
