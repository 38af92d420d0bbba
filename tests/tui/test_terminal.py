"""The console on a real terminal: what it leaves behind, however it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30.0
CONSOLE = """
import asyncio, sys
from tests.tui.fakes import FakeClient, first_frame, send_done
from tui.app import QuarterdeckApp
client = FakeClient(first_frame())
async def connect():
    return client
app = QuarterdeckApp(connect, send_done)
{more}
app.run()
sys.exit(app.return_code or 0)
"""
LEFT_ALTERNATE, SHOWS_CURSOR = b"\x1b[?1049l", b"\x1b[?25h"


class Terminal:
    """A console on a pseudo-terminal of 80×24."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid, self.fd, self.seen = pid, fd, b""
        self.before = termios.tcgetattr(fd)
        self.status: int | None = None

    def read(self) -> None:
        if select.select([self.fd], [], [], 0.05)[0]:
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError:
                return

    def until_shown(self, text: bytes) -> None:
        end = time.monotonic() + LIMIT_S
        while text not in self.seen:
            assert time.monotonic() < end, self.seen[-2000:]
            self.read()

    def until_ended(self) -> int:
        end = time.monotonic() + LIMIT_S
        while self.status is None:
            assert time.monotonic() < end, "still running"
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        for _ in range(20):
            self.read()
        return self.status


@contextmanager
def terminal(more: str = "") -> Iterator[Terminal]:
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-c", CONSOLE.format(more=more)])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    here = Terminal(pid, fd)
    try:
        yield here
    finally:
        if here.status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_restores_the_terminal(number: int, status: int) -> None:
    with terminal() as here:
        here.until_shown(b"alpha.compute.9e02f1")
        os.kill(here.pid, number)
        assert here.until_ended() == status
        assert LEFT_ALTERNATE in here.seen and SHOWS_CURSOR in here.seen
        assert termios.tcgetattr(here.fd)[3] == here.before[3]


def test_q_leaves_with_status_zero_and_a_whole_terminal() -> None:
    with terminal() as here:
        here.until_shown(b"alpha.compute.9e02f1")
        os.write(here.fd, b"q")
        assert here.until_ended() == 0
        assert LEFT_ALTERNATE in here.seen and SHOWS_CURSOR in here.seen


def test_bug_of_ours_ends_in_one_line_and_no_traceback() -> None:
    break_it = "app.chrome.title = lambda cells: 1 / 0"
    with terminal(break_it) as here:
        assert here.until_ended() == 1
        after = here.seen.rpartition(LEFT_ALTERNATE)[2]
        assert b"qd: console: ZeroDivisionError" in after
        assert b"Traceback" not in here.seen and b"locals" not in here.seen
