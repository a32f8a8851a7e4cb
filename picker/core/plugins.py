"""The extension points of the scheduler, smallest useful form.

A plugin is pure: it may look at the request and the rows it is given, nothing else. It must not keep a clock, do I/O
or change its arguments. Filters, scorers and pickers are looked up by `name` in explicit tables (`filters.BUILTIN`,
`scorers.BUILTIN`, `pickers.BUILTIN`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import msgspec

from picker.core.values import EndpointState, InferenceRequest, RejectionCode

# Where a falling score is one half. `policies` checks it: 0 or infinity would make scores that are no numbers.
Scale = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Rng(Protocol):
    """Randomness handed in by the caller, so that a seed reproduces every decision."""

    def random(self) -> float:
        """A float in [0, 1)."""


class Filter(Protocol):
    """Removes endpoints that must not serve the request."""

    @property
    def name(self) -> str: ...

    @property
    def refusal(self) -> RejectionCode:
        """What it means for the client when this filter leaves nobody."""

    def reject(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[str | None]:
        """One entry per row: None keeps it, a short reason removes it. May be called with no rows."""


class Scorer(Protocol):
    """Says how good each endpoint is for the request."""

    @property
    def name(self) -> str: ...

    def score(self, request: InferenceRequest, states: Sequence[EndpointState]) -> Sequence[float | None]:
        """One entry per row in [0, 1], higher is better. None means no data, which is not a bad score: it counts as
        the mean of the others.
        """


class Picker(Protocol):
    """Turns totals into an order of preference."""

    @property
    def name(self) -> str: ...

    def rank(self, states: Sequence[EndpointState], totals: Sequence[float], rng: Rng) -> Sequence[int]:
        """Indices into `states`, best first, each at most once, at least one. `totals` are finite; never called with
        no rows.
        """
