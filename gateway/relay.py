"""The relay: one raw ASGI route for all inference calls.

It takes a request in, has the director find an endpoint that answers, and delivers the answer as it comes. Retries
happen only before the first body byte, so response headers are held until then. Scoring, health and books belong to
the brain.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.budget import BodyBudget
from gateway.delivery import Committed, Delivered, Delivery, Send
from gateway.explain import explain_header
from gateway.headers import by_name, to_client, to_engine
from gateway.homes import ResponseHomes
from gateway.http1 import CONNECTION, GatewayProtocol
from gateway.intake import (
    BodyLimits,
    BodyReader,
    ClientGone,
    Intake,
    Receive,
    Scope,
    allow_header,
    dialect_of,
    find_route,
    is_stateful,
    request_id,
    target_of,
    understand,
)
from gateway.verdicts import verdict
from picker.core.events import PROGRESS_EVERY_S, FailureKind, Finished, FirstByte, Outcome, Progress, Stalled, Usage
from picker.core.record import RequestRecord
from picker.core.values import Decision
from picker.director import Answer, Director, Failure, Guard
from picker.openai import errors
from picker.openai.errors import ApiError
from picker.openai.routes import RouteKind, target_path
from picker.prompts import Prompts
from picker.telemetry.logs import Log
from picker.telemetry.metrics import Metrics
from picker.telemetry.requests import record_request
from picker.upstream.client import Upstream
from picker.upstream.connection import Response

# Statuses that say "not me, not now": another endpoint may do better. 529 is Anthropic's overload status.
RETRY_STATUSES = frozenset((502, 503, 504, 529))
# An engine's refusal is kept up to this size in case no other endpoint does better.
KEPT_REFUSAL_BYTES = 64 * 2**10
_JSON = ((b"content-type", b"application/json"),)


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says about the relay."""

    body: BodyLimits
    concurrent_requests: int
    extra_paths: frozenset[str] = frozenset()
    expose: Callable[[str], bool]
    admin_token: str | None = None


class Exchange:
    """One request through the relay, from its first byte to its log line. Never shared, never reused."""

    __slots__ = (
        "attempts",
        "connection",
        "cut",
        "decision",
        "dialect",
        "first_byte_at",
        "guard",
        "headers",
        "ident",
        "key",
        "last_told_at",
        "model",
        "outcome",
        "path",
        "received_at",
        "refused",
        "scope",
        "send",
        "status",
        "stream",
        "usage",
    )

    def __init__(self, scope: Scope, send: Send, *, key: int, now: float) -> None:
        self.scope = scope
        self.send = send
        self.connection: GatewayProtocol = scope[CONNECTION]
        self.key = key
        self.headers = by_name(scope["headers"])
        self.ident = request_id(self.headers)
        self.dialect = dialect_of(scope["raw_path"])
        self.path = ""
        self.model: str | None = None
        self.stream = False
        self.guard = Guard()
        self.received_at = now
        self.first_byte_at: float | None = None
        self.last_told_at = 0.0
        self.decision: Decision | None = None
        self.refused: tuple[Answer, Decision] | None = None
        self.attempts = 0
        self.cut = False
        self.status = 0
        self.outcome = Outcome.REJECTED
        self.usage: Usage | None = None


