"""Which URLs are taken, and that refusals repeat nothing of them."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import RedisCluster
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection

from picker.signals.shared.address import client_of
from picker.signals.shared.names import Names, is_replica
from picker.signals.shared.settings import SharedHooks
from picker.signals.shared.snapshots import owner_of
from picker.signals.shared.state import SharedState


def arguments_of(url: str, **given: str) -> dict[str, Any]:
    client, _ = client_of(url, connect_timeout_s=1.5, **given)
    kwargs: dict[str, Any] = client.connection_pool.connection_kwargs
    return kwargs | {"class": client.connection_pool.connection_class}


def test_a_plain_url() -> None:
    found = arguments_of("redis://user:p%40ss@redis.example:7000/3")
    assert (found["host"], found["port"], found["db"]) == ("redis.example", 7000, 3)
    assert (found["username"], found["password"]) == ("user", "p@ss")
    assert (found["protocol"], found["driver_info"], found["socket_connect_timeout"]) == (2, None, 1.5)
    assert found["retry"].get_retries() == 0


def test_credentials_beside_the_url_win() -> None:
    found = arguments_of("redis://user:old@redis.example", username="other", password="new")
    assert (found["username"], found["password"]) == ("other", "new")


def test_tls_checks_certificates_and_names() -> None:
    found = arguments_of("rediss://redis.example?ssl_ca_certs=/ca.pem")
    assert found["class"] is SSLConnection
    connection = SSLConnection(**{name: value for name, value in found.items() if name != "class"})
    assert connection.ssl_context.check_hostname
    assert connection.ssl_context.cert_reqs.name == "CERT_REQUIRED"


def test_a_unix_socket() -> None:
    found = arguments_of("unix:///run/redis.sock?db=2")
    assert (found["class"], found["path"], found["db"]) == (UnixDomainSocketConnection, "/run/redis.sock", 2)


def test_sentinels() -> None:
    client, owned = client_of(
        "rediss+sentinel://user:pw@one:1,[::1]:2,three/main/4?sentinel_username=su&sentinel_password=sp",
        connect_timeout_s=1.0,
    )
    sentinel = owned[1]
    places = [each.connection_pool.connection_kwargs for each in sentinel.sentinels]
    assert [(place["host"], place["port"]) for place in places] == [("one", 1), ("::1", 2), ("three", 26379)]
    assert {(place["username"], place["password"]) for place in places} == {("su", "sp")}
    assert {each.connection_pool.connection_class for each in sentinel.sentinels} == {SSLConnection}
    pool = client.connection_pool
    assert (pool.service_name, pool.connection_kwargs["db"]) == ("main", 4)
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("user", "pw")
    assert "sentinel_password" not in pool.connection_kwargs


def test_a_cluster() -> None:
    client, _ = client_of("redis+cluster://:pw@one:1,two", connect_timeout_s=1.0)
    assert isinstance(client, RedisCluster)
    assert set(client.nodes_manager.startup_nodes) == {"one:1", "two:6379"}
    assert client.connection_kwargs["password"] == "pw"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3cret",
        "http://s3cret",
        "redis:s3cret",
        "redis://user:s3cret@host:port",
        "redis://user:s3cret@host:99999999",
        "redis://:s3cret@[half",
        "redis://host?socket_timeout=s3cret",
        "redis://host?s3cret=1",
        "redis+sentinel://:s3cret@host",
        "redis+sentinel://:s3cret@host/main/s3cret",
        "redis+sentinel://:s3cret@host,,other/main",
        "redis+sentinel://:s3cret@/main",
        "redis+magic://:s3cret@host",
        "unix+cluster://:s3cret@host",
        "redis+cluster://:s3cret@host:x",
        "redis+cluster://host?s3cret=1",
        "redis+sentinel://host/main?s3cret=1",
    ],
)
def test_a_bad_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as refusal:
        SharedState(url, hooks=SharedHooks())
    error: BaseException | None = refusal.value
    while error is not None:
        assert "s3cret" not in str(error)
        error = None if error.__suppress_context__ else error.__cause__ or error.__context__


@pytest.mark.parametrize("prefix", ["", "a b", "{a}", "a" * 65, "a\n"])
def test_a_bad_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        SharedState("redis://host", hooks=SharedHooks(), prefix=prefix)


@pytest.mark.parametrize("name", ["a b", "a/b", "a" * 65, "a\n", "{a}"])
def test_a_bad_name_is_refused(name: str) -> None:
    assert not is_replica(name)
    with pytest.raises(ValueError, match="name"):
        SharedState("redis://host", hooks=SharedHooks(), replica=name)


def test_all_keys_of_a_deployment_are_in_one_slot() -> None:
    names = Names("way:post")
    keys = [
        names.secret,
        names.replicas,
        names.routed,
        names.deltas,
        names.ingester,
        names.load("r"),
        names.snapshot("e"),
    ]
    assert all(key.startswith("{way:post}:") for key in keys)
    assert len(set(keys)) == len(keys)


def test_nothing_secret_is_in_a_repr() -> None:
    shared = SharedState("redis://user:s3cret@host", hooks=SharedHooks(), replica="me")
    assert repr(shared) == "<SharedState me not connected [0 others]>"
    assert shared.secret.hex() not in repr(shared) + repr(shared._link) + repr(shared._secret)


def test_owners_are_spread_and_stay() -> None:
    endpoints = [f"endpoint-{number}" for number in range(300)]
    three = {name: owner_of(name, ["one", "two", "three"]) for name in endpoints}
    two = {name: owner_of(name, ["two", "one"]) for name in endpoints}
    for replica in ("one", "two", "three"):
        assert 60 < sum(owner == replica for owner in three.values()) < 140
    assert all(two[name] == owner for name, owner in three.items() if owner != "three")
