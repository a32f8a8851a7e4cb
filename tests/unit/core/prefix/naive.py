"""The index as one would write it without a thought of cost: sets and loops, to compare the real one with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from picker.core.prefix.deltas import Op, Record, Tier
from picker.core.prefix.index import REPORTED_S, SENT_S
from picker.core.prefix.prompt import Match, PromptKeys


class Engine:
    """What one publisher told, and what was sent there."""

    def __init__(self, endpoint_id: str) -> None:
        self.endpoint_id = endpoint_id
        self.online = False
        self.told = False
        self.held: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        self.sent: dict[int, float] = {}
        self.reported: dict[int, float] = {}

    def clear(self) -> None:
        self.held = {tier: set() for tier in Tier}
        self.sent = {}
        self.reported = {}

    def anywhere(self, key: int) -> bool:
        return any(key in held for held in self.held.values())


class NaiveIndex:
    """The exact half of the index."""

    def __init__(self) -> None:
        self.engines: dict[int, Engine] = {}
        self.now = 0.0

    def bound(self, number: int, endpoint_id: str) -> None:
        if number not in self.engines:
            self.unbind(endpoint_id)
            self.engines[number] = Engine(endpoint_id)

    def unbind(self, endpoint_id: str) -> None:
        self.engines = {number: each for number, each in self.engines.items() if each.endpoint_id != endpoint_id}

    def take_in(self, record: Record) -> None:
        engine = self.engines.get(record.publisher)
        if engine is None:
            return
        match record.op:
            case Op.ADD:
                engine.told = True
                engine.held[record.tier].update(record.keys)
            case Op.REMOVE:
                engine.held[record.tier].difference_update(record.keys)
            case Op.CLEAR:
                engine.clear()
            case Op.ONLINE:
                engine.online = True
            case Op.OFFLINE:
                engine.online = False

    def _of(self, endpoint_id: str) -> Iterator[Engine]:
        return (engine for engine in self.engines.values() if engine.endpoint_id == endpoint_id)

    def routed(self, endpoint_id: str, keys: PromptKeys, now: float) -> None:
        for engine in self._of(endpoint_id):
            for chain in keys.exact.values():
                engine.sent.update(dict.fromkeys(chain, now))

    def observed(self, endpoint_id: str, keys: PromptKeys, cached_tokens: int | None, now: float) -> None:
        for engine in self._of(endpoint_id):
            for size, chain in keys.exact.items():
                had = chain[: (cached_tokens or 0) // size]
                if had and not engine.anywhere(had[-1]):
                    engine.reported.update(dict.fromkeys(had, now))

    def lookup(self, keys: PromptKeys) -> dict[str, Match]:
        found = {}
        for engine in self.engines.values():
            best = Match(0)
            for size, chain in keys.exact.items():
                usable = chain[: max(0, keys.tokens - 1) // size]
                held = _run([engine.anywhere(key) for key in usable])
                slow = sum(key not in engine.held[Tier.GPU] for key in usable[:held])
                sent = _run([engine.sent.get(key, -1e9) > self.now - SENT_S for key in usable])
                reported = _run([engine.reported.get(key, -1e9) > self.now - REPORTED_S for key in usable])
                for match in (Match(held * size, slow * size, engine.online), Match(max(sent, reported) * size)):
                    best = match if match.tokens > best.tokens else best
            if best.tokens:
                found[engine.endpoint_id] = best
        return found


def _run(there: Sequence[bool]) -> int:
    return there.index(False) if False in there else len(there)
