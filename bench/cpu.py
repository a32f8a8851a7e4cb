"""CPU seconds of a process and its children, from Linux's /proc.

Nanosecond figures of the scheduler, summed over threads. It reads; it never changes a process.
"""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def process_tree(pid: int) -> list[int]:
    """`pid` and its living descendants. Empty if there is no such process."""
    children: dict[int, list[int]] = {}
    alive = set()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                alive.add(int(entry.name))
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid] if pid in alive else []
    for parent in found:
        found.extend(children.get(parent, ()))
    return found


def cpu_seconds(pid: int) -> float:
    """CPU seconds used so far by `pid` and its living descendants, user and system together.

    The difference of two calls is what was used in between, unless a child ended in between. Per process it is the
    larger of two lower bounds: the living threads by the nanosecond (`schedstat`), and the process by the tick
    (`stat`), which also has the threads that ended. Raises ProcessLookupError if `pid` does not exist.
    """
    tree = process_tree(pid)
    if not tree:
        raise ProcessLookupError(f"no process {pid}")
    return sum(max(_threads_s(member), _ticks_s(member)) for member in tree)


def _threads_s(pid: int) -> float:
    nanoseconds = 0
    try:
        for task in (_PROC / str(pid) / "task").iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    except OSError:  # a thread or the process ended, or the kernel does not keep schedstat
        pass
    return nanoseconds / 1e9


def _ticks_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: state, ppid, ...; utime and stime at 11 and 12. Empty if gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    # The command name in parentheses may hold spaces and parentheses itself.
    return text.rpartition(")")[2].split()
