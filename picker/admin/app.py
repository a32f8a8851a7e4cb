"""The FastAPI app of the admin port.

`/healthz`, `/readyz` and `/metrics` are open; the debug pages answer on loopback, or to the admin token, since they
tell what models and requests there are. `/endpoints`, which changes things, is `registration`.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.admin import registration
from picker.admin.explained import endpoints, explained
from picker.director import Director
from picker.sources.registered import RegisteredSource
from picker.telemetry.metrics import Metrics

Checks = Callable[[], dict[str, str | None]]

# One debug page shows at most this many decisions.
PAGE = 100


@lru_cache(maxsize=4096)
def is_loopback(host: str) -> bool:
    """Whether an address as the server reports it is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build(
    director: Director,
    metrics: Metrics,
    *,
    checks: Checks,
    engines: Callable[[], Mapping[str, str]],
    token: str | None,
    version: str,
    registered: RegisteredSource | None = None,
    credentials: frozenset[str] = frozenset(),
    details: Callable[[], Mapping[str, str]] = dict,
) -> FastAPI:
    """The app. `checks` gives, for each condition of readiness, None when it holds or the reason it does not;
    `engines` the engine of each endpoint that was recognised. `registered` takes registrations where they are enabled,
    which may name these `credentials`. `details` are
    worth knowing beside readiness.
    """
    app = FastAPI(title="Waypost admin", version=version, docs_url=None, redoc_url=None)
    app.include_router(registration.routes(registered, director, credentials=credentials, token=token))
    guarded = [Depends(_guard(token))]

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Alive: the loop runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Ready for traffic, with a reason for each condition that does not hold."""
        conditions = checks()
        failing = any(reason is not None for reason in conditions.values())
        body = {"status": "not ready" if failing else "ready", "checks": conditions, "details": dict(details())}
        return JSONResponse(body, status_code=503 if failing else 200)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Prometheus text."""
        return Response(await _page(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/debug/endpoints", dependencies=guarded)
    async def debug_endpoints() -> list[dict[str, Any]]:
        """What is known about every endpoint."""
        return endpoints(director.snapshot(), engines())

    @app.get("/debug/decisions", dependencies=guarded)
    async def debug_decisions(limit: int = PAGE) -> list[dict[str, Any]]:
        """The latest decisions, newest first."""
        latest = list(director.decisions)[-max(1, min(limit, PAGE)) :]
        return [explained(verdict) for verdict in reversed(latest)]

    @app.get("/debug/decisions/{request_id}", dependencies=guarded)
    async def debug_decision(request_id: str) -> list[dict[str, Any]]:
        """Every attempt of one request, in order."""
        found = [explained(verdict) for verdict in director.decisions if verdict.request.id == request_id]
        if not found:
            raise HTTPException(404, "no decision with that request id is remembered")
        return found

    return app


class _Alone(Collector):
    """One family, as a collector."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


async def _page(registry: CollectorRegistry) -> bytes:
    """All metrics as text. Requests get their turn between two families: a hundred models make a long page."""
    page = bytearray()
    for family in registry.collect():
        page += generate_latest(_Alone(family))
        await asyncio.sleep(0)
    return bytes(page)


def _guard(token: str | None) -> Callable[[Request], None]:
    def guard(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and hmac.compare_digest(given.encode(), token.encode()):
            return
        if token is None and request.client is not None and is_loopback(request.client.host):
            return
        raise HTTPException(401, "the debug pages need the admin token")

    return guard
