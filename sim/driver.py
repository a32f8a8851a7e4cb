"""Runs the physics on the real clock of an event loop and hands each emission to the one who asked for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from sim.meter import Meter
from sim.physics import Engine
from sim.requests import Emission, Refused, Request

# Steps made in one go before other callbacks get their turn.
MAX_STEPS_PER_WAKE: Final = 64
# Loops have timers of about this grain. Shorter steps are made several at a time, at their own simulated times.
TIMER_GRAIN_S: Final = 1e-3


class EngineDriver:
    """One engine on one event loop. ``freeze`` stops time for the engine, ``thaw`` lets it go on from there."""

    def __init__(self, engine: Engine, *, loop: asyncio.AbstractEventLoop, meter: Meter) -> None:
        self.engine = engine
        self.meter = meter
        self._loop = loop
        self._listeners: dict[str, Callable[[Emission], None]] = {}
        self._timer: asyncio.Handle | None = None
        self._frozen = False
        self._thawed_at = 0.0

    def now(self) -> float:
        """The clock of the engine, seconds."""
        return self._loop.time()

    def submit(self, request: Request, listener: Callable[[Emission], None]) -> Refused | None:
        """Queue a request; ``listener`` gets all its emissions."""
        refused = self.engine.submit(request, self._loop.time())
        if refused is None:
            self._listeners[request.id] = listener
            self._wake()
        return refused

    def abort(self, request_id: str) -> None:
        """Drop a request; its listener hears nothing more. Unknown ids are fine."""
        if self._listeners.pop(request_id, None) is not None:
            self.engine.abort(request_id, self._loop.time())

    def freeze(self) -> None:
        """No progress until ``thaw``."""
        self._frozen = True
        self._cancel()

    def thaw(self) -> None:
        """Go on. The step in progress ends now: the time in between was not worked."""
        if self._frozen:
            self._frozen = False
            self._thawed_at = self._loop.time()
            self._wake()

    def close(self) -> None:
        """Forget everybody and stop."""
        self._listeners.clear()
        self.freeze()

    def _wake(self) -> None:
        # With a timer set the engine is busy, and a newcomer waits for the end of the step anyway.
        if self._timer is None and not self._frozen:
            self._timer = self._loop.call_soon(self._run)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        now = self._loop.time()
        for _ in range(MAX_STEPS_PER_WAKE):
            due = self.engine.next_step_at()
            if due is None:
                return
            if due > now:
                self._timer = self._loop.call_at(max(due, now + TIMER_GRAIN_S), self._run)
                return
            emissions = self.engine.step(max(due, self._thawed_at))
            self.meter.note_loras(self.engine, time.time())
            for emission in emissions:
                self._deliver(emission)
        self._timer = self._loop.call_soon(self._run)

    def _deliver(self, emission: Emission) -> None:
        self.meter.observe(emission)
        if emission.finish_reason is None:
            listener = self._listeners.get(emission.request_id)
        else:
            listener = self._listeners.pop(emission.request_id, None)
        if listener is not None:
            listener(emission)
