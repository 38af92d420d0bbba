"""The console's own node: a process of kind console that lives exactly as long as the pipe to it.

The screen paints before this node has joined; `ConsoleNode.connect` is where waiting happens, as often as the
screen asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from agent.home import Home
from agent.spawn import entry_of, last_words, start_node
from discovery.errors import Unreachable

if TYPE_CHECKING:
    from tui.client import Client

READY_LIMIT_S = 10.0
POLL_EVERY_S = 0.02
GOODBYE_LIMIT_S = 3.0


class ConsoleNode:
    """A console node of this home in `mesh`. `start` returns at once; `stop` is its goodbye."""

    def __init__(self, home: Home, mesh: str) -> None:
        self.home = home
        self.mesh = mesh
        self.log: Path = home.state / mesh / f"console-{os.getpid()}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the node's process. Its stderr goes to `log`; the end of its stdin is its goodbye."""
        args = ["--mesh", self.mesh, "--kind", "console", "--port", "0"]
        self.process = start_node(self.home, args, self.log, goodbye_pipe=True)

    async def connect(self) -> Client:
        """A client of the node, once it answers; a node that ended is started again.

        Unreachable with the node's last words when it ends before it answers, or takes too long.
        """
        if self.process is None or self.process.poll() is not None:
            self.start()
        from tui.client import attach_entry  # SSH is heavy to import, and the screen is to be painted first

        process = self.process
        assert process is not None
        last = "it is starting"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_LIMIT_S):
                while process.poll() is None:
                    if entry := entry_of(self.home, process.pid):
                        try:
                            return await attach_entry(self.home, entry)
                        except Unreachable as why:
                            last = str(why)
                    await asyncio.sleep(POLL_EVERY_S)
        if process.poll() is not None:
            raise Unreachable(
                f"console node: ended ({last_words(self.log) or process.returncode}); see {self.log}"
            )
        raise Unreachable(f"console node: no answer within {READY_LIMIT_S:g} s ({last}); see {self.log}")

    async def stop(self) -> None:
        """Says goodbye by closing the pipe; whoever doesn't end within GOODBYE_LIMIT_S is ended."""
        process = self.process
        if process is None:
            return
        await end_processes([process])
        if process.returncode == 0:
            with contextlib.suppress(OSError):
                self.log.unlink()


def start_console_node(home: Home, mesh: str) -> ConsoleNode:
    """A started console node of this home."""
    node = ConsoleNode(home, mesh)
    node.start()
    return node


async def end_processes(
    processes: list[subprocess.Popen[bytes]], limit_s: float = GOODBYE_LIMIT_S
) -> list[int]:
    """Ends our own children: pipe closed and SIGTERM (both are a goodbye), SIGKILL after `limit_s`, each reaped.

    A stopped one is continued first, so that it can say its goodbye. Returns the pids that had to be killed.
    """
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while any(p.poll() is None for p in processes):  # noqa: ASYNC110 (a child's end is no event)
                await asyncio.sleep(POLL_EVERY_S)
    killed = [p for p in processes if p.poll() is None]
    for process in killed:
        process.kill()
    for process in killed:
        process.wait()
    return [p.pid for p in killed]
