"""Simulated engines that publish their caches, and a door before them, all in processes of their own.

What was decided is read from the debug pages; what an engine really had is what its answer says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.rolling_rig import Door, free_port_on
from tests.integration.sim_rig import ready_urls

# Five times what anything takes when seven processes share two cores.
PATIENCE_S = 20.0
MODEL = "sim-8b"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ONLINE = "waypost_prefix_publishers_online"
# Engines are asked for tokens, and have milliseconds: on a busy machine some are late, and those requests are decided
# by their text. On a quiet one it is 19 of 20 and more.
EXACT_SHARE = 0.5


class Sim:
    """Engines in one process. `fixed` gives one engine ports that stay its own over restarts, replays among them."""

    def __init__(self, *arguments: str, engines: int = 1, fixed: bool = False) -> None:
        self._arguments = ["--accelerator", "instant", "--engines", str(engines), *arguments]
        self._engines = engines
        self.urls: list[str] = []
        if fixed:
            port, events, replays = (str(free_port_on(["127.0.0.1"])) for _ in range(3))
            self._arguments += ["--port", port, "--kv-events-port", events, "--kv-replay-port", replays]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        [url] = self.urls
        return url

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sim", *self._arguments), stdout=asyncio.subprocess.PIPE
        )
        self.urls = await ready_urls(self._process, self._engines)

    async def kill(self) -> None:
        """At once, as a lost host does."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def running(*sims: Sim) -> AsyncIterator[list[str]]:
    """All of them started; their URLs."""
    try:
        await asyncio.gather(*(sim.start() for sim in sims))
        yield [url for sim in sims for url in sim.urls]
    finally:
        await asyncio.gather(*(sim.kill() for sim in sims))


class Told(msgspec.Struct, frozen=True):
    """One request: what was believed of the endpoint it went to, and what its engine said afterwards."""

    id: str
    endpoint: str
    keys: str | None
    held: Mapping[str, Mapping[str, Any]]
    tokens: int
    estimate: int
    cached: int
    text: str

    @property
    def held_tokens(self) -> int:
        """Tokens the chosen endpoint was believed to hold."""
        return int(self.held.get(self.endpoint, {"tokens": 0})["tokens"])

    @property
    def exact(self) -> bool:
        """Whether the tokens were known, and nothing that was only learnt had a say about the endpoint."""
        return self.keys == "tokens" and bool(self.held.get(self.endpoint, {"exact": True})["exact"])


