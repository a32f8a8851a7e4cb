"""The riskiest of the gateway's tests once more, on the event loop that `waypost run` uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tests.integration import test_gateway_attempts as attempts
from tests.integration import test_gateway_clients as clients
from tests.integration import test_gateway_http as http
from tests.integration import test_gateway_openai as sdk
from tests.integration import test_gateway_relay as relay
from tests.unit.upstream import test_upstream_exchange as exchange
from tests.unit.upstream import test_upstream_pool as pool

Scenario = Callable[[], Coroutine[Any, Any, None]]

SCENARIOS: dict[str, Scenario] = {
    "abort before": lambda: clients.test_a_client_that_leaves_aborts_its_request_on_the_engine(
        "no answer yet", "close"
    ),
    "abort stream": lambda: clients.test_a_client_that_leaves_aborts_its_request_on_the_engine(
        "in the stream", "reset"
    ),
    "slow reader": lambda: clients.test_a_slow_reader_slows_its_engine(b"Content-Type: text/event-stream"),
    "no reader": lambda: clients.test_a_client_that_never_reads_is_cut_off(b"Content-Type: text/event-stream"),
    "no reader, whole": lambda: clients.test_a_client_that_never_reads_is_cut_off(b"Content-Type: application/json"),
    "http/1.0 broken": http.test_http_1_0_clients_can_tell_a_broken_answer,
    "refusal arrives": http.test_a_refusal_reaches_a_client_that_is_still_sending,
    "pipelined": http.test_pipelined_requests_are_answered_in_order,
    "flood": http.test_a_flood_of_pipelined_requests_is_bounded,
    "trailers": http.test_endless_trailers_are_cut,
    "slow headers": http.test_slow_headers_lose_their_connection,
    "flushed": relay.test_events_are_flushed_one_by_one_and_headers_with_the_first,
    "dies": lambda: attempts.test_a_stream_that_dies_ends_with_an_error_event_and_nobody_else_is_asked("reset", b""),
    "silence": lambda: attempts.test_silence_between_chunks_ends_an_answer("whole"),
    "sdk death": sdk.test_an_engine_that_dies_in_a_stream_raises_in_the_sdk,
    "sdk cancel": lambda: sdk.test_a_cancelled_request_ends_on_the_engine(False),
    "early answer": exchange.test_an_early_answer_is_read_and_its_connection_not_used_again,
    "server paused": exchange.test_a_slow_reader_pauses_the_server,
    "reset is no end": exchange.test_a_reset_is_no_end_of_a_body_without_a_length,
    "idle talk": lambda: pool.test_an_idle_connection_that_talks_unasked_is_dropped(b"\x00"),
    "lost before": pool.test_a_connection_lost_before_its_exchange_is_a_reset,
    "rude server": pool.test_a_server_that_closes_at_once_wakes_its_request,
    "connect hangs": pool.test_a_connect_that_hangs_is_given_up,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_uvloop(name: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(SCENARIOS[name]())
