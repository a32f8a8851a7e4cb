"""Values as Go programs and Kubernetes write them: booleans, durations and quantities of bytes.

Facts of the notations: the Go documentation of `strconv.ParseBool` and `time.ParseDuration`, the Kubernetes
documentation of resource quantities. None stands for text that is none of them.
"""

from __future__ import annotations

import re
from math import isfinite

_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"\+?(?:{_PART.pattern})+")
_UNIT_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(k|[KMG]i|[MG])?[Bb]?")


def switch(text: str) -> bool | None:
    """`true`, `false` and Go's other words for them."""
    return True if text in _TRUE else False if text in _FALSE else None


def seconds(text: str) -> float | None:
    """`30s`, `1m30s`, `1.5h`, `250us` or `0` in seconds; none that is negative."""
    if text in ("0", "+0"):
        return 0.0
    if not _DURATION.fullmatch(text):
        return None
    total = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(text))
    return total if isfinite(total) else None


def size_bytes(text: str) -> int | None:
    """`10MiB`, `25MB`, `10Mi` or `1048576` in bytes."""
    match = _QUANTITY.fullmatch(text.strip())
    return int(float(match[1]) * _UNIT_BYTES[match[2] or ""]) if match else None
