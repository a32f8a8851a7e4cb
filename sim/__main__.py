"""``python -m sim``: simulated engines without the command line of the product, for tests that kill processes."""

from __future__ import annotations

import argparse
import sys

from sim.cluster import run_specs, specs_for
from sim.kv_encoding import EngineName
from sim.kv_events import KvEvents
from sim.profiles import ACCELERATORS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim", description="Simulated inference engines.")
    parser.add_argument("--engine", choices=("vllm", "sglang"), default=None, help="whose API to imitate [vllm]")
    parser.add_argument("--engines", type=int, default=1, help="number of engines, one port each")
    parser.add_argument("--port", type=int, default=0, help="first port; 0 takes free ones")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", default="sim-8b", help="served name; one that contains 32b is the 32B model")
    parser.add_argument("--accelerator", default="H100", help=f"comma separated: {', '.join(ACCELERATORS)}")
    parser.add_argument("--speed", type=float, default=1.0, help="divides all times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, default=0, help="number of the first engine, sent as x-sim-engine")
    parser.add_argument("--lora", default="", help="comma separated adapter names")
    parser.add_argument("--max-num-queued-reqs", type=int, default=None)
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--drain", type=float, default=0.0, help="seconds running requests may take after a signal")
    parser.add_argument("--data-parallel-size", type=int, default=1, help="ranks per engine, one port each")
    parser.add_argument("--block-size", type=int, default=None, help="tokens per KV block")
    parser.add_argument(
        "--kv-events",
        choices=("vllm", "vllm-array", "sglang", "sglang-array", "off"),
        default="off",
        help="publish KV-cache events, as maps (vLLM 0.32, SGLang 0.5.23) or arrays (vLLM 0.22, SGLang 0.5.10)",
    )
    parser.add_argument("--kv-events-port", type=int, default=0, help="first port of the events; 0 takes free ones")
    parser.add_argument("--kv-replay-port", type=int, default=None, help="first port of replay, which is off without")
    parser.add_argument("--kv-buffer-steps", type=int, default=10_000, help="batches kept for replay")
    parser.add_argument("--kv-replay-frames", type=int, choices=(3, 4), default=None, help="without or with the topic")
    return parser


def _kv_events(given: argparse.Namespace) -> KvEvents | None:
    if given.kv_events == "off":
        return None
    return KvEvents(
        encoding="array" if given.kv_events.endswith("-array") else "map",
        port=given.kv_events_port,
        replay_port=given.kv_replay_port,
        buffer_steps=given.kv_buffer_steps,
        replay_topic=None if given.kv_replay_frames is None else given.kv_replay_frames == 4,
    )


def main() -> int:
    """Parse the arguments, serve until a signal, return the exit code."""
    parser = _parser()
    given = parser.parse_args()
    publishes: EngineName | None = None if given.kv_events == "off" else given.kv_events.removesuffix("-array")
    if given.engine and publishes and given.engine != publishes:
        parser.error(f"--kv-events {given.kv_events} needs --engine {publishes}")
    if given.data_parallel_size < 1 or (given.block_size is not None and given.block_size < 1):
        parser.error("--data-parallel-size and --block-size must be at least 1")
    try:
        specs = specs_for(
            given.engines,
            given.port,
            model=given.model,
            accelerator=given.accelerator.split(","),
            speed=given.speed,
            seed=given.seed,
            lora=tuple(name for name in given.lora.split(",") if name),
            first_index=given.index,
            max_num_queued_reqs=given.max_num_queued_reqs,
            api_key=given.api_key,
            engine=given.engine or publishes or "vllm",
            kv_events=_kv_events(given),
            data_parallel_size=given.data_parallel_size,
            block_size=given.block_size,
        )
    except ValueError as error:
        parser.error(str(error))
    return run_specs(specs, host=given.host, drain_s=given.drain)


if __name__ == "__main__":
    sys.exit(main())
