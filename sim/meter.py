"""What metrics pages need beyond the engine's own counters: histograms of times and sizes, adapters in use."""

from __future__ import annotations

from typing import Final

import msgspec

from sim.exposition import Histogram
from sim.physics import Engine
from sim.requests import Emission

MAX_LORA_SERIES: Final = 64

_FIRST_TOKEN_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))[:16]


class Meter:
    """What the page needs beyond the engine's own counters: histograms, adapters seen, the start time (unix, s)."""

    def __init__(self, *, started_at_s: float, max_loras: int | None = None) -> None:
        self.started_at_s = started_at_s
        self.max_loras = max_loras
        self.first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token = Histogram(_PER_TOKEN_S)
        self.per_output_token = Histogram(_PER_TOKEN_S)
        self.total = Histogram(_REQUEST_S)
        self.queue = Histogram(_REQUEST_S)
        self.inference = Histogram(_REQUEST_S)
        self.prefill = Histogram(_REQUEST_S)
        self.decode = Histogram(_REQUEST_S)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        # Old label combinations stay on the page, as in the real engine: the newest timestamp is the true one.
        self.lora_series: dict[tuple[str, str], float] = {}

    def observe(self, emission: Emission) -> None:
        """Add what one emission tells."""
        if emission.first:
            self.first_token.observe(emission.since_last_s)
        elif emission.count:
            self.inter_token.observe(emission.since_last_s / emission.count, times=emission.count)
        summary = emission.summary
        if summary is None:
            return
        self.total.observe(summary.total_s)
        self.queue.observe(summary.queue_s)
        self.inference.observe(summary.total_s - summary.queue_s)
        self.prefill.observe(summary.first_token_s - summary.queue_s)
        self.decode.observe(summary.total_s - summary.first_token_s)
        self.prompt_tokens.observe(summary.prompt_tokens)
        self.generation_tokens.observe(summary.generated_tokens)
        if summary.generated_tokens > 1:
            gap = (summary.total_s - summary.first_token_s) / (summary.generated_tokens - 1)
            self.per_output_token.observe(gap)

    def note_loras(self, engine: Engine, unix_s: float) -> None:
        """Remember which adapters run and wait now."""
        if self.max_loras is None:
            return
        series = (",".join(engine.running_loras), ",".join(engine.waiting_loras))
        self.lora_series[series] = unix_s
        while len(self.lora_series) > MAX_LORA_SERIES:
            del self.lora_series[min(self.lora_series, key=self.lora_series.__getitem__)]


class Gauges(msgspec.Struct, frozen=True):
    """What the front end believes about the engine. All zero when the engine has stopped reporting."""

    running: int = 0
    capacity_waiting: int = 0
    deferred_waiting: int = 0
    kv_usage: float = 0.0

    @classmethod
    def of(cls, engine: Engine) -> Gauges:
        """The true values."""
        return cls(engine.running, engine.waiting - engine.deferred, engine.deferred, engine.kv_usage)
