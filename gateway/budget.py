"""The bound on all request bodies in memory together, reserved before they are read."""

from __future__ import annotations

from pathlib import Path


class BodyBudget:
    """Counts bytes of request bodies against a limit."""

    __slots__ = ("limit_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def __repr__(self) -> str:
        return f"<BodyBudget [{self.used_bytes} of {self.limit_bytes} bytes]>"

    def reserve(self, size_bytes: int) -> bool:
        """Takes bytes from the budget; false, and nothing taken, when there are not enough."""
        if self.used_bytes + size_bytes > self.limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def release(self, size_bytes: int) -> None:
        """Gives bytes back."""
        self.used_bytes -= size_bytes


def memory_available_bytes(root: Path = Path("/")) -> int:
    """What this process may use: the cgroup's limit (v2, then v1) or the machine's memory, whichever is less."""
    limits = [_total_bytes(root / "proc/meminfo")]
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = (root / path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _total_bytes(meminfo: Path) -> int:
    try:
        first = meminfo.read_text().split("\n", 1)[0]
        return int(first.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 2**30
