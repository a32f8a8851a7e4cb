"""The gateway's ASGI app: FastAPI for what is ours to answer, the relay for everything that goes to an engine.

Inference calls skip FastAPI's routing: one look at the path, then straight into the relay. Every answer made here gets
its request id.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from gateway.headers import by_name
from gateway.intake import request_id
from gateway.relay import Relay
from picker.openai import errors
from picker.openai.routes import target_path
from picker.runtime import Runtime

_OWN = frozenset(("/v1/models", "/health", "/version", "/openapi.json", "/docs"))
_UNCERTAIN = "the models of some endpoints are not known at the moment"


class GatewayApp(FastAPI):
    """FastAPI with the relay in front."""

    relay: Relay

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Routes one connection event."""
        if scope["type"] == "http":
            path = target_path(scope["path"], "")
            own = path in _OWN or path.startswith("/v1/models/")
            if not own or scope["method"] not in ("GET", "HEAD"):
                await self.relay(scope, receive, send)
                return
            scope = {**scope, "method": "GET", "path": path}
            send = _identified(send, request_id(by_name(scope["headers"])))
        await super().__call__(scope, receive, send)


def _identified(send: Any, ident: str) -> Any:
    async def send_identified(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", ident.encode("latin-1"))]
        await send(message)

    return send_identified


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
    async def models() -> Response:
        """The models all endpoints serve together, and the configured aliases."""
        cards = [_card(name, started) for name in served_models(runtime)]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """One model; 404 when no endpoint serves it, 503 while that cannot be told."""
        if model in served_models(runtime):
            return JSONResponse(_card(model, started))
        states = runtime.director.snapshot().states
        certain = states and all(state.models is not None for state in states)
        error = errors.model_not_found(model) if certain else errors.no_ready_endpoints(_UNCERTAIN)
        return Response(errors.render_error(error), error.status, dict(errors.error_headers(error)))

    @app.get("/health")
    async def health() -> Response:
        """What load balancers ask: 200 when ready, 503 otherwise. Reasons are on the admin port's /readyz."""
        return Response(status_code=200 if runtime.ready() else 503)

    @app.get("/version")
    async def version() -> Response:
        """The version of Waypost."""
        return JSONResponse({"version": runtime.version})

    return app


def served_models(runtime: Runtime) -> list[str]:
    """All model names a client may ask for, sorted: what endpoints list, and aliases and rewritten names of which a
    target is served or unknown.
    """
    names: set[str] = set()
    complete = True
    for _, models in runtime.datastore.models():
        complete = complete and models is not None
        names |= models or set()
    director = runtime.director
    renamed = {alias for alias, target in director.aliases.items() if target in names or not complete}
    for rewrite in director.rules.rewrites:
        if not complete or any(target.model in names for target in rewrite.targets):
            renamed |= rewrite.models
    return sorted(names | renamed)


def _card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "waypost"}
