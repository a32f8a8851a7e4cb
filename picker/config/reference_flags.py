"""The command line flags of the reference endpoint picker, as existing manifests spell them.

Only rewrites lists of arguments; what to say about flags without effect is the command line's matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SWITCHES = ("--secure-serving", "--enable-cert-reload", "--zap-devel")
_IGNORED = (
    "--zap-encoder",
    "--zap-log-level",
    "--zap-devel",
    "--zap-stacktrace-level",
    "--zap-time-encoding",
    "-v",
    "--v",
)
POOL = ("--pool-name", "--pool-namespace")


def spell_out_switches(args: Sequence[str]) -> list[str]:
    """`--secure-serving` and `--secure-serving false` as `--secure-serving=true` and `--secure-serving=false`."""
    spelled: list[str] = []
    for arg in args:
        if spelled and spelled[-1] in _SWITCHES and arg in ("true", "false"):
            spelled[-1] += f"={arg}"
        else:
            spelled.append(arg)
    return [f"{arg}=true" if arg in _SWITCHES else arg for arg in spelled]


def set_aside(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without the flags that mean nothing here or are not supported, and the names of those flags."""
    kept: list[str] = []
    aside: list[str] = []
    value_follows = False
    for arg in args:
        name, equals, _ = arg.partition("=")
        if re.fullmatch(r"-v\d+", name):
            name, equals = "-v", "="
        if value_follows:
            value_follows = False
        elif name in (*_IGNORED, *POOL):
            aside.append(name)
            value_follows = not equals
        else:
            kept.append(arg)
    return kept, list(dict.fromkeys(aside))