class Site:
    """A client of a door and of its debug pages. `url` is where requests go; `proxied` when that is a proxy."""

    def __init__(self, url: str, admin: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self.proxied = False
        self.admin = admin
        self.client = client

    async def ask(self, body: Mapping[str, Any], path: str = COMPLETIONS) -> Told:
        """One request, which must work."""
        ident = f"{random.getrandbits(64):x}"
        body = {"model": MODEL, "ignore_eos": True, **body}
        # Proxies have request ids of their own; an objective that means nothing names the request as well.
        headers = {"x-request-id": ident, "x-gateway-inference-objective": ident}
        answer = await self.client.post(self.url + path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        page = await self.client.get(f"{self.admin}/debug/decisions" + ("?limit=20" if self.proxied else f"/{ident}"))
        [decision] = [each for each in page.json() if each["objective"] == ident]
        choice = said["choices"][0]
        details = said["usage"]["prompt_tokens_details"]
        return Told(
            id=decision["request_id"],
            endpoint=decision["endpoint"],
            keys=decision["prefix_keys"],
            held=decision["held"],
            tokens=said["usage"]["prompt_tokens"],
            estimate=decision["prompt_tokens_estimate"],
            cached=0 if details is None else details["cached_tokens"],
            text=choice["text"] if "text" in choice else choice["message"]["content"],
        )

    async def metrics(self) -> dict[str, float]:
        """Samples by name and first label value (`name/value`)."""
        text = (await self.client.get(f"{self.admin}/metrics")).text
        families = text_string_to_metric_families(text)
        return {
            "/".join((sample.name, *list(sample.labels.values())[:1])): sample.value
            for family in families
            for sample in family.samples
        }

    async def until(self, name: str, holds: Callable[[float], bool]) -> None:
        """Waits until a metric is as wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds((found := await self.metrics()).get(name, 0.0)):
            assert time.monotonic() < deadline, {key: found[key] for key in found if "prefix" in key or "kv" in key}
            await asyncio.sleep(0.02)


def ids(seed: int, count: int) -> list[int]:
    """A prompt as token ids that shares nothing with others."""
    return random.Random(seed).choices(range(1 << 20), k=count)


async def heard(site: Site, engines: int = 1, *models: str) -> None:
    """Sends new prompts until so many engines were heard: what they told before somebody listened is lost."""
    async with asyncio.timeout(PATIENCE_S):
        while (await site.metrics())[ONLINE] < engines:
            for model in models or (MODEL,):
                await site.ask({"model": model, "prompt": ids(random.getrandbits(30), 100)})


async def settled(site: Site, body: dict[str, Any]) -> Told:
    """Asks until the engine's events have told of this prompt; the answer to the last question."""
    async with asyncio.timeout(PATIENCE_S):
        while not (told := await site.ask(body)).exact or not told.held_tokens:
            await asyncio.sleep(0.02)
    return told


async def converse(site: Site, model: str, *, number: int, turns: int) -> list[Told]:
    """A chat that grows: each turn sends the answers before."""
    rng = random.Random(f"{model} {number}")
    words = " ".join(rng.choices(("alpha", "beta", "gamma", "delta"), k=200 + 40 * number))
    messages = [{"role": "system", "content": f"Chat {number}."}, {"role": "user", "content": words}]
    told = []
    for turn in range(turns):
        body = {"model": model, "messages": messages, "max_tokens": rng.randrange(5, 60)}
        told.append(await site.ask(body, CHAT))
        messages.append({"role": "assistant", "content": told[-1].text})
        messages.append({"role": "user", "content": f"And {turn}? " * rng.randrange(1, 20)})
        # People take longer.
        await asyncio.sleep(0.05)
    return told


def check_exact(told: Sequence[Told]) -> None:
    """What was decided with the tokens at hand was decided by what engines hold, and that is what they then had."""
    known = [each for each in told if each.keys == "tokens"]
    exact = [each for each in known if each.exact]
    wrong = [each for each in known if each.held_tokens != each.cached]
    assert len(told) > 100
    assert len(known) >= EXACT_SHARE * len(told), (len(known), len(told))
    assert len(exact) >= 0.95 * len(known), [each for each in known if not each.exact]
    assert len(wrong) <= 0.01 * len(known), wrong


async def ready(site: Site) -> None:
    """Waits until the door sends requests to the engine again."""
    async with asyncio.timeout(PATIENCE_S):
        while (await site.client.get(f"{site.admin}/debug/endpoints")).json()[0]["standing"] != "ready":
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def gateway(directory: Path, urls: Sequence[str], **index: Any) -> AsyncIterator[tuple[Site, Door]]:
    """`waypost run` before these engines."""
    listen, admin = (f"127.0.0.1:{free_port_on(['127.0.0.1'])}" for _ in range(2))
    arguments = ("run", "--config", configured(directory, urls, index), "--listen", listen, "--admin", admin)
    async with door_process(directory, arguments, f"http://{listen}", f"http://{admin}") as made:
        yield made


@contextlib.asynccontextmanager
async def door_process(
    directory: Path, arguments: Sequence[str], url: str, admin: str
) -> AsyncIterator[tuple[Site, Door]]:
    """A `waypost` and a client of it. It must end well."""
    made = Door(directory, *arguments)
    await made.start()
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
            yield Site(url, admin, client), made
    finally:
        code = await made.close()
    assert code == 0, made.log.read_text()


def configured(directory: Path, urls: Sequence[str], index: Mapping[str, Any], **sections: Any) -> str:
    """A configuration file."""
    file = directory / "waypost.yaml"
    scrape = {"idle_interval": "100ms", "busy_interval": "50ms", "models_interval": "1s"}
    # JSON is YAML.
    file.write_text(json.dumps({"endpoints": {"static": list(urls)}, "scrape": scrape, "index": index, **sections}))
    return str(file)


def lines(made: Door, event: str) -> list[dict[str, Any]]:
    """Log lines of one kind so far."""
    found = [json.loads(line) for line in made.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line.get("event") == event]


def children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def worker_of(made: Door) -> int:
    """The process that hears the engines."""
    assert made._process is not None
    named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(made._process.pid)}
    [pid] = [pid for pid, command in named.items() if b"picker.signals.kv.worker" in command]
    return pid
