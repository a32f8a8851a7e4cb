"""Durations, sizes, shares, addresses and URLs: what is read, and that it prints back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from picker.config import Config, HostPort, MemoryBound, format_duration, format_size
from picker.config.locate import parse_document, plain_value
from picker.config.values import (
    parse_duration,
    parse_endpoint_url,
    parse_host_port,
    parse_memory_bound,
    parse_page_url,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05),
        ("600ms", 0.6),
        ("2s", 2.0),
        ("1.5s", 1.5),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1m30s", 90.0),
        ("0s", 0.0),
    ],
)
def test_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 30 * 24 * 3600 * 1000))
def test_durations_print_back(milliseconds: int) -> None:
    seconds = parse_duration(f"{milliseconds}ms")
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("value", [5, 5.0, True, None, "", "5", "-1s", "s", "1d", "1s ", "1e3s", "٣s", ["1s"]])
def test_not_a_duration(value: object) -> None:
    with pytest.raises(PydanticCustomError, match="must be a duration"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1B", 1), ("64KiB", 65536), ("10MiB", 10485760), ("4GiB", 2**32), ("10MB", 10**7), ("1.5KiB", 1536)],
)
def test_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(1, 2**50))
def test_sizes_print_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@pytest.mark.parametrize("value", [64, "64", "64M", "64mib", "-1B", None, True, {}])
def test_not_a_size(value: object) -> None:
    with pytest.raises(PydanticCustomError, match="must be a size"):
        parse_size(value)


def test_memory_bound() -> None:
    assert parse_memory_bound("25%") == MemoryBound(ratio=0.25)
    assert parse_memory_bound("25%").resolve(1000) == 250
    assert parse_memory_bound("4GiB").resolve(1000) == 2**32
    assert [str(parse_memory_bound(text)) for text in ("25%", "12.5%", "4GiB")] == ["25%", "12.5%", "4GiB"]
    with pytest.raises(PydanticCustomError, match="between 1% and 100%"):
        parse_memory_bound("0%")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:8080", "127.0.0.1", 8080), ("[::1]:80", "::1", 80), ("a.b:0", "a.b", 0), (":8080", "0.0.0.0", 8080)],
)
def test_host_port(text: str, host: str, port: int) -> None:
    address = parse_host_port(text)
    assert address == HostPort(host, port)
    assert parse_host_port(str(address)) == address


@pytest.mark.parametrize(
    "value", ["a", "a:", ":", "::1:80", "[::1]", "a:b", "a b:80", "-a:80", "a:80:90", "[1.2.3.4]:80", 80, None]
)
def test_not_a_host_port(value: object) -> None:
    with pytest.raises(PydanticCustomError):
        parse_host_port(value)


@pytest.mark.parametrize("url", ["http://a:8000", "https://a.example", "http://[::1]:8000", "http://10.0.0.1:1"])
def test_endpoint_url(url: str) -> None:
    assert parse_endpoint_url(url) == url
    assert parse_endpoint_url(f"{url}/") == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a",
        "ftp://a",
        "http://",
        "http://a/b",
        "http://a?b",
        "http://u:p@a",
        "http://a:0",
        "http://a b",
        "http://[::1",
        "http://a:99999",
        7,
    ],
)
def test_not_an_endpoint_url(url: object) -> None:
    with pytest.raises(PydanticCustomError):
        parse_endpoint_url(url)


def test_page_url_may_have_a_path() -> None:
    assert parse_page_url("http://a:8002/metrics?x=1") == "http://a:8002/metrics?x=1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("", None),
        ("~", None),
        ("null", None),
        ("12", 12),
        ("-3", -3),
        ("012", "012"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1e999", "1e999"),
        (".inf", ".inf"),
        ("9" * 400, "9" * 400),
    ],
)
def test_plain_words(text: str, value: object) -> None:
    found = plain_value(text)
    assert found == value
    assert type(found) is type(value)


@given(st.text(max_size=200))
def test_any_text_is_a_document_or_a_problem(text: str) -> None:
    document = parse_document(text, name="f")
    assert document.broken <= bool(document.problems)


def test_a_model_can_be_built_without_loading() -> None:
    config = Config.model_validate(
        {"timeouts": {"connect": "50ms"}, "endpoints": {"static": ["http://a:1"]}, "log": None}
    )
    assert config.timeouts.connect == 0.05
    assert config.endpoints.static[0].id == "a:1"
    assert config.listen == HostPort("127.0.0.1", 8080)
    assert config.log.level == "info"
