"""``python -m sim``: simulated engines without the command line of the product, for tests that kill processes."""

from __future__ import annotations

import argparse
import sys

from sim.cluster import run_specs, specs_for
from sim.profiles import ACCELERATORS


def main() -> int:
    """Parse the arguments, serve until a signal, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sim", description="Simulated inference engines.")
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
    given = parser.parse_args()
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
        )
    except ValueError as error:
        parser.error(str(error))
    return run_specs(specs, host=given.host, drain_s=given.drain)


if __name__ == "__main__":
    sys.exit(main())
