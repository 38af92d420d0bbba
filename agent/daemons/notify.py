"""What a daemon says of itself, by systemd's notification protocol: datagrams of NAME=VALUE lines.

`parse` is pure. `Ear` is the socket it listens on: an abstract name that only the daemon is told, kept over
restarts of the agent, so that a daemon that outlived one is heard by the next. Who sends is told by the kernel;
anybody but this user, root and the daemon's user is refused. A daemon that says too much waits in its own send.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import math
import os
import socket
import struct
from collections.abc import Callable

import msgspec

from agent.events import plain
from agent.meshos.events import DaemonHealth

DATAGRAM_MAX_BYTES = 4096
STATUS_MAX = 256
REASON_MAX = 200
EXTEND_MAX_S = 3600.0
"""The most that one EXTEND_TIMEOUT_USEC adds."""
BATCH = 16
"""Datagrams read before everything else has its turn."""
QUEUE = 64
"""More than the kernel keeps for a socket that isn't read (net.unix.max_dgram_qlen)."""
PER_WINDOW = 200
WINDOW_S = 1.0
_CREDENTIALS = struct.Struct("3i")


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One datagram. None: it says nothing about that."""

    ready: bool = False
    reloading: bool = False
    stopping: bool = False
    watchdog: bool = False
    trouble: bool = False
    """WATCHDOG=trigger: it wants to be treated as if it had fallen silent."""
    status: str | None = None
    main_pid: int | None = None
    extend_s: float | None = None
    health: tuple[DaemonHealth, str] | None = None
    saturation: float | None = None


def parse(data: bytes) -> tuple[Notice, int]:
    """The notice, and how many of its lines made no sense. Names that are unknown are passed over, as systemd does."""
    found: dict[str, object] = {}
    bad = 0
    for line in data.decode("utf-8", "replace").split("\n"):
        if not line:
            continue
        name, equals, value = line.partition("=")
        if not equals:
            bad += 1
            continue
        try:
            match name:
                case "READY":
                    found["ready"] = value == "1"
                case "RELOADING":
                    found["reloading"] = value == "1"
                case "STOPPING":
                    found["stopping"] = value == "1"
                case "WATCHDOG":
                    found["watchdog" if value == "1" else "trouble"] = value in ("1", "trigger")
                case "STATUS":
                    found["status"] = plain(value)[:STATUS_MAX]
                case "MAINPID":
                    found["main_pid"] = _number(value, 2**31 - 1)
                case "EXTEND_TIMEOUT_USEC":
                    found["extend_s"] = min(EXTEND_MAX_S, _number(value, 2**64) / 1e6)
                case "X_QD_HEALTH":
                    word, _, reason = value.partition(":")
                    found["health"] = (DaemonHealth(word.strip()), plain(reason).strip()[:REASON_MAX])
                case "X_QD_SATURATION":
                    level = float(value)
                    if math.isnan(level):
                        raise ValueError("not a number")
                    found["saturation"] = min(1.0, max(0.0, level))
        except ValueError:
            bad += 1
    return Notice(**found), bad  # type: ignore[arg-type]


def _number(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and 0 < int(text) <= most):
        raise ValueError(f"not a number: {text[:32]}")
    return int(text)


def socket_name(node: str, daemon: str, token: str, kind: str) -> str:
    """The abstract name of one of a run's sockets, with `@` for its NUL as in NOTIFY_SOCKET. At most 108 bytes."""
    return f"@quarterdeck/{node}/{daemon}/{token}{kind}"


def abstract(name: str) -> str:
    """As the socket calls take it."""
    return "\0" + name[1:] if name.startswith("@") else name


class Ear:
    """Listens for one daemon. `hear` gets each notice and the pid that sent it."""

    def __init__(self, name: str, uids: set[int], hear: Callable[[Notice, int], None]) -> None:
        """OSError when the name is taken."""
        self.name = name
        self.heard = self.refused = self.strangers = self.throttled = 0
        self._uids = uids
        self._hear = hear
        self._loop = asyncio.get_running_loop()
        self._window, self._count = 0.0, 0
        self._resume: asyncio.TimerHandle | None = None
        self._sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._sock.bind(abstract(name))
        except BaseException:
            self._sock.close()
            raise
        self._loop.add_reader(self._sock, self._read)

    def close(self) -> None:
        """Hears no more; what was sent already is dropped. Safe to call twice."""
        if self._resume is not None:
            self._resume.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def drain(self) -> None:
        """Hears what was sent before now: the last words of a process that has ended."""
        for _ in range(QUEUE):
            if self._sock.fileno() < 0 or not self._take():
                return

    def _read(self) -> None:
        now = self._loop.time()
        if now - self._window >= WINDOW_S:
            self._window, self._count = now, 0
        for _ in range(BATCH):
            if self._sock.fileno() < 0 or not self._take():
                return
            self._count += 1
            if self._count >= PER_WINDOW:
                self._pause()
                return

    def _pause(self) -> None:
        """Listens no more until the window is over: the kernel's queue fills up, and the sender waits."""
        if self._sock.fileno() >= 0:
            self.throttled += 1
            self._loop.remove_reader(self._sock)
            self._resume = self._loop.call_at(self._window + WINDOW_S, self._listen)

    def _listen(self) -> None:
        self._resume = None
        self._loop.add_reader(self._sock, self._read)

    def _take(self) -> bool:
        """One datagram; False when there is none."""
        room = socket.CMSG_SPACE(_CREDENTIALS.size)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            data, ancillary, got, _ = self._sock.recvmsg(DATAGRAM_MAX_BYTES, room, flags)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.refused += 1
            return False
        pid, uid = 0, -1
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, uid, _ = _CREDENTIALS.unpack_from(value)
            elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                _close_all(value)
        if uid not in self._uids:
            self.strangers += 1
        elif got & socket.MSG_TRUNC or not data:
            self.refused += 1
        else:
            notice, bad = parse(data)
            self.refused += bad
            self.heard += 1
            self._hear(notice, pid)
        return True


def _close_all(value: bytes) -> None:
    fds = array.array("i")
    fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
