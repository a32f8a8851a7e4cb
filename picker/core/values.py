"""The values that travel between the doors, the brain and the sources.

Everything here is immutable and serialisable with msgspec, so that a door may one day live in another process. Times
are seconds on one monotonic clock which the caller owns. No behaviour beyond what is derived from the fields
themselves.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping

import msgspec

from picker.core.prefix.prompt import Match, PromptKeys


class Role(enum.StrEnum):
    """What a model server does with a request."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"


class Place(msgspec.Struct, frozen=True):
    """Where an endpoint runs, as far as it is known; prefill and decode are paired by what they share."""

    node: str = ""
    zone: str = ""
    rack: str = ""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One model server that can be addressed: a pod's port, a host, a data-parallel rank.

    `id` is unique and stable over restarts of Waypost; `address` is `ip:port` (IPv6 in brackets) as Envoy wants it,
    empty while a host name is not resolved; `url` has scheme, host and port and no path. `path_prefix` goes before the
    path of every API request (`/openai` for KServe's Hugging Face runtime). `credentials` names an entry of the
    configuration, never a secret.

    `pool` is `namespace/name`, empty outside Kubernetes. `group` and `revision` say which prefill and decode servers
    were deployed as one. `instance` changes when the processes behind the endpoint are others: what was learnt of it
    (health, cached prefixes) is void then. `endpoint_class` names the hardware (accelerator, node group): endpoints of
    one class cost alike. `rank` counts the ports of one pod; `bootstrap_port` is SGLang's, 0 when there is none.
    """

    id: str
    url: str
    address: str = ""
    path_prefix: str = ""
    role: Role = Role.BOTH
    engine: str = "auto"
    pool: str = ""
    pod: str = ""
    rank: int = 0
    instance: str = ""
    group: str = ""
    revision: str = ""
    endpoint_class: str = ""
    place: Place = Place()
    bootstrap_port: int = 0
    credentials: str = ""
    models: frozenset[str] = frozenset()
    metrics_url: str = ""
    labels: Mapping[str, str] = {}


class Lora(msgspec.Struct, frozen=True):
    """LoRA adapters as an engine reports them; `slots` is how many fit on the accelerator at once."""

    running: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()
    slots: int = 0


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What one scrape of one engine said. None means the engine does not tell, which is not the same as zero.

    `at` is the time the scrape was sent: what was dispatched later cannot be in it. `progress_tokens` is the sum of
    the engine's prompt and generation token counters; while the engine works it rests at most `progress_lag_s`.
    """

    at: float
    waiting: float | None = None
    running: float | None = None
    kv_usage: float | None = None
    block_tokens: int | None = None
    blocks: int | None = None
    lora: Lora | None = None
    progress_tokens: float | None = None
    progress_lag_s: float = 0.0


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the scheduler sees it. Holds no prompt text.

    `key` is unique in this process and keys the ledger; `id` is the `x-request-id` people see, which clients may
    repeat. `target_model` is the name the engines see after a rewrite. `subset` holds `ip:port` or bare `ip` entries
    the proxy restricted us to; None is no restriction, empty is nobody. `pool` is the one pool (`namespace/name`) that
    may serve, None for any. `objective` is the name a client gave its purpose and `priority` what that name means; 0 is
    usual, below 0 may be shed. `pinned` is the one endpoint that may serve (it holds the state asked for). `tried`
    endpoints failed this request already. `strict_model` refuses a model nobody serves (the gateway door); without it
    such a request goes anywhere, and the engine answers. `sees_body` is false where the door does not see the response
    body, so that silence there proves nothing. `keys` are the prefixes of its prompt, None where they were not made;
    `matches` is what endpoints hold of it, by endpoint id, as of the decision.
    """

    key: int
    id: str
    received_at: float
    path: str = ""
    model: str | None = None
    target_model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    session: str | None = None
    subset: frozenset[str] | None = None
    pool: str | None = None
    objective: str | None = None
    priority: int = 0
    pinned: str | None = None
    tried: frozenset[str] = frozenset()
    strict_model: bool = False
    sees_body: bool = True
    keys: PromptKeys | None = None
    matches: Mapping[str, Match] = {}

    def uncached_tokens_at(self, endpoint_id: str) -> int:
        """Tokens of the prompt that the endpoint does not hold yet, as of the decision."""
        match = self.matches.get(endpoint_id)
        return max(0, self.prompt_tokens - (match.tokens if match is not None else 0))

    def expected_tokens_at(self, endpoint_id: str) -> int:
        """Tokens this request is expected to make the endpoint compute: what it does not hold of the prompt, and the
        output, 256 when the client set no limit (a typical chat answer).
        """
        output = 256 if self.max_output_tokens is None else max(0, min(self.max_output_tokens, 4096))
        return self.uncached_tokens_at(endpoint_id) + output


class Standing(enum.StrEnum):
    """Whether an endpoint may get traffic: READY first, DEGRADED only when nobody is ready, OUT never."""

    READY = "ready"
    DEGRADED = "degraded"
    OUT = "out"


class EndpointState(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint at one instant: a row of the snapshot.

    `waiting` and `running` are the engine's last figures corrected by what we dispatched and saw finish since; None
    when the engine tells nothing fresh. `in_flight` and `in_flight_tokens` are our own exact counts. `models` is what
    the engine serves, None when unknown. `others` and `others_tokens` are what other replicas of ours have in flight
    there, as far as they told. `cold_at` is when a prompt it held nothing of was last sent there.
    """

    endpoint: Endpoint
    standing: Standing = Standing.READY
    standing_reason: str = ""
    signals: Signals | None = None
    models: frozenset[str] | None = None
    waiting: float | None = None
    running: float | None = None
    in_flight: int = 0
    in_flight_tokens: int = 0
    others: int = 0
    others_tokens: int = 0
    cold_at: float = 0.0

    @property
    def all_in_flight(self) -> int:
        """Requests in flight there from all our replicas."""
        return self.in_flight + self.others

    @property
    def all_in_flight_tokens(self) -> int:
        """Their tokens."""
        return self.in_flight_tokens + self.others_tokens


class Snapshot(msgspec.Struct, frozen=True):
    """All endpoints at one instant. Cheap to take: rows are shared with the snapshots before and after."""

    now: float
    states: tuple[EndpointState, ...]


class ScoreTable(msgspec.Struct, frozen=True):
    """Every number behind a decision, in columns aligned with `endpoints`.

    `reasons[i]` is empty when endpoint i took part in scoring, otherwise `filter: why`. In `scores` and `totals` NaN
    means no data (or filtered). Above the bound of rows the best are kept and `omitted` counts the others by reason.
    """

    endpoints: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    scores: Mapping[str, array[float]] = {}
    weights: Mapping[str, float] = {}
    totals: array[float] = array("d")
    omitted: Mapping[str, int] = {}


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes, who would have been next, and why."""

    request: InferenceRequest
    endpoint: Endpoint
    alternates: tuple[Endpoint, ...] = ()
    profile: str = ""
    table: ScoreTable = ScoreTable()
    decided_at: float = 0.0


class RejectionCode(enum.StrEnum):
    """Why nobody was chosen; the doors map these to statuses (`picker.openai.errors`)."""

    NO_ENDPOINTS = "no_endpoints"
    NO_READY_ENDPOINTS = "no_ready_endpoints"
    SUBSET_EMPTY = "subset_empty"
    POOL_NOT_FOUND = "pool_not_found"
    MODEL_NOT_FOUND = "model_not_found"
    SATURATED = "saturated"
    RESPONSE_GONE = "response_gone"


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody was chosen: an expected refusal, so a value."""

    request: InferenceRequest
    code: RejectionCode
    message: str
    table: ScoreTable = ScoreTable()
    decided_at: float = 0.0
