"""What the prefix index costs: a lookup with its hashing, taking in events, and memory, by number of keys.

Times are CPU time of this process, the least or the median of many; the slice that took longest is wall time as well,
so other programs are in it. It measures; it judges nothing.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from msgspec import structs

from picker.core.prefix.deltas import Op, Record, Tier, pack
from picker.core.prefix.index import PrefixIndex
from picker.core.prefix.keys import Namespace, byte_root, chain, token_root
from picker.core.prefix.prompt import PromptKeys

PODS = 100
BLOCKS = 512
BLOCK_TOKENS = 16
CHUNK_BYTES = 256
# Background keys are told in messages of this many, as an engine's batch of a few prompts is.
MESSAGE_KEYS = 16_384
SECRET = b"bench"


def prompt(seed: int, blocks: int = BLOCKS) -> bytes:
    """Token ids of one prompt as the hash wants them."""
    rng = random.Random(seed)
    return array("I", [rng.randrange(128_000) for _ in range(blocks * BLOCK_TOKENS + 1)]).tobytes()


def block_keys(tokens: bytes) -> list[int]:
    """Keys of a prompt's blocks."""
    return chain(token_root(SECRET, Namespace(), BLOCK_TOKENS), tokens, BLOCK_TOKENS * 4)


def keys_of(tokens: bytes) -> PromptKeys:
    """Keys of a prompt; its text is made of its ids, four bytes to a token."""
    return PromptKeys(
        exact={BLOCK_TOKENS: block_keys(tokens)},
        learned=chain(byte_root(SECRET, Namespace(), CHUNK_BYTES), tokens, CHUNK_BYTES),
        tokens=len(tokens) // 4,
        chunk_tokens=CHUNK_BYTES / 4,
    )


def bound(index: PrefixIndex) -> list[int]:
    """Publishers of all pods, online."""
    publishers = [index.bind(f"pod-{number}") for number in range(PODS)]
    for publisher in publishers:
        index.apply(pack(Op.ONLINE, publisher))
    return publishers


def tell(index: PrefixIndex, op: Op, publisher: int, keys: Sequence[int]) -> list[tuple[int, int]]:
    """Applies one message in slices. Returns wall and CPU nanoseconds of each."""
    took: list[tuple[int, int]] = []
    rest: bytes | Iterator[Record] | None = pack(op, publisher, Tier.GPU, keys)
    while rest is not None:
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        rest = index.apply(rest)
        took.append((time.perf_counter_ns() - wall, time.process_time_ns() - cpu))
    return took


