"""All forms of URLs, each with a real server behind: TLS, passwords, Unix sockets, sentinels, a cluster, and an ACL
that allows what the documentation lists and no more.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.redis_rig import (
    Line,
    RedisServer,
    Replica,
    free_port,
    load,
    quick,
    redis_server,
    settled,
    unix_server,
    until,
)
from tests.unit.upstream.certificates import Authority

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "shared-state.md"


def documented(words: str) -> str:
    """The rights that the documentation lists after these words."""
    found = re.search(rf"{words} `([^`]+)`", DOCUMENT.read_text())
    assert found is not None
    return found[1]


def documented_user() -> str:
    found = re.search(r"ACL SETUSER waypost (.*)", DOCUMENT.read_text())
    assert found is not None
    return found[1].replace("~{waypost}:*", "~{test}:*").replace(">change-me", ">it")


async def share(url: str, **arguments: str) -> None:
    """Everything that is shared goes from one to the other."""
    settings = quick(ingester=True)
    async with Replica(url, settings=settings, **arguments) as one, Replica(url, settings=settings, **arguments) as two:
        await settled(one, two)
        one.own = {"a": load(3)}
        await until(lambda: two.loads == {"a": load(3)})
        one.shared.tell_routed("a", "uid", [1, 2])
        await until(lambda: two.routed == [("a", "uid", (1, 2))])
        await until(lambda: one.shared.elected or two.shared.elected)
        # Nothing but a busy machine stood in the way.
        assert set(one.troubles + two.troubles) <= {"Redis does not answer in time"}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


async def test_tls(server: RedisServer, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    async with Line(server.port, authority.server("localhost")) as line:
        await share(f"rediss://localhost:{line.port}/1?ssl_ca_certs={authority.ca}")

        async with Replica(f"rediss://localhost:{line.port}") as stranger:
            await until(lambda: stranger.troubles)
            assert not stranger.shared.connected
        async with Replica(f"rediss://127.0.0.1:{line.port}?ssl_ca_certs={authority.ca}") as other_name:
            await until(lambda: other_name.troubles)
            assert not other_name.shared.connected


async def test_a_unix_socket(tmp_path: Path) -> None:
    with unix_server(tmp_path) as url:
        await share(url)


async def test_user_and_password_in_the_url_or_beside_it() -> None:
    with redis_server("--user", "way", "on", ">p%ss", "~*", "&*", "+@all") as server:
        await share(f"redis://way:p%25ss@127.0.0.1:{server.port}/0")
        await share(f"redis://127.0.0.1:{server.port}", username="way", password="p%ss")


async def test_sentinels_lead_to_the_master(server: RedisServer, tmp_path: Path) -> None:
    with redis_server("--requirepass", "master-secret") as master:
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"port 0\nsentinel monitor mine 127.0.0.1 {master.port} 1\nsentinel auth-pass mine master-secret\n"
            f"user way on >sentinel-secret {documented('a user of sentinels needs')}\n"
            "sentinel down-after-milliseconds mine 1000\n"
        )
        with redis_server(str(config), "--sentinel") as sentinel:
            # The first one does not exist.
            hosts = f"127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}"
            await share(
                f"redis+sentinel://:master-secret@{hosts}/mine/2?sentinel_username=way&sentinel_password=sentinel-secret",
            )
            async with master.client(password="master-secret", db=2) as client:
                assert await client.keys("*")
            async with Replica(
                f"redis+sentinel://{hosts}/other?sentinel_username=way&sentinel_password=sentinel-secret"
            ) as lost:
                await until(lambda: lost.troubles)
                assert not lost.shared.connected


async def test_a_cluster_of_one_node_with_the_documented_rights() -> None:
    rule = f"{documented_user()} {documented('For a cluster add')}"
    with redis_server("--cluster-enabled", "yes", "--user", "waypost", *rule.split()) as server:
        async with server.client() as client:
            await client.cluster("ADDSLOTS", *range(16384))
            async with asyncio.timeout(5):
                while (await client.cluster("INFO"))["cluster_state"] != "ok":
                    await asyncio.sleep(0.02)
            await share(f"redis+cluster://waypost:it@127.0.0.1:{free_port()},127.0.0.1:{server.port}")
            assert await client.acl_log() == []


async def test_the_documented_rights_are_enough() -> None:
    with redis_server("--user", "waypost", *documented_user().split()) as server:
        async with server.client() as client:
            await share(f"redis://waypost:it@127.0.0.1:{server.port}")
            assert await client.acl_log() == []
            async with Replica(f"redis://waypost:it@127.0.0.1:{server.port}", prefix="elsewhere") as one:
                await until(lambda: one.shared.status().problem == "the Redis user may not do what is needed (ACL)")
