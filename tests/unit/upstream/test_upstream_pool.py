"""Connections between exchanges: kept, taken, swept, refused, encrypted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
from pathlib import Path
from typing import cast

import pytest

from picker.core.events import FailureKind
from picker.upstream import pool as pool_module
from picker.upstream.client import Upstream
from picker.upstream.connection import Response
from picker.upstream.credentials import Credentials, tls_context
from picker.upstream.outbox import Outbox
from tests.unit.upstream.certificates import Authority
from tests.unit.upstream.hostile import PATIENCE_S, Peer, answer, hostile
from tests.unit.upstream.rig import ask, endpoint, read_all, until, upstream

OK = answer(b"ok")


async def serve(peer: Peer) -> None:
    while await peer.request() is not None:
        await peer.send(OK)


async def test_connections_are_used_again_last_in_first_out() -> None:
    async with hostile(serve) as server, upstream() as client:
        assert await asyncio.gather(*(ask(client, server.url) for _ in range(5))) == [b"ok"] * 5
        assert "5 idle" in repr(client)
        for _ in range(10):
            assert await ask(client, server.url) == b"ok"
        assert server.connections == 5


@pytest.mark.parametrize("last", [b"Connection: close", b""])
async def test_connections_that_will_close_are_not_kept(last: bytes) -> None:
    wire = answer(b"ok", last) if last else answer(b"ok").replace(b"HTTP/1.1", b"HTTP/1.0")

    async def script(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(wire)

    async with hostile(script) as server, upstream() as client:
        assert [await ask(client, server.url) for _ in range(3)] == [b"ok"] * 3
        assert server.connections == 3


async def test_an_idle_connection_that_the_server_closes_is_not_used() -> None:
    async def once(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)

    async with hostile(once) as server, upstream() as client:
        for number in range(3):
            assert await ask(client, server.url) == b"ok"
            await until(lambda: server.open == 0)
            await asyncio.sleep(0.01)
            assert server.connections == number + 1


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"H", b"\x00"])
async def test_an_answer_with_something_behind_it_stands_but_its_connection_does_not(more: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + more)
        await peer.request()

    async with hostile(script) as server, upstream() as client:
        assert [await ask(client, server.url) for _ in range(3)] == [b"ok"] * 3
        assert server.connections == 3


@pytest.mark.parametrize("unasked", [b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", b"\x00", OK])
async def test_an_idle_connection_that_talks_unasked_is_dropped(unasked: bytes) -> None:
    talk = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if server.connections == 1:
            await talk.wait()
            await peer.send(unasked)
        await peer.request()

    async with hostile(script) as server, upstream() as client:
        assert await ask(client, server.url) == b"ok"
        talk.set()
        await until(lambda: server.open == 0)
        assert await ask(client, server.url) == b"ok"
        assert server.connections == 2


async def test_a_close_that_races_with_a_request_is_a_reset() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.head()
        peer.reset()

    async with hostile(script) as server, upstream() as client:
        assert await ask(client, server.url) == b"ok"
        assert await ask(client, server.url) is FailureKind.RESET
        assert await ask(client, server.url) == b"ok"


async def test_a_server_that_closes_at_once_wakes_its_request() -> None:
    async def rude(peer: Peer) -> None:
        peer.reset()

    async with hostile(rude) as server, upstream() as client:
        for _ in range(20):
            result = await asyncio.wait_for(ask(client, server.url), PATIENCE_S)
            assert result in (FailureKind.RESET, FailureKind.CONNECT)


async def test_a_connection_lost_before_its_exchange_is_a_reset() -> None:
    """The loss was told before anybody waited for it."""
    async with hostile(serve) as server, upstream() as client:
        pool, _ = client._pool(server.url, "")
        connection = await pool.connect(1.0)
        assert not isinstance(connection, FailureKind)
        connection.abort()
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(connection.exchange(b"GET / HTTP/1.1\r\n\r\n", b""), 1) is FailureKind.RESET


async def test_idle_connections_are_swept_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "KEEP_ALIVE_S", 0.1)
    async with hostile(serve) as server, upstream() as client:
        assert await ask(client, server.url) == b"ok"
        assert server.open == 1
        await until(lambda: server.open == 0)
        assert "0 idle" in repr(client)
        # One that is too old is not taken although no sweep has seen it yet.
        assert await ask(client, server.url) == b"ok"
        monkeypatch.setattr(pool_module, "KEEP_ALIVE_S", -1.0)
        assert await ask(client, server.url) == b"ok"
        assert server.connections == 3


async def test_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_MAX", 2)
    async with hostile(serve) as server, upstream() as client:
        await asyncio.gather(*(ask(client, server.url) for _ in range(6)))
        assert "2 idle" in repr(client)
        await until(lambda: server.open == 2)


async def test_a_connection_that_comes_back_after_the_end_is_cut() -> None:
    async with hostile(serve) as server:
        client = Upstream({}, connect_timeout_s=1)
        await client.start()
        response = await client.open(endpoint(server.url), "POST", "/x", [], b"")
        assert isinstance(response, Response)
        await client.close()
        assert await read_all(response) == b"ok"
        await until(lambda: server.open == 0)


# -- connecting -------------------------------------------------------------------------------------------------------


async def test_connects_that_fail_are_values() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        async with upstream() as client:
            for url in (f"http://127.0.0.1:{port}", "http://does-not-exist.invalid:80", f"http://{'x' * 70}.test:80"):
                assert await ask(client, url) is FailureKind.CONNECT


async def test_a_connect_that_hangs_is_given_up() -> None:
    """A listener whose queue is full drops what comes next."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        async with upstream(connect_timeout_s=0.1) as client:
            begun = asyncio.get_running_loop().time()
            assert await ask(client, f"http://127.0.0.1:{port}") is FailureKind.CONNECT
            assert asyncio.get_running_loop().time() - begun < 0.5
            task = asyncio.create_task(ask(client, f"http://127.0.0.1:{port}"))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_ipv6() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.request()
        assert request is not None
        await peer.send(answer(request.header(b"host") or b""))

    async with hostile(script, host="::1") as server, upstream() as client:
        assert server.url.startswith("http://[::1]:")
        assert await ask(client, server.url) == server.url.removeprefix("http://").encode()


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