def fill(index: PrefixIndex, publishers: list[int], count: int, *, seed: int = 3) -> list[tuple[int, int]]:
    """Adds that many random keys, each held by one pod."""
    rng = random.Random(seed)
    took: list[tuple[int, int]] = []
    for start in range(0, count, MESSAGE_KEYS):
        keys = [rng.getrandbits(64) for _ in range(min(MESSAGE_KEYS, count - start))]
        took += tell(index, Op.ADD, publishers[start // MESSAGE_KEYS % PODS], keys)
    return took


def timed(name: str, what: Callable[[], object], rounds: int = 300) -> None:
    """Prints what one call costs, in microseconds of CPU."""
    samples = []
    for _ in range(rounds):
        begin = time.process_time_ns()
        what()
        samples.append(time.process_time_ns() - begin)
    show(name, f"{min(samples) / 1000:.0f} us least, {statistics.median(samples) / 1000:.0f} median")


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def show(name: str, text: str) -> None:
    """One line of the report."""
    print(f"{name:<46}{text}")


def lookups(background: int) -> None:
    """A prompt of 512 blocks over 100 pods, by who holds how much of it."""
    rng = random.Random(4)
    depths = {
        "all hold everything": [BLOCKS] * PODS,
        "one holds everything, the others 64 blocks": [BLOCKS] + [64] * (PODS - 1),
        "any depths": [rng.randrange(BLOCKS + 1) for _ in range(PODS)],
        "nobody holds anything": [0] * PODS,
    }
    tokens = prompt(1)
    known = keys_of(tokens)
    timed("hashing 512 blocks", partial(block_keys, tokens))
    for name, held in depths.items():
        index = PrefixIndex()
        publishers = bound(index)
        fill(index, publishers, background)
        for publisher, depth in zip(publishers, held, strict=True):
            tell(index, Op.ADD, publisher, known.exact[BLOCK_TOKENS][:depth])
        timed(f"lookup: {name}", partial(index.lookup, known))
        timed("  with the hashing of blocks and chunks", partial(hash_and_look, index, tokens))
    for number in range(PODS):
        index.routed(f"pod-{number}", known, 0.0)
    timed("lookup: nobody told, just sent to everybody", partial(index.lookup, known))
    timed("routed", partial(index.routed, "pod-1", known, 0.0))
    timed("lookup: all learned all 128 chunks", partial(index.lookup, structs.replace(known, exact={})))


def hash_and_look(index: PrefixIndex, tokens: bytes) -> None:
    """What one request costs when nothing of it was hashed before."""
    index.lookup(keys_of(tokens))


def ingest() -> None:
    """Growing to 4 million keys, sharing them, removing them, clearing a pod and sweeping it out; then a full index."""
    index = PrefixIndex()
    publishers = bound(index)
    gc.collect()
    before, told = resident_bytes(), 0
    for target in (1_000_000, 2_000_000, 4_000_000):
        report(f"add, up to {target:,} keys", fill(index, publishers, target - told, seed=target), target - told)
        told = target
        show("  resident bytes per key", f"{(resident_bytes() - before) / index.statistics().keys:.0f}")
    rng = random.Random(2_000_000)
    shared = [rng.getrandbits(64) for _ in range(MESSAGE_KEYS)]
    report("add keys another pod holds", tell(index, Op.ADD, publishers[-1], shared), len(shared))
    report("remove them", tell(index, Op.REMOVE, publishers[-1], shared), len(shared))
    tell(index, Op.CLEAR, publishers[0], [])
    sweep: list[tuple[int, int]] = []
    while index.statistics().retired_slots:
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        index.tick(1.0)
        sweep.append((time.perf_counter_ns() - wall, time.process_time_ns() - cpu))
    report("sweep one cleared pod out, keys looked at", sweep, 4_000_000)
    fill(index, publishers, 4_000_000 - index.statistics().keys, seed=9)
    report("add to a full index", fill(index, publishers, 500_000, seed=10), 500_000)
    figures = index.statistics()
    show("  evicted, refused", f"{figures.evicted:,}, {figures.refused:,}")


def report(name: str, took: list[tuple[int, int]], keys: int) -> None:
    """Rate and slices."""
    wall, cpu = [each for each, _ in took], sorted(each for _, each in took)
    show(
        name,
        f"{keys / sum(cpu) * 1000:.2f} M keys/s; slices: median {statistics.median(cpu) / 1e6:.2f} ms, "
        f"p99 {cpu[int(len(cpu) * 0.99)] / 1e6:.2f}, longest {cpu[-1] / 1e6:.2f} of CPU, {max(wall) / 1e6:.2f} of time",
    )


def learning() -> None:
    """Memory of learned chunks."""
    index = PrefixIndex()
    rng = random.Random(5)
    gc.collect()
    before, chunks = resident_bytes(), 200_000
    for start in range(0, chunks, 100):
        keys = PromptKeys(learned=[rng.getrandbits(64) for _ in range(100)], tokens=6400, chunk_tokens=CHUNK_BYTES / 4)
        index.declare(f"pod-{start % 4000}", 10**6)
        index.routed(f"pod-{start % 4000}", keys, float(start))
    show("resident bytes per learned chunk", f"{(resident_bytes() - before) / index.statistics().chunks:.0f}")


def main() -> None:
    """Prints the figures."""
    learning()
    lookups(200_000)
    ingest()


if __name__ == "__main__":
    main()
