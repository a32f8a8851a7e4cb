"""The prefix index: which endpoint holds how much of a prompt. The one thing the director asks.

Endpoints whose engines publish KV events are known exactly: `apply` takes in what they tell. Of the others, and of
those while their events are not heard, it is learnt from what was routed there and from what responses say. All work
that grows with the size of a cache is done in slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import msgspec

from picker.core.prefix.blocks import FIRST_SLOT, Blocks
from picker.core.prefix.deltas import Op, Record, unpack
from picker.core.prefix.learned import Belief, Learned
from picker.core.prefix.prompt import Match, PromptKeys
from picker.core.prefix.slots import Publisher, Slots

# About 0.35 GB: the distinct blocks of 64 million tokens at 16 a block, more than 100 accelerators of 80 GB hold.
MAX_KEYS = 4_000_000
# About 0.13 GB: the chunks of 128 endpoints of half a million tokens at 64 a chunk.
MAX_CHUNKS = 1_000_000
# One slice of work, about 1 ms: keys added or removed, keys a sweep looks at, chunks forgotten.
APPLY_KEYS = 1024
SWEEP_KEYS = 4096
FORGET_KEYS = 256
# What was just routed somewhere is there by then and its event has come, or it is still waiting in a queue.
SENT_S = 2.0
# What a response said to have been there is believed for so long: an engine evicts the least recently used, and tells.
REPORTED_S = 60.0
# Prefixes of either kind remembered per publisher: more than an engine computes in two seconds.
RECENT_MAX = 16_384
# What a key with its mask costs, and one that is remembered by its last use; measured by bench/prefix_index.py.
KEY_BYTES = 87
RECENT_BYTES = 125


class PrefixStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the index. Counters only grow: `lookups`, `hits` (somebody held something), `evicted` and `refused`
    (keys), `stale` (keys of publishers that are gone).
    """

    publishers: int
    online: int
    keys: int
    bits: int
    retired_slots: int
    chunks: int
    bytes_estimate: int
    lookups: int
    hits: int
    evicted: int
    refused: int
    stale: int


