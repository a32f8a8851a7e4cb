"""A fake Kubernetes API server that speaks real HTTP on 127.0.0.1, for lists and watches, and that breaks on command.

    async with FakeKube(token="t") as kube:
        kube.put("pods", "default", {"metadata": {"name": "a"}})
        config = kube.kubeconfig(tmp_path)

It runs in the loop of the test; other processes reach it at `kube.url`. Not here: writes over HTTP, protobuf, tables,
admission, and what a watch from a version of the future does.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from aiohttp import web

from tests.fakes.kube_answers import json_answer, not_served, refuse, status_object, watch_line
from tests.fakes.kube_state import KINDS, Json, Key, KubeState, Scope, Watcher

_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?"
)


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    path: str
    query: dict[str, str]
    authorization: str
    status: int = 0

    @property
    def watch(self) -> bool:
        return self.query.get("watch") in ("true", "1")


@dataclass
class _Fault:
    """An answer that is given instead of the right one, `times` more times."""

    status: int
    times: int
    path: str
    watch: bool | None
    having: str
    retry_after_s: int | None
    message: str
    body: bytes | None

    def fits(self, asked: Seen) -> bool:
        fits = self.path in asked.path and self.watch in (None, asked.watch)
        return fits and self.times > 0 and (not self.having or self.having in asked.query)


class FakeKube:
    """An API server. Objects are dicts as in YAML; kinds are named by the keys of `KINDS` ("pods", "inferencepools.x").

    `token`: the bearer token to ask for, None for no questions. `absent`: kinds whose definition is not installed.
    `bookmark_s`: how often idle watches are told the version; real servers do about once a minute.
    `tls`: the context of an https server.
    """

    def __init__(
        self,
        *,
        token: str | None = None,
        absent: tuple[str, ...] = (),
        bookmark_s: float = 60.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.state = KubeState()
        self.state.served -= set(absent)
        self.token = token
        self.bookmark_s = bookmark_s
        self.forbidden: set[str] = set()
        """Kinds that we have no right to see."""
        self.latency_s = 0.0
        """Before every answer."""
        self.expire_in_stream = True
        """How an expired watch is told: as an event after a 200, like most real ones, or as the status 410."""
        self.requests: deque[Seen] = deque(maxlen=10_000)
        self.port = 0
        self._tls = tls
        self._faults: list[_Fault] = []
        # A client that leaves ends the handler of its watch.
        self._server = web.Server(self._answer, handler_cancellation=True)
        self._listener: asyncio.Server | None = None

    def __repr__(self) -> str:
        return f"<FakeKube {self.url} version {self.state.version}>"

    async def __aenter__(self) -> FakeKube:
        await self.up()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.down()
        await self._server.shutdown(timeout=0.1)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def kubeconfig(
        self, directory: Path, *, namespace: str = "default", token_file: Path | None = None, ca: Path | None = None
    ) -> Path:
        """Writes a kubeconfig for this server, with its token or a file that holds one."""
        user = {"tokenFile": str(token_file)} if token_file else {"token": self.token} if self.token else {}
        cluster: Json = {"server": self.url}
        if ca is not None:
            cluster["certificate-authority"] = str(ca)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": namespace}}],
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "fake", "user": user}],
        }
        path = directory / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path

    # -- objects -------------------------------------------------------------------------------------------------------

    def put(self, kind: str, namespace: str, found: Json) -> Json:
        """Creates or replaces an object; returns it as it is now. Nodes have the namespace ""."""
        return self.state.put(kind, namespace, found)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Deletes an object; KeyError when there is none."""
        self.state.delete(kind, namespace, name)

    def objects(self, kind: str) -> dict[Key, Json]:
        """The truth."""
        return self.state.objects(kind)

    def compact(self) -> None:
        """Versions before now expire. Running watches go on."""
        self.state.compact()

    def withdraw(self, kind: str) -> None:
        """The definition of a kind is deleted, and its objects with it."""
        self.state.withdraw(kind)

    def install(self, kind: str) -> None:
        """The definition of a kind appears."""
        self.state.served.add(kind)

    # -- trouble -------------------------------------------------------------------------------------------------------

    def fail(
        self,
        status: int,
        times: int = 1,
        *,
        path: str = "",
        watch: bool | None = None,
        having: str = "",
        retry_after_s: int | None = None,
        message: str = "",
        body: bytes | None = None,
    ) -> None:
        """The next `times` requests whose path contains `path` get `status` (or `body` with it). `watch`: only watches,
        or only lists. `having`: only with this parameter, such as "continue".
        """
        self._faults.append(_Fault(status, times, path, watch, having, retry_after_s, message, body))

    def forgive(self) -> None:
        """No more of the failures that were ordered."""
        self._faults.clear()

    def cut_watches(self) -> None:
        """Every running watch breaks off in the middle of its next line."""
        for watcher in self.state.watchers:
            watcher.cut = True

    def mangle_watches(self) -> None:
        """In every running watch the next line loses its second half, and the watch goes on."""
        for watcher in self.state.watchers:
            watcher.mangle = True

    def close_watches(self) -> None:
        """Every running watch ends in good order, after what is still to be sent."""
        self.send_raw(None)

    def expire_watches(self) -> None:
        """Every running watch is told that its version has expired."""
        self.send_raw(watch_line("ERROR", status_object(410, "too old resource version")))
        self.close_watches()

    def send_raw(self, raw: bytes | None) -> None:
        """Every running watch is sent these bytes as they are."""
        for watcher in self.state.watchers:
            watcher.queue.put_nowait(raw)

    def mute_watches(self) -> None:
        """Every running watch stays open and says nothing any more, like a peer that lost its network."""
        for watcher in self.state.watchers:
            watcher.mute = True

    def drop(self) -> None:
        """Every connection is reset."""
        for connection in self._server.connections:
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            sock = transport.get_extra_info("socket")
            if sock is not None:
                # A reset, rather than an end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    async def down(self) -> None:
        """The server goes away: connections are reset and new ones refused."""
        if self._listener is None:
            return
        # asyncio loses connections that it accepted in the moment its server closes: first accept no more.
        for sock in self._listener.sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())
        for _ in range(3):
            await asyncio.sleep(0)
        self._listener.close()
        self._listener = None
        self.drop()

    async def up(self) -> None:
        """The server is there, at the port it had before."""
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(self._server, "127.0.0.1", self.port, ssl=self._tls)
            self.port = self._listener.sockets[0].getsockname()[1]

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        asked = Seen(request.path, dict(request.query), request.headers.get("Authorization", ""))
        refusal = self._refusal(asked)
        found = _PATH.fullmatch(asked.path)
        if refusal is not None:
            response: web.StreamResponse = refusal
        elif found is None:
            response = not_served()
        else:
            return await self._resource(request, asked, found.groupdict(default=""))
        self._note(asked, response.status)
        return response

    def _note(self, asked: Seen, status: int) -> None:
        self.requests.append(Seen(asked.path, asked.query, asked.authorization, status))

    def _refusal(self, asked: Seen) -> web.Response | None:
        if self.token is not None and asked.authorization.lower() != f"bearer {self.token}".lower():
            return refuse(401, "Unauthorized")
        fault = next((each for each in self._faults if each.fits(asked)), None)
        if fault is None:
            return None
        fault.times -= 1
        if fault.body is not None:
            return web.Response(status=fault.status, body=fault.body)
        return refuse(fault.status, fault.message or "the test wants this", fault.retry_after_s)

    async def _resource(self, request: web.BaseRequest, asked: Seen, parts: dict[str, str]) -> web.StreamResponse:
        kind = self._kind(parts)
        if kind is None:
            self._note(asked, 404)
            return not_served()
        if kind in self.forbidden:
            self._note(asked, 403)
            return refuse(403, f'{parts["plural"]} is forbidden: User "fake" cannot list resource')
        query = asked.query
        scope = Scope(kind, parts["namespace"], query.get("labelSelector", ""), query.get("fieldSelector", ""))
        if asked.watch:
            return await self._watch(request, asked, scope)
        if parts["name"]:
            one = self.state.objects(kind).get((parts["namespace"], parts["name"]))
            response = refuse(404, f"{parts['name']} not found") if one is None else json_answer(one)
        else:
            response = self._list(scope, query)
        self._note(asked, response.status)
        return response

    def _kind(self, parts: dict[str, str]) -> str | None:
        for name in self.state.served:
            kind = KINDS[name]
            if (kind.group, kind.version, kind.plural) == (parts["group"], parts["version"], parts["plural"]):
                return name
        return None

    def _list(self, scope: Scope, query: dict[str, str]) -> web.Response:
        page = self.state.page(scope, int(query.get("limit", "0")), query.get("continue", ""))
        if page is None:
            return refuse(410, "The provided continue parameter is too old")
        items, version, more = page
        kind = KINDS[scope.kind]
        meta: Json = {"resourceVersion": str(version)}
        if more:
            meta["continue"] = more
        return json_answer(
            {"kind": f"{kind.singular}List", "apiVersion": kind.api_version, "metadata": meta, "items": items}
        )

    # -- watch ---------------------------------------------------------------------------------------------------------

    async def _watch(self, request: web.BaseRequest, asked: Seen, scope: Scope) -> web.StreamResponse:
        query = asked.query
        version = query.get("resourceVersion", "")
        if version and not version.isdigit():
            self._note(asked, 400)
            return refuse(400, f"invalid resource version {version!r}")
        watcher = self.state.watch(scope, int(version) if version not in ("", "0") else None)
        expired = f"too old resource version: {version} ({self.state.compacted})"
        if watcher is None and not self.expire_in_stream:
            self._note(asked, 410)
            return refuse(410, expired)
        self._note(asked, 200)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        try:
            with suppress(ConnectionError):
                await response.prepare(request)
                if watcher is None:
                    await response.write(watch_line("ERROR", status_object(410, expired)))
                else:
                    await self._stream(request, response, watcher, query)
                await response.write_eof()
        finally:
            if watcher is not None:
                self.state.watchers.discard(watcher)
        return response

    async def _stream(
        self, request: web.BaseRequest, response: web.StreamResponse, watcher: Watcher, query: dict[str, str]
    ) -> None:
        """Sends events until the time the client asked for is over."""
        clock = asyncio.get_running_loop().time
        ends_at = clock() + float(query.get("timeoutSeconds", "1800"))
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        while True:
            if watcher.mute:
                await asyncio.Event().wait()
            wait_s = max(0.0, min(self.bookmark_s if bookmarks else 1e9, ends_at - clock()))
            try:
                async with asyncio.timeout(wait_s):
                    item = await watcher.queue.get()
            except TimeoutError:
                if clock() >= ends_at:
                    return
                if not watcher.queue.empty():
                    continue
                item = ("BOOKMARK", self._bookmark(watcher))
            if watcher.mute:
                continue
            if item is None:
                return
            line = item if isinstance(item, bytes) else watch_line(*item)
            if watcher.cut:
                await response.write(line[: max(1, len(line) // 2)])
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError
            if watcher.mangle:
                watcher.mangle = False
                line = line[: len(line) // 2] + b"\n"
            await response.write(line)

    def _bookmark(self, watcher: Watcher) -> Json:
        kind = KINDS[watcher.scope.kind]
        meta = {"resourceVersion": str(self.state.version), "creationTimestamp": None}
        return {"kind": kind.singular, "apiVersion": kind.api_version, "metadata": meta}
