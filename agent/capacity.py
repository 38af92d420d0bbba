"""What this node has for daemons: the processors it may run on and the memory of its host, or less where its control
group, in which its daemons are too, is limited.

Read once, at the start. What can't be found out is None, never a guess.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MIB = 1 << 20


def capacity(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> tuple[int | None, int | None]:
    """(thousandths of a core, MiB of memory)."""
    groups = list(_groups(cgroups, own))
    return _least([_millicores(), *map(_quota, groups)]), _least([_memory_mib(), *map(_limit_mib, groups)])


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's control group (version 2) and of those around it."""
    try:
        lines = own.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        if line.startswith("0::/") and ".." not in line:
            group = cgroups / line.removeprefix("0::/")
            yield group
            while group != cgroups:
                group = group.parent
                yield group


def _least(found: list[int | None]) -> int | None:
    return min((each for each in found if each is not None), default=None)


def _millicores() -> int | None:
    try:
        return 1000 * len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        count = os.cpu_count()
        return None if count is None else 1000 * count


def _memory_mib() -> int | None:
    try:
        return int(psutil.virtual_memory().total) // MIB
    except (psutil.Error, OSError, RuntimeError):
        return None


def _quota(group: Path) -> int | None:
    match _words(group / "cpu.max"):
        case [quota, period] if quota.isdigit() and period.isdigit() and int(period):
            return 1000 * int(quota) // int(period)
    return None


def _limit_mib(group: Path) -> int | None:
    match _words(group / "memory.max"):
        case [limit] if limit.isdigit():
            return int(limit) // MIB
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
