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

from sim import metrics_page, sglang_page
from sim.answers import OVERLOADED, Answer, ApiError, Ask, bad_request, encode_json, model_not_found
from sim.describe import kv_event_sources, model_info, model_list, server_info
from sim.driver import EngineDriver
from sim.exposition import CONTENT_TYPE
from sim.faults import Faults
from sim.generation import Generation, Surroundings
from sim.http1 import HttpRequest, Reply
from sim.kv_encoding import EngineName
from sim.kv_events import KvEvents, KvPublisher
from sim.meter import Gauges
from sim.openai_api import ChatAnswer, CompletionAnswer, EmbeddingAnswer, read_chat, read_completion, read_embedding
from sim.profiles import Profile
from sim.requests import Request
from sim.responses_api import (
    MessagesAnswer,
    ResponsesAnswer,
    ResponseStore,
    StoredResponse,
    read_messages,
    read_responses,
)
from sim.tokenizing import Renderer, detokenize, render_chat, render_completion, tokenize

VERSIONS: Final[dict[EngineName, str]] = {"vllm": "0.32.0", "sglang": "0.5.23"}
Route = Callable[[HttpRequest, Reply], None]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine is set up. ``port`` 0 takes a free one; ``index`` is what ``x-sim-engine`` tells.

    ``max_num_queued_reqs`` limits running and waiting requests together (503 beyond it). ``api_key`` guards ``/v1/*``.
    ``data_parallel_rank``: this server is that rank of a data-parallel engine; every rank is a server with its own
    port, cache and events, as behind an InferencePool with several target ports. ``kv_events`` None: none published.
    ``prompt_tokens_details``: usage tells cached tokens. ``scale_out``: the ``/render`` routes answer (else 403).
    """

    profile: Profile
    engine: EngineName = "vllm"
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
    data_parallel_rank: int = 0
    kv_events: KvEvents | None = None
    prompt_tokens_details: bool = True
    scale_out: bool = True


class FrontEnd:
    """Answers the API of one engine incarnation. ``faults`` gives the switches of the moment, ``later`` is a timer.

    ``publisher``: where its KV events go, if anywhere; only told about here.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        driver: EngineDriver,
        faults: Callable[[], Faults],
        later: Callable[[float, Callable[[], None]], object],
        publisher: KvPublisher | None,
    ) -> None:
        self.spec = spec
        self.driver = driver
        self.publisher = publisher
        self._faults = faults
        self._around = Surroundings(driver=driver, faults=faults, later=later, tells_cached=spec.prompt_tokens_details)
        self._started = int(time.time())
        self._models = frozenset((spec.model, *spec.loras))
        self._boot = uuid.uuid4().hex[:16]
        self._count = 0
        self._responses = ResponseStore()
        self._frozen_page: bytes | None = None
        self._routes = self._common_routes()
        self._routes |= self._sglang_routes() if spec.engine == "sglang" else self._vllm_routes()

    def _common_routes(self) -> dict[tuple[str, str], Route]:
        return {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completion,
            ("POST", "/v1/responses"): self._respond,
            ("POST", "/v1/messages"): self._message,
            ("POST", "/v1/embeddings"): self._embed,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("GET", "/v1/models"): self._list_models,
            ("GET", "/health"): self._healthy,
            ("GET", "/ping"): self._healthy,
            ("GET", "/metrics"): self._metrics,
        }

    def _vllm_routes(self) -> dict[tuple[str, str], Route]:
        return {
            ("GET", "/version"): self._version,
            ("GET", "/kv_event_sources"): self._kv_event_sources,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("POST", "/v1/chat/completions/render"): self._render_chat,
            ("POST", "/v1/completions/render"): self._render_completion,
        }

    def _sglang_routes(self) -> dict[tuple[str, str], Route]:
        return {
            ("GET", "/server_info"): self._server_info,
            ("GET", "/get_server_info"): self._server_info,
            ("GET", "/model_info"): self._model_info,
            ("GET", "/get_model_info"): self._model_info,
            ("POST", "/flush_cache"): self._flush_cache,
            ("GET", "/flush_cache"): self._flush_cache,
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
            around=self._around,
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

    # Tokens

    def _tokenize(self, request: HttpRequest, reply: Reply) -> None:
        length = self.spec.profile.max_model_len
        self._answer(reply, tokenize(request.body, models=self._models, max_model_len=length))

    def _render_chat(self, request: HttpRequest, reply: Reply) -> None:
        self._render(render_chat, "chatcmpl-", request, reply)

    def _render_completion(self, request: HttpRequest, reply: Reply) -> None:
        self._render(render_completion, "cmpl-", request, reply)

    def _render(self, render: Renderer, prefix: str, request: HttpRequest, reply: Reply) -> None:
        if not self.spec.scale_out:
            self._answer(reply, ApiError(403, "Forbidden", "This needs --enable-scale-out."))
            return
        name = self._public_id(prefix, request)
        self._answer(reply, render(request.body, name, models=self._models, default_model=self.spec.model))

    def _detokenize(self, request: HttpRequest, reply: Reply) -> None:
        self._answer(reply, detokenize(request.body))

    def _answer(self, reply: Reply, body: bytes | ApiError) -> None:
        if isinstance(body, ApiError):
            reply.send(body.body(), status=body.status)
        else:
            reply.send(body)

    # What the engine tells, and its cache

    def _list_models(self, request: HttpRequest, reply: Reply) -> None:
        spec = self.spec
        length = spec.profile.max_model_len
        cards = model_list(spec.model, spec.loras, engine=spec.engine, max_model_len=length, created=self._started)
        reply.send(cards)

    def _version(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(encode_json({"version": VERSIONS["vllm"]}))

    def _kv_event_sources(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(kv_event_sources(self.publisher, rank=self.spec.data_parallel_rank))

    def _server_info(self, request: HttpRequest, reply: Reply) -> None:
        spec = self.spec
        reply.send(server_info(spec.model, spec.profile, self.publisher, version=VERSIONS["sglang"]))

    def _model_info(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(model_info(self.spec.model))

    def _reset_prefix_cache(self, request: HttpRequest, reply: Reply) -> None:
        # The answer is 200 even when running requests prevent it, as in vLLM.
        self.driver.engine.reset_prefix_cache()
        reply.send(b"")

    def _flush_cache(self, request: HttpRequest, reply: Reply) -> None:
        done = self.driver.engine.reset_prefix_cache()
        reply.send(b"Cache flushed.\n" if done else b"Requests are running.\n", status=200 if done else 400)

    def _healthy(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(b"")

    def _metrics(self, request: HttpRequest, reply: Reply) -> None:
        faults = self._faults()
        if faults.metrics == "off":
            reply.send(b'{"detail":"Not Found"}', status=404)
            return
        page = self._frozen_page if faults.stale_metrics and self._frozen_page is not None else self._page(faults)
        reply.send(page, content_type=CONTENT_TYPE)

    def freeze_page(self) -> None:
        """Take the page of this moment: it is what a stale front end goes on showing."""
        self._frozen_page = self._page(self._faults())

    def _page(self, faults: Faults) -> bytes:
        engine = self.driver.engine
        # A stopped engine reports nothing, and the front end then shows an idle one.
        gauges = Gauges() if faults.hang == "engine" else Gauges.of(engine)
        spec, render = self.spec, _PAGES[self.spec.engine]
        return render(engine, self.driver.meter, model=spec.model, gauges=gauges, rank=spec.data_parallel_rank)


_PAGES: Final = {"vllm": metrics_page.render, "sglang": sglang_page.render}
