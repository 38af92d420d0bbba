"""Processes told apart for certain: a pid alone names nobody, a pid with its start time and its boot does.

A signal goes through a pidfd, opened first and checked afterwards, so none ever reaches a process that took over
a number. The table of processes is read only where nothing else tells: when an earlier agent was killed between
a fork and its note of it, and for the groups of such processes on kernels before 6.9.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

RUN_MARK = "QD_DAEMON_RUN"
"""The environment variable by which a process is known to belong to a run of a daemon."""
_GROUP = 4
"""PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9: to all whose group this process leads or led, alive or not."""
_ENVIRON_MAX_BYTES = 4 << 20


class ProcessId(msgspec.Struct, frozen=True):
    """One process of one boot: `start` is field 22 of /proc/PID/stat, in clock ticks since the boot."""

    pid: int
    start: int
    boot: str


class Stat(NamedTuple):
    """What /proc/PID/stat says that matters here."""

    state: str
    parent: int
    group: int
    session: int
    start: int


class End(NamedTuple):
    """How a process ended: an exit status, or the signal that killed it; neither when nobody can know."""

    status: int | None
    signal: int | None
    core: bool = False

    def words(self) -> str:
        if self.signal is not None:
            return f"killed by {signal_name(self.signal)}" + (" (core dumped)" if self.core else "")
        return "exited, status unknown (adopted)" if self.status is None else f"exit status {self.status}"


UNKNOWN_END = End(None, None)


@functools.cache
def boot_id() -> str:
    """This boot's random id; a pid of another boot means nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def stat_of(pid: int) -> Stat | None:
    """None when there is no such process. The name in it may hold anything, so it is read from the last `)`."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return Stat(fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def identify(pid: int) -> ProcessId | None:
    """Who has this pid now, a zombie included."""
    stat = stat_of(pid)
    return None if stat is None else ProcessId(pid, stat.start, boot_id())


def pidfd_of(who: ProcessId) -> int | None:
    """A pidfd of exactly that process, or None when it is gone. A zombie that nobody reaped yet is not gone."""
    if who.boot != boot_id():
        return None
    try:
        fd = os.pidfd_open(who.pid)
    except OSError:
        return None
    if identify(who.pid) == who:
        return fd
    os.close(fd)
    return None


def end_of(fd: int, *, reap: bool) -> End | None:
    """How the process of a pidfd that is readable ended; UNKNOWN_END when it is no child of ours, None when it
    runs. With `reap`, its pid is free from now on."""
    flags = os.WEXITED | os.WNOHANG | (0 if reap else os.WNOWAIT)
    try:
        result = os.waitid(os.P_PIDFD, fd, flags)
    except ChildProcessError:
        return UNKNOWN_END
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return End(result.si_status, None)
    return End(None, result.si_status, result.si_code == os.CLD_DUMPED)


def signal_one(fd: int, number: int) -> bool:
    """False when it is gone or may not be signalled."""
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    return True


def signal_group(leader_fd: int | None, leader: int, run: str, number: int) -> None:
    """To every process of the group that `leader` leads or led. With its pidfd the kernel picks them; without,
    those in a group of this number that carry the run's mark."""
    if leader_fd is not None:
        try:
            signal.pidfd_send_signal(leader_fd, number, None, _GROUP)
        except ProcessLookupError:
            return
        except OSError:
            pass
        else:
            return
    for pid in pids():
        stat = stat_of(pid)
        if stat is not None and stat.group == leader and stat.state != "Z":
            _signal_marked(pid, run, number)


def kill_marked(pids_of_run: Collection[int], run: str) -> None:
    """SIGKILL to those of these processes that carry the run's mark."""
    for pid in pids_of_run:
        _signal_marked(pid, run, signal.SIGKILL)


def _signal_marked(pid: int, run: str, number: int) -> None:
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if run_of(pid) == run:
                signal_one(fd, number)
        finally:
            os.close(fd)


def pids() -> Iterator[int]:
    """Every process of this host, in the order of /proc."""
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            yield int(name)


def run_of(pid: int) -> str | None:
    """The run whose mark a process carries; None without one, or where it can't be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:  # noqa: PTH123
            text = f.read(_ENVIRON_MAX_BYTES)
    except OSError:
        return None
    mark = f"{RUN_MARK}=".encode()
    for entry in text.split(b"\0"):
        if entry.startswith(mark):
            return entry[len(mark) :].decode("utf-8", "replace")
    return None


def marked(runs: Collection[str]) -> dict[str, list[int]]:
    """The processes that carry the mark of one of these runs, from one reading of the whole table."""
    found: dict[str, list[int]] = {}
    own = os.getpid()
    for pid in pids():
        if pid != own and (run := run_of(pid)) in runs and run is not None:
            found.setdefault(run, []).append(pid)
    return found


def leader_among(candidates: Collection[int]) -> ProcessId | None:
    """The one that leads its session: the process that was started, of those that carry its mark."""
    for pid in candidates:
        stat = stat_of(pid)
        if stat is not None and stat.session == pid and stat.state != "Z":
            return ProcessId(pid, stat.start, boot_id())
    return None
