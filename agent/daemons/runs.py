"""What runs, on disk: one small file a daemon, so that an agent that was killed leaves none doubled and none lost.

The file is written with the run's random id before the fork, and again with the process's identity after it.
Who is killed in between leaves a file without a process: the next agent finds it by the id in its environment.
The lock of the place makes that certain: a forked child holds it until it has executed the program, and the next
agent waits for it. Nothing here is flushed to the disk: what a power failure could tear describes processes that
the same failure ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from pathlib import Path

import msgspec

from agent.daemons.process import ProcessId
from agent.meshos.events import DaemonHealth
from agent.spec.model import DaemonSpec
from discovery.errors import LocalError

LOCK_WAIT_S = 5.0
PLACEMENT = ("on", "count", "all", "after", "restart_on_update", "resources")
"""Fields of a spec that say where and when a daemon runs, and nothing about the process."""


class Run(msgspec.Struct, kw_only=True):
    """One process of a daemon, from before its fork to its end."""

    version: int = 1
    daemon: str
    id: str
    """Random; the process finds it in QD_DAEMON_RUN."""
    token: str
    """Random: what the names of its sockets end in."""
    boot: str
    spec: DaemonSpec
    started_ms: int
    """Unix milliseconds."""
    leader: ProcessId | None = None
    """The process that was started, which leads its session and group."""
    main: ProcessId | None = None
    """The process that counts, where MAINPID= named another one."""
    ready: bool = False
    asked: bool = False
    """It was told to end."""
    health: DaemonHealth = DaemonHealth.HEALTHY
    reason: str = ""
    """What it said of itself last."""

    def write(self, path: Path) -> None:
        """Whole or not at all; without `resources`, a key that an earlier build refuses to read, and that says nothing
        about the process. OSError when it can't be written."""
        fields = msgspec.to_builtins(self)
        del fields["spec"]["resources"]
        tmp = path.with_name(f".{path.name}")
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(msgspec.json.encode(fields))
        tmp.replace(path)


def read_run(path: Path) -> Run | None:
    """None when there is none, or nothing that can be read."""
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except (OSError, msgspec.MsgspecError):
        return None
    return run if run.version == 1 and run.daemon == path.parent.name else None


def fingerprint_of(spec: DaemonSpec) -> str:
    """16 hex digits of what a spec says about the process itself; where it shall run changes nothing in it."""
    fields = msgspec.to_builtins(spec)
    for name in PLACEMENT:
        fields.pop(name, None)
    return hashlib.sha256(msgspec.json.encode(fields, order="deterministic")).hexdigest()[:16]


class PlaceLock:
    """Held by the one agent that supervises in this place, and by each child that it has forked and that has not
    executed its program yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def take(self) -> None:
        """LocalError when another agent keeps it for longer than it takes to end."""
        if self._fd is not None:
            return
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= until:
                    os.close(fd)
                    where = self._path.parent
                    raise LocalError(
                        f"daemons in {where}: another agent supervises them; end it first"
                    ) from None
                time.sleep(0.01)
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
