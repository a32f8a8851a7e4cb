"""What a cluster's resources change in the Endpoint Picker contract: objectives, rewrites, pools; and its conformance
headers. Case names are those of the reference's tables.
"""

from __future__ import annotations

import json

import pytest

from picker.core.rules import Objective, Rewrite, Target
from picker.core.values import Endpoint
from picker.extproc.settings import SessionSettings
from protos import ext_proc_pb2 as pb
from tests.contract.extproc_rig import Conversation, Pod, destination, head, picker, set_headers, streamed

PODS = [Pod(0, 3, 0.2), Pod(1, 0, 0.1), Pod(2, 10, 0.2)]
FIRST, SECOND, THIRD = (pod.address for pod in PODS)
MODEL = "model-to-be-rewritten"
OBJECTIVES = [Objective(pool="ns/a", name="gold", priority=2), Objective(pool="ns/a", model="sql", priority=-1)]
CONFORMANCE = SessionSettings(conformance=True)


@pytest.mark.parametrize(("name", "model", "priority"), [("gold", "m", 2), ("unknown", "m", 0), ("unknown", "sql", -1)])
async def test_a1_an_objective_has_its_priority(name: str, model: str, priority: int) -> None:
    async with picker(PODS) as served:
        served.director.rules.replace("cluster", OBJECTIVES, ())
        stream = served.stream()
        await stream.headers({"x-llm-d-inference-objective": name})
        await stream.body(json.dumps({"model": model, "prompt": "x"}).encode())
        assert destination((await stream.read(2))[0]) == SECOND
        request = served.director.decisions[-1].request
        assert (request.objective, request.priority) == (name, priority)
        stream.cancel()
        await served.settled()


@pytest.mark.parametrize("header", [None, MODEL, "something-else"])
async def test_a14_a_rewrite_of_the_cluster_wins_over_the_header(header: str | None) -> None:
    async with picker(PODS) as served:
        rewrite = Rewrite(pool="ns/a", name="r", models=frozenset({MODEL}), targets=(Target("rewritten-model"),))
        served.director.rules.replace("cluster", (), (rewrite,))
        stream = served.stream()
        sent = await stream.llm_request(MODEL, target=header)
        answers = await stream.read(2)
        body, end = streamed(answers[1])
        assert (json.loads(body), end) == (json.loads(sent) | {"model": "rewritten-model"}, True)
        assert set_headers(answers[0])["content-length"] == str(len(body))
        assert served.director.decisions[-1].request.target_model == "rewritten-model"
        stream.cancel()
        await served.settled()


async def test_a_header_still_rewrites_what_no_rule_does() -> None:
    async with picker(PODS) as served:
        rewrite = Rewrite(pool="ns/a", name="r", models=frozenset({MODEL}), targets=(Target("rewritten-model"),))
        served.director.rules.replace("cluster", (), (rewrite,))
        stream = served.stream()
        await stream.llm_request("direct", target="by-header")
        assert json.loads(streamed((await stream.read(2))[1])[0])["model"] == "by-header"
        stream.cancel()
        await served.settled()


async def in_pool(stream: Conversation, hint: str | None, header: str | None) -> pb.ProcessingResponse:
    """The answer to a request without a body."""
    message = pb.ProcessingRequest(request_headers=head({} if header is None else {"x-waypost-pool": header}, end=True))
    if hint is not None:
        message.metadata_context.filter_metadata["envoy.lb"].update({"x-waypost-pool": hint})
    await stream.send(message)
    [answer] = await stream.read()
    return answer


@pytest.mark.parametrize(
    ("hint", "header", "expected"),
    [
        ("ns/a", None, {FIRST}),
        ("b", None, {SECOND}),
        (None, "ns/b", {SECOND}),
        ("ns/a", "ns/b", {FIRST}),
        ("", "ns/b", {SECOND}),
        (None, None, {FIRST, SECOND}),
        ("ns/c", "ns/a", None),
        (None, "c", None),
    ],
)
async def test_a_pool_is_named_by_the_route_or_the_client(
    hint: str | None, header: str | None, expected: set[str] | None
) -> None:
    addresses = {"a": FIRST, "b": SECOND}
    pods = [Endpoint(id=name, url=f"http://{at}", address=at, pool=f"ns/{name}") for name, at in addresses.items()]
    async with picker(pods) as served:
        served.director.pools = ("ns/a", "ns/b")
        seen = set()
        for _ in range(8):
            stream = served.stream()
            answer = await in_pool(stream, hint, header)
            if expected is None:
                assert answer.immediate_response.status.code == 503
                assert b"pool_not_found" in answer.immediate_response.body
                assert await stream.ends()
                return
            removed = list(answer.request_headers.response.header_mutation.remove_headers)
            assert removed == ([] if header is None else ["x-waypost-pool"])
            seen.add(destination(answer))
            stream.cancel()
        assert seen == expected
        await served.settled()


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("192.168.1.3", THIRD),
        ("192.168.1.1:8000", FIRST),
        ("192.168.1.1:8001,192.168.1.3:8000,10.1.1.1", THIRD),
        ("10.1.1.1,10.1.1.2:8000", None),
    ],
)
async def test_conformance_10_and_11_the_selection_is_followed(selection: str, expected: str | None) -> None:
    async with picker(PODS, CONFORMANCE) as served:
        stream = served.stream()
        await stream.headers({":path": "/primary-gateway-test", "test-epp-endpoint-selection": selection})
        await stream.body(b'{"model":"conformance-fake-model","prompt":"x"}')
        [answer] = await stream.read()
        if expected is None:
            assert answer.immediate_response.status.code == 503
            return
        assert destination(answer) == expected
        stream.cancel()
        await served.settled()


@pytest.mark.parametrize("feedback", [None, THIRD])
async def test_conformance_13_the_response_says_who_served(feedback: str | None) -> None:
    async with picker(PODS, CONFORMANCE) as served:
        stream = served.stream()
        await stream.headers({}, end=True)
        [answer] = await stream.read()
        assert set_headers(answer)["x-echo-set-header"] == f"x-conformance-test-served-endpoint:{SECOND}"
        message = pb.ProcessingRequest(response_headers=head({":status": "200"}))
        if feedback is not None:
            fields = {"x-gateway-destination-endpoint-served": feedback}
            message.metadata_context.filter_metadata["envoy.lb"].update(fields)
        await stream.send(message)
        [answer] = await stream.read()
        told = answer.response_headers.response.header_mutation.set_headers
        assert {option.header.key: option.header.raw_value.decode() for option in told} == {
            "x-conformance-test-served-endpoint": feedback or SECOND
        }
        stream.cancel()
        await served.settled()
