"""What the gateway's tests share: a gateway in this process, scripted engines, a client that sees every byte.

Leaving `gateway` asserts that nothing is left behind: no flight in the books, no reserved byte, no task, no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec

from gateway.http1 import GatewayProtocol
from gateway.relay import Relay
from gateway.serve import bind, gateway_server
from picker.config import HostPort, Loaded, load
from picker.runtime import Runtime
from picker.telemetry import logs
from tests.unit.upstream.hostile import PATIENCE_S, Hostile, Peer, Received, answer, hostile

MODEL = "tiny"
CHAT = "/v1/chat/completions"
HELLO = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"tiny","stream":true,"messages":[{"role":"user","content":"hi"}]}'
EVENT_STREAM = b"Content-Type: text/event-stream"
JSON = b"Content-Type: application/json"
# What was asked of "within 100 ms", with the allowance for a busy machine.
ABORT_S = 0.5

Script = Callable[[Peer, Received], Awaitable[None]]


@contextlib.asynccontextmanager
async def backend(script: Script, *, models: Sequence[str] | None = None) -> AsyncIterator[Hostile]:
    """A scripted engine. Probes are answered for it: alive, no metrics, and a model list when `models` are given."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if request.method == "GET" and request.target in (
                "/health",
                "/metrics",
                "/v1/models",
                "/prometheus/metrics",
            ):
                await peer.send(_probe(request.target, models))
                continue
            server.received.append(request)
            await script(peer, request)

    async with hostile(serve) as server:
        yield server


def _probe(target: str, models: Sequence[str] | None) -> bytes:
    if target == "/v1/models" and models is not None:
        return answer(msgspec.json.encode({"object": "list", "data": [{"id": name} for name in models]}), JSON)
    return answer(b"") if target == "/health" else answer(b"", status=b"404 Not Found")


def says(*pieces: bytes) -> Script:
    """A script that answers every request with the same bytes."""

    async def script(peer: Peer, request: Received) -> None:
        await peer.send(*pieces)

    return script


def events(*pieces: bytes, end: bool = True) -> bytes:
    """An event stream, chunked."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if end else b"")


class Gateway:
    """A running gateway and its insides."""

    def __init__(self, runtime: Runtime, relay: Relay, address: str, log: io.StringIO) -> None:
        self.runtime = runtime
        self.relay = relay
        self.address = address
        self.url = f"http://{address}"
        self._log = log

    @property
    def budget_bytes(self) -> int:
        """Bytes of bodies reserved now."""
        return self.relay._budget.used_bytes

    def lines(self, event: str = "request") -> list[dict[str, Any]]:
        """Log lines of one kind so far."""
        found = [json.loads(line) for line in self._log.getvalue().splitlines() if line]
        return [line for line in found if line.get("event") == event]

    def idle(self) -> bool:
        """Whether the books say that nothing is going on."""
        return self.relay.active == 0 and self.budget_bytes == 0 and len(self.runtime.datastore.ledger) == 0

    async def settled(self) -> None:
        """Waits until nothing is going on."""
        await until(self.idle, lambda: f"{self.relay!r} {self.budget_bytes} {self.runtime.datastore.ledger!r}")

    @contextlib.asynccontextmanager
    async def client(self, *, receive_bytes: int | None = None) -> AsyncIterator[Client]:
        """One raw connection, with a receive buffer of its own size if told."""
        host, port = self.address.rsplit(":", 1)
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def ask(self, *request: bytes, method: str = "POST") -> Got:
        """One request on a connection of its own."""
        async with self.client() as client:
            await client.send(*request)
            return await client.answer(method=method)

    async def post(self, body: bytes = HELLO, *headers: bytes, path: str = CHAT) -> Got:
        """One POST with a JSON body."""
        return await self.ask(post(body, *headers, path=path))


class Got(msgspec.Struct):
    """An answer as it came: status, lower-case headers, body, its chunks if it had any, and whether it was whole."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunks: list[tuple[float, bytes]]
    whole: bool

    @property
    def error(self) -> dict[str, Any]:
        """The `error` object of the body."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


class Client:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        """Writes pieces, each in a write of its own."""
        for index, piece in enumerate(pieces):
            if index:
                await asyncio.sleep(pause_s)
            if self.writer.is_closing():
                return
            self.writer.write(piece)
            with contextlib.suppress(ConnectionError):
                await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        async with asyncio.timeout(PATIENCE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        start, *lines = raw[:-4].decode("latin-1").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        names = [name.lower() for name, _ in pairs]
        assert len(set(names) - {"set-cookie"}) == len([name for name in names if name != "set-cookie"]), names
        return int(start.split(" ", 2)[1]), {name.lower(): value for name, value in pairs}

    async def answer(self, *, method: str = "POST") -> Got:
        """The next answer to its end, whole or not."""
        status, headers = await self.head()
        got = Got(status, headers, b"", [], False)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                await self._body(got, method)
        return got

    async def _body(self, got: Got, method: str) -> None:
        if method == "HEAD" or got.status in (204, 304):
            got.whole = True
        elif got.headers.get("transfer-encoding") == "chunked":
            while piece := await self.chunk():
                got.chunks.append((time.monotonic(), piece))
                got.body += piece
            got.whole = True
        elif "content-length" in got.headers:
            length = int(got.headers["content-length"])
            while len(got.body) < length:
                piece = await self.reader.read(length - len(got.body))
                if not piece:
                    return
                got.body += piece
            got.whole = True
        else:
            while piece := await self.reader.read(2**16):
                got.body += piece
            got.whole = True

    async def chunk(self) -> bytes:
        """The next HTTP chunk."""
        size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def closed(self) -> bytes:
        """What comes until the gateway closes."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                return await self.reader.read()
        return b""


