"""`/endpoints`: model servers announce themselves, renew, and say goodbye.

A URL that is registered is dialled by the gateway, with the credentials it names: whoever may register can make this
process connect anywhere, and have a key sent there. The admin token grants exactly that, so it is asked for always, on
loopback too. All registrants hold the same token and trust each other: one may renew, change or remove what another
registered. What other sources say (the configuration, a cluster) is not theirs to change.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from picker.config import parse_announcement
from picker.director import Director
from picker.sources.endpoints import endpoint_of
from picker.sources.registered import REGISTERED_MAX, Registered, RegisteredSource

# An entry with as many and as long labels as there may be is half of this.
BODY_MAX_BYTES = 64 * 2**10
# Who sends an entry has it ready.
BODY_TIMEOUT_S = 10.0


def routes(
    source: RegisteredSource | None, director: Director, *, credentials: frozenset[str], token: str | None
) -> APIRouter:
    """The routes. `source` is None where registration is not enabled; `credentials` are the names entries may use.

    `POST /endpoints` takes an entry like those of the configuration as JSON, with a `ttl`, and answers 201 for a new
    endpoint or 200 for one renewed or changed. `DELETE /endpoints/{id}` answers 204. `GET /endpoints` lists what is
    registered, not what other sources say.
    """
    router = APIRouter()
    allowed = Depends(_guard(source, token))

    @router.post("/endpoints")
    async def register(request: Request, source: RegisteredSource = allowed) -> Response:
        """Adds or renews an endpoint."""
        found = parse_announcement(await _json(request), credentials=credentials, ttl_max_s=source.ttl_max_s)
        if isinstance(found, list):
            problems = [str(problem) for problem in found]
            return JSONResponse({"detail": "the endpoint is not valid", "problems": problems}, status_code=422)
        endpoint = endpoint_of(found)
        if director.datastore.endpoint(endpoint.id) is not None and not source.owns(endpoint.id):
            raise HTTPException(409, "another source has an endpoint with this id; give yours a name of its own")
        registered = source.register(endpoint, found.ttl)
        if registered is None:
            raise HTTPException(503, f"{REGISTERED_MAX} endpoints are registered already")
        body = {"id": endpoint.id, "expires_in_s": registered.expires_in_s}
        return JSONResponse(body, status_code=201 if registered.new else 200)

    @router.get("/endpoints")
    async def registered(source: RegisteredSource = allowed) -> list[dict[str, Any]]:
        """What is registered."""
        return [_shown(each) for each in source.registered()]

    @router.delete("/endpoints/{endpoint_id:path}", status_code=204)
    async def deregister(endpoint_id: str, source: RegisteredSource = allowed) -> None:
        """Removes an endpoint."""
        if not source.deregister(endpoint_id):
            raise HTTPException(404, "no endpoint with this id is registered")

    return router


def _guard(source: RegisteredSource | None, token: str | None) -> Callable[[Request], Awaitable[RegisteredSource]]:
    async def guard(request: Request) -> RegisteredSource:
        if source is None:
            raise HTTPException(403, "registration is not enabled; see endpoints.registration.enabled")
        if token is None:
            raise HTTPException(403, "registration needs a token; see admin.token")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise HTTPException(401, "registration needs the admin token", {"www-authenticate": "Bearer"})
        return source

    return guard


async def _json(request: Request) -> object:
    """The body as plain data. Raises HTTPException when it is too large, too slow or not JSON."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_MAX_BYTES:
                    raise HTTPException(413, f"the body is larger than {BODY_MAX_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body did not arrive") from None
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from None


def _shown(registered: Registered) -> dict[str, Any]:
    """An endpoint as it was registered, without what was left empty."""
    fields = msgspec.to_builtins(registered.endpoint)
    shown = {name: value for name, value in fields.items() if value and name not in ("address", "place")}
    if "models" in shown:
        shown["models"] = sorted(shown["models"])
    return shown | {"expires_in_s": round(registered.expires_in_s, 3)}
