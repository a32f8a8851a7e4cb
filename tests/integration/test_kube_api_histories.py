"""Whatever happens to a cluster and to the way there: in the end the mirror is the truth, no ghosts, no duplicates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.sources.kubernetes.api import ClusterApi
from tests.fakes.kube_api import FakeKube
from tests.fakes.kube_mirror import FAST, connected, mirrored, until

# Lists of up to seven objects in pages of two, so that they expire between pages too.
SETTINGS = msgspec.structs.replace(FAST, page_objects=2, idle_s=0.2, watch_least_s=1.0, watch_most_s=2.0)
NAMES = st.sampled_from("abcdefg")
STATUSES = st.sampled_from([400, 401, 403, 404, 410, 429, 500, 503])

CHANGES = st.tuples(st.sampled_from(["put", "delete"]), NAMES)
STEPS = st.one_of(
    CHANGES,
    # What happens while nobody is connected, and whether it is remembered.
    st.tuples(st.just("outage"), st.lists(CHANGES, max_size=4), st.booleans()),
    st.tuples(st.sampled_from(["cut", "mangle", "mute", "drop", "compact"]), CHANGES),
    st.tuples(st.just("fail"), STATUSES, st.integers(1, 3), st.sampled_from([None, True, False])),
    st.tuples(st.just("slow"), st.sampled_from([0.0, 0.002, 0.01])),
    st.tuples(st.sampled_from(["close", "expire", "expire page", "garbage", "stranger", "down", "up"])),
    st.tuples(st.sampled_from(["token", "token file", "by status", "in stream"])),
)
# After each step: at once the next one, or in the middle of whatever the reflector is doing, or when it watches again.
PAUSES = st.sampled_from([0.0, 0.0, 0.001, 0.004, 0.05])
HISTORIES = st.lists(st.tuples(STEPS, PAUSES), min_size=5, max_size=40)
History = list[tuple[tuple[Any, ...], float]]


class World:
    """A cluster to which things happen."""

    def __init__(self, kube: FakeKube, token_file: Path) -> None:
        self.kube = kube
        self._token_file = token_file
        self._simple: dict[str, Callable[[], None]] = {
            "compact": kube.compact,
            "cut": kube.cut_watches,
            "mangle": kube.mangle_watches,
            "close": kube.close_watches,
            "expire": kube.expire_watches,
            "drop": kube.drop,
            "mute": kube.mute_watches,
            "expire page": lambda: kube.fail(410, having="continue"),
            "garbage": lambda: kube.send_raw(b'{"type":"ADDED","obj\n'),
            "stranger": lambda: kube.send_raw(b'{"type":"SPARKLED","object":{"metadata":{"resourceVersion":"9"}}}\n'),
            "token": self._rotate,
            "token file": self._write_token,
            "by status": lambda: setattr(kube, "expire_in_stream", False),
            "in stream": lambda: setattr(kube, "expire_in_stream", True),
        }

    async def step(self, step: tuple[Any, ...], pause_s: float) -> None:
        match step:
            case ("put" | "delete", name):
                self._change(step[0], name)
            case ("outage", changes, compacted):
                await self.kube.down()
                for change in changes:
                    self._change(*change)
                if compacted:
                    self.kube.compact()
                await self.kube.up()
            case ("slow", seconds):
                self.kube.latency_s = seconds
            case ("fail", status, times, watch):
                self.kube.fail(status, times, watch=watch)
            case ("down",):
                await self.kube.down()
            case ("up",):
                await self.kube.up()
            case (name, change):
                self._simple[name]()
                self._change(*change)
            case (name,):
                self._simple[name]()
            case _:
                raise AssertionError(step)
        await self._pause(pause_s)

    def _change(self, what: str, name: str) -> None:
        if what == "put":
            self.kube.put("pods", "default", {"metadata": {"name": name}})
        elif ("default", name) in self.kube.objects("pods"):
            self.kube.delete("pods", "default", name)

    async def _pause(self, pause_s: float) -> None:
        """For so long, or until somebody watches."""
        ends_at = asyncio.get_running_loop().time() + pause_s
        await asyncio.sleep(0)
        while asyncio.get_running_loop().time() < ends_at and not self.kube.state.watchers:
            await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """All troubles are over, apart from what they left behind."""
        self.kube.latency_s = 0.0
        self.kube.forgive()
        self._write_token()
        await self.kube.up()

    def _rotate(self) -> None:
        self.kube.token = f"token-{self.kube.state.version}-{len(self.kube.requests)}"

    def _write_token(self) -> None:
        assert self.kube.token is not None
        self._token_file.write_text(self.kube.token)


async def live(history: History, directory: Path) -> None:
    token_file = directory / "token"
    token_file.write_text("token")
    async with FakeKube(token="token", bookmark_s=0.02) as kube:
        config = kube.kubeconfig(directory, token_file=token_file)
        async with connected(config, clock=_hurried()) as api:
            await _live(history, World(kube, token_file), api)


async def _live(history: History, world: World, api: ClusterApi) -> None:
    kube = world.kube
    for name in "abc":
        kube.put("pods", "default", {"metadata": {"name": name}})
    async with mirrored(api, settings=SETTINGS) as (mirror, reflector):
        for step, pause_s in history:
            await world.step(step, pause_s)
        await world.settle()
        await until(lambda: mirror.shows(kube), timeout_s=5)
        # What comes after arrives too, and nothing that was on its way undoes it.
        kube.put("pods", "default", {"metadata": {"name": "last"}})
        await until(lambda: mirror.shows(kube) and reflector.problem == "", timeout_s=5)
        await asyncio.sleep(0.03)
        assert mirror.shows(kube)


def _hurried() -> Callable[[], float]:
    """A clock on which the client's two seconds between fruitless readings of a token are short."""
    loop = asyncio.get_running_loop()
    return lambda: loop.time() * 50


def run(history: History) -> None:
    with TemporaryDirectory() as directory:
        asyncio.run(live(history, Path(directory)))


@settings(max_examples=60)
@given(HISTORIES)
def test_after_any_history_the_mirror_is_the_truth(history: History) -> None:
    run(history)


@pytest.mark.long
@settings(max_examples=600)
@given(HISTORIES)
def test_after_many_histories_the_mirror_is_the_truth(history: History) -> None:
    run(history)
