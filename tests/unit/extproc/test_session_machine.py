"""Random conversations, legal and not: what must hold whatever a proxy, a client or the brain does."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from picker.core.ledger import Eviction
from picker.core.values import RejectionCode
from picker.extproc.headers import CONTROL
from picker.extproc.messages import (
    CHUNK_BYTES,
    NO_CONTEXT,
    UNCHANGED,
    BodyMode,
    BodyReply,
    Context,
    Deadline,
    Direction,
    Draining,
    Evicted,
    HeadersReply,
    Immediate,
    Overloaded,
    PeerGone,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    SessionEvent,
    StreamedBody,
    TrailersReply,
)
from picker.extproc.settings import ResponsePath, SessionSettings
from picker.openai.routes import target_path
from tests.unit.extproc.extproc_fakes import FakeDirector
from tests.unit.extproc.talk import COMPLETION, FDS, KEY, Talk

RANK = {HeadersReply: 0, StreamedBody: 1, BodyReply: 1, TrailersReply: 2}
CHUNKS = st.sampled_from([b"", b"x", COMPLETION, COMPLETION[:30], b"y" * 70_000, b'data: {"model":"real"}\n\n', b'"m"'])
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *(":path", "content-type", "content-length", "x-request-id", "date", "authorization"),
            *("x-llm-d-model-name-rewrite", "x-llm-d-inference-objective", "x-waypost-pool"),
            *("test-epp-endpoint-selection", "x-echo-set-header"),
        ]
    ),
    st.sampled_from(
        [
            *("", "/v1/completions", "/openai/v1/completions", "/v1/messages", "/x", "application/json"),
            *("text/event-stream", "12", "10.0.0.1", "10.0.0.9:8000"),
        ]
    ),
)
CONTEXTS = st.builds(
    Context,
    subset=st.sampled_from([None, None, None, (), ("10.0.0.1",), ("10.0.0.9",)]),
    pool=st.sampled_from([None, None, "", "ns/a", "x"]),
    served=st.sampled_from([None, None, "10.0.0.1:8000"]),
)
# What an endpoint may want of its requests.
ENDPOINTS = st.fixed_dictionaries(
    {"path_prefix": st.sampled_from(["", "/openai", "/a"]), "credentials": st.sampled_from(["", "main"])}
)


class Conversation(RuleBasedStateMachine):
    """One session and everything that was said."""

    @initialize(
        request=st.sampled_from(BodyMode),
        response=st.sampled_from(BodyMode),
        leave=st.booleans(),
        refuse=st.sampled_from([None, None, None, RejectionCode.SATURATED]),
        aliases=st.booleans(),
        at_once=st.booleans(),
        limit=st.sampled_from([100, 200_000]),
        endpoint=ENDPOINTS,
        conformance=st.booleans(),
    )
    def open(
        self,
        request: BodyMode,
        response: BodyMode,
        leave: bool,
        refuse: RejectionCode | None,
        aliases: bool,
        at_once: bool,
        limit: int,
        endpoint: dict[str, str],
        conformance: bool,
    ) -> None:
        path = ResponsePath.LEAVE if leave else ResponsePath.OBSERVE
        self.modes = {Direction.REQUEST: request, Direction.RESPONSE: response}
        self.aliased = aliases
        self.endpoint = endpoint
        self.conformance = conformance
        aliased = {"m": "real"} if aliases else {}
        self.talk = Talk(
            FakeDirector(refuse=refuse, aliases=aliased, pools=["ns/a"], endpoint=endpoint),
            SessionSettings(
                response_path=path, max_body_bytes=limit, hold_response_bytes=limit, conformance=conformance
            ),
            request=request,
            response=response,
            decide_at_once=at_once,
        )
        self.said: list[SessionEvent] = []
        self.first = True
        self.overtaken = False
        self.answered: Counter[Direction] = Counter()
        self.asked: Counter[Direction] = Counter()

    def say(self, event: SessionEvent) -> None:
        was_open = self.talk.closed is None
        if isinstance(event, ResponseHeaders | ResponseBody | ResponseTrailers) and self.talk.pending:
            # The proxy answered by itself and no longer waits for what it asked before.
            self.overtaken = True
        replies = self.talk.feed(event)
        assert was_open or not replies
        if was_open and isinstance(event, RequestHeaders | RequestBody | RequestTrailers):
            self.asked[Direction.REQUEST] += 1
        elif was_open and isinstance(event, ResponseHeaders | ResponseBody | ResponseTrailers):
            self.asked[Direction.RESPONSE] += 1
        for reply in replies:
            if not isinstance(reply, Immediate):
                self.answered[reply.direction] += 1
        self.said.append(event)

    def context(self, context: Context = NO_CONTEXT) -> Context:
        modes = self.talk.context.modes if self.first else None
        self.first = False
        return msgspec.structs.replace(context, modes=modes)

    @rule(headers=HEADERS, end=st.booleans(), context=CONTEXTS)
    def request_headers(self, headers: dict[str, str], end: bool, context: Context) -> None:
        self.say(RequestHeaders(headers, end, self.context(context)))

    @rule(chunk=CHUNKS, end=st.booleans(), context=CONTEXTS)
    def request_body(self, chunk: bytes, end: bool, context: Context) -> None:
        self.say(RequestBody(chunk, end, self.context(context)))

    @rule()
    def request_trailers(self) -> None:
        self.say(RequestTrailers(self.context()))

    @rule(status=st.sampled_from([0, 200, 429, 503]), headers=HEADERS, end=st.booleans(), context=CONTEXTS)
    def response_headers(self, status: int, headers: dict[str, str], end: bool, context: Context) -> None:
        self.say(ResponseHeaders(status, headers, end, self.context(context)))

    @rule(chunk=CHUNKS, end=st.booleans())
    def response_body(self, chunk: bytes, end: bool) -> None:
        self.say(ResponseBody(chunk, end, self.context()))

    @rule()
    def response_trailers(self) -> None:
        self.say(ResponseTrailers(self.context()))

    @precondition(lambda self: self.talk.pending)
    @rule()
    def decision(self) -> None:
        for reply in self.talk.settle():
            if not isinstance(reply, Immediate):
                self.answered[reply.direction] += 1

    @rule(
        event=st.sampled_from(
            [
                Deadline(),
                Evicted(Eviction.HUNG),
                Evicted(Eviction.TOTAL_TIMEOUT),
                Overloaded("full"),
                PeerGone(clean=True),
                PeerGone(clean=False),
                Draining(),
            ]
        )
    )
    def elsewhere(self, event: SessionEvent) -> None:
        self.say(event)

    @rule(seconds=st.sampled_from([0.001, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.talk.now += seconds

    @invariant()
    def replies_are_in_order(self) -> None:
        for direction in Direction:
            ranks = [RANK[type(reply)] for reply in self.of(direction)]
            assert ranks == sorted(ranks)
        kinds = [isinstance(reply, Immediate) for reply in self.talk.replies]
        assert True not in kinds[:-1]

    @invariant()
    def chunks_are_small_and_end_once(self) -> None:
        for direction in Direction:
            chunks = [reply for reply in self.of(direction) if isinstance(reply, StreamedBody)]
            assert all(len(chunk.chunk) <= CHUNK_BYTES for chunk in chunks)
            assert not any(chunk.end_of_stream for chunk in chunks[:-1])

    @invariant()
    def one_answer_per_message_outside_full_duplex(self) -> None:
        for direction, mode in self.modes.items():
            overtaken = self.overtaken and direction is Direction.REQUEST
            if mode is not FDS and self.talk.closed is None and not (self.talk.pending or overtaken):
                assert self.answered[direction] == self.asked[direction]

    @invariant()
    def the_mode_decides_the_kind_of_body_reply(self) -> None:
        for direction, mode in self.modes.items():
            for reply in self.of(direction):
                assert not isinstance(reply, BodyReply if mode is FDS else StreamedBody)

    @invariant()
    def full_duplex_responses_keep_every_byte(self) -> None:
        if self.aliased or self.modes[Direction.RESPONSE] is not FDS or self.talk.closed is False:
            return
        came = [event for event in self.said if isinstance(event, ResponseBody)]
        went = [reply for reply in self.of(Direction.RESPONSE) if isinstance(reply, StreamedBody)]
        if went and went[-1].end_of_stream:
            ends = next(at for at, event in enumerate(came) if event.end_of_stream)
            assert b"".join(part.chunk for part in went) == b"".join(event.chunk for event in came[: ends + 1])

    @invariant()
    def an_engine_gets_what_it_wants_and_nothing_of_ours(self) -> None:
        mutations = [r.mutation for r in self.talk.replies if isinstance(r, HeadersReply | BodyReply)]
        picked = [mutation for mutation in mutations if mutation.destination is not None]
        assert len(picked) <= 1
        for mutation in picked:
            [asked] = [event.headers for event in self.said if isinstance(event, RequestHeaders)][:1]
            changed, path = dict(mutation.set_headers), asked.get(":path", "")
            wanted = target_path(path, self.endpoint["path_prefix"])
            assert changed.get(":path", path) == wanted
            assert (":path" in changed) == (path != wanted)
            assert changed.get("authorization") == (KEY if self.endpoint["credentials"] else None)
            assert ("x-echo-set-header" in changed) == self.conformance
            assert CONTROL.intersection(asked) <= set(mutation.remove_headers)
        assert KEY not in repr(self.talk.replies)

    @invariant()
    def a_target_is_drawn_at_most_once(self) -> None:
        assert len(self.talk.director.asked) <= 1
        if self.talk.director.asked and self.talk.director.requests:
            assert self.talk.director.asked[0][1] == self.talk.director.requests[0].pool

    @invariant()
    def only_conformance_tests_see_who_served(self) -> None:
        told = [r for r in self.of(Direction.RESPONSE) if isinstance(r, HeadersReply) and r.mutation != UNCHANGED]
        assert not told or self.conformance

    @invariant()
    def one_end_per_decision(self) -> None:
        ends = Counter(type(event).__name__ for event in self.talk.director.endings)
        assert ends.total() <= 1
        if self.talk.closed is not None and not self.talk.pending:
            assert self.talk.director.reserved == {}
            assert self.talk.session.held_bytes == 0

    @invariant()
    def one_record_per_request(self) -> None:
        asked = any(isinstance(event, RequestHeaders) for event in self.said)
        assert len(self.talk.records) <= asked
        if self.talk.closed is not None and self.talk.director.requests:
            assert len(self.talk.records) == 1

    def of(self, direction: Direction) -> list[Reply]:
        return [r for r in self.talk.replies if not isinstance(r, Immediate) and r.direction is direction]

    def teardown(self) -> None:
        if not hasattr(self, "talk"):
            return
        self.talk.feed(PeerGone(clean=False))
        while self.talk.pending:
            self.talk.settle()
        assert self.talk.director.reserved == {}
        decided = [r for r in self.talk.director.requests if self.talk.director.refuse is None]
        assert len(self.talk.director.endings) <= len(decided) <= 1


TestConversation = Conversation.TestCase
TestConversation.settings = settings(
    max_examples=300, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
