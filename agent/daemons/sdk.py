"""`daemon_main(daemon)`: runs a `MeshDaemon` as a program of its own, supervised by an agent or by systemd.

It says READY=1, its health and its saturation by sd_notify, hears controls on the socket that the agent names,
and keeps its snapshot in a file. Without an agent around it all of that is left out and it just runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.daemons.contract import (
    HEALTHY,
    SNAPSHOT_MAX_BYTES,
    Health,
    MeshDaemon,
    condition_of,
    degraded,
    listens,
    unhealthy,
)
from agent.meshos.controls import (
    BackpressureOff,
    BackpressureOn,
    DaemonControl,
    DrainFinish,
    DrainStart,
    Shutdown,
)
from agent.meshos.events import DaemonHealth

__all__ = [
    "HEALTHY",
    "BackpressureOff",
    "BackpressureOn",
    "DaemonControl",
    "DaemonHealth",
    "DrainFinish",
    "DrainStart",
    "Health",
    "MeshDaemon",
    "Shutdown",
    "daemon_main",
    "degraded",
    "unhealthy",
]

ASKED_EVERY_S = 0.5
SAID_AGAIN_S = 15.0
"""Everything is said again this often: an agent that took another's place learns how things stand."""
SNAPSHOT_EVERY_S = 30.0
MARGIN_S = 1.0
"""Of the grace period, kept for the snapshot after a `process` that had to be cancelled."""
CONTROL_MAX_BYTES = 4096
_CREDENTIALS = struct.Struct("3i")
_controls = msgspec.json.Decoder(DaemonControl)


def daemon_main(daemon: MeshDaemon) -> int:
    """Runs it to its end. 0: it returned, or ended as it was told; 1: it raised (traceback on stderr).

    Use it as `sys.exit(daemon_main(MyDaemon()))`."""
    return asyncio.run(_Host(daemon).run())


class _Host:
    """A daemon as a process: what the environment says about where it runs."""

    def __init__(self, daemon: MeshDaemon) -> None:
        self._daemon = daemon
        self._notify = _address(os.environ.get("NOTIFY_SOCKET", ""))
        self._control = _address(os.environ.get("QD_CONTROL_SOCKET", ""))
        self._file = Path(os.environ["QD_SNAPSHOT"]) if os.environ.get("QD_SNAPSHOT") else None
        self._grace_ms = int(os.environ.get("QD_GRACE_MS", "30000"))
        self._watchdog_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        self._said = ""
        self._kept: bytes | None = None
        self._process: asyncio.Task[None] | None = None
        self._shutdown = False
        self._socket: socket.socket | None = None
        self._cancel: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        try:
            self._restore()
            with self._listening():
                self._process = loop.create_task(self._daemon.process(), name=self._daemon.name)
                pump = loop.create_task(self._pump())
                self.say("READY=1")
                try:
                    status = await self._to_its_end()
                    self.say("STOPPING=1")
                    self._keep()
                finally:
                    pump.cancel()
                return status
        except Exception:
            traceback.print_exc()
            return 1

    async def _to_its_end(self) -> int:
        assert self._process is not None
        await asyncio.wait([self._process])
        if self._process.cancelled():
            return 0 if self._shutdown else 1
        self._process.result()
        return 0

    def _terminate(self) -> None:
        """A signal to end: the Shutdown that was sent before it counts, with its grace period."""
        if self._socket is not None:
            while self._hear(self._socket):
                pass
        self.control(Shutdown(self._grace_ms))

    def control(self, control: DaemonControl) -> None:
        """Hands it a control. The first Shutdown counts; what `on_control` raises is printed and survived."""
        if isinstance(control, Shutdown):
            if self._shutdown:
                return
            self._shutdown = True
        try:
            self._daemon.on_control(control)
        except Exception:
            traceback.print_exc()
        if isinstance(control, Shutdown) and self._process is not None:
            grace_s = control.grace_period_ms / 1000
            wait_s = max(grace_s - MARGIN_S, grace_s / 2) if listens(self._daemon) else 0.0
            self._cancel = asyncio.get_running_loop().call_later(wait_s, self._process.cancel)

    def say(self, *lines: str) -> None:
        """Tells the supervisor; never waits, and whether anybody hears it changes nothing."""
        if self._notify:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._notify)

    async def _pump(self) -> None:
        """Says how it is when that changes, and now and then all the same; saves its snapshot; feeds the watchdog."""
        loop = asyncio.get_running_loop()
        every_s = min(ASKED_EVERY_S, self._watchdog_s / 2) if self._watchdog_s else ASKED_EVERY_S
        again = saved = loop.time()
        while True:
            lines = self._how_it_is()
            now = loop.time()
            if lines != self._said or now - again >= SAID_AGAIN_S:
                self._said, again = lines, now
                self.say("READY=1", lines)
            if self._watchdog_s:
                self.say("WATCHDOG=1")
            if now - saved >= SNAPSHOT_EVERY_S:
                saved = now
                self._keep()
            await asyncio.sleep(every_s)

    def _how_it_is(self) -> str:
        try:
            health, reason = condition_of(self._daemon.health())
            saturation = self._daemon.saturation()
        except Exception as why:
            health, reason, saturation = DaemonHealth.UNHEALTHY, f"{type(why).__name__}: {why}", None
        said = f"X_QD_HEALTH={health.value}" + (f":{' '.join(reason.split())}" if reason else "")
        return said if saturation is None else f"{said}\nX_QD_SATURATION={saturation:.3f}"

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Binds the control socket, where there is one to bind."""
        if not self._control:
            yield
            return
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                sock.bind(self._control)
            except OSError as why:
                print(f"no controls: {why.strerror}", file=sys.stderr)
                yield
                return
            self._socket = sock
            loop.add_reader(sock, self._hear, sock)
            try:
                yield
            finally:
                self._socket = None
                loop.remove_reader(sock)

    def _hear(self, sock: socket.socket) -> bool:
        """Takes one datagram; False when there is none. Strangers and what is no control are passed over."""
        try:
            data, ancillary, flags, _ = sock.recvmsg(CONTROL_MAX_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
        except OSError:
            return False
        uid = next(
            (_CREDENTIALS.unpack_from(v)[1] for _, k, v in ancillary if k == socket.SCM_CREDENTIALS), -1
        )
        if uid in (0, os.geteuid()) and not flags & socket.MSG_TRUNC:
            try:
                self.control(_controls.decode(data))
            except msgspec.MsgspecError:
                pass
        return True

    def _restore(self) -> None:
        if self._file is None:
            return
        try:
            state = self._file.read_bytes()
        except FileNotFoundError:
            return
        self._kept = state
        self._daemon.restore(state)

    def _keep(self) -> None:
        """Writes its snapshot, whole, if it has one that is new."""
        if self._file is None:
            return
        try:
            state = self._daemon.snapshot()
            if state and state != self._kept:
                write_snapshot(self._file, state)
                self._kept = state
        except Exception as why:
            print(f"snapshot not kept: {type(why).__name__}: {why}", file=sys.stderr)


def write_snapshot(path: Path, state: bytes) -> None:
    """Whole or not at all. ValueError when it is too big."""
    if len(state) > SNAPSHOT_MAX_BYTES:
        raise ValueError(f"{len(state):,} bytes are more than {SNAPSHOT_MAX_BYTES:,}")
    tmp = path.with_name(f".{path.name}")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(state)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)


def _address(name: str) -> str:
    return "\0" + name[1:] if name.startswith("@") else name