class Relay:
    """The ASGI callable. One per gateway. `active` counts the requests in progress, and goes on counting those that the
    end of the process cut.
    """

    def __init__(
        self,
        director: Director,
        upstream: Upstream,
        *,
        settings: RelaySettings,
        budget: BodyBudget,
        homes: ResponseHomes,
        metrics: Metrics,
        log: Log,
        prompts: Prompts | None = None,
    ) -> None:
        self._prompts = prompts
        self._director = director
        self._upstream = upstream
        self._settings = settings
        self._budget = budget
        self._homes = homes
        self._metrics = metrics
        self._log = log
        self.active = 0

    def __repr__(self) -> str:
        return f"<Relay [{self.active} active]>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, whatever happens: exactly one answer, one log line, nothing left in the books."""
        now = self._director.clock()
        exchange = Exchange(scope, send, key=self._director.new_key(), now=now)
        exchange.connection.on_gone = exchange.guard.client_left
        self.active += 1
        try:
            await self._serve(exchange, receive)
        except asyncio.CancelledError:
            if exchange.guard.gone:
                exchange.outcome = Outcome.CLIENT_GONE
            else:
                evicted = exchange.guard.absorb() is not None
                exchange.cut = not evicted
                exchange.outcome = Outcome.TIMEOUT if evicted else Outcome.FAILED
                await self._give_up(exchange, errors.upstream_timeout() if evicted else errors.shutting_down())
        except ClientGone:
            exchange.outcome = Outcome.CLIENT_GONE
        except Exception:
            exchange.outcome = Outcome.FAILED
            self._log.error("relay_failed", id=exchange.ident, trace=traceback.format_exc())
            await self._give_up(exchange, errors.internal_error())
        finally:
            exchange.connection.on_gone = None
            self.active -= not exchange.cut
            self._conclude(exchange)

    async def _give_up(self, exchange: Exchange, error: ApiError) -> None:
        """The end of a request that went wrong where nobody expected it."""
        if exchange.status:
            exchange.connection.cut()
        else:
            await self._refuse(exchange, error)

    async def _serve(self, exchange: Exchange, receive: Receive) -> None:
        reader = BodyReader(self._budget, self._settings.body)
        try:
            intake = await self._take_in(exchange, receive, reader)
            if isinstance(intake, ApiError):
                await self._refuse(exchange, intake)
                return
            exchange.connection.resume_body()
            result, exchange.decision, exchange.attempts = await self._director.dispatch(
                intake.request, exchange.guard, self._attempt(exchange, intake)
            )
            # No attempt needs it any more, and its place in the budget is about to be given away.
            intake.body = b""
        finally:
            reader.release()
        if isinstance(result, Committed):
            await self._deliver(exchange, intake, result)
            return
        if isinstance(result, Failure) and exchange.refused is not None:
            # What an engine said about its trouble tells more than our words about the last attempt.
            answer, exchange.decision = exchange.refused
            await self._pass_on(exchange, answer)
            return
        await self._refuse(exchange, verdict(result, intake.stored_id, attempts=exchange.attempts))

    async def _take_in(self, exchange: Exchange, receive: Receive, reader: BodyReader) -> Intake | ApiError:
        scope = exchange.scope
        route = find_route(scope["method"], scope["raw_path"], self._settings.extra_paths)
        if isinstance(route, ApiError):
            return route
        exchange.path = route.name
        exchange.dialect = route.dialect
        if self._director.draining:
            return errors.shutting_down()
        if self.active > self._settings.concurrent_requests:
            return errors.saturated("too many requests are in progress; try again shortly")
        body = await reader.read(exchange.headers, receive, arrived=exchange.connection.body_arrived)
        if isinstance(body, ApiError):
            return body
        intake = understand(
            route,
            body,
            exchange.headers,
            target=target_of(scope),
            key=exchange.key,
            ident=exchange.ident,
            now=exchange.received_at,
            director=self._director,
        )
        if isinstance(intake, ApiError):
            return intake
        exchange.model, exchange.stream = intake.request.model, intake.request.stream
        if self._prompts is not None and intake.parsed is not None:
            intake.request = await self._prompts.keyed(intake.request, intake.body, intake.parsed)
        # It points into the body as it came, which may be another one than the engine gets.
        intake.parsed = None
        return self._pin(intake) if is_stateful(route.kind) else intake

    def _pin(self, intake: Intake) -> Intake | ApiError:
        """Sends a request that names a stored response to the endpoint that holds it, and nowhere else."""
        ident = intake.stored_id
        if ident is None:
            return intake
        home = self._homes.home(ident, self._director.clock())
        if home is None:
            # With one endpoint there is no doubt who holds it, even if it was made before we started.
            endpoints = self._director.datastore.endpoints()
            if len(endpoints) != 1:
                return errors.response_gone(ident)
            home = endpoints[0].id
        intake.request = msgspec.structs.replace(intake.request, pinned=home)
        return intake

    def _attempt(self, exchange: Exchange, intake: Intake) -> Callable[[Decision], Any]:
        async def attempt(decision: Decision) -> Committed | Failure:
            upstream, endpoint = self._upstream, decision.endpoint
            scope = exchange.scope
            headers = to_engine(
                scope["headers"], exchange.headers, exchange.ident.encode(), upstream.authorization(endpoint)
            )
            target = target_path(intake.target, endpoint.path_prefix)
            opened = await upstream.open(endpoint, scope["method"], target, headers, intake.body)
            if isinstance(opened, FailureKind):
                return Failure(opened)
            try:
                return await self._first_byte(exchange, opened, decision)
            except BaseException:
                opened.close()
                raise

        return attempt

    async def _first_byte(self, exchange: Exchange, response: Response, decision: Decision) -> Committed | Failure:
        first = await response.read()
        if isinstance(first, FailureKind) or (not first and response.unframed and response.status < 300):
            response.close()
            return Failure(FailureKind.RESET)
        refused = await _refused(response, first)
        if refused is not None:
            if refused.body:
                exchange.refused = (refused, decision)
            response.close()
            overloaded = refused.status in (503, 529)
            return Failure(FailureKind.OVERLOADED if overloaded else FailureKind.SERVER_ERROR)
        now = self._director.clock()
        exchange.first_byte_at = exchange.last_told_at = now
        self._director.observe(FirstByte(exchange.key, now, refused=response.status >= 400))
        return Committed(response, first)

    async def _deliver(self, exchange: Exchange, intake: Intake, committed: Committed) -> None:
        response = committed.response
        exchange.outcome = Outcome.CLIENT_GONE
        try:
            if response.status >= 400 and await self._deliver_error(exchange, committed):
                return
            exchange.status = response.status
            delivery = Delivery(
                committed,
                exchange.send,
                exchange.connection,
                dialect=exchange.dialect,
                rename=intake.rename,
                on_chunk=lambda: self._progress(exchange),
                on_stall=lambda stalled: self._director.observe(Stalled(exchange.key, self._director.clock(), stalled)),
                on_id=self._learner(exchange) if intake.route.kind is RouteKind.RESPONSES else None,
            )
            headers = to_client(response.headers, self._our_headers(exchange))
            delivered = await delivery.run(headers, exchange.guard)
            exchange.outcome, exchange.cut = delivered.outcome, delivered.cut
            if delivered.error is not None:
                await self._refuse(exchange, delivered.error)
            self._learn(exchange, intake, delivered)
        finally:
            response.close()

    async def _deliver_error(self, exchange: Exchange, committed: Committed) -> bool:
        """An engine's error answer, except a stream, and except JSON too long to hold: that passes as it comes."""
        response = committed.response
        if response.is_event_stream:
            return False
        body = await response.read_up_to(KEPT_REFUSAL_BYTES, committed.first)
        if isinstance(body, FailureKind):
            exchange.outcome = Outcome.FAILED
            await self._refuse(exchange, errors.upstream_reset())
            return True
        if not response.finished and b"json" in response.header(b"content-type").lower():
            committed.first = body
            return False
        exchange.outcome = Outcome.COMPLETED
        await self._pass_on(exchange, Answer(response.status, response.headers, body))
        return True

    def _progress(self, exchange: Exchange) -> None:
        now = self._director.clock()
        if now - exchange.last_told_at >= PROGRESS_EVERY_S:
            exchange.last_told_at = now
            self._director.observe(Progress(exchange.key, now))

    def _learner(self, exchange: Exchange) -> Callable[[str], None]:
        """Notes where a stored response lives as soon as its id is seen: it may be cancelled while it streams."""

        def learn(ident: str) -> None:
            if exchange.decision is not None:
                self._homes.remember(ident, exchange.decision.endpoint.id, self._director.clock())

        return learn

    def _learn(self, exchange: Exchange, intake: Intake, delivered: Delivered) -> None:
        ident = intake.route.resource_id
        if ident is not None and exchange.scope["method"] == "DELETE" and exchange.status < 300:
            self._homes.forget(ident)
        exchange.usage = delivered.usage

    async def _pass_on(self, exchange: Exchange, answer: Answer) -> None:
        """An engine's own error: JSON byte for byte, anything else in our shape."""
        content_type = by_name((name.lower(), value) for name, value in answer.headers).get(b"content-type")
        text = content_type.decode("latin-1") if content_type is not None else None
        wrapped = errors.wrap_engine_error(answer.status, text, answer.body, dialect=exchange.dialect)
        body = answer.body if wrapped is None else wrapped
        ours = [*self._our_headers(exchange), (b"content-length", str(len(body)).encode())]
        kept = [item for item in answer.headers if item[0].lower() not in (b"content-length", b"content-type")]
        kind = b"application/json" if wrapped is not None or content_type is None else content_type
        await self._send_all(exchange, answer.status, to_client(kept, [*ours, (b"content-type", kind)]), body)

    async def _refuse(self, exchange: Exchange, error: ApiError) -> None:
        """One of our own errors."""
        body = errors.render_error(error, dialect=exchange.dialect, request_id=exchange.ident)
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in errors.error_headers(error)]
        headers += [*self._our_headers(exchange), (b"content-length", str(len(body)).encode())]
        if error.status == 405:
            headers.append((b"allow", allow_header(exchange.scope["raw_path"])))
        if not exchange.connection.body_arrived:
            # Nobody reads the rest of the body, so the connection cannot be used again.
            headers.append((b"connection", b"close"))
        await self._send_all(exchange, error.status, headers, body)

    async def _send_all(self, exchange: Exchange, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        exchange.status = status
        await exchange.send({"type": "http.response.start", "status": status, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": body, "more_body": False})

    def _our_headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", exchange.ident.encode("latin-1"))]
        decision = exchange.decision
        if decision is None:
            return headers
        client = exchange.scope["client"]
        if self._settings.expose(client[0] if client else ""):
            waited_ms = (decision.decided_at - exchange.received_at) * 1000
            headers.append((b"x-waypost-endpoint", decision.endpoint.id.encode("ascii", "replace")))
            headers.append((b"x-waypost-decision-ms", b"%.3f" % waited_ms))
        explained = explain_header(exchange.headers, decision, self._settings.admin_token)
        if explained is not None:
            headers.append((b"x-waypost-explain", explained))
        return headers

    def _conclude(self, exchange: Exchange) -> None:
        """The one end of every request: books, metrics, log line."""
        now = self._director.clock()
        status = exchange.status
        ended = Finished(key=exchange.key, at=now, outcome=exchange.outcome, status=status, usage=exchange.usage)
        self._director.observe(ended)
        decision, first_byte_at = exchange.decision, exchange.first_byte_at
        record = RequestRecord(
            id=exchange.ident,
            path=exchange.path,
            status=status,
            outcome=exchange.outcome.value,
            duration_s=now - exchange.received_at,
            model=exchange.model,
            target_model=decision.request.target_model if decision is not None else None,
            priority=decision.request.priority if decision is not None else 0,
            endpoint=decision.endpoint.id if decision is not None else None,
            stream=exchange.stream,
            attempts=exchange.attempts,
            first_byte_s=first_byte_at - exchange.received_at if first_byte_at is not None else None,
            usage=exchange.usage,
        )
        record_request(record, self._metrics, self._log)


async def _refused(response: Response, first: bytes) -> Answer | None:
    """The refusal of an engine that asks for another attempt, None for an answer. Its body is empty if it broke off.

    A stream that is nothing but an error has a status of 200, since its headers went out before the engine was asked.
    """
    if response.status == 200 and response.is_event_stream:
        found = errors.refused_stream(first)
        return Answer(found[0], _JSON, found[1]) if found is not None else None
    if response.status not in RETRY_STATUSES and not (response.status == 500 and errors.engine_died(first)):
        return None
    body = await response.read_up_to(KEPT_REFUSAL_BYTES, first)
    return Answer(response.status, response.headers, body if isinstance(body, bytes) else b"")