async def tls(server_context: ssl.SSLContext, credentials: Credentials) -> bytes | FailureKind:
    async with hostile(serve, tls=server_context) as server, upstream(main=credentials) as client:
        for _ in range(2):
            result = await read_all(await client.open(endpoint(server.url, "main"), "POST", "/x", [], b"{}"))
        if result == b"ok":
            assert server.connections == 1
        return result


async def test_servers_are_trusted_by_authority_and_name(ours: Authority, theirs: Authority) -> None:
    context = ours.server("engine.internal")
    name = "engine.internal"
    assert await tls(context, Credentials(ca=str(ours.ca), server_name=name)) == b"ok"
    assert await tls(context, Credentials(ca=str(ours.ca), server_name="other.internal")) is FailureKind.CONNECT
    assert await tls(context, Credentials(ca=str(ours.ca))) is FailureKind.CONNECT
    assert await tls(context, Credentials(ca=str(theirs.ca), server_name=name)) is FailureKind.CONNECT
    assert await tls(context, Credentials(server_name=name)) is FailureKind.CONNECT
    assert await tls(context, Credentials(verify=False)) == b"ok"


async def test_clients_show_a_certificate(ours: Authority, theirs: Authority) -> None:
    context = ours.server("engine.internal", clients_of=theirs)
    certificate, key = (str(path) for path in theirs.issue("waypost"))
    without = Credentials(ca=str(ours.ca), server_name="engine.internal")
    assert await tls(context, dataclasses.replace(without, client_cert=certificate, client_key=key)) == b"ok"
    # With TLS 1.3 the refusal comes after the handshake.
    assert isinstance(await tls(context, without), FailureKind)


async def test_plain_and_encrypted_do_not_understand_each_other(ours: Authority) -> None:
    credentials = Credentials(ca=str(ours.ca))
    async with hostile(serve) as plain, upstream(connect_timeout_s=0.2, main=credentials) as client:
        url = plain.url.replace("http:", "https:")
        response = await client.open(endpoint(url, "main"), "POST", "/x", [], b"")
        assert response is FailureKind.CONNECT


def test_missing_files_are_told(tmp_path: Path, ours: Authority) -> None:
    with pytest.raises(FileNotFoundError):
        tls_context(Credentials(ca=str(tmp_path / "none.pem")))
    (tmp_path / "empty.pem").write_text("no certificate")
    with pytest.raises(ssl.SSLError):
        tls_context(Credentials(client_cert=str(tmp_path / "empty.pem")))
    assert ours.ca.exists()


@pytest.mark.parametrize("key", ["k3y\r\nX-Evil: 1", "k3y\n", "k3y\xe9", "k3y\x00", "k3y\t"])
def test_keys_that_no_header_may_carry_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Upstream({"main": Credentials(api_key=key)}, connect_timeout_s=1)
    assert "k3y" not in str(caught.value)


def test_keys_do_not_show() -> None:
    credentials = Credentials(api_key="secret")
    assert "secret" not in repr(credentials)
    client = Upstream({"main": credentials}, connect_timeout_s=1)
    assert "secret" not in repr(client)
    assert client.authorization(endpoint("http://x", "main")) == b"Bearer secret"
    assert client.authorization(endpoint("http://x")) is None


# -- writes of one turn -----------------------------------------------------------------------------------------------


class Sink:
    """A transport that notes what it is given."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def is_closing(self) -> bool:
        return self.closing


async def test_small_writes_wait_for_the_end_of_the_turn_in_order() -> None:
    outbox, one, two = Outbox(), Sink(), Sink()
    for sink, data in ((one, b"a"), (two, b"b"), (one, b"c")):
        outbox.write(cast(asyncio.WriteTransport, sink), data)
    assert one.writes == two.writes == []
    assert repr(outbox) == "<Outbox [3 waiting]>"
    await asyncio.sleep(0)
    assert (one.writes, two.writes) == ([b"a", b"c"], [b"b"])
    outbox.write(cast(asyncio.WriteTransport, one), b"d")
    outbox.flush()
    assert one.writes[2:] == [b"d"]
    outbox.write(cast(asyncio.WriteTransport, one), b"e")
    one.closing = True
    await asyncio.sleep(0)
    assert one.writes[3:] == []