def post(body: bytes = HELLO, *headers: bytes, path: str = CHAT) -> bytes:
    """A POST with a JSON body, as bytes."""
    return request_bytes("POST", path, JSON, b"Content-Length: %d" % len(body), *headers) + body


def get(path: str, *headers: bytes, method: str = "GET") -> bytes:
    """A request without a body, as bytes."""
    return request_bytes(method, path, *headers)


def request_bytes(method: str, path: str, *headers: bytes) -> bytes:
    """The head of a request."""
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: gateway", *headers, b"", b""])


@contextlib.asynccontextmanager
async def gateway(*endpoints: str | dict[str, Any], **config: Any) -> AsyncIterator[Gateway]:
    """A gateway before `endpoints` (URLs, or entries as in the file). `config` are sections of the configuration.

    URLs become endpoints without metrics that serve MODEL, so that only the tests' own requests matter.
    """
    before = _open_sockets()
    entries = [_entry(endpoint) for endpoint in endpoints]
    flags: dict[tuple[str, ...] | str, object] = {"endpoints.static": entries, "listen": "127.0.0.1:0"}
    flags.update({(section,): value for section, value in config.items()})
    loaded = load(None, environ={}, flags=flags)
    assert isinstance(loaded, Loaded), [str(problem) for problem in loaded]
    log = io.StringIO()
    runtime = Runtime(loaded.config, log=logs.configure("debug", style="json", stream=log), version="test")
    tasks = asyncio.all_tasks()
    await runtime.start()
    await until(lambda: len(runtime.datastore.endpoints()) == len(entries))
    door, relay = gateway_server(runtime, bind(HostPort("127.0.0.1", 0)))
    address, stop = await _listen(door)
    served = Gateway(runtime, relay, address, log)
    try:
        yield served
        await served.settled()
    finally:
        await stop()
        await runtime.close()
    await until(lambda: not asyncio.all_tasks() - tasks, lambda: str(asyncio.all_tasks() - tasks))
    gc.collect(1)
    await until(lambda: _open_sockets() <= before, lambda: f"{_open_sockets()} sockets, {before} before")
    for line in served.lines("Exception in ASGI application\n"):
        raise AssertionError(line)


def _entry(endpoint: str | dict[str, Any]) -> dict[str, Any]:
    plain = {"engine": "none", "models": [MODEL]}
    return {**plain, "url": endpoint} if isinstance(endpoint, str) else {**plain, **endpoint}


async def _listen(door: Any) -> tuple[str, Callable[[], Awaitable[None]]]:
    """Serves as uvicorn does, without its main loop, whose tenths of a second would add up."""
    from uvicorn.server import ServerState

    config = door._server.config
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()

    def protocol() -> GatewayProtocol:
        made: GatewayProtocol = config.http_protocol_class(config=config, server_state=state, app_state={})
        return made

    listener = await loop.create_server(protocol, sock=door._sock)

    async def stop() -> None:
        listener.close()
        for connection in list(state.connections):
            connection.shutdown()
        await until(lambda: not state.connections, lambda: f"{len(state.connections)} connections")
        await until(lambda: not state.tasks, lambda: str(state.tasks))
        await listener.wait_closed()

    return door.address, stop


async def until(condition: Callable[[], bool], say: Callable[[], str] = lambda: "never happened") -> None:
    """Polls a condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, say()
        await asyncio.sleep(0.005)


def _open_sockets() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(link.startswith("socket:") for link in links)


def request_id_of(got: Got) -> str:
    """The request id of an answer, which every answer must have."""
    ident = got.headers["x-request-id"]
    assert re.fullmatch(r"[\x21-\x7e]{1,256}", ident), ident
    return ident
