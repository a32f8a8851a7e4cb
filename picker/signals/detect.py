"""Which engine an endpoint runs and where its metrics are, found out by asking.

Pages first, since their families are the proof that there is something to scrape; then version endpoints, because an
engine that has just started may have nothing on its page yet. Says `none` when there is nothing to scrape. One run
makes at most nine small requests; when to run again is the caller's business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import msgspec

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.engine import NO_METRICS, Engine
from picker.signals.engines import BUILTIN, identify
from picker.signals.getter import Answer
from picker.signals.page import looks_like_page

# In the order of how common the engines are; each engine's own path is among them.
METRICS_PATHS = ("/metrics", "/prometheus/metrics", "/v1/metrics")
# What an endpoint without metrics is asked to see that it lives. Engines without /health have the other.
LIVENESS_PATHS = ("/health", "/v1/models")

Ask = Callable[[str], Awaitable[Answer | ProbeFailure]]
"""GET of one URL of the endpoint in question."""


class Detected(msgspec.Struct, frozen=True):
    """`engine` is a name from the tables or `none`; `metrics_url` is empty exactly for `none`."""

    engine: str
    metrics_url: str = ""


def metrics_url(endpoint: Endpoint, engine: Engine) -> str:
    """Where this engine's page is: the endpoint's own setting, completed with the usual path if it has none."""
    if not endpoint.metrics_url:
        return endpoint.url + engine.metrics_path
    has_path = urlsplit(endpoint.metrics_url).path.strip("/") != ""
    return endpoint.metrics_url if has_path else endpoint.metrics_url.rstrip("/") + engine.metrics_path


async def detect(endpoint: Endpoint, ask: Ask) -> Detected | ProbeFailure:
    """The engine behind `endpoint`; a failure when nobody answers, which says nothing about the engine."""
    if endpoint.engine == NO_METRICS:
        return Detected(NO_METRICS)
    if endpoint.engine in BUILTIN:
        return Detected(endpoint.engine, metrics_url(endpoint, BUILTIN[endpoint.engine]))
    pages = await _pages(endpoint, ask)
    if isinstance(pages, ProbeFailure):
        return pages
    for url, page in pages.items():
        engine = identify(page)
        if engine is not None:
            return Detected(engine.name, url)
    return await _by_version(endpoint, ask, pages)


async def _pages(endpoint: Endpoint, ask: Ask) -> dict[str, bytes] | ProbeFailure:
    """The metrics pages there are, by URL, up to the first that gives an engine away."""
    own = endpoint.metrics_url
    if own and urlsplit(own).path.strip("/"):
        urls = [own]
    else:
        urls = [(own or endpoint.url).rstrip("/") + path for path in METRICS_PATHS]
    found: dict[str, bytes] = {}
    for url in urls:
        answer = await ask(url)
        if isinstance(answer, ProbeFailure):
            if url == urls[0]:
                return answer
            continue
        if answer.status >= 500 and url == urls[0]:
            # A front end whose engine starts or dies: what it lacks now it may have in a moment.
            return ProbeFailure.HTTP
        if answer.status == 200 and looks_like_page(answer.body):
            found[url] = answer.body
            if identify(answer.body) is not None:
                break
    return found


async def _by_version(endpoint: Endpoint, ask: Ask, pages: dict[str, bytes]) -> Detected | ProbeFailure:
    """For pages without known families: an engine that names itself gets its page scraped if it has one, maybe
    still empty.
    """
    if not pages:
        return Detected(NO_METRICS)
    name = await _named(endpoint, ask)
    if name:
        url = metrics_url(endpoint, BUILTIN[name])
        if url in pages:
            return Detected(name, url)
    return Detected(NO_METRICS)


class _About(msgspec.Struct):
    """The fields of version and server information answers that tell engines apart, of whatever type."""

    version: object = None
    page_size: object = None
    internal_states: object = None
    kv_cache_hash_algo: object = None


async def _named(endpoint: Endpoint, ask: Ask) -> str:
    """The engine's name by its own account: SGLang and TensorRT-LLM have server information, vLLM only a version."""
    for path in ("/get_server_info", "/server_info"):
        about = _about(await ask(endpoint.url + path))
        if about is None:
            continue
        if about.internal_states is not None or about.page_size is not None:
            return "sglang"
        if about.kv_cache_hash_algo is not None:
            return "trtllm"
    about = _about(await ask(endpoint.url + "/version"))
    return "vllm" if about is not None and about.version else ""


def _about(answer: Answer | ProbeFailure) -> _About | None:
    if isinstance(answer, ProbeFailure) or answer.status != 200:
        return None
    try:
        return msgspec.json.decode(answer.body, type=_About)
    except (msgspec.DecodeError, RecursionError):
        return None
