"""Whether one endpoint deserves traffic: a pure state machine over what scrapes and requests showed.

Three causes are kept apart. *Unreachable*: probes fail, or a connect did; cured by any sign of life, and a failed
connect also by time. *Ejected*: too many failed requests in a row, or a hung engine; cured by time through one trial
request, or by progress. *Degraded*: the front end lives but its metrics fail, or it just said it is overloaded. It does
not decide who gets traffic: the `health` filter does.
"""

from __future__ import annotations

import msgspec

from picker.core.events import FailureKind
from picker.core.updates import ProbeFailure
from picker.core.values import Standing

# An endpoint that serves some kinds of requests and breaks others never fails many in a row: half of this many is as
# bad.
HISTORY_REQUESTS = 20
_HISTORY = (1 << HISTORY_REQUESTS) - 1


class HealthLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Thresholds of the state machine.

    Two probe failures in a row make an endpoint unreachable: one is an accident, and with 200 ms between probes and
    600 ms for each two take at most 1.6 s. Five failed requests eject, as in most proxies (Envoy's `consecutive_5xx`
    is 5).
    """

    probe_failures: int = 2
    hung_after_s: float = 2.0
    breaker_failures: int = 5
    breaker_open_s: float = 5.0
    breaker_open_max_s: float = 60.0
    overloaded_s: float = 0.5


class EndpointHealth:
    """The health of one endpoint. All methods are synchronous and take `now` in seconds."""

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._refused = 0
        self._timeouts = 0
        self._front_end_failures = 0
        self._unreachable = ""
        self._no_connect_until = 0.0
        self._failures = 0
        self._history = 0
        self._ejected = ""
        self._ejected_until = 0.0
        self._eject_s = limits.breaker_open_s
        self._trial: int | None = None
        self._overloaded_until = 0.0

    def __repr__(self) -> str:
        return f"<EndpointHealth unreachable={self._unreachable!r} ejected={self._ejected!r} failures={self._failures}>"

    @property
    def hung(self) -> bool:
        """Whether the last ejection was for a hung engine and still stands."""
        return self._ejected == "hung"

    @property
    def trial(self) -> int | None:
        """The key of the one request that tests an endpoint after its ejection."""
        return self._trial

    def standing(self, now: float) -> tuple[Standing, str]:
        """The standing and, when it is not READY, the reason in a few words."""
        if self._unreachable:
            return Standing.OUT, self._unreachable
        if now < self._no_connect_until:
            return Standing.OUT, "unreachable: connect failed"
        if self._ejected and (now < self._ejected_until or self._trial is not None):
            return (Standing.OUT if self.hung else Standing.DEGRADED), self._ejected
        if now < self._overloaded_until:
            return Standing.DEGRADED, "overloaded"
        if self._front_end_failures >= self._limits.probe_failures:
            return Standing.DEGRADED, "metrics failing"
        return Standing.READY, ""

    def alive(self) -> None:
        """A sign of life: a probe answered (whatever it said) or response bytes arrived."""
        self._refused = 0
        self._timeouts = 0
        self._unreachable = ""
        self._no_connect_until = 0.0

    def scraped(self) -> None:
        """A scrape brought usable signals."""
        self.alive()
        self.metrics_scraped()

    def scrape_failed(self, kind: ProbeFailure) -> None:
        """A scrape brought nothing usable."""
        if kind is ProbeFailure.REFUSED:
            self._refused += 1
            if self._refused >= self._limits.probe_failures:
                self._unreachable = "unreachable: connection refused"
        elif kind is ProbeFailure.TIMEOUT:
            self._timeouts += 1
            if self._timeouts >= self._limits.probe_failures:
                self._unreachable = "unreachable: no answer to probes"
        else:
            self.alive()
            self.metrics_failed()

    def metrics_scraped(self) -> None:
        """Metrics came, perhaps from another port than the API's: that alone is no sign of life."""
        self._front_end_failures = 0

    def metrics_failed(self) -> None:
        """Metrics did not come, perhaps from another port than the API's: that alone does not make it unreachable."""
        self._front_end_failures += 1

    def dispatched(self, key: int, now: float) -> None:
        """A request was sent here. After an ejection ran out this is the trial, and the only one until it ends."""
        if self._ejected and now >= self._ejected_until and self._trial is None:
            self._trial = key

    def answered(self, key: int) -> None:
        """The headers of an answer came: no failed request, but no proof that the engine behind works."""
        if self.hung:
            self.alive()
        else:
            self.succeeded(key)

    def began(self, key: int) -> None:
        """The first bytes of an answer came. They end a trial, but an engine that breaks its answers off begins them
        too: until one ends well, the next failure ejects again, for longer.
        """
        self.alive()
        if self.hung:
            self._recover()
        elif self._trial == key:
            self._ejected = ""
            self._trial = None
            self._failures = self._limits.breaker_failures - 1

    def succeeded(self, key: int) -> None:
        """A request ended well. Only a trial ends an ejection for failed requests: others were sent before it."""
        self.alive()
        self._failures = 0
        self._history = self._history << 1 & _HISTORY
        if self.hung or not self._ejected or self._trial == key:
            self._recover()

    def ended(self, key: int, now: float) -> None:
        """A request is over without telling anything about the endpoint (its client left). A trial that ends so
        proves nothing: another may run.
        """
        if self._trial == key:
            self._trial = None
            self._ejected_until = now

    def failed(self, key: int, kind: FailureKind, now: float) -> None:
        """A request failed: before its first body byte, or (RESET) in the middle of its answer."""
        if kind is FailureKind.OVERLOADED:
            self.alive()
            self._overloaded_until = now + self._limits.overloaded_s
            self.ended(key, now)
            return
        if kind is FailureKind.CONNECT:
            # Where probes go elsewhere, or nowhere, only time and the next request can tell whether it is back.
            self._no_connect_until = now + self._limits.breaker_open_s
            self.ended(key, now)
            return
        if kind is FailureKind.HUNG:
            self.eject("hung", now)
            return
        self._failures += 1
        self._history = (self._history << 1 | 1) & _HISTORY
        if self._trial == key:
            self._eject(self._ejected, now)
        elif not self._ejected and self._failures >= self._limits.breaker_failures:
            self._eject(f"{self._failures} failed requests in a row", now)
        elif not self._ejected and self._history.bit_count() * 2 >= HISTORY_REQUESTS:
            self._eject(f"half of {HISTORY_REQUESTS} requests failed", now)

    def eject(self, reason: str, now: float) -> None:
        """Takes the endpoint out. Ejecting again while it is out changes nothing, except that hung weighs more than
        failed requests; a failed trial doubles the time.
        """
        stands = self._ejected and self._trial is None and now < self._ejected_until
        if stands and (self.hung or reason != "hung"):
            return
        self._eject(reason, now)

    def progressed(self) -> None:
        """The engine moved its token counters or sent body bytes: it is not hung."""
        if self.hung:
            self._recover()

    def restarted(self) -> None:
        """The engine's counters went backwards: a new process, old sins do not count."""
        self._recover()
        self._failures = 0

    def _eject(self, reason: str, now: float) -> None:
        self._ejected = reason
        self._ejected_until = now + self._eject_s
        self._history = 0
        self._eject_s = min(self._eject_s * 2, self._limits.breaker_open_max_s)
        self._trial = None

    def _recover(self) -> None:
        self._ejected = ""
        self._trial = None
        self._eject_s = self._limits.breaker_open_s
