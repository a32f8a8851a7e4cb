"""What hearing KV-cache events costs: per block in the worker process, and on the request loop.

A full cache is simulated: every batch stores a chunk of a prompt and drops as many old blocks, as vLLM 0.32 words it
(one event per dropped block). A block is counted when it is stored and when it is dropped. It judges nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import zmq

from bench.cpu import cpu_seconds
from picker.core.prefix.index import PrefixIndex
from picker.signals.kv.events import KvEvents, KvHooks
from picker.signals.kv.messages import Spec
from picker.signals.kv.publisher import Publisher

SECRET = b"bench-secret-bench-secret"
BLOCK_TOKENS = 16
CACHE_BLOCKS = 32_768
PROMPT_BLOCKS = 512


def payloads(blocks: int, *, seed: int = 1) -> Iterator[bytes]:
    """Batches of that many stored and, once the cache is full, as many dropped blocks."""
    rng = random.Random(seed)
    cached: deque[int] = deque()
    parent: int | None = None
    depth = 0
    while True:
        hashes = [rng.getrandbits(64) for _ in range(blocks)]
        evicted = [cached.popleft() for _ in range(max(0, len(cached) + blocks - CACHE_BLOCKS))]
        cached.extend(hashes)
        events: list[dict[str, object]] = [
            {"type": "BlockRemoved", "block_hashes": [gone], "medium": "GPU", "group_idx": 0} for gone in evicted
        ]
        events.append(
            {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": parent,
                "token_ids": [rng.randrange(150_000) for _ in range(blocks * BLOCK_TOKENS)],
                "block_size": BLOCK_TOKENS,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )
        depth += blocks
        parent = None if depth >= PROMPT_BLOCKS else hashes[-1]
        depth = 0 if parent is None else depth
        yield msgspec.msgpack.encode([time.time(), events, 0])


def apply_us(blocks: int, *, total_blocks: int) -> float:
    """CPU microseconds per block of decoding, hashing and mapping alone, in this process."""
    source = payloads(blocks)
    publisher = Publisher(SECRET)
    for _ in range(CACHE_BLOCKS // blocks):
        publisher.apply(next(source))
    batches = [next(source) for _ in range(max(1, total_blocks // (2 * blocks)))]
    begin = time.process_time()
    for payload in batches:
        publisher.apply(payload)
        publisher.take()
    return (time.process_time() - begin) * 1e6 / (2 * blocks * len(batches))


async def through_worker(blocks: int, *, total_blocks: int) -> tuple[float, float, float]:
    """CPU microseconds per block of the worker, of the loop that only takes deltas, and of the loop that also keeps
    the index.
    """
    idle, kept = await _through(blocks, total_blocks, None), await _through(blocks, total_blocks, PrefixIndex())
    return idle[0], idle[1], kept[1]


async def _through(blocks: int, total_blocks: int, index: PrefixIndex | None) -> tuple[float, float]:
    source = payloads(blocks)
    warm = [next(source) for _ in range(CACHE_BLOCKS // blocks)]
    batches = [next(source) for _ in range(max(1, total_blocks // (2 * blocks)))]
    number = index.bind("bench") if index else 1

    def on_delta(delta: bytes) -> None:
        rest = index.apply(delta) if index else None
        assert rest is None

    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.sndhwm = 0
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    try:
        async with KvEvents(secret=SECRET, hooks=KvHooks(on_delta=on_delta), clock=time.monotonic) as events:
            events.subscribe(number, Spec(endpoint=f"tcp://127.0.0.1:{port}"))
            await asyncio.to_thread(publisher.recv)
            await _publish(events, publisher, warm, 0)
            # A second's worth of counts, so that the warm-up is not in the figures.
            await asyncio.sleep(1.2)
            worker, loop = cpu_seconds(events.stats().pid), time.thread_time()
            await _publish(events, publisher, batches, len(warm))
            loop = time.thread_time() - loop
            worker = cpu_seconds(events.stats().pid) - worker
    finally:
        context.destroy(0)
    seen = 2 * blocks * len(batches)
    return worker * 1e6 / seen, loop * 1e6 / seen


async def _publish(events: KvEvents, publisher: zmq.Socket[bytes], batches: list[bytes], first: int) -> None:
    def send() -> None:
        for number, payload in enumerate(batches, first):
            publisher.send_multipart([b"", number.to_bytes(8, "big"), payload])

    await asyncio.to_thread(send)
    while events.stats().total.batches < first + len(batches):  # noqa: ASYNC110 - it is another process that counts
        await asyncio.sleep(0.05)


def main() -> None:
    """Prints the table."""
    print(f"{'CPU us per block':<34}" + "".join(f"{f'{n} a batch':>12}" for n in (64, 8, 1)))
    sizes = {64: 300_000, 8: 100_000, 1: 40_000}
    rows: dict[str, list[float]] = {"decode, hash, map": [apply_us(n, total_blocks=t) for n, t in sizes.items()]}
    measured = [asyncio.run(through_worker(n, total_blocks=t)) for n, t in sizes.items()]
    for place, name in enumerate(("worker process, all", "loop, taking deltas", "loop, with the index")):
        rows[name] = [figures[place] for figures in measured]
    for name, values in rows.items():
        print(f"{name:<34}" + "".join(f"{value:>12.2f}" for value in values))


if __name__ == "__main__":
    main()
