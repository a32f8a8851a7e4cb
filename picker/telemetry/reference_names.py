"""The names, labels and buckets of the reference endpoint pickers' metrics, as far as they are offered here.

Facts of the Gateway API Inference Extension (`inference_*`) and of the llm-d router (`llm_d_epp_*`), which shows each
figure under both names. Dashboards and autoscalers know them, odd ones such as the bucket 32778 included.
"""

from __future__ import annotations

import enum

import msgspec

EPP = "llm_d_epp_"
OBJECTIVE = "inference_objective_"
POOL = "inference_pool_"
EXTENSION = "inference_extension_"

MODEL = ("model_name", "target_model_name")
FLOW = (*MODEL, "fairness_id", "priority")

_DURATION_S = (
    *(0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0),
    *(15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0),
    *(900.0, 1200.0, 1800.0, 2700.0, 3600.0),
)
_TTFT_S = tuple(bound for bound in _DURATION_S if bound <= 120)
_NTPOT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_TPOT_S = (
    *(0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 2.0),
)
_OUTPUT_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
_INPUT_TOKENS = (*_OUTPUT_TOKENS, 16384.0, 32778.0, 65536.0, 131072.0, 262144.0, 524288.0, 1048576.0)
SCHEDULER_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class Measure(enum.Enum):
    """What is measured once per request."""

    DURATION = enum.auto()
    INPUT_TOKENS = enum.auto()
    OUTPUT_TOKENS = enum.auto()
    CACHED_TOKENS = enum.auto()
    NTPOT = enum.auto()
    TPOT = enum.auto()
    TTFT_STREAM = enum.auto()
    TTFT_WHOLE = enum.auto()


class HistogramNames(msgspec.Struct, frozen=True):
    """A histogram by request: its name after `llm_d_epp_`, its older whole name (empty if it has none), its buckets,
    and what is measured with the value of its label `streaming`, if it has that.
    """

    name: str
    older: str
    text: str
    bounds: tuple[float, ...]
    measures: tuple[tuple[Measure, tuple[str, ...]], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels under the newer name; the older one has MODEL."""
        return (*FLOW, "streaming") if self.measures[0][1] else FLOW


HISTOGRAMS = (
    HistogramNames(
        "request_duration_seconds",
        f"{OBJECTIVE}request_duration_seconds",
        "From receiving a request to its end.",
        _DURATION_S,
        ((Measure.DURATION, ()),),
    ),
    HistogramNames(
        "request_input_tokens",
        f"{OBJECTIVE}input_tokens",
        "Prompt tokens engines reported.",
        _INPUT_TOKENS,
        ((Measure.INPUT_TOKENS, ()),),
    ),
    HistogramNames(
        "request_output_tokens",
        f"{OBJECTIVE}output_tokens",
        "Output tokens engines reported.",
        _OUTPUT_TOKENS,
        ((Measure.OUTPUT_TOKENS, ()),),
    ),
    HistogramNames(
        "request_cached_tokens",
        f"{OBJECTIVE}prompt_cached_tokens",
        "Prompt tokens engines found in their caches.",
        _INPUT_TOKENS,
        ((Measure.CACHED_TOKENS, ()),),
    ),
    HistogramNames(
        "request_ntpot_seconds",
        f"{OBJECTIVE}normalized_time_per_output_token_seconds",
        "Duration by output tokens.",
        _NTPOT_S,
        ((Measure.NTPOT, ()),),
    ),
    HistogramNames(
        "request_streaming_tpot_seconds",
        "",
        "Time per output token after the first one, of streams.",
        _TPOT_S,
        ((Measure.TPOT, ()),),
    ),
    HistogramNames(
        "request_ttft_seconds",
        "",
        "From receiving a request to the first body byte of its answer.",
        _TTFT_S,
        ((Measure.TTFT_STREAM, ("true",)), (Measure.TTFT_WHOLE, ("false",))),
    ),
)
BOUNDS = {measure: names.bounds for names in HISTOGRAMS for measure, _ in names.measures}
