"""What an engine tells about itself: its models, where its KV events are, and SGLang's server information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from sim.answers import encode_json
from sim.kv_encoding import EngineName
from sim.kv_events import KvPublisher
from sim.profiles import Profile


def model_list(base: str, loras: Sequence[str], *, engine: EngineName, max_model_len: int, created: int) -> bytes:
    """The answer of ``/v1/models``: the base model, then one entry per adapter with the base as its parent."""

    def card(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": engine,
            "root": name if parent is None else f"/adapters/{name}",
            "parent": parent,
            "max_model_len": max_model_len if parent is None else None,
            "permission": [],
        }

    return encode_json({"object": "list", "data": [card(base, None), *(card(name, base) for name in loras)]})


def kv_event_sources(publisher: KvPublisher | None, *, rank: int) -> bytes:
    """The answer of vLLM's ``/kv_event_sources``: one source per data-parallel rank behind this port, here one."""
    if publisher is None:
        return b"{}"
    source = {
        "endpoint": publisher.endpoint,
        "replay_endpoint": publisher.replay_endpoint,
        "topic": publisher.topic,
    }
    return encode_json({str(rank): source})


def server_info(model: str, profile: Profile, publisher: KvPublisher | None, *, version: str) -> bytes:
    """The answer of SGLang's ``/server_info``, as far as routers read it: page size, capacity, KV-event publisher.

    The publisher is told twice, as there: the configuration as given (a JSON text), and a description with the real
    port, to which subscribers add the rank.
    """
    told: dict[str, Any] = {
        "model_path": model,
        "served_model_name": model,
        "version": version,
        "page_size": profile.block_size,
        "dp_size": 1,
        "max_total_num_tokens": profile.kv_tokens,
        "max_running_requests": profile.max_num_seqs,
        "disaggregation_mode": "null",
        "kv_events_config": None,
        "kv_events": None,
        "internal_states": [{}],
    }
    if publisher is not None:
        config = {
            "publisher": "zmq",
            "endpoint": publisher.endpoint,
            "replay_endpoint": publisher.replay_endpoint,
            "topic": publisher.topic,
            "bind": True,
        }
        address = urlsplit(publisher.endpoint)
        told["kv_events_config"] = encode_json(config).decode()
        told["kv_events"] = {
            "publisher": "zmq",
            "endpoint_host": address.hostname,
            "endpoint_port_base": address.port,
            "topic": publisher.topic,
            "block_size": profile.block_size,
            "dp_size": 1,
        }
    return encode_json(told)


def model_info(model: str) -> bytes:
    """The answer of SGLang's ``/get_model_info``."""
    return encode_json({"model_path": model, "tokenizer_path": model, "is_generation": True})
