"""The API front end of one engine process: routes, generations in flight, stored responses, the metrics page.

It lives as long as one incarnation of the engine: a restart makes a new one. Sockets and faults that concern them
belong to ``sim.server``.
"""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Callable
from typing import Final

import msgspec

from sim.answers import OVERLOADED, Answer, ApiError, Ask, Usage, bad_request, encode_json, model_not_found
from sim.driver import EngineDriver
from sim.faults import Faults
from sim.http1 import HttpRequest, Reply
from sim.metrics_page import CONTENT_TYPE, Gauges, render
from sim.openai_api import (
    ChatAnswer,
    CompletionAnswer,
    EmbeddingAnswer,
    detokenize,
    model_list,
    read_chat,
    read_completion,
    read_embedding,
    tokenize,
)
from sim.profiles import Profile
from sim.requests import Emission, Request
from sim.responses_api import (
    MessagesAnswer,
    ResponsesAnswer,
    ResponseStore,
    StoredResponse,
    read_messages,
    read_responses,
)
from sim.tokens import decode, no_tokens

# Time for the last chunk to leave before the connection is broken: an RST takes unsent bytes with it.
RESET_DELAY_S: Final = 0.01
VERSION: Final = "0.32.0"


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine is set up. ``port`` 0 takes a free one; ``index`` is what ``x-sim-engine`` tells.

    ``max_num_queued_reqs`` limits running and waiting requests together (503 beyond it). ``api_key`` guards ``/v1/*``.
    """

    profile: Profile
    model: str = "sim-8b"
    index: int = 0
    port: int = 0
    seed: int = 0
    loras: tuple[str, ...] = ()
    max_loras: int = 4
    max_num_queued_reqs: int | None = None
    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    recorded_requests: int = 256


class Generation:
    """One request between the engine and its client. ``reply`` is None for responses made in the background."""

    __slots__ = ("_answer", "_broken", "_front", "_id", "_reply", "_sent", "_stored", "_streams", "_tokens")

    def __init__(
        self,
        request_id: str,
        answer: Answer,
        *,
        front: FrontEnd,
        reply: Reply | None,
        streams: bool,
        stored: StoredResponse | None,
    ) -> None:
        self._id = request_id
        self._answer = answer
        self._front = front
        self._reply = reply
        self._streams = streams
        self._stored = stored
        self._tokens = no_tokens()
        self._sent = 0
        self._broken = False

    def abort(self) -> None:
        """The client has gone: the engine drops the request at once."""
        self._front.driver.abort(self._id)
        if self._stored is not None:
            self._stored.cancel()

    def cancel(self) -> None:
        """A second request cancels this one: its own client gets a clean end."""
        self.abort()
        if self._reply is None or self._stored is None:
            return
        if self._streams:
            self._reply.end()
        else:
            self._reply.send(encode_json(self._stored.as_json()))

    def deliver(self, emission: Emission) -> None:
        """Pass on what the engine made."""
        reason, summary = emission.finish_reason, emission.summary
        if not self._streams:
            self._tokens += emission.token_ids
            if reason is not None and summary is not None:
                usage = Usage(summary.prompt_tokens, summary.generated_tokens, summary.cached_tokens)
                body = self._answer.whole(decode(self._tokens), reason, usage)
                if self._reply is not None:
                    self._reply.send(body)
            return
        pieces = self._answer.opening() if emission.first else []
        text = decode(emission.token_ids)
        if reason is not None and summary is not None:
            usage = Usage(summary.prompt_tokens, summary.generated_tokens, summary.cached_tokens)
            pieces += self._answer.closing(text, reason, usage)
        else:
            pieces += self._answer.piece(text, None)
        self._stream(pieces, last=reason is not None)

    def _stream(self, pieces: list[bytes], *, last: bool) -> None:
        reply, limit = self._reply, self._front.faults().reset_after_chunks
        if reply is None or self._broken:
            return
        if limit is not None and self._sent + len(pieces) >= limit:
            self._broken = True
            reply.write(pieces[: max(0, limit - self._sent)])
            self._front.later(RESET_DELAY_S, reply.reset)
            return
        self._sent += len(pieces)
        reply.write(pieces)
        if last:
            reply.end()


class FrontEnd:
    """Answers the API of one engine incarnation. ``faults`` gives the switches of the moment, ``later`` is a timer."""

    def __init__(
        self,
        spec: EngineSpec,
        *,
        driver: EngineDriver,
        faults: Callable[[], Faults],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self.spec = spec
        self.driver = driver
        self.faults = faults
        self.later = later
        self._started = int(time.time())
        self._models = frozenset((spec.model, *spec.loras))
        self._boot = uuid.uuid4().hex[:16]
        self._count = 0
        self._responses = ResponseStore()
        self._frozen_page: bytes | None = None
        self._routes: dict[tuple[str, str], Callable[[HttpRequest, Reply], None]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completion,
            ("POST", "/v1/responses"): self._respond,
            ("POST", "/v1/messages"): self._message,
            ("POST", "/v1/embeddings"): self._embed,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("GET", "/v1/models"): self._list_models,
            ("GET", "/version"): self._version,
            ("GET", "/health"): self._healthy,
            ("GET", "/ping"): self._healthy,
            ("GET", "/metrics"): self._metrics,
        }

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Route one request."""
        route = self._routes.get((request.method, request.path))
        if route is not None:
            route(request, reply)
        elif request.path.startswith("/v1/responses/"):
            self._stored_response(request, reply)
        elif any(path == request.path for _, path in self._routes):
            reply.send(b'{"detail":"Method Not Allowed"}', status=405)
        else:
            reply.send(b'{"detail":"Not Found"}', status=404)

    # Generations

    def _chat(self, request: HttpRequest, reply: Reply) -> None:
        read = read_chat(request.body)
        if isinstance(read, ApiError):
            reply.send(read.body(), status=read.status)
            return
        ask, include_usage = read
        name, created = self._public_id("chatcmpl-", request), int(time.time())
        model = ask.model or self.spec.model
        self._start(ask, ChatAnswer(name, model=model, created=created, include_usage=include_usage), reply)

    def _completion(self, request: HttpRequest, reply: Reply) -> None:
        read = read_completion(request.body)
        if isinstance(read, ApiError):
            reply.send(read.body(), status=read.status)
            return
        ask, include_usage = read
        name, created = self._public_id("cmpl-", request), int(time.time())
        model = ask.model or self.spec.model
        self._start(ask, CompletionAnswer(name, model=model, created=created, include_usage=include_usage), reply)

    def _embed(self, request: HttpRequest, reply: Reply) -> None:
        read = read_embedding(request.body)
        if isinstance(read, ApiError):
            reply.send(read.body(), status=read.status)
            return
        ask, inputs, as_base64 = read
        name = self._public_id("embd-", request)
        model = ask.model or self.spec.model
        self._start(ask, EmbeddingAnswer(name, model=model, inputs=inputs, as_base64=as_base64), reply)

    def _message(self, request: HttpRequest, reply: Reply) -> None:
        ask = read_messages(request.body)
        if isinstance(ask, ApiError):
            reply.send(ask.anthropic_body(), status=ask.status)
            return
        name = self._public_id("msg_", request)
        answer = MessagesAnswer(name, model=ask.model or self.spec.model, prompt_tokens=len(ask.tokens))
        self._start(ask, answer, reply, anthropic=True)

    def _respond(self, request: HttpRequest, reply: Reply) -> None:
        created = int(time.time())
        wanted = read_responses(request.body, self._responses, default_model=self.spec.model, created=created)
        if isinstance(wanted, ApiError):
            reply.send(wanted.body(), status=wanted.status)
            return
        stored, answer = wanted.stored, ResponsesAnswer(wanted.stored)
        generation = self._start(wanted.ask, answer, reply, stored=stored, background=wanted.background)
        if generation is None:
            return
        stored.on_cancel = generation.cancel
        self._responses.add(stored)
        if wanted.background:
            stored.status = "queued"
            reply.send(encode_json(stored.as_json()))

    def _start(
        self,
        ask: Ask,
        answer: Answer,
        reply: Reply,
        *,
        anthropic: bool = False,
        stored: StoredResponse | None = None,
        background: bool = False,
    ) -> Generation | None:
        """Submit to the engine; a refusal is answered here and gives None."""
        self._count += 1
        request_id = stored.response_id if stored is not None else f"{self._count:x}"
        streams = ask.stream and not background
        generation = Generation(
            request_id,
            answer,
            front=self,
            reply=None if background else reply,
            streams=streams,
            stored=stored,
        )
        error = self._submit(ask, request_id, generation, every_token=streams)
        if error is not None:
            reply.send(error.anthropic_body() if anthropic else error.body(), status=error.status)
            return None
        if not background:
            reply.on_gone = generation.abort
        if streams:
            # The real front end sends its headers before the engine has done anything.
            reply.open_stream()
        return generation

    def _submit(self, ask: Ask, request_id: str, generation: Generation, *, every_token: bool) -> ApiError | None:
        spec = self.spec
        if ask.model is not None and ask.model not in self._models:
            return model_not_found(ask.model)
        if not ask.tokens:
            return bad_request("The prompt is empty.", "prompt")
        room = min(spec.profile.max_model_len, spec.profile.kv_tokens) - len(ask.tokens)
        request = Request(
            id=request_id,
            arrived_at_s=self.driver.now(),
            max_tokens=max(1, room) if ask.max_tokens is None else ask.max_tokens,
            token_ids=ask.tokens,
            ignore_eos=ask.ignore_eos,
            lora=ask.model if ask.model in spec.loras else None,
            cache_salt=ask.cache_salt,
            every_token=every_token,
        )
        refused = self.driver.submit(request, generation.deliver)
        if refused is None:
            return None
        return OVERLOADED if refused.reason == "overloaded" else bad_request(refused.message)

    def _public_id(self, prefix: str, request: HttpRequest) -> str:
        given = request.header(b"x-request-id")
        return prefix + (given.decode("latin-1") if given else f"{self._boot}{self._count:08x}")

    # Everything else

    def _stored_response(self, request: HttpRequest, reply: Reply) -> None:
        response_id, _, verb = request.path.removeprefix("/v1/responses/").partition("/")
        if (request.method, verb) not in (("GET", ""), ("POST", "cancel")):
            reply.send(b'{"detail":"Not Found"}', status=404)
            return
        stored = self._responses.get(response_id)
        if isinstance(stored, ApiError):
            reply.send(stored.body(), status=404)
            return
        if verb == "cancel" and stored.on_cancel is not None:
            stored.on_cancel()
        reply.send(encode_json(stored.as_json()))

    def _tokenize(self, request: HttpRequest, reply: Reply) -> None:
        self._answer(reply, tokenize(request.body, self.spec.profile.max_model_len))

    def _detokenize(self, request: HttpRequest, reply: Reply) -> None:
        self._answer(reply, detokenize(request.body))

    def _answer(self, reply: Reply, body: bytes | ApiError) -> None:
        if isinstance(body, ApiError):
            reply.send(body.body(), status=body.status)
        else:
            reply.send(body)

    def _list_models(self, request: HttpRequest, reply: Reply) -> None:
        spec = self.spec
        length = spec.profile.max_model_len
        reply.send(model_list(spec.model, spec.loras, max_model_len=length, created=self._started))

    def _version(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(encode_json({"version": VERSION}))

    def _healthy(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(b"")

    def _metrics(self, request: HttpRequest, reply: Reply) -> None:
        faults = self.faults()
        if faults.metrics == "off":
            reply.send(b'{"detail":"Not Found"}', status=404)
            return
        page = self._frozen_page if faults.stale_metrics and self._frozen_page is not None else self._page(faults)
        reply.send(page, content_type=CONTENT_TYPE)

    def freeze_page(self) -> None:
        """Take the page of this moment: it is what a stale front end goes on showing."""
        self._frozen_page = self._page(self.faults())

    def _page(self, faults: Faults) -> bytes:
        engine = self.driver.engine
        # A stopped engine reports nothing, and the front end then shows an idle one.
        gauges = Gauges() if faults.hang == "engine" else Gauges.of(engine)
        return render(engine, self.driver.meter, model=self.spec.model, gauges=gauges)
