"""Following a fake API server over real HTTP: the normal course, and everything that can break on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from picker.sources.kubernetes import api as api_module
from picker.sources.kubernetes.api import ClusterApi
from picker.sources.kubernetes.failure import ApiFailure
from picker.sources.kubernetes.objects import InferenceObjective, PoolV1
from tests.fakes.kube_api import FakeKube
from tests.fakes.kube_mirror import FAST, PODS, connected, mirrored, until

POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/default/inferencepools"
OBJECTIVES = "/apis/llm-d.ai/v1alpha2/namespaces/default/inferenceobjectives"


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "status": {"podIP": "10.0.0.1"}}


@pytest.fixture
async def kube() -> AsyncIterator[FakeKube]:
    async with FakeKube(token="secret-token") as kube:
        yield kube


@pytest.fixture
async def api(kube: FakeKube, tmp_path: Path) -> AsyncIterator[ClusterApi]:
    async with connected(kube.kubeconfig(tmp_path)) as api:
        yield api


def lists(kube: FakeKube) -> int:
    return sum(1 for seen in kube.requests if not seen.watch)


# -- the normal course -------------------------------------------------------------------------------------------------


async def test_pages_compressed_and_then_every_change(kube: FakeKube, api: ClusterApi) -> None:
    for n in range(1200):
        kube.put("pods", "default", {"metadata": {"name": f"pod-{n}", "annotations": {"x": "y" * 300}}})
    kube.put("pods", "elsewhere", pod("other"))
    async with mirrored(api) as (mirror, reflector):
        await until(lambda: len(mirror.versions) == 1200)
        assert (mirror.lists, lists(kube)) == (1, 3)
        kube.delete("pods", "elsewhere", "other")
        await until(lambda: bool(kube.state.watchers))
        for n in range(0, 1200, 100):
            kube.put("pods", "default", pod(f"pod-{n}"))
        kube.delete("pods", "default", "pod-7")
        kube.put("pods", "default", pod("new"))
        await until(lambda: mirror.shows(kube))
        assert (mirror.lists, mirror.changes) == (1, 14)
        assert (mirror.troubles, reflector.problem, reflector.present) == ([], "", True)


async def test_selectors_go_to_the_server(kube: FakeKube, api: ClusterApi) -> None:
    kube.put("inferencepools", "default", {"metadata": {"name": "mine"}, "spec": {"targetPorts": [{"number": 8000}]}})
    kube.put("inferencepools", "default", {"metadata": {"name": "theirs"}})
    kube.put("pods", "default", pod("a", app="x"))
    kube.put("pods", "default", pod("b", app="y"))
    async with (
        mirrored(api, POOLS, PoolV1, field_selector="metadata.name=mine") as (pools, _),
        mirrored(api, label_selector="app in (x, z),tier!=gold") as (pods, _),
    ):
        await until(lambda: bool(pools.versions) and bool(pods.versions) and len(kube.state.watchers) == 2)
        assert set(pods.versions) == {("default", "a")}
        kube.put("pods", "default", pod("a", app="y"))
        kube.put("pods", "default", pod("b", app="z"))
        kube.put("inferencepools", "default", {"metadata": {"name": "theirs"}, "spec": {"targetPorts": []}})
        await until(lambda: set(pods.versions) == {("default", "b")})
        assert set(pools.versions) == {("default", "mine")}


async def test_bookmarks_let_a_quiet_watch_go_on_after_compaction(tmp_path: Path) -> None:
    async with FakeKube(token="t", bookmark_s=0.02) as kube, connected(kube.kubeconfig(tmp_path)) as api:
        kube.put("pods", "default", pod("a"))
        async with mirrored(api) as (mirror, reflector):
            await until(lambda: bool(kube.state.watchers))
            for n in range(50):
                kube.put("nodes", "", {"metadata": {"name": f"n{n}"}})
            kube.compact()
            heard_at = reflector.heard_at
            await until(lambda: (reflector.heard_at or 0) > (heard_at or 0) + 0.05)
            kube.drop()
            kube.put("pods", "default", pod("b"))
            await until(lambda: mirror.shows(kube) and len(kube.state.watchers) == 1)
            assert (mirror.lists, lists(kube)) == (1, 1)


async def test_a_watch_ends_in_its_time_and_goes_on(kube: FakeKube, api: ClusterApi) -> None:
    settings = msgspec.structs.replace(FAST, watch_least_s=1.0, watch_most_s=1.0)
    async with mirrored(api, settings=settings) as (mirror, _):
        await until(lambda: len(kube.requests) == 3)
        kube.put("pods", "default", pod("a"))
        await until(lambda: mirror.shows(kube))
        assert mirror.lists == 1
        assert mirror.troubles == []


@pytest.mark.parametrize("in_stream", [True, False])
async def test_an_expired_version_leaves_no_ghosts(kube: FakeKube, api: ClusterApi, in_stream: bool) -> None:
    kube.expire_in_stream = in_stream
    for name in ("a", "ghost"):
        kube.put("pods", "default", pod(name))
    async with mirrored(api) as (mirror, _):
        await until(lambda: bool(kube.state.watchers))
        await kube.down()
        kube.delete("pods", "default", "ghost")
        kube.put("pods", "default", pod("b"))
        kube.compact()
        await asyncio.sleep(0.05)
        assert set(mirror.versions) == {("default", "a"), ("default", "ghost")}
        await kube.up()
        await until(lambda: mirror.shows(kube))
        assert mirror.lists == 2


async def test_a_running_watch_that_expires_lists_again(kube: FakeKube, api: ClusterApi) -> None:
    kube.put("pods", "default", pod("a"))
    async with mirrored(api) as (mirror, reflector):
        await until(lambda: bool(kube.state.watchers))
        kube.expire_watches()
        await until(lambda: mirror.lists == 2 and mirror.shows(kube))
        assert (mirror.troubles, reflector.problem) == ([], "")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503])
@pytest.mark.parametrize("watch", [False, True])
async def test_refusals_pass(kube: FakeKube, api: ClusterApi, status: int, watch: bool) -> None:
    kube.put("pods", "default", pod("a"))
    kube.fail(status, times=4, watch=watch)
    async with mirrored(api) as (mirror, reflector):
        await until(lambda: mirror.shows(kube) and bool(kube.state.watchers))
        await until(lambda: reflector.problem == "")
        assert PODS in mirror.troubles[0]
        assert sum(1 for seen in kube.requests if seen.status == status) == 4


async def test_the_time_a_server_asks_for_is_given(kube: FakeKube, api: ClusterApi) -> None:
    kube.fail(429, retry_after_s=1)
    began = time.monotonic()
    async with mirrored(api) as (mirror, _):
        await until(lambda: mirror.lists == 1)
    assert time.monotonic() - began >= 1.0


async def test_no_right_to_see_it_is_said_and_granted_later(kube: FakeKube, api: ClusterApi) -> None:
    kube.forbidden.add("pods")
    async with mirrored(api) as (mirror, reflector):
        await until(lambda: len(kube.requests) > 3)
        assert mirror.lists == 0
        assert "RBAC" in reflector.problem
        assert PODS in reflector.problem
        kube.forbidden.clear()
        await until(lambda: mirror.lists == 1)
        assert len(mirror.troubles) == 1


async def test_a_kind_comes_and_goes_with_its_definition(tmp_path: Path) -> None:
    async with (
        FakeKube(absent=("inferenceobjectives",)) as kube,
        connected(kube.kubeconfig(tmp_path)) as api,
        mirrored(api, OBJECTIVES, InferenceObjective, optional=True) as (mirror, reflector),
        mirrored(api, OBJECTIVES, InferenceObjective) as (strict, strict_reflector),
    ):
        await until(lambda: mirror.lists == 1 and strict_reflector.problem != "")
        assert (mirror.versions, reflector.present, strict.lists) == ({}, False, 0)
        kube.install("inferenceobjectives")
        kube.put("inferenceobjectives", "default", {"metadata": {"name": "chat"}, "spec": {"priority": 3}})
        await until(lambda: mirror.shows(kube, "inferenceobjectives") and strict.shows(kube, "inferenceobjectives"))
        assert reflector.present is True
        kube.withdraw("inferenceobjectives")
        await until(lambda: reflector.present is False)
        assert (mirror.versions, reflector.problem) == ({}, "")


# -- broken connections ------------------------------------------------------------------------------------------------


async def test_a_watch_cut_in_the_middle_of_a_line(kube: FakeKube, api: ClusterApi) -> None:
    async with mirrored(api) as (mirror, _):
        for name in ("a", "b", "c"):
            await until(lambda: bool(kube.state.watchers))
            kube.cut_watches()
            kube.put("pods", "default", {"metadata": {"name": name, "annotations": {"x": "y" * 100_000}}})
            await until(lambda: mirror.shows(kube))
        assert (mirror.lists, mirror.changes) == (1, 3)


async def test_connections_that_are_reset(kube: FakeKube, api: ClusterApi) -> None:
    async with mirrored(api) as (mirror, _):
        for n in range(5):
            await until(lambda: bool(kube.state.watchers))
            kube.drop()
            kube.put("pods", "default", pod(f"p{n}"))
            await until(lambda: mirror.shows(kube))
        assert mirror.lists == 1


async def test_a_server_that_is_away_and_comes_back(kube: FakeKube, api: ClusterApi) -> None:
    kube.put("pods", "default", pod("a"))
    async with mirrored(api) as (mirror, reflector):
        await until(lambda: bool(kube.state.watchers))
        heard_at = reflector.heard_at
        await kube.down()
        kube.put("pods", "default", pod("b"))
        await until(lambda: reflector.problem != "")
        await asyncio.sleep(0.1)
        assert (set(mirror.versions), reflector.heard_at) == ({("default", "a")}, heard_at)
        await kube.up()
        await until(lambda: mirror.shows(kube) and reflector.problem == "")
        assert (reflector.heard_at or 0) > (heard_at or 0)
        assert len(mirror.troubles) == 1


async def test_a_peer_that_fell_silent_is_left(kube: FakeKube, api: ClusterApi) -> None:
    settings = msgspec.structs.replace(FAST, idle_s=0.2)
    async with mirrored(api, settings=settings) as (mirror, _):
        await until(lambda: bool(kube.state.watchers))
        kube.mute_watches()
        kube.put("pods", "default", pod("a"))
        await until(lambda: mirror.shows(kube))


async def test_a_watch_that_does_not_end_in_its_time_is_ended(kube: FakeKube, api: ClusterApi) -> None:
    """Bytes still come, but the server forgot to end it: our own deadline does."""
    lines = api.watch(PODS, {"watch": "true", "resourceVersion": "1000"}, timeout_s=0.3, idle_s=5)
    async with asyncio.timeout(10):
        got = [line async for line in lines]
    assert got[0] == b""
    assert got[1] == ApiFailure(0, "the API server did not answer in time")


async def test_a_slow_server(kube: FakeKube, api: ClusterApi) -> None:
    kube.put("pods", "default", pod("a"))
    kube.latency_s = 0.3
    settings = msgspec.structs.replace(FAST, list_timeout_s=0.1)
    async with mirrored(api, settings=settings) as (mirror, reflector):
        await until(lambda: reflector.problem != "")
        assert "in time" in reflector.problem
        kube.latency_s = 0.01
        await until(lambda: mirror.shows(kube))


async def test_garbage_in_the_stream(kube: FakeKube, api: ClusterApi) -> None:
    kube.put("pods", "default", pod("a"))
    async with mirrored(api) as (mirror, _):
        await until(lambda: bool(kube.state.watchers))
        kube.send_raw(b"\n\r\n{}\n<html>\n")
        kube.put("pods", "default", pod("b"))
        await until(lambda: mirror.lists == 2 and mirror.shows(kube))
        assert len(mirror.troubles) == 1


async def test_a_line_that_lost_a_part_is_made_up_for(kube: FakeKube, api: ClusterApi) -> None:
    async with mirrored(api) as (mirror, _):
        await until(lambda: bool(kube.state.watchers))
        kube.mangle_watches()
        kube.put("pods", "default", pod("a"))
        kube.put("pods", "default", pod("b"))
        await until(lambda: mirror.shows(kube))


async def test_a_list_that_is_a_login_page(kube: FakeKube, api: ClusterApi) -> None:
    kube.fail(200, body=b"<html>please log in</html>")
    async with mirrored(api) as (mirror, _):
        await until(lambda: mirror.lists == 1)
        assert "cannot be read" in mirror.troubles[0]


# -- sizes -------------------------------------------------------------------------------------------------------------


async def test_objects_of_many_mib_pass(kube: FakeKube, api: ClusterApi) -> None:
    big = {"metadata": {"name": "big", "annotations": {"x": "y" * (3 << 20)}}}
    async with mirrored(api) as (mirror, _):
        await until(lambda: bool(kube.state.watchers))
        kube.put("pods", "default", big)
        kube.put("pods", "default", pod("small"))
        await until(lambda: mirror.shows(kube))
        assert (mirror.lists, mirror.changes, mirror.troubles) == (1, 2, [])


async def test_lines_and_answers_have_a_bound(kube: FakeKube, api: ClusterApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "LINE_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(api_module, "BODY_MAX_BYTES", 1 << 20)
    kube.put("pods", "default", {"metadata": {"name": "big", "annotations": {"x": "y" * (3 << 20)}}})
    answer = await api.get(PODS, {}, timeout_s=5)
    assert answer == ApiFailure(200, "an answer has more than 1 MiB")
    lines = [line async for line in api.watch(PODS, {"watch": "1"}, timeout_s=5, idle_s=5)]
    assert lines == [b"", ApiFailure(200, "a line of the watch has more than 1 MiB")]


async def test_lines_come_whole_however_they_are_cut_into_chunks(kube: FakeKube, api: ClusterApi) -> None:
    got: list[bytes | ApiFailure] = []

    async def read() -> None:
        got.extend([line async for line in api.watch(PODS, {"watch": "1"}, timeout_s=5, idle_s=5)])

    task = asyncio.create_task(read())
    await until(lambda: bool(kube.state.watchers))
    for piece in (b"a", b"b\nc", b"\n", b"\n\nd\ne\nf", b"g", b"\nrest of a line"):
        kube.send_raw(piece)
        await asyncio.sleep(0.01)
    kube.close_watches()
    await task
    assert got == [b"", b"ab", b"c", b"d", b"e", b"fg"]


async def test_a_redirect_is_not_followed(kube: FakeKube, api: ClusterApi) -> None:
    kube.fail(307)
    answer = await api.get(PODS, {}, timeout_s=5)
    assert isinstance(answer, ApiFailure)
    assert answer.status == 307
    assert len(kube.requests) == 1
