"""Which members of which request body matter: tables for the parser, no logic.

Facts of the OpenAI, Anthropic, vLLM, SGLang and TensorRT-LLM request schemas.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

from picker.openai.routes import RouteKind


class Wanted(msgspec.Struct):
    """Members of interest over all routes. Raw members are read leniently: a wrong type is the engine's business."""

    model: str | UnsetType | None = UNSET
    stream: bool | UnsetType | None = UNSET
    messages: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    max_tokens: Raw | UnsetType = UNSET
    max_completion_tokens: Raw | UnsetType = UNSET
    max_output_tokens: Raw | UnsetType = UNSET
    n: Raw | UnsetType = UNSET
    stream_options: Raw | UnsetType = UNSET
    sampling_params: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    system: Raw | UnsetType = UNSET
    instructions: Raw | UnsetType = UNSET
    prompt_embeds: Raw | UnsetType = UNSET
    items: Raw | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    query: Raw | UnsetType = UNSET
    documents: Raw | UnsetType = UNSET
    tokens: Raw | UnsetType = UNSET
    token_ids: Raw | UnsetType = UNSET
    text: Raw | UnsetType = UNSET
    text_input: Raw | UnsetType = UNSET
    input_ids: Raw | UnsetType = UNSET
    input_embeds: Raw | UnsetType = UNSET
    previous_response_id: Raw | UnsetType = UNSET
    session_id: Raw | UnsetType = UNSET
    prompt_cache_key: Raw | UnsetType = UNSET
    user: Raw | UnsetType = UNSET
    cache_salt: Raw | UnsetType = UNSET
    request_id: Raw | UnsetType = UNSET
    nvext: Raw | UnsetType = UNSET
    vllm_xargs: Raw | UnsetType = UNSET
    kv_transfer_params: Raw | UnsetType = UNSET
    ec_transfer_params: Raw | UnsetType = UNSET
    bootstrap_host: Raw | UnsetType = UNSET
    bootstrap_port: Raw | UnsetType = UNSET
    bootstrap_room: Raw | UnsetType = UNSET
    bootstrap_pair_key: Raw | UnsetType = UNSET
    decode_tp_size: Raw | UnsetType = UNSET
    disaggregated_params: Raw | UnsetType = UNSET
    data_parallel_rank: Raw | UnsetType = UNSET
    routed_dp_rank: Raw | UnsetType = UNSET
    disagg_prefill_dp_rank: Raw | UnsetType = UNSET


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampling(msgspec.Struct):
    max_tokens: Raw | UnsetType = UNSET
    max_new_tokens: Raw | UnsetType = UNSET
    n: Raw | UnsetType = UNSET
    extra_args: Raw | UnsetType = UNSET


class Needs(msgspec.Struct, frozen=True):
    """Prompt members of a route: one of `prompt` is the prompt; `all_of` must be there; `extras` add to its size."""

    prompt: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    list_only: bool = False


NEEDS: dict[RouteKind, Needs] = {
    RouteKind.CHAT: Needs(("messages",), extras=("tools",), list_only=True),
    RouteKind.COMPLETIONS: Needs(("prompt", "prompt_embeds")),
    RouteKind.RESPONSES: Needs(("input",), extras=("instructions", "tools")),
    RouteKind.CONVERSATIONS: Needs(("items",)),
    RouteKind.MESSAGES: Needs(("messages",), extras=("system", "tools"), list_only=True),
    RouteKind.EMBEDDINGS: Needs(("input", "messages")),
    RouteKind.POOLING: Needs(("input", "messages", "data")),
    RouteKind.CLASSIFY: Needs(("input", "messages", "text", "input_ids")),
    RouteKind.RERANK: Needs(("documents",), all_of=("query", "documents"), extras=("query",)),
    RouteKind.TOKENIZE: Needs(("prompt", "messages", "text")),
    RouteKind.DETOKENIZE: Needs(("tokens",)),
    RouteKind.SPEECH: Needs(("input",)),
    RouteKind.IMAGES: Needs(("prompt",)),
    RouteKind.TOKEN_GENERATE: Needs(("token_ids",), list_only=True),
    RouteKind.NATIVE_GENERATE: Needs(("text", "input_ids", "input_embeds", "prompt", "text_input")),
}
ANY_PROMPT = Needs(("messages", "prompt", "input", "text", "input_ids", "token_ids"))
