"""A model server that does exactly what a script says, byte for byte, well or badly.

A script is called once per connection. It owns no HTTP beyond reading requests; whatever is sent is up to the script.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

# Five times what anything in these tests needs.
PATIENCE_S = 5.0


class Received(msgspec.Struct, frozen=True):
    """One request as it came over the wire; header names in lower case, the head as it was."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    head: bytes = b""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header."""
        return next((value for key, value in self.headers if key == name), None)

    def all(self, name: bytes) -> list[bytes]:
        """All values of a header."""
        return [value for key, value in self.headers if key == name]


class Peer:
    """One connection, seen from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> Received | None:
        """The next request without its body; None when the client closed."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        start, *lines = head[:-4].split(b"\r\n")
        method, target, _ = start.decode("latin-1").split(" ")
        pairs = (line.partition(b":") for line in lines)
        headers = tuple((name.lower(), value.strip(b" \t")) for name, _, value in pairs)
        return Received(method, target, headers, b"", head)

    async def request(self) -> Received | None:
        """The next request with its body; None when the client closed."""
        request = await self.head()
        if request is None:
            return None
        body = await self.reader.readexactly(int(request.header(b"content-length") or b"0"))
        return msgspec.structs.replace(request, body=body)

    async def send(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        """Writes pieces, each in a write of its own. A client that is gone is no error."""
        with contextlib.suppress(ConnectionError):
            for index, piece in enumerate(pieces):
                if index:
                    await asyncio.sleep(pause_s)
                if self.writer.is_closing():
                    return
                self.writer.write(piece)
                await self.writer.drain()

    async def gone(self) -> float:
        """Waits until the client cut the connection; the loop's time of that moment."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                while await self.reader.read(2**16):
                    pass
        return loop.time()

    def close(self) -> None:
        """FIN, after what was written."""
        self.writer.close()

    def reset(self) -> None:
        """RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class Hostile:
    """A listening script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.url = ""
        self.port = 0
        self.connections = 0
        self.open = 0
        self.received: list[Received] = []
        self.errors: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Runs the script on a new connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self.script(Peer(reader, writer))
        except asyncio.CancelledError:
            pass
        except ConnectionError:
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def close(self) -> None:
        """Ends all scripts."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def hostile(
    script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Hostile]:
    """A server that runs `script` for each connection. A script that raises fails the test at the end."""
    server = Hostile(script)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = await asyncio.start_server(server.accept, host, port, family=family, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    server.url = f"{'https' if tls else 'http'}://{shown}:{server.port}"
    try:
        yield server
    finally:
        listener.close()
        await server.close()
        await listener.wait_closed()
    assert server.errors == []


def answer(body: bytes, *headers: bytes, status: bytes = b"200 OK", framed: bool = True) -> bytes:
    """A whole answer, with a length unless `framed` is false."""
    lines = [b"HTTP/1.1 " + status, *headers]
    if framed:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", b""]) + body


def chunked(*pieces: bytes, end: bool = True) -> list[bytes]:
    """Pieces as HTTP chunks, one each, and the last chunk."""
    return [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + ([b"0\r\n\r\n"] if end else [])