class PrefixIndex:
    """Exact, just sent and learned prefixes behind one face. Not for use from several threads."""

    def __init__(self, *, max_keys: int = MAX_KEYS, max_chunks: int = MAX_CHUNKS, sent_s: float = SENT_S) -> None:
        self._blocks = Blocks(max_keys)
        self._slots = Slots(FIRST_SLOT)
        self._learned = Learned(max_chunks)
        self._sent_s = sent_s
        self._publishers: dict[int, Publisher] = {}
        self._by_endpoint: dict[str, Publisher] = {}
        self._numbers = count(1)
        self._now = 0.0
        self._lookups = 0
        self._hits = 0
        self._stale = 0

    def __repr__(self) -> str:
        return f"<PrefixIndex [{len(self._publishers)} publishers | {self._blocks.keys} keys]>"

    # -- endpoints ---------------------------------------------------------------------------------

    def bind(self, endpoint_id: str, instance: str = "") -> int:
        """The publisher id of an engine whose events will be heard; it is never given to another one. Another
        `instance` is another process: what was known of the one before is void.
        """
        publisher = self._by_endpoint.get(endpoint_id)
        if publisher is not None and publisher.instance == instance:
            return publisher.id
        if publisher is not None:
            self.restarted(endpoint_id)
            self.unbind(endpoint_id)
        publisher = Publisher(next(self._numbers), endpoint_id, instance)
        self._publishers[publisher.id] = self._by_endpoint[endpoint_id] = publisher
        return publisher.id

    def sized(self, endpoint_id: str, block_tokens: tuple[int, ...]) -> None:
        """Its engine was heard to have blocks of these sizes, in tokens."""
        publisher = self._by_endpoint.get(endpoint_id)
        if publisher is not None and block_tokens:
            publisher.block_tokens = block_tokens

    def unbind(self, endpoint_id: str) -> None:
        """Its events will not be heard any more: what they told is void, and what is learnt counts again."""
        publisher = self._by_endpoint.pop(endpoint_id, None)
        if publisher is not None:
            del self._publishers[publisher.id]
            self._slots.retire(publisher)

    def declare(self, endpoint_id: str, tokens: int) -> None:
        """The engine says how many tokens its cache has room for (blocks times their size)."""
        self._learned.declare(endpoint_id, tokens)

    def restarted(self, endpoint_id: str) -> None:
        """The endpoint is another process now: its cache is empty. While its events are heard they say so themselves,
        and what they told may already be the new process's.
        """
        self._learned.restarted(endpoint_id)
        publisher = self._by_endpoint.get(endpoint_id)
        if publisher is not None and not publisher.online:
            self._clear(publisher)

    def clear(self) -> None:
        """Keys are made another way from now on: everything known is void, for exact publishers and learnt alike."""
        for endpoint_id in [*self._by_endpoint]:
            self.unbind(endpoint_id)
        self._learned.clear()

    def forget(self, endpoint_id: str) -> None:
        """The endpoint is gone."""
        self.unbind(endpoint_id)
        self._learned.forget(endpoint_id)

    def belief(self, endpoint_id: str) -> Belief | None:
        """What was learnt of an endpoint: its capacity, and how many tokens a chunk of text has there."""
        return self._learned.belief(endpoint_id)

    # -- events ------------------------------------------------------------------------------------

    def apply(self, delta: bytes | Iterator[Record], budget: int = APPLY_KEYS) -> Iterator[Record] | None:
        """Takes in a message, or the rest of one, up to about `budget` keys. Returns the rest to go on with after
        others had their turn, None when there is none. The rest of one message goes before the next message.

        Raises BadDelta where the message is none; what comes before has been taken in, and nothing after it will be.
        """
        records = delta if isinstance(delta, Iterator) else unpack(delta)
        for record in records:
            self._take_in(record)
            budget -= max(1, len(record.keys))
            if budget <= 0:
                return records
        return None

    def _take_in(self, record: Record) -> None:
        publisher = self._publishers.get(record.publisher)
        if publisher is None:
            self._stale += len(record.keys)
            return
        match record.op:
            case Op.ADD:
                publisher.told = True
                if not publisher.bit:
                    self._slots.give(publisher)
                if publisher.bit:
                    self._blocks.add(record.tier, publisher.bit, record.keys)
                else:
                    self._blocks.refused += len(record.keys)
            case Op.REMOVE:
                self._blocks.remove(record.tier, publisher.bit, record.keys)
            case Op.CLEAR:
                self._clear(publisher)
            case Op.ONLINE:
                publisher.online = True
            case Op.OFFLINE:
                publisher.online = False

    def _clear(self, publisher: Publisher) -> None:
        publisher.sent.clear()
        publisher.reported.clear()
        # It gets another slot when it tells of a block: clearing again and again must not use up the slots.
        self._slots.retire(publisher)

    # -- requests ----------------------------------------------------------------------------------

    def lookup(self, keys: PromptKeys) -> dict[str, Match]:
        """What endpoints hold of a prompt, by endpoint id; those that hold nothing are left out. Whose events are heard
        is known exactly where the prompt's tokens are. What was sent expires as of the last `tick`.

        An engine computes at least the last token of every prompt, and caches whole blocks: of 288 tokens it uses 256
        when a block has 32. So a prompt's last block never counts when it ends the prompt.
        """
        known = [each.endpoint_id for each in self._publishers.values() if each.trusted] if keys.exact else ()
        found = self._learned.lookup(keys, frozenset(known))
        if keys.exact:
            for block_tokens, chain in keys.exact.items():
                usable = chain[: max(0, keys.tokens - 1) // block_tokens]
                self._match_blocks(usable, block_tokens, found)
                self._match_recent(usable, block_tokens, found)
        self._lookups += 1
        self._hits += bool(found)
        return found

    def _match_blocks(self, keys: Sequence[int], block_tokens: int, found: dict[str, Match]) -> None:
        steps, digits = self._blocks.match(keys, self._slots.alive)
        for depth, bits in steps:
            tokens = depth * block_tokens
            usual = Match(tokens, exact=True)
            for publisher in self._slots.owners(bits):
                match = usual
                if digits or not publisher.online:
                    slow = sum([1 << place for place, mask in enumerate(digits) if mask & publisher.bit])
                    match = Match(tokens, slow * block_tokens, publisher.online)
                _keep_longer(found, publisher.endpoint_id, match)

    def _match_recent(self, keys: Sequence[int], block_tokens: int, found: dict[str, Match]) -> None:
        sent_after, reported_after = self._now - self._sent_s, self._now - REPORTED_S
        for publisher in self._publishers.values():
            depth = 0
            if publisher.sent:
                depth = publisher.sent.depth(keys, sent_after)
            if publisher.reported:
                depth = max(depth, publisher.reported.depth(keys, reported_after))
            if depth:
                _keep_longer(found, publisher.endpoint_id, Match(depth * block_tokens))

    def routed(self, endpoint_id: str, keys: PromptKeys, now: float) -> None:
        """A request with this prompt was routed there: the prompt will be there in a moment."""
        self._learned.routed(endpoint_id, keys, now)
        publisher = self._by_endpoint.get(endpoint_id)
        if publisher is not None:
            for block_tokens, chain in keys.exact.items():
                # Prefixes in blocks that it does not have would seem to go further than its own.
                if publisher.has(block_tokens):
                    publisher.sent.touch(chain, now)
            publisher.sent.drop_oldest(len(publisher.sent) - RECENT_MAX)

    def observed(
        self, endpoint_id: str, keys: PromptKeys, prompt_tokens: int, cached_tokens: int | None, now: float
    ) -> None:
        """A response says how long its prompt was, and how much of that the engine had; None when it does not say."""
        self._learned.observed(endpoint_id, keys, prompt_tokens, cached_tokens, now)
        publisher = self._by_endpoint.get(endpoint_id)
        if publisher is None or not cached_tokens:
            return
        for block_tokens, chain in keys.exact.items():
            had = chain[: cached_tokens // block_tokens]
            # Blocks from before we listened: engines tell nothing when they use a block again.
            if had and publisher.has(block_tokens) and not self._blocks.holds(publisher.bit, had[-1]):
                publisher.reported.touch(had, now)
        publisher.reported.drop_oldest(len(publisher.reported) - RECENT_MAX)

    # -- time --------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """To be called about every 100 ms: forgets what expired and sweeps retired slots, one slice of each."""
        self._now = now
        for publisher in self._publishers.values():
            publisher.sent.drop_until(now - self._sent_s, FORGET_KEYS)
            publisher.reported.drop_until(now - REPORTED_S, FORGET_KEYS)
        self._learned.tick(FORGET_KEYS)
        slots = self._slots
        if slots.retired:
            if not slots.swept:
                self._blocks.begin_sweep(slots.begin_sweep())
            if self._blocks.sweep(SWEEP_KEYS):
                slots.end_sweep()

    def statistics(self) -> PrefixStatistics:
        """The figures now."""
        blocks = self._blocks
        chunks = len(self._learned)
        recent = sum(len(each.sent) + len(each.reported) for each in self._publishers.values())
        return PrefixStatistics(
            publishers=len(self._publishers),
            online=sum(publisher.online for publisher in self._publishers.values()),
            keys=blocks.keys,
            bits=blocks.bits,
            retired_slots=self._slots.retired.bit_count(),
            chunks=chunks,
            bytes_estimate=blocks.keys * KEY_BYTES + (chunks + recent) * RECENT_BYTES,
            lookups=self._lookups,
            hits=self._hits,
            evicted=blocks.evicted,
            refused=blocks.refused,
            stale=self._stale,
        )


def _keep_longer(found: dict[str, Match], endpoint_id: str, match: Match) -> None:
    known = found.get(endpoint_id)
    if known is None or known.tokens < match.tokens:
        found[endpoint_id] = match
