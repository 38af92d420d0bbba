"""A supervisor in this process with all that it tells, and real processes under it that end with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.daemons.supervisor import Supervisor
from agent.meshos.events import DaemonLifecycle
from agent.spec.model import DaemonSpec, Resources

NODE = "00000000000000aa"
WITHIN_S = 15.0
needs_systemd_notify = pytest.mark.skipif(
    shutil.which("systemd-notify") is None, reason="systemd-notify is not installed"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Rig:
    """`signals` is what the engine would have heard of a daemon, in order."""

    def __init__(self, place: Path, *specs: DaemonSpec, mesh: str = "") -> None:
        self.events: list[DaemonLifecycle] = []
        self.troubles: list[tuple[str, str]] = []
        self.specs = {spec.name: spec for spec in specs}
        self.asked: list[tuple[str, Resources | None]] = []
        self.room = True
        self.supervisor = Supervisor(
            place,
            node=NODE,
            tell=self.events.append,
            trouble=lambda daemon, reason: self.troubles.append((daemon, reason)),
            mesh=mesh,
            room_for=self._room_for,
        )

    def _room_for(self, daemon: str, needs: Resources | None) -> bool:
        self.asked.append((daemon, needs))
        return self.room

    def signals(self, name: str = "d") -> list[str]:
        return [e.signal for e in self.events if e.daemon == name]

    def last(self, signal: str, name: str = "d") -> DaemonLifecycle | None:
        return next((e for e in reversed(self.events) if (e.signal, e.daemon) == (signal, name)), None)

    async def told(self, signal: str, name: str = "d") -> DaemonLifecycle:
        """The latest such event, once there is one."""
        await until(lambda: self.last(signal, name) is not None, f"{signal} of {name}: {self.events}")
        event = self.last(signal, name)
        assert event is not None
        return event

    def pid(self, name: str = "d") -> int:
        pid = self.supervisor.facts(name).pid
        assert pid is not None
        return pid

    def lines(self, name: str = "d") -> list[str]:
        log = self.supervisor.log(name)
        return [] if log is None else [line.line for line in log.tail(1000)]

    async def wrote(self, line: str, name: str = "d") -> None:
        await until(lambda: line in self.lines(name), f"{line!r} in {self.lines(name)}")


@contextlib.asynccontextmanager
async def rig(place: Path, *specs: DaemonSpec, mesh: str = "") -> AsyncIterator[Rig]:
    """Begun with these specs; at the end nothing of it runs any more."""
    made = Rig(place, *specs, mesh=mesh)
    await made.supervisor.begin(made.specs)
    try:
        yield made
    finally:
        await made.supervisor.stop_all(0)
        await made.supervisor.close()


def spec(*command: str, name: str = "d", **fields: Any) -> DaemonSpec:
    return DaemonSpec(name=name, command=list(command), **fields)


def sh(script: str, *, name: str = "d", **fields: Any) -> DaemonSpec:
    return spec("sh", "-c", script, name=name, **fields)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Waits on a condition; AssertionError after 15 s."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s: {what}"
        await asyncio.sleep(0.005)


def environ(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def say(pid: int, *lines: str) -> None:
    """Sends a notification as the daemon would."""
    say_bytes(pid, "\n".join(lines).encode())


def say_bytes(pid: int, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, "\0" + environ(pid)["NOTIFY_SOCKET"][1:])


def alive(pid: int) -> bool:
    """Whether it runs; a zombie doesn't."""
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def running(word: str) -> list[int]:
    """Processes that have this word among their arguments."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if word.encode() in (path / "cmdline").read_bytes().split(b"\0") and alive(int(path.name)):
                    found.append(int(path.name))
    return found
