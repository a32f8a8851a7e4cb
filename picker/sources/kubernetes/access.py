"""Where the API server is and how to prove who we are: from a kubeconfig or from the pod's service account.

Reading both is the `kubernetes` package's work. It is not watched over time there, so `AccessLoader.load` reads
everything anew and says when that should happen again. Texts of errors never hold what is in a kubeconfig's users.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import ssl
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import load_kube_config
from kubernetes.aio.config.incluster_config import SERVICE_HOST_ENV_NAME, InClusterConfigLoader

from picker.sources.kubernetes.failure import one_line

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Tokens of service accounts live an hour and are replaced when a fifth of that is left; the library does the same.
REREAD_S = 60.0
# Ask the plugin again this long before what it gave ends, but not all the time when it gives little.
PLUGIN_EARLY_S = 60.0
PLUGIN_APART_S = 30.0
# Plugins may open a browser, and nobody may be there.
PLUGIN_TIMEOUT_S = 60.0


class NoCluster(RuntimeError):
    """There is no usable configuration of a cluster; the text is one line that says why."""


class Access(msgspec.Struct, frozen=True):
    """One reading of the configuration. `reread_at` is on the loader's clock, infinite for "when it is refused"."""

    server: str
    authorization: str
    tls: ssl.SSLContext | None
    server_name: str | None
    proxy: str | None
    namespace: str | None
    reread_at: float

    def __repr__(self) -> str:
        return f"<Access to {self.server}>"


class AccessLoader:
    """Finds the configuration: the file or context given, else the pod's service account, else `$KUBECONFIG` or
    `~/.kube/config`.
    """

    def __init__(
        self,
        *,
        kubeconfig: Path | None,
        context: str | None,
        service_account: Path,
        environ: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._kubeconfig = kubeconfig
        self._context = context
        self._service_account = service_account
        self._environ = environ
        self._clock = clock
        self._tls: tuple[bytes, ssl.SSLContext] | None = None
        self._reading: asyncio.Task[tuple[Configuration, Any]] | None = None

    async def load(self) -> Access:
        """Reads everything again, running the exec plugin if there is one; NoCluster when there is nothing usable."""
        if self._kubeconfig is None and self._context is None and self._environ.get(SERVICE_HOST_ENV_NAME):
            return self._in_cluster()
        return await self._from_kubeconfig()

    async def close(self) -> None:
        """Waits no longer for a plugin."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None

    def _in_cluster(self) -> Access:
        configuration = Configuration()
        try:
            InClusterConfigLoader(  # type: ignore[no-untyped-call]
                token_filename=str(self._service_account / "token"),
                cert_filename=str(self._service_account / "ca.crt"),
                try_refresh_token=False,
                environ=self._environ,
            ).load_and_set(configuration)
            namespace = _text_of(self._service_account / "namespace")
            # The API server is a Service of the cluster: a proxy for the world outside is not on the way to it.
            return self._access(configuration, namespace, proxy=None, reread_s=REREAD_S)
        except Exception as error:
            raise NoCluster(f"the pod's service account cannot be used: {_safe(error)}") from None

    async def _from_kubeconfig(self) -> Access:
        paths = str(self._kubeconfig) if self._kubeconfig else self._environ.get("KUBECONFIG") or "~/.kube/config"
        if not _any_file(paths):
            raise NoCluster(f"there is no kubeconfig at {paths}, and this is not a pod of a cluster")
        try:
            configuration, loader = await self._read_once(paths)
            access = self._access(
                configuration,
                str(loader.current_context["context"].get("namespace") or "") or None,
                proxy=configuration.proxy or _environment_proxy(configuration.host),
                reread_s=_reread_s(loader),
            )
        except TimeoutError:
            raise NoCluster(f"kubeconfig {paths}: no credentials within {PLUGIN_TIMEOUT_S:.0f} s") from None
        except Exception as error:
            raise NoCluster(f"kubeconfig {paths}: {_safe(error)}") from None
        if _plugin(loader) and not access.authorization and not configuration.cert_file:
            raise NoCluster(f"kubeconfig {paths}: the exec plugin {_plugin(loader)!r} gave no credentials")
        return access

    async def _read_once(self, paths: str) -> tuple[Configuration, Any]:
        """The library's reading. One that takes too long goes on, for the next caller to find: a plugin that waits for
        somebody cannot be stopped from here, and there must not be a second one.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(_read(paths, self._context), name="kubeconfig")
        reading = self._reading
        try:
            async with asyncio.timeout(PLUGIN_TIMEOUT_S):
                return await asyncio.shield(reading)
        finally:
            if reading.done():
                self._reading = None

    def _access(
        self, configuration: Configuration, namespace: str | None, *, proxy: str | None, reread_s: float
    ) -> Access:
        server = configuration.host
        if urlsplit(server).hostname is None or urlsplit(server).scheme not in ("http", "https"):
            raise ValueError("the cluster has no server with http:// or https://")
        return Access(
            server=server.rstrip("/"),
            # Files often end with a newline, which no header may hold.
            authorization=(configuration.api_key.get("BearerToken") or "").strip(),
            tls=self._tls_context(configuration) if server.startswith("https:") else None,
            server_name=configuration.tls_server_name,
            proxy=proxy,
            namespace=namespace,
            reread_at=self._clock() + reread_s,
        )

    def _tls_context(self, configuration: Configuration) -> ssl.SSLContext:
        """The same context as long as nothing it is made of changed, so that connections are used again."""
        files = [configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file]
        digest = hashlib.sha256(repr(configuration.verify_ssl).encode())
        for name in files:
            digest.update(hashlib.sha256(Path(name).read_bytes() if name else b"").digest())
        if self._tls is None or self._tls[0] != digest.digest():
            self._tls = (digest.digest(), RESTClientObject(configuration).ssl_context)
        return self._tls[1]


async def _read(paths: str, context: str | None) -> tuple[Configuration, Any]:
    configuration = Configuration()
    loader = await load_kube_config(  # type: ignore[no-untyped-call]
        config_file=paths,
        context=context,
        client_configuration=configuration,
        # The file is the user's.
        persist_config=False,
    )
    return configuration, loader


def _any_file(paths: str) -> bool:
    return any(Path(path).expanduser().is_file() for path in paths.split(":") if path)


def _reread_s(loader: Any) -> float:
    """Files are read again regularly; plugins and providers only when what they gave ends or is refused."""
    if _plugin(loader):
        ends_at: datetime | None = getattr(loader, "exec_plugin_expiry", None)
        if ends_at is None:
            return math.inf
        return max(PLUGIN_APART_S, (ends_at - datetime.now(UTC)).total_seconds() - PLUGIN_EARLY_S)
    return math.inf if loader.provider else REREAD_S


def _plugin(loader: Any) -> str:
    """The command of the exec plugin, empty when there is none."""
    user = loader._user
    return str(user["exec"]["command"]) if user is not None and "exec" in user else ""


def _environment_proxy(server: str) -> str | None:
    """The proxy that the environment names for this server. aiohttp would take ~/.netrc along."""
    parts = urlsplit(server)
    if parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _safe(error: Exception) -> str:
    """The error in one line. The library puts whole users, with their tokens, into some of its texts; what YAML cannot
    parse may be one.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} is no YAML"
    text = one_line(str(error).partition("{")[0])
    return text or type(error).__name__
