"""What an engine has to do right now: its last figures, corrected by what we know ourselves. Pure."""

from __future__ import annotations

from picker.core.values import Signals


def estimate(signals: Signals | None, correction: int, in_flight: int) -> tuple[float | None, float | None]:
    """Waiting and running now: the scrape plus what we dispatched minus what ended since, at least our own in-flight.

    New work joins the queue where there is one, otherwise the batch; ends drain the queue first, since the engine
    refills the batch from it.
    """
    if signals is None or (signals.waiting is None and signals.running is None):
        return None, None
    waiting, running = signals.waiting or 0.0, signals.running or 0.0
    change = max(float(correction), in_flight - waiting - running)
    if change >= 0:
        waiting, running = (waiting + change, running) if waiting > 0 else (waiting, running + change)
    else:
        from_queue = min(waiting, -change)
        waiting, running = waiting - from_queue, max(0.0, running + change + from_queue)
    return None if signals.waiting is None else waiting, None if signals.running is None else running
