"""The fault switches of one engine: what is broken now, and how a ``POST /sim`` body changes it.

Values only; who acts on them is the server. The random draws come from a generator that the caller seeds.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wrong with the engine at the moment; the defaults are a healthy one.

    ``slow`` multiplies every step time. ``hang`` "all": nothing answers but ``/sim``; "engine": the front end answers,
    the engine makes no progress. ``error_rate`` maps status codes to shares of the inference requests.
    ``reset_after_chunks``: TCP RST after so many SSE events of every stream. ``close_before_response``: inference
    requests are read and the connection closed without a byte. ``kv_replay`` "off": requests for missed KV events
    get no answer.
    """

    slow: float = 1.0
    hang: Literal["all", "engine"] | None = None
    error_rate: dict[str, float] = {}
    reset_after_chunks: int | None = None
    stale_metrics: bool = False
    metrics: Literal["on", "off"] = "on"
    close_before_response: bool = False
    kv_replay: Literal["on", "off"] = "on"

    def drawn_error(self, rng: random.Random) -> int | None:
        """The status code with which to fail this request, if any."""
        if not self.error_rate:
            return None
        draw = rng.random()
        for status, share in self.error_rate.items():
            draw -= share
            if draw < 0:
                return int(status)
        return None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One ``POST /sim``: the faults from now on, and what to do once.

    ``drop_kv_batches``: so many next batches of KV events are not sent (subscribers see a gap; replay has them).
    """

    faults: Faults
    restart_after_s: float | None = None
    forget: bool = False
    drop_kv_batches: int = 0


def command_from(body: bytes, current: Faults) -> Command | str:
    """Read a ``POST /sim`` body: fields of ``Faults`` to change, ``reset``, ``restart`` (seconds), ``forget``,
    ``drop_kv_batches``.

    Returns the reason when the body is wrong; then nothing is to be changed.
    """
    try:
        patch = msgspec.json.decode(body or b"{}", type=dict[str, Any])
        reset = msgspec.convert(patch.pop("reset", False), bool)
        forget = msgspec.convert(patch.pop("forget", False), bool)
        dropped = msgspec.convert(patch.pop("drop_kv_batches", 0), int)
        restart = msgspec.convert(patch.pop("restart", None), float | None)
        before = {} if reset else msgspec.to_builtins(current)
        faults = msgspec.convert({**before, **patch}, Faults)
    except msgspec.DecodeError as error:
        return str(error)
    reason = _reason_against(faults)
    if reason is None and restart is not None and not 0 <= restart <= 3600:
        reason = "restart must be 0 to 3600 seconds"
    if reason is None and dropped < 0:
        reason = "drop_kv_batches must not be negative"
    return reason or Command(faults=faults, restart_after_s=restart, forget=forget, drop_kv_batches=dropped)


def _reason_against(faults: Faults) -> str | None:
    if not 0 < faults.slow <= 1e6:
        return "slow must be above 0 and at most 1e6"
    if any(not code.isdecimal() or not 400 <= int(code) <= 599 for code in faults.error_rate):
        return "error_rate needs status codes 400 to 599"
    if any(share < 0 for share in faults.error_rate.values()) or sum(faults.error_rate.values()) > 1:
        return "the shares of error_rate must not be negative and add up to at most 1"
    if faults.reset_after_chunks is not None and faults.reset_after_chunks < 0:
        return "reset_after_chunks must not be negative"
    return None
