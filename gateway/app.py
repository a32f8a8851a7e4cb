"""The gateway's ASGI app: FastAPI for what is ours to answer, the relay for everything that goes to an engine.

Inference calls skip FastAPI's routing: one look at the path, then straight into the relay.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gateway.headers import by_name
from gateway.intake import request_id
from gateway.relay import Relay
from picker.openai import errors
from picker.openai.routes import Dialect
from picker.runtime import Runtime

_OWN = frozenset(("/v1/models", "/health", "/version", "/openapi.json", "/docs"))


class GatewayApp(FastAPI):
    """FastAPI with the relay in front."""

    relay: Relay

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Routes one connection event."""
        if scope["type"] == "http":
            path = scope["path"]
            own = path in _OWN or path.startswith("/v1/models/")
            if not own or scope["method"] not in ("GET", "HEAD"):
                await self.relay(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def build(runtime: Runtime, relay: Relay) -> GatewayApp:
    """The app of one gateway."""
    app = GatewayApp(
        title="Waypost",
        version=runtime.version,
        summary="An OpenAI-compatible gateway: POST /v1/chat/completions and its kin go to the best model server.",
        redoc_url=None,
    )
    app.relay = relay
    started = int(time.time())

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The models all endpoints serve together, and the configured aliases."""
        cards = [_card(name, started) for name in served_models(runtime)]
        return _json({"object": "list", "data": cards}, request)

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> Response:
        """One model, 404 when no endpoint serves it."""
        if model not in served_models(runtime):
            error = errors.model_not_found(model)
            headers = {**dict(errors.error_headers(error)), **_identified(request)}
            return Response(errors.render_error(error, dialect=Dialect.OPENAI), error.status, headers)
        return _json(_card(model, started), request)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """What load balancers ask: 200 when ready, 503 otherwise. Reasons are on the admin port's /readyz."""
        return Response(status_code=200 if runtime.ready() else 503, headers=_identified(request))

    @app.get("/version")
    async def version(request: Request) -> Response:
        """The version of Waypost."""
        return _json({"version": runtime.version}, request)

    return app


def served_models(runtime: Runtime) -> list[str]:
    """All model names a client may ask for, sorted: what endpoints list, and aliases whose target is served or
    unknown.
    """
    names: set[str] = set()
    complete = True
    for _, models in runtime.datastore.models():
        complete = complete and models is not None
        names |= models or set()
    names |= {alias for alias, target in runtime.director.aliases.items() if target in names or not complete}
    return sorted(names)


def _card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "waypost"}


def _json(content: Any, request: Request) -> Response:
    return JSONResponse(content, headers=_identified(request))


def _identified(request: Request) -> dict[str, str]:
    return {"x-request-id": request_id(by_name(request.scope["headers"]))}
