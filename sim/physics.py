"""The physics of one inference engine: continuous batching, chunked prefill, KV blocks, prefix cache, preemption.

Pure and synchronous: the clock is an argument and nothing here waits, so the same class runs behind a socket (real
clock) and in replay (simulated clock). It knows nothing of HTTP, text or metrics pages.

How to drive it::

    engine = Engine(profile, seed=1)
    engine.submit(request, now)
    while (due := engine.next_step_at()) is not None:
        for emission in engine.step(due): ...

``next_step_at`` is when ``step`` wants to be called: at once when work waits on an idle engine, else at the end of the
step in progress. ``step(now)`` ends that step (its emissions are returned) and begins the next one. A ``now`` later
than ``next_step_at`` is a stall: everything happens at ``now``. For a trace, submit all requests whose arrival is not
after ``next_step_at``, then step.

A step (the vLLM scheduler's order): first the running sequences, oldest first, each one decode token or its next
prefill chunk, within a budget of ``max_num_batched_tokens``; when no KV block is left the youngest running sequence
goes back to the head of the queue and loses its blocks; then, if nobody was preempted, waiting requests first come
first served while the budget, ``max_num_seqs``, ``max_loras`` and the KV blocks last. Step time: see ``Profile``.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection

from sim.prefix import BlockPool, CacheChange
from sim.profiles import Profile
from sim.requests import Emission, FinishReason, Refused, Request, Summary
from sim.sequence import Sequence


class Engine:
    """One simulated engine. Not thread safe; every method takes the current time in seconds, which never goes back.

    Readable state: the gauges ``running``, ``waiting``, ``deferred``, ``kv_usage``, ``running_loras``,
    ``waiting_loras`` and the counters below. ``slowdown`` may be changed at any time and acts from the next step on.

    ``seed`` decides the answers, ``noise_seed`` the jitter of step times: replicas share the first, not the second.
    ``on_cache_changes`` is told at the end of every step what that step did to the prefix cache, before the emissions
    are returned; it needs prompts given as token ids. ``block_copies``: see ``BlockPool``.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        seed: int = 0,
        noise_seed: int = 0,
        max_num_queued_reqs: int | None = None,
        max_loras: int = 8,
        block_copies: bool = True,
        on_cache_changes: Callable[[list[CacheChange]], None] | None = None,
    ) -> None:
        self.profile = profile
        self.seed = seed
        self.max_num_queued_reqs = max_num_queued_reqs
        self.max_loras = max_loras
        self.slowdown = 1.0
        self.pool = BlockPool(profile.kv_blocks, copies=block_copies, record=on_cache_changes is not None)
        self._on_cache_changes = on_cache_changes
        #: Counters, in tokens or requests, since the engine was made.
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.prefix_queries_total = 0
        self.prefix_hits_total = 0
        self.preemptions_total = 0
        self.rejected_total = 0
        self.aborted_total = 0
        self.steps_total = 0
        self.finished_total: dict[FinishReason, int] = {"stop": 0, "length": 0}
        self._rng = random.Random(noise_seed)
        self._live: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._plan: list[Sequence] = []
        self._ends_at: float | None = None
        self._wake_at = 0.0
        self._deferred = 0

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def deferred(self) -> int:
        """Those of ``waiting`` that were passed over because too many adapters are in use."""
        return min(self._deferred, len(self._waiting))

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1. Cached blocks that nobody uses do not count."""
        return self.pool.usage

    @property
    def running_loras(self) -> list[str]:
        """Adapters of the running requests, sorted."""
        return sorted({seq.request.lora for seq in self._running if seq.request.lora})

    @property
    def waiting_loras(self) -> list[str]:
        """Adapters of the waiting requests, sorted."""
        return sorted({seq.request.lora for seq in self._waiting if seq.request.lora})

    def submit(self, request: Request, now: float) -> Refused | None:
        """Queue a request, or say why not. ``max_num_queued_reqs`` limits running and waiting together, as vLLM's.

        Raises ValueError for a prompt of block hashes when cache changes are told: they could not name the tokens.
        """
        if request.token_ids is None and self.pool.record:
            raise ValueError("an engine that tells its cache changes needs token ids")
        if request.id in self._live:
            return Refused("duplicate", f"request id {request.id} is in use")
        limit = self.max_num_queued_reqs
        if limit is not None and len(self._live) >= limit:
            self.rejected_total += 1
            return Refused("overloaded", "The engine is currently busy and cannot accept new requests.")
        room = min(self.profile.max_model_len, self.profile.kv_tokens)
        if request.prompt_length + request.max_tokens > room:
            wanted = f"{request.prompt_length} prompt tokens and {request.max_tokens} output tokens"
            return Refused("too_long", f"The maximum context length is {room} tokens, but {wanted} were requested.")
        if self._ends_at is None and not self._waiting:
            self._wake_at = now
        seq = Sequence(request, profile=self.profile, seed=self.seed)
        self._live[request.id] = seq
        self._waiting.append(seq)
        return None

    def abort(self, request_id: str, now: float) -> bool:
        """Drop a request and free its blocks at once. False when it is unknown or has finished.

        The step in progress takes as long as planned: a batch on its way is not cut short, so ``now`` plays no part.
        """
        seq = self._live.pop(request_id, None)
        if seq is None:
            return False
        self.aborted_total += 1
        seq.live = False
        if seq in self._running:
            self._running.remove(seq)
            self._free(seq)
        else:
            self._waiting.remove(seq)
        return True

    def next_step_at(self) -> float | None:
        """When ``step`` is due, in seconds of the caller's clock; None while there is nothing to do."""
        if self._ends_at is not None:
            return self._ends_at
        return self._wake_at if self._waiting else None

    def step(self, now: float) -> list[Emission]:
        """End the step in progress, return what it produced, begin the next one. ``now`` is not before it is due."""
        emissions = self._finish_step(now)
        self._tell_changes()
        self._plan = self._schedule(now)
        if self._plan:
            self.steps_total += 1
            self._ends_at = now + self._step_time_s()
        else:
            self._ends_at = None
            self._wake_at = now
        return emissions

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content and tell it at once. False, and nothing happens, while any block is held."""
        if self.pool.in_use:
            return False
        self.pool.clear()
        self._tell_changes()
        return True

    def _tell_changes(self) -> None:
        if self.pool.changes and self._on_cache_changes is not None:
            changes, self.pool.changes = self.pool.changes, []
            self._on_cache_changes(changes)

    def _schedule(self, now: float) -> list[Sequence]:
        budget = self.profile.max_num_batched_tokens
        plan: list[Sequence] = []
        preempted = False
        index = 0
        while index < len(self._running) and budget > 0:
            seq = self._running[index]
            if self._reserve(seq, budget):
                plan.append(seq)
                budget -= seq.planned
                index += 1
                continue
            preempted = True
            self._preempt(self._running.pop())
        if not preempted:
            self._admit(plan, budget, now)
        return plan

    def _admit(self, plan: list[Sequence], budget: int, now: float) -> None:
        self._deferred = 0
        if not self._waiting:
            return
        deferred: list[Sequence] = []
        loras = {seq.request.lora for seq in self._running if seq.request.lora}
        while self._waiting and budget > 0 and len(self._running) < self.profile.max_num_seqs:
            seq = self._waiting[0]
            lora = seq.request.lora
            if lora and lora not in loras and len(loras) >= self.max_loras:
                deferred.append(self._waiting.popleft())
                continue
            # A prompt that is cached to its end still computes its last token, so at least one block is never a hit.
            hits = self.pool.match(seq.keys, limit=(seq.known - 1) // self.profile.block_size)
            if not self._reserve(seq, budget, hits=hits):
                break
            self._waiting.popleft()
            self._running.append(seq)
            plan.append(seq)
            budget -= seq.planned
            if lora:
                loras.add(lora)
            if not seq.admitted:
                seq.admitted = True
                seq.admitted_at = now
                seq.cached = len(hits) * self.profile.block_size
                self.prefix_queries_total += seq.prompt_tokens
                self.prefix_hits_total += seq.cached
        self._deferred = len(deferred)
        self._waiting.extendleft(reversed(deferred))

    def _reserve(self, seq: Sequence, budget: int, *, hits: Collection[int] = ()) -> bool:
        """Plan the next chunk of ``seq`` and hold the blocks for it, or change nothing and return False.

        ``hits``: cached blocks that a sequence without any block begins with.
        """
        size = self.profile.block_size
        computed = seq.computed + len(hits) * size
        planned = min(seq.known - computed, budget)
        burst = 0
        if planned == seq.known - computed:
            burst = min(self.profile.tokens_per_step, seq.limit - seq.generated)
        blocks = -(-(computed + planned + max(0, burst - 1)) // size)
        fresh = max(0, blocks - len(seq.blocks) - len(hits))
        if fresh or hits:
            taken = self.pool.take(hits, fresh=fresh)
            if taken is None:
                return False
            seq.blocks += hits
            seq.blocks += taken
            seq.published += len(hits)
        seq.computed = computed
        seq.planned = planned
        seq.burst = burst
        # Published when scheduled, not when computed: requests that start in the same step share the work, as in vLLM.
        self._publish(seq, computed + planned)
        return True

    def _publish(self, seq: Sequence, tokens: int) -> None:
        size = self.profile.block_size
        full = min(tokens // size, len(seq.keys))
        start = seq.published
        for index in range(start, full):
            block = self.pool.publish(seq.blocks[index], seq.keys[index])
            if block != seq.blocks[index]:
                seq.blocks[index] = block
                self._record(seq, start, index)
                start = index + 1
        seq.published = max(seq.published, full)
        self._record(seq, start, full)

    def _record(self, seq: Sequence, start: int, stop: int) -> None:
        if self.pool.record and start < stop:
            self.pool.changes.append(seq.stored(start, stop, self.profile.block_size))

    def _free(self, seq: Sequence) -> None:
        # The end of a prompt goes first: its beginning is what other prompts share.
        self.pool.release(reversed(seq.blocks))
        seq.blocks = []
        seq.published = 0

    def _preempt(self, seq: Sequence) -> None:
        self._free(seq)
        seq.computed = seq.planned = seq.burst = 0
        seq.preemptions += 1
        self.preemptions_total += 1
        self._waiting.appendleft(seq)

    def _step_time_s(self) -> float:
        prefill = decoding = resident = 0
        context = 0.0
        for seq in self._plan:
            if seq.decoding:
                decoding += 1
                resident += seq.known
            else:
                prefill += seq.planned
                context += seq.planned * (seq.computed + seq.planned / 2)
        profile = self.profile
        seconds = (
            profile.step_s
            + profile.prefill_token_s * prefill
            + profile.context_token_s * context
            + profile.sequence_s * decoding
            + profile.resident_token_s * resident
        )
        if profile.jitter:
            seconds *= 1 + profile.jitter * self._rng.uniform(-1.0, 1.0)
        return seconds * self.slowdown

    def _finish_step(self, now: float) -> list[Emission]:
        emissions: list[Emission] = []
        ended = False
        size = self.profile.block_size
        for seq in self._plan:
            if not seq.live:
                continue
            complete = seq.computed + seq.planned == seq.known
            seq.computed += seq.planned
            if not complete:
                continue
            if not seq.started:
                self.prompt_tokens_total += seq.prompt_tokens
            if seq.burst:
                seq.computed += seq.burst - 1
                seq.generate(seq.burst, size)
                self.generation_tokens_total += seq.burst
            done = seq.generated >= seq.limit
            if seq.request.every_token or done or not seq.started:
                emissions.append(self._emit(seq, now, done=done))
            if done:
                ended = True
                self._end(seq)
        if ended:
            self._running = [seq for seq in self._running if seq.live]
        self._plan = []
        return emissions

    def _end(self, seq: Sequence) -> None:
        self._publish(seq, seq.computed)
        self._free(seq)
        seq.live = False
        del self._live[seq.request.id]
        self.finished_total[seq.finish_reason] += 1

    def _emit(self, seq: Sequence, now: float, *, done: bool) -> Emission:
        request = seq.request
        first = not seq.started
        if first:
            seq.started = True
            seq.first_at = now
        summary = None
        if done:
            summary = Summary(
                prompt_tokens=seq.prompt_tokens,
                cached_tokens=seq.cached,
                generated_tokens=seq.generated,
                queue_s=seq.admitted_at - request.arrived_at_s,
                first_token_s=seq.first_at - request.arrived_at_s,
                total_s=now - request.arrived_at_s,
                preemptions=seq.preemptions,
            )
        emission = Emission(
            request_id=request.id,
            at_s=now,
            since_last_s=now - seq.last_at,
            count=seq.generated - seq.emitted,
            token_ids=seq.tokens[len(seq.tokens) - (seq.generated - seq.emitted) :],
            first=first,
            finish_reason=seq.finish_reason if done else None,
            summary=summary,
        )
        seq.emitted = seq.generated
        seq.last_at = now
        return emission
