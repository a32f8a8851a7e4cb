"""The path table: exact for the gateway, longest suffix for the picker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.openai.routes import (
    ALLOWED,
    PASSTHROUGH_ROUTE,
    Dialect,
    RouteKind,
    allowed,
    match_suffix,
    target_path,
)

SERVED = {
    "/v1/chat/completions": RouteKind.CHAT,
    "/v1/chat/completions/render": RouteKind.CHAT,
    "/v1/completions": RouteKind.COMPLETIONS,
    "/v1/responses": RouteKind.RESPONSES,
    "/v1/embeddings": RouteKind.EMBEDDINGS,
    "/v1/messages": RouteKind.MESSAGES,
    "/v1/messages/count_tokens": RouteKind.MESSAGES,
    "/rerank": RouteKind.RERANK,
    "/v1/rerank": RouteKind.RERANK,
    "/v2/rerank": RouteKind.RERANK,
    "/score": RouteKind.SCORE,
    "/v1/score": RouteKind.SCORE,
    "/classify": RouteKind.CLASSIFY,
    "/pooling": RouteKind.POOLING,
    "/tokenize": RouteKind.TOKENIZE,
    "/detokenize": RouteKind.DETOKENIZE,
    "/v1/audio/transcriptions": RouteKind.TRANSCRIPTIONS,
    "/v1/audio/translations": RouteKind.TRANSLATIONS,
    "/v1/audio/speech": RouteKind.SPEECH,
    "/v1/models": RouteKind.MODELS,
    "/inference/v1/generate": RouteKind.TOKEN_GENERATE,
    "/generate": RouteKind.NATIVE_GENERATE,
}


@pytest.mark.parametrize(("path", "kind"), SERVED.items())
def test_served_paths_are_allowed_with_their_kind(path: str, kind: RouteKind) -> None:
    route = allowed(path)
    assert route is not None
    assert (route.kind, route.name) == (kind, path)
    assert match_suffix(path).kind is kind
    assert match_suffix("/team/a" + path + "?x=/v1/models").kind is (kind if path != "/generate" else _PASS)


_PASS = RouteKind.PASSTHROUGH


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/metrics",
        "/sleep",
        "/v1/load_lora_adapter",
        "/flush_cache",
        "/chat/completions",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/V1/chat/completions",
        "/v1/chat%2Fcompletions",
        "/v1/responses/",
        "/v1/responses/..",
        "/v1/responses/../metrics",
        "/v1/responses/..%2Fmetrics",
        "/v1/responses/a/b",
        "/v1/responses/a/cancel/",
        "/v1/responses/a?x=1",
        "/v1/responses/" + "a" * 129,
        "/v1/models/../metrics",
        "/v1/models/",
        "/invocations",
        "/v1/chat/completions\n",
    ],
)
def test_other_paths_are_not_allowed(path: str) -> None:
    assert allowed(path) is None


def test_stateful_responses_paths_carry_the_id() -> None:
    state, cancel = allowed("/v1/responses/resp_0a-1"), allowed("/v1/responses/resp_0a-1/cancel")
    assert state is not None
    assert cancel is not None
    assert (state.resource_id, state.methods) == ("resp_0a-1", ("GET", "DELETE"))
    assert (cancel.resource_id, cancel.methods) == ("resp_0a-1", ("POST",))
    assert "resp_0a-1" not in state.name + cancel.name
    assert match_suffix("/x/v1/responses/resp_0a-1?a=b").resource_id == "resp_0a-1"
    assert match_suffix("/x/v1/responses/resp_0a-1/cancel").resource_id == "resp_0a-1"


def test_models_by_name_may_have_slashes() -> None:
    route = allowed("/v1/models/org/base-8b:tag")
    assert route is not None
    assert (route.kind, route.resource_id) == (RouteKind.MODELS, "org/base-8b:tag")


def test_error_dialect_follows_the_route() -> None:
    assert {path for path, route in ALLOWED.items() if route.dialect is Dialect.ANTHROPIC} == {
        "/v1/messages",
        "/v1/messages/render",
        "/v1/messages/count_tokens",
    }


def test_only_routes_that_decode_generate() -> None:
    assert ALLOWED["/v1/chat/completions"].generates
    assert not ALLOWED["/v1/chat/completions/render"].generates
    assert not ALLOWED["/v1/messages/count_tokens"].generates
    assert not ALLOWED["/v1/embeddings"].generates


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", RouteKind.COMPLETIONS),
        ("/primary-gateway-test", _PASS),
        ("/", _PASS),
        ("/openai/deployments/x/chat/completions?api-version=1", RouteKind.CHAT),
        ("/v1/chat/completions/", RouteKind.CHAT),
        ("/mychat/completions", RouteKind.COMPLETIONS),
        ("/v1/mycompletions", _PASS),
        ("/v1/conversations", RouteKind.CONVERSATIONS),
        ("/x/generate", _PASS),
    ],
)
def test_suffix_match_prefers_the_longest_and_falls_back_to_passthrough(path: str, kind: RouteKind) -> None:
    assert match_suffix(path).kind is kind


@given(st.text(max_size=60))
def test_any_path_is_answered(path: str) -> None:
    assert isinstance(match_suffix("/" + path).kind, RouteKind)
    route = allowed("/" + path)
    assert route is None or route.name != PASSTHROUGH_ROUTE.name


# -- where an engine has a path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in SERVED if path.startswith("/v1/")])
def test_paths_below_openai_are_twins(path: str) -> None:
    assert allowed("/openai" + path) == allowed(path)
    assert match_suffix("/openai" + path) == match_suffix(path)


@pytest.mark.parametrize(
    ("path", "prefix", "expected"),
    [
        ("/v1/models", "", "/v1/models"),
        ("/v1/models", "/openai", "/openai/v1/models"),
        ("/openai/v1/models", "/openai", "/openai/v1/models"),
        ("/openai/v1/models", "", "/v1/models"),
        ("/openai/v1/models", "/serving/a", "/serving/a/v1/models"),
        ("/serving/a/v1/models", "/serving/a", "/serving/a/v1/models"),
        ("/v1/files?purpose=/v1/x&y=%2Fv1", "/openai", "/openai/v1/files?purpose=/v1/x&y=%2Fv1"),
        ("/v1/v1/models", "/v1", "/v1/v1/models"),
        ("/health", "/openai", "/health"),
        ("/metrics?x=/v1/", "/openai", "/metrics?x=/v1/"),
        ("/v1", "/openai", "/v1"),
        ("/v1beta/models", "/openai", "/v1beta/models"),
        ("/v2/rerank", "/openai", "/v2/rerank"),
        ("/openai/deployments/x/chat/completions", "/openai", "/openai/deployments/x/chat/completions"),
        ("/openai", "", "/openai"),
        ("", "/openai", ""),
    ],
)
def test_a_prefix_goes_before_the_api_once(path: str, prefix: str, expected: str) -> None:
    assert target_path(path, prefix) == expected


PREFIXES = st.sampled_from(["", "/openai", "/a", "/a/b-1", "/v1", "/openai/v1", "/openai/openai"])
PATHS = st.builds(
    "".join,
    st.lists(
        st.sampled_from(["/v1", "/openai", "/a", "/", "/chat/completions", "?x=/v1/y", "?", "%2e%2e", "v1/", "\ud800"])
        | st.text(max_size=5),
        max_size=6,
    ),
)


@given(path=PATHS, prefix=PREFIXES, other=PREFIXES)
def test_where_an_engine_has_a_path(path: str, prefix: str, other: str) -> None:
    target = target_path(path, prefix)

    assert target_path(target, prefix) == target, "never doubled"
    assert target == path or target.endswith(path.removeprefix("/openai")), "nothing but its beginning changes"
    assert target.partition("?")[1:] == path.partition("?")[1:]
    assert target.count("//") <= path.count("//")
    if not path.startswith(("/v1/", "/openai/v1/")):
        assert target == path
    elif prefix and not path.startswith(prefix + "/v1/"):
        assert target.startswith(prefix + "/v1/")
