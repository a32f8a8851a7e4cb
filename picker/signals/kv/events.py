"""KV-cache events for the request loop: owns the worker process, hears its deltas, says what is known of publishers.

Deltas arrive in order and in small pieces; other tasks get their turn between two of them. The worker's death is
noticed, all publishers are cleared, and another worker starts after a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Self

import msgspec

from picker.core.prefix.deltas import Op, pack
from picker.signals.kv.messages import (
    COMMAND,
    COUNTS,
    DELTA,
    FACTS,
    FRAME,
    MAX_FRAME_BYTES,
    TROUBLE,
    Command,
    Counted,
    Counts,
    Facts,
    Spec,
    Start,
    Subscribe,
    Trouble,
    Unsubscribe,
    frame,
)

# A fleet of a thousand pods of eight data-parallel ranks.
MAX_PUBLISHERS = 8192
_RESTART_S, _RESTART_MAX_S = 0.2, 10.0
# The worker says something every second. On a busy machine its start takes seconds.
SILENCE_S = 20.0
# A worker that lived so long did not die of what it was told first.
_LIVED_S = 30.0
_END_S = 2.0
_READ_BYTES = 2**18
_SEND_BUFFER_BYTES = 2**20


def _no_delta(delta: bytes) -> None:
    pass


def _no_facts(facts: Facts) -> None:
    pass


def _no_trouble(publisher: int, reason: str) -> None:
    pass


class KvHooks(msgspec.Struct, frozen=True, kw_only=True):
    """Called on the loop; they must be quick and must not raise.

    `on_delta` takes a message of `picker.core.prefix.deltas` with at most 512 keys; `on_facts` what was learnt of a
    publisher, when it changed; `on_trouble` a publisher that cannot be heard, or 0 for the worker, and why.
    """

    on_delta: Callable[[bytes], None] = _no_delta
    on_facts: Callable[[Facts], None] = _no_facts
    on_trouble: Callable[[int, str], None] = _no_trouble


class KvStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of each publisher heard now, the sum over all there were (it only grows), how often the worker was
    started again, and its process id (0 while there is none).
    """

    publishers: dict[int, Counts]
    total: Counts
    restarts: int
    pid: int


class KvEvents:
    """The publishers that are heard. An async context manager: leaving it ends the worker."""

    def __init__(
        self,
        *,
        secret: bytes,
        hooks: KvHooks,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`secret` is the one the keys of requests are made with; `clock` gives monotonic seconds."""
        self._secret, self._hooks = secret, hooks
        self._clock, self._sleep = clock, sleep
        self._specs: dict[int, Spec] = {}
        self._counts: dict[int, Counts] = {}
        self._total = Counts()
        self._restarts = 0
        self._pid = 0
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to listen; `close` ends it."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_running())

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the worker and waits for its end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def subscribe(self, publisher: int, spec: Spec) -> bool:
        """Hear a publisher from now on; another `spec` replaces the one it had. False when there are too many."""
        if self._specs.get(publisher) == spec:
            return True
        if publisher in self._specs:
            self.unsubscribe(publisher)
        elif len(self._specs) >= MAX_PUBLISHERS:
            return False
        self._specs[publisher] = spec
        self._command(Subscribe(publisher, spec))
        return True

    def unsubscribe(self, publisher: int) -> None:
        """Hear it no more. A clearing still follows, if the worker is alive; deltas under way may come before it."""
        if self._specs.pop(publisher, None) is not None:
            self._counts.pop(publisher, None)
            self._command(Unsubscribe(publisher))

    def stats(self) -> KvStatistics:
        """The figures as of about a second ago."""
        return KvStatistics(
            publishers=dict(self._counts),
            total=msgspec.structs.replace(self._total),
            restarts=self._restarts,
            pid=self._pid,
        )

    # -- the worker --------------------------------------------------------------------------------------------------

    async def _keep_running(self) -> None:
        pause_s = _RESTART_S
        while True:
            began = self._clock()
            try:
                reason = await self._one_worker()
            except OSError as error:
                reason = f"cannot start: {error}"
            self._hooks.on_trouble(0, reason)
            for publisher in self._specs:
                self._hooks.on_delta(pack(Op.CLEAR, publisher) + pack(Op.OFFLINE, publisher))
            self._counts.clear()
            if self._clock() - began > _LIVED_S:
                pause_s = _RESTART_S
            await self._sleep(pause_s)
            pause_s = min(_RESTART_MAX_S, pause_s * 2)
            self._restarts += 1

    async def _one_worker(self) -> str:
        """Starts a worker and hears it until its end. Returns why it ended."""
        ours, its = socket.socketpair()
        with its:
            try:
                ours.setblocking(False)
                its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "picker.signals.kv.worker", str(its.fileno())),
                    pass_fds=(its.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=_READ_BYTES)
        self._writer, self._pid = writer, process.pid
        try:
            self._command(Start(self._secret))
            for publisher, spec in self._specs.items():
                self._command(Subscribe(publisher, spec))
            await self._hear(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except TimeoutError:
            return f"silent for {SILENCE_S:g} s"
        finally:
            self._writer, self._pid = None, 0
            writer.close()
            await _ended(process)
        return f"ended with {process.returncode}"

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        while True:
            async with asyncio.timeout(SILENCE_S):
                length, kind = FRAME.unpack(await reader.readexactly(FRAME.size))
                if length > MAX_FRAME_BYTES:
                    raise ConnectionError(f"a message of {length} bytes")
                body = await reader.readexactly(length)
            if kind == DELTA:
                self._hooks.on_delta(body)
                # What is buffered already is read without waiting: others must get their turn.
                await asyncio.sleep(0)
            else:
                self._told(kind, body)

    def _told(self, kind: int, body: bytes) -> None:
        if kind == FACTS:
            facts = msgspec.msgpack.decode(body, type=Facts)
            if facts.publisher in self._specs:
                self._hooks.on_facts(facts)
        elif kind == COUNTS:
            counted = msgspec.msgpack.decode(body, type=Counted)
            if counted.publisher in self._specs:
                self._count(counted)
        elif kind == TROUBLE:
            trouble = msgspec.msgpack.decode(body, type=Trouble)
            self._hooks.on_trouble(trouble.publisher, trouble.reason)

    def _count(self, counted: Counted) -> None:
        before = self._counts.get(counted.publisher, Counts())
        self._counts[counted.publisher] = counted.counts
        for name in Counts.__struct_fields__:
            more = getattr(counted.counts, name) - getattr(before, name)
            setattr(self._total, name, getattr(self._total, name) + more)

    def _command(self, command: Command) -> None:
        if self._writer is not None:
            self._writer.write(frame(COMMAND, msgspec.msgpack.encode(command)))


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Waits for the end of a worker whose link is closed; one that does not notice is killed."""
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except (TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
