"""How long one endpoint takes to answer, learnt from our own requests, and when its silence means that it hangs.

A frozen engine looks like the best pod: its front end answers probes, its gauges say 0, even the headers of a stream
come at once. Only the absence of progress tells. Judges; ejecting is up to the health.
"""

from __future__ import annotations

from picker.core.ledger import Flight, Load

# Expected time to the first byte before anything was observed: fixed part, and prefill at a modest 4,000 tokens a
# second. Only prompts of some length tell the prefill rate; what is learnt stays within what accelerators do (1,000
# to 50,000 tokens a second).
FIRST_BYTE_PRIOR_S = 0.3
PREFILL_PRIOR_S_PER_TOKEN = 1 / 4000
PREFILL_S_PER_TOKEN_MIN = 1 / 50_000
PREFILL_S_PER_TOKEN_MAX = 1 / 1000
TELLING_PROMPT_TOKENS = 1024
# Prompt tokens that engines take into one step on modest accelerators; the tokens of several prompts come together.
STEP_TOKENS = 2048
# Without token counters a non-streaming answer is silent until its end, and nothing tells a long answer from a hung
# engine.
SILENT_ANSWER_S = 30.0


class Pace:
    """Smoothed times of one endpoint, in seconds: first byte of a stream, whole silent answer, prefill per token."""

    __slots__ = ("first_byte_s", "prefill_s_per_token", "silent_s")

    def __init__(self) -> None:
        self.first_byte_s = 0.0
        self.prefill_s_per_token = PREFILL_PRIOR_S_PER_TOKEN
        self.silent_s = 0.0

    def learn(self, flight: Flight, now: float) -> None:
        """Takes in the first byte of a flight; headers alone teach nothing."""
        if not flight.telling:
            return
        took_s = now - flight.reserved_at
        if not flight.request.stream:
            self.silent_s = _smoothed(self.silent_s, took_s)
            return
        self.first_byte_s = _smoothed(self.first_byte_s, took_s)
        # What was in the cache took no time.
        tokens = flight.request.uncached_tokens_at(flight.endpoint_id)
        if tokens >= TELLING_PROMPT_TOKENS:
            rate = min(max(took_s / tokens, PREFILL_S_PER_TOKEN_MIN), PREFILL_S_PER_TOKEN_MAX)
            self.prefill_s_per_token = _smoothed(self.prefill_s_per_token, rate)

    def is_hung(self, load: Load, now: float, *, counter_at: float | None, hung_after_s: float) -> bool:
        """Whether our own requests are there, no data came and no token counter moved, for longer than the work
        explains: `hung_after_s`, or four times the expected first byte. `counter_at` is when the engine's token
        counters last moved, None where it has none to show.
        """
        moved_at = load.progress_at if counter_at is None else max(load.proof_at, counter_at)
        if now - moved_at <= hung_after_s:
            return False
        awaited = [flight for flight in load.flights.values() if _is_awaited(flight, counter_at)]
        if not awaited:
            return False
        silent_s = now - max(moved_at, min(flight.reserved_at for flight in awaited))
        return silent_s > max(hung_after_s, 4 * self._expected_s(awaited, counter_at is not None))

    def _expected_s(self, awaited: list[Flight], counters: bool) -> float:
        if not counters and not any(flight.request.stream for flight in awaited):
            return max(SILENT_ANSWER_S, self.silent_s)
        # The first of them to be prefilled ends the silence, so they do not add up beyond one step of the engine:
        # otherwise a frozen engine would get more time with every request it swallows.
        # All of them count in full: a wrong guess about what is cached must not make a busy engine look frozen.
        prompts = [flight.request.prompt_tokens for flight in awaited]
        tokens = max(*prompts, min(sum(prompts), STEP_TOKENS))
        return max(self.first_byte_s, FIRST_BYTE_PRIOR_S + tokens * self.prefill_s_per_token)


def _is_awaited(flight: Flight, counter_at: float | None) -> bool:
    """Whether the engine owes this request something, as far as we can know.

    After the first byte only token counters that rest tell a frozen engine from one that thinks; while the client does
    not take what is there, nothing does: it must not cost the endpoint its traffic. Where only headers are seen, the
    engine owes for certain as long as it made no token at all since the request came.
    """
    if flight.left or flight.stalled:
        return False
    if flight.first_byte_at is None:
        return True
    return counter_at is not None and (flight.telling or flight.reserved_at > counter_at)


def _smoothed(mean: float, sample: float) -> float:
    return sample if not mean else 0.8 * mean + 0.2 * sample
