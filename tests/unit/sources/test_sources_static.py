"""Endpoints from flags and configuration entries."""

from __future__ import annotations

from typing import Any

import pytest

from picker.config import EndpointEntry, is_problems, load
from picker.core.updates import Replace
from picker.core.values import Endpoint, Role
from picker.sources.endpoints import address_at, endpoint_of, host_of
from picker.sources.static import StaticSource, usual_url


def entry(**fields: Any) -> EndpointEntry:
    return EndpointEntry.model_validate(fields)


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://a:8000", "http://a:8000"),
        ("http://a:8000/", "http://a:8000"),
        ("http://a:8000/v1", "http://a:8000"),
        ("https://a/v1/", "https://a"),
        ("HTTP://A:8000/v1", "HTTP://A:8000"),
        (" a:8000 ", "http://a:8000"),
        ("a", "http://a"),
        ("localhost:8000/v1", "http://localhost:8000"),
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_urls_as_people_type_them(typed: str, url: str) -> None:
    assert usual_url(typed) == url


@pytest.mark.parametrize(
    "typed",
    [
        "http://a:8000/v1/chat/completions",
        "http://a:8000/v2",
        "http://a:8000/?x=1",
        "http://user:secret@a:8000",
        "user:secret@a:8000",
        "http://a:0",
        "http://a:99999",
        "a:99999",
        "::1",
        "[::1:8000",
        "unix:///run/engine.sock",
        "grpc://a:8000",
        "a b",
        "",
    ],
)
def test_what_is_no_endpoint_is_refused_in_a_sentence(typed: str) -> None:
    found = load(None, environ={}, flags={"endpoints.static": [usual_url(typed)]})
    assert is_problems(found)
    assert "secret" not in str(found[0])


def test_the_same_endpoint_twice_is_refused() -> None:
    flags: dict[tuple[str, ...] | str, object] = {
        "endpoints.static": [usual_url("a:8000"), usual_url("http://A:8000/v1")]
    }
    found = load(None, environ={}, flags=flags)
    assert is_problems(found)
    assert "same endpoint" in str(found[0])


def test_a_bare_url_becomes_an_endpoint() -> None:
    assert endpoint_of(entry(url="http://10.0.0.1:8000")) == Endpoint(
        id="10.0.0.1:8000", url="http://10.0.0.1:8000", address="10.0.0.1:8000"
    )


def test_every_field_arrives() -> None:
    full = entry(
        url="https://[2001:db8::1]:8443",
        name="p0",
        labels={"zone": "x"},
        role="prefill",
        models=["m", "n"],
        engine="sglang",
        group="g",
        credentials="main",
        metrics_url="http://[2001:db8::1]:9000/metrics",
    )
    assert endpoint_of(full) == Endpoint(
        id="p0",
        url="https://[2001:db8::1]:8443",
        address="[2001:db8::1]:8443",
        role=Role.PREFILL,
        engine="sglang",
        group="g",
        credentials="main",
        models=frozenset({"m", "n"}),
        metrics_url="http://[2001:db8::1]:9000/metrics",
        labels={"zone": "x"},
    )


@pytest.mark.parametrize("role", list(Role))
def test_every_role_of_the_core_can_be_configured(role: Role) -> None:
    assert endpoint_of(entry(url="http://a:1", role=role.value)).role is role


@pytest.mark.parametrize(("url", "full"), [("http://a", "http://a:80"), ("https://a", "https://a:443")])
def test_urls_get_the_port_of_their_scheme(url: str, full: str) -> None:
    endpoint = endpoint_of(entry(url=url))
    assert (endpoint.url, endpoint.id) == (full, full.split("//")[1])


def test_names_have_no_address_yet() -> None:
    endpoint = endpoint_of(entry(url="http://engine.local:8000"))
    assert (endpoint.address, host_of(endpoint)) == ("", "engine.local")
    assert address_at(endpoint, "10.0.0.1") == "10.0.0.1:8000"
    assert address_at(endpoint, "::1") == "[::1]:8000"


def test_addresses_need_no_look_up() -> None:
    assert host_of(endpoint_of(entry(url="http://[::1]:8000"))) == ""


async def test_everything_is_said_once() -> None:
    source = StaticSource([entry(url="http://10.0.0.1:1"), entry(url="http://10.0.0.2:1")])
    (update,) = [update async for update in source.updates()]
    assert isinstance(update, Replace)
    assert (update.source, [endpoint.id for endpoint in update.endpoints]) == ("static", ["10.0.0.1:1", "10.0.0.2:1"])
