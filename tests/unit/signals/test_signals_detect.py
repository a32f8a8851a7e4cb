"""Recognising engines by asking them."""

from __future__ import annotations

import pytest

from picker.core.updates import ProbeFailure
from picker.core.values import Endpoint
from picker.signals.detect import Detected, detect, metrics_url
from picker.signals.engines import BUILTIN
from tests.unit.signals.fakes import Answer, Reply

URL = "http://e:8000"
HTML = Answer(200, b"<html>welcome</html>")


class Host:
    """One host with some paths; the rest is 404."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self.replies = replies
        self.asked: list[str] = []

    async def __call__(self, url: str) -> Answer | ProbeFailure:
        self.asked.append(url)
        reply = self.replies.get(url.removeprefix(URL), Answer(404))
        assert isinstance(reply, Answer | ProbeFailure)
        return reply


def endpoint(**fields: str) -> Endpoint:
    return Endpoint(id="e", url=URL, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("replies", "engine", "path"),
    [
        ({"/metrics": Answer(200, b"vllm:num_requests_running 0\n")}, "vllm", "/metrics"),
        ({"/metrics": Answer(200, b'sglang:num_running_reqs{a="b"} 0\n')}, "sglang", "/metrics"),
        ({"/metrics": Answer(200, b'nv_inference_count{model="a"} 0\n')}, "triton", "/metrics"),
        (
            {
                "/metrics": Answer(200, b'[{"iter": 1}]'),
                "/prometheus/metrics": Answer(200, b"trtllm_num_requests_running 0\n"),
            },
            "trtllm",
            "/prometheus/metrics",
        ),
        (
            {"/v1/metrics": Answer(200, b"num_requests_running 0\ngpu_cache_usage_perc 0\n")},
            "nim",
            "/v1/metrics",
        ),
        ({"/v1/metrics": Answer(200, b"vllm:num_requests_running 0\n")}, "vllm", "/v1/metrics"),
        ({"/metrics": Answer(200, b""), "/server_info": Answer(200, b'{"page_size":1}')}, "sglang", "/metrics"),
        (
            {"/metrics": Answer(200, b""), "/get_server_info": Answer(200, b'{"internal_states":[{}]}')},
            "sglang",
            "/metrics",
        ),
        (
            {
                "/prometheus/metrics": Answer(200, b"python_info 1\n"),
                "/server_info": Answer(200, b'{"kv_cache_hash_algo":"V1"}'),
            },
            "trtllm",
            "/prometheus/metrics",
        ),
        (
            {"/metrics": Answer(200, b"python_info 1\n"), "/version": Answer(200, b'{"version":"0.32.0"}')},
            "vllm",
            "/metrics",
        ),
        ({"/metrics": ProbeFailure.PARSE}, None, ""),
        ({"/metrics": HTML, "/version": Answer(200, b'{"version":"1"}')}, "none", ""),
        ({"/metrics": Answer(200, b"llamacpp:requests 1\n")}, "none", ""),
        ({"/metrics": Answer(200, b"x 1\n"), "/server_info": Answer(200, b"[[[["), "/version": HTML}, "none", ""),
        ({"/metrics": Answer(401)}, "none", ""),
        ({"/metrics": Answer(404), "/v1/metrics": ProbeFailure.TIMEOUT}, "none", ""),
        ({}, "none", ""),
    ],
)
async def test_engines(replies: dict[str, Reply], engine: str | None, path: str) -> None:
    host = Host(replies)
    found = await detect(endpoint(), host)
    if engine is None:
        assert found is ProbeFailure.PARSE
    else:
        assert found == Detected(engine, URL + path if path else "")
    assert len(host.asked) <= 9


@pytest.mark.parametrize("failure", [ProbeFailure.REFUSED, ProbeFailure.TIMEOUT])
async def test_a_dead_host_says_nothing_about_the_engine(failure: ProbeFailure) -> None:
    host = Host({"/metrics": failure})
    assert await detect(endpoint(), host) is failure
    assert host.asked == [URL + "/metrics"]


async def test_a_starting_engine_is_asked_again_later() -> None:
    assert await detect(endpoint(), Host({"/metrics": Answer(503)})) is ProbeFailure.HTTP


@pytest.mark.parametrize("engine", [*BUILTIN, "none"])
async def test_a_configured_engine_is_believed(engine: str) -> None:
    host = Host({})
    found = await detect(endpoint(engine=engine), host)
    path = BUILTIN[engine].metrics_path if engine in BUILTIN else ""
    assert found == Detected(engine, URL + path if path else "")
    assert host.asked == []


@pytest.mark.parametrize(
    ("setting", "engine", "expected"),
    [
        ("", "trtllm", "http://e:8000/prometheus/metrics"),
        ("http://e:8002", "triton", "http://e:8002/metrics"),
        ("http://e:8002/", "nim", "http://e:8002/v1/metrics"),
        ("http://e:8002/own", "nim", "http://e:8002/own"),
    ],
)
def test_where_metrics_are(setting: str, engine: str, expected: str) -> None:
    assert metrics_url(endpoint(metrics_url=setting), BUILTIN[engine]) == expected


async def test_metrics_on_their_own_port_are_recognised() -> None:
    host = Host({"http://e:8002/metrics": Answer(200, b"nv_inference_count 1\n")})
    found = await detect(endpoint(metrics_url="http://e:8002"), host)
    assert found == Detected("triton", "http://e:8002/metrics")


async def test_a_metrics_url_with_a_path_is_the_only_page_asked_for() -> None:
    host = Host({"http://e:9/own": Answer(200, b"vllm:x 1\n")})
    assert await detect(endpoint(metrics_url="http://e:9/own"), host) == Detected("vllm", "http://e:9/own")
    assert host.asked == ["http://e:9/own"]


async def test_an_engine_named_by_version_with_its_own_page_elsewhere_set() -> None:
    host = Host({"http://e:9/own": Answer(200, b"x 1\n"), "/version": Answer(200, b'{"version":"1"}')})
    assert await detect(endpoint(metrics_url="http://e:9/own"), host) == Detected("vllm", "http://e:9/own")
