"""How much memory of the machine is free for this process."""

from __future__ import annotations

from pathlib import Path

_SYSTEM = Path("/")


def free_memory() -> int | None:
    """Bytes that the machine, and the control groups of the process (a container, a job of Slurm), have left.

    What the system uses for copies of files counts as free. None where it does not tell.
    """
    try:
        lines = (_SYSTEM / "proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group that limits the process has left, in the second version of the interface."""
    root = _SYSTEM / "sys/fs/cgroup"
    try:
        entries = (_SYSTEM / "proc/self/cgroup").read_text().splitlines()
        own = next(line for line in entries if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    left, group = [], root / own.removeprefix("0::").lstrip("/")
    for where in (group, *group.parents):
        if where != root and root not in where.parents:
            break
        try:
            limit = int((where / "memory.max").read_text())  # "max" where there is none
            used = int((where / "memory.current").read_text())
            known = dict(line.split() for line in (where / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        left.append(limit - used + int(known.get("inactive_file", 0)) + int(known.get("active_file", 0)))
    return left
