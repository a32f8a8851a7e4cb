"""From a URL to a client of Redis: alone, behind sentinels, or a cluster.

Knows redis-py's options and nothing of what is stored. A bad URL raises ValueError; its text never holds the URL, which
may hold a password.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import ConnectionPool, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

FORMS = (
    "redis://host:6379/0, rediss://..., unix:///path, redis+sentinel://host:26379,host:26379/service/0, "
    "redis+cluster://host:6379,host:6379, or the last two with rediss+"
)
_KINDS = {("unix", ""), *((scheme, form) for scheme in ("redis", "rediss") for form in ("", "sentinel", "cluster"))}
_REDIS_PORT = 6379
_SENTINEL_PORT = 26379
# Six things are done at a time; one that was given up may still hold its connection.
_CONNECTIONS_MAX = 12


def options(connect_timeout_s: float) -> dict[str, Any]:
    """What every connection has: no retries and no waiting that we do not see, and only commands that Redis 6.2 and
    Valkey know.
    """
    return {
        "protocol": 2,
        "driver_info": None,
        "retry": Retry(NoBackoff(), 0),
        # Calls have deadlines of their own; a second one inside costs a third of a small call.
        "socket_timeout": None,
        "socket_connect_timeout": connect_timeout_s,
        "max_connections": _CONNECTIONS_MAX,
    }


def client_of(
    url: str, *, connect_timeout_s: float, username: str = "", password: str = ""
) -> tuple[Any, tuple[Any, ...]]:
    """The client, not connected yet, and everything to `aclose()` after it. `username` and `password` go before the
    URL's.
    """
    scheme, found, rest = url.partition("://")
    scheme, _, form = scheme.partition("+")
    if not found or (scheme, form) not in _KINDS:
        raise ValueError(f"not a Redis URL; write {FORMS}")
    try:
        return _built(scheme, form, rest, options(connect_timeout_s), username, password)
    except (ValueError, TypeError, RedisError):
        # The library says what it does not like by repeating it.
        raise ValueError(f"a Redis URL with parts that are not understood; write {FORMS}") from None


def _built(
    scheme: str, form: str, rest: str, given: dict[str, Any], username: str, password: str
) -> tuple[Any, tuple[Any, ...]]:
    hosts: list[tuple[str, int]] = []
    if form:
        rest, hosts = _hosts(rest, _SENTINEL_PORT if form == "sentinel" else _REDIS_PORT)
    given |= parse_url(f"{scheme}://{rest}")
    if username:
        given["username"] = username
    if password:
        given["password"] = password
    if not form:
        # Not `Redis.from_url`: what the URL says would win. Making a connection tells whether its options exist.
        pool = ConnectionPool(**given)
        pool.make_connection()  # type: ignore[no-untyped-call]
        client = Redis.from_pool(pool)
        return client, (client,)
    given.pop("host", None)
    given.pop("port", None)
    given["ssl"] = given.pop("connection_class", None) is SSLConnection
    return _behind_sentinels(rest, hosts, given) if form == "sentinel" else _cluster(hosts, given)


def _hosts(rest: str, port: int) -> tuple[str, list[tuple[str, int]]]:
    """Takes the list of hosts out of what follows the scheme, and leaves the first one there."""
    parts = urlsplit(f"//{rest}")
    login, at, places = parts.netloc.rpartition("@")
    hosts: list[tuple[str, int]] = []
    for place in places.split(","):
        one = urlsplit(f"//{place}")
        if not one.hostname:
            raise ValueError("a host is missing")
        hosts.append((one.hostname, one.port or port))
    first = places.split(",")[0]
    return urlunsplit(("", login + at + first, *parts[2:])).removeprefix("//"), hosts


def _behind_sentinels(rest: str, hosts: list[tuple[str, int]], given: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    given = dict(given)
    service, _, database = urlsplit(f"//{rest}").path.strip("/").partition("/")
    if not service or (database and not database.isdecimal()):
        raise ValueError("the path of a sentinel URL is /service or /service/database")
    given["db"] = int(database or 0)
    own = {name: given[name] for name in options(0.0)}
    for name in ("username", "password"):
        value = given.pop(f"sentinel_{name}", None)
        if value:
            own[name] = value
    if given["ssl"]:
        own |= {name: value for name, value in given.items() if name.startswith("ssl")}
    sentinel = Sentinel(hosts, sentinel_kwargs=own, **given)  # type: ignore[no-untyped-call]
    client = sentinel.master_for(service)
    client.connection_pool.make_connection()
    return client, (client, sentinel)


def _cluster(hosts: list[tuple[str, int]], given: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    given = {name: value for name, value in given.items() if name != "db"}
    nodes = [ClusterNode(host, port) for host, port in hosts]
    client = RedisCluster(startup_nodes=nodes, **given)
    return client, (client,)
