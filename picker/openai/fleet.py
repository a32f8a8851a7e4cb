"""Names in requests that address hosts, ranks or memory of the fleet, which clients must not set, and those that steer
the choice: engines get neither.

Only names: stripping is in `rewrite`, detection in `parse`. Sources: the sidecar protocol of llm-d, the request
schemas of vLLM, SGLang and TensorRT-LLM, and Dynamo's `nvext` extension with its header overrides.
"""

from __future__ import annotations

import re

# vLLM (kv, ec), SGLang (bootstrap, routed ranks), TensorRT-LLM (disaggregated_params).
FLEET_BODY_FIELDS: tuple[str, ...] = (
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
    "disaggregated_params",
    "data_parallel_rank",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
)

# Dynamo: worker and rank pins, and the URL the worker would upload to. Other `nvext` members stay.
NVEXT_FIELDS: tuple[str, ...] = (
    "backend_instance_id",
    "prefill_worker_id",
    "decode_worker_id",
    "worker_id",
    "allowed_worker_ids",
    "dp_rank",
    "prefill_dp_rank",
    "decode_dp_rank",
    "metadata_upload",
)

# vLLM merges these into the engine's extra arguments, next to the transfer parameters it sets itself.
EXTRA_ARGS_FIELDS: tuple[str, ...] = ("kv_transfer_params", "ec_transfer_params")

POOL_HEADER = "x-waypost-pool"
OBJECTIVE_HEADERS: tuple[str, ...] = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
"""The current name first; it wins over the older one."""

FLEET_HEADERS: frozenset[str] = frozenset(
    (
        POOL_HEADER,
        *OBJECTIVE_HEADERS,
        # llm-d sidecar and engines
        "x-prefiller-host-port",
        "x-encoder-hosts-ports",
        "x-data-parallel-host-port",
        "x-data-parallel-rank",
        "x-kv-cache-source-host-port",
        # endpoint picker protocol
        "x-gateway-destination-endpoint",
        "x-gateway-destination-endpoint-subset",
        "x-gateway-destination-endpoint-served",
        "x-gateway-destination-endpoint-scores",
        # Dynamo: current names, unprefixed aliases, older releases
        "x-dynamo-worker-instance-id",
        "x-dynamo-prefill-instance-id",
        "x-dynamo-dp-rank",
        "x-dynamo-prefill-dp-rank",
        "x-dynamo-routing-mode",
        "x-dynamo-epp-prefill-reservation-id",
        "x-worker-instance-id",
        "x-prefill-instance-id",
        "x-dp-rank",
        "x-prefill-dp-rank",
        "x-dynamo-backend-instance-id",
        "x-dynamo-prefill-worker-id",
        "x-dynamo-decode-worker-id",
        "x-dynamo-token-data",
        # SGLang model gateway
        "x-smg-target-worker",
    )
)
FLEET_HEADERS_BYTES: frozenset[bytes] = frozenset(name.encode() for name in FLEET_HEADERS)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}\Z")
_ADDRESS_MARKS = ("___prefill_addr_", "___decode_addr_")


def names_fleet_address(request_id: str) -> bool:
    """True when a request id carries peer addresses: one vLLM connector reads host and port out of the id."""
    return any(mark in request_id for mark in _ADDRESS_MARKS)


def safe_request_id(request_id: str) -> bool:
    """May a client's `x-request-id` go upstream? Printable ASCII, at most 256 characters, no peer addresses."""
    return _REQUEST_ID.match(request_id) is not None and not names_fleet_address(request_id)
