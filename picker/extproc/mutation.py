"""From a decision to the change of the request's headers that has the proxy carry it out. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from picker.core.values import Decision, Endpoint
from picker.extproc import headers as names
from picker.extproc.messages import Hidden, Mutation
from picker.extproc.question import Head
from picker.extproc.settings import SessionSettings
from picker.openai.routes import target_path

Authorization = Callable[[Endpoint], bytes | None]
"""The value of the Authorization header an endpoint wants from us; None leaves the client's alone."""


def request_mutation(
    head: Head, decision: Decision, settings: SessionSettings, authorization: Authorization
) -> Mutation:
    """The destination, what its endpoint wants of the request, and what no engine may see taken out."""
    endpoint, headers = decision.endpoint, head.headers
    destination = _destination(decision, settings.fallbacks)
    added = [(names.DESTINATION, destination)]
    if headers.get(names.REQUEST_ID) != head.id:
        added.append((names.REQUEST_ID, head.id))
    path = headers.get(names.PATH, "")
    target = target_path(path, endpoint.path_prefix)
    if target != path:
        # The proxy matches routes again with it, since its route cache is cleared: they must match both paths.
        added.append((names.PATH, target))
    key = authorization(endpoint)
    if key is not None:
        added.append((names.AUTHORIZATION, Hidden(key.decode("ascii"))))
    if settings.conformance:
        added.append((names.ECHO, f"{names.SERVED_ECHO}:{endpoint.address}"))
    return Mutation(
        set_headers=tuple(added),
        remove_headers=names.to_remove(headers),
        destination=destination,
        scores=ranked_scores(decision) if settings.emit_scores else (),
    )


def _destination(decision: Decision, fallbacks: int) -> str:
    """The addresses to try, in order. The request is changed for the first, so the others must want it the same way."""
    chosen = decision.endpoint
    if not fallbacks:
        return chosen.address
    wanted = (chosen.credentials, chosen.path_prefix)
    others = [
        other.address
        for other in decision.alternates
        if other.address and (other.credentials, other.path_prefix) == wanted
    ]
    return ",".join([chosen.address, *others[:fallbacks]])


def ranked_scores(decision: Decision) -> tuple[tuple[str, float], ...]:
    """Address and total score of the endpoints a decision ranked, as far as they have both."""
    address_of = {endpoint.id: endpoint.address for endpoint in (decision.endpoint, *decision.alternates)}
    table = decision.table
    scored = ((address_of.get(name), total) for name, total in zip(table.endpoints, table.totals, strict=False))
    return tuple((address, total) for address, total in scored if address and not math.isnan(total))


def with_length(mutation: Mutation, body: bytes) -> Mutation:
    """The same with the length of the body that goes along."""
    length = ("content-length", str(len(body)))
    return msgspec.structs.replace(mutation, set_headers=(*mutation.set_headers, length))


def without_length(mutation: Mutation) -> Mutation:
    """The same for a body whose length is not known yet."""
    return msgspec.structs.replace(mutation, remove_headers=(*mutation.remove_headers, "content-length"))
