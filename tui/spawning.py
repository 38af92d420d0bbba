"""Starts a node of this home and follows it until it answers: `qd spawn` and the console do it the same way.

A started node is a process in a session of its own: it goes on when whoever started it ends. Who started it has
nothing to do with who may operate it.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discovery.errors import LocalError, QuarterdeckError, Unreachable

if TYPE_CHECKING:
    from agent.home import Home
    from agent.spawn import Seat
    from discovery.identity import Identity

ANSWER_LIMIT_S = 10.0
POLL_EVERY_S = 0.02


class Ended(LocalError):
    """The started node ended before it answered. `status` is its exit status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass
class Started:
    """A node process that was started. `id` and `name` are empty for a kind that chooses its seat itself (console)."""

    home: Home
    mesh: str
    kind: str
    process: subprocess.Popen[bytes]
    log: Path
    seat: Seat
    identity: Identity | None
    id: str = ""
    name: str = ""

    @property
    def running(self) -> bool:
        return self.process.poll() is None


def start(home: Home, mesh: str, kind: str, name: str | None = None) -> Started:
    """Starts the node. LocalError for a mesh that this home has no keys for, a bad kind or name, or one that runs."""
    from agent.spawn import free_seat, identity_of, note, start_node
    from discovery.identity import id_text

    seat = free_seat(home, mesh, kind, name)
    if mesh not in home.meshes():
        raise LocalError(f"mesh {mesh}: not in this home; {choices(home.meshes())}")
    if any(e.mesh == mesh and e.name == name for e in home.running()):
        raise LocalError(f"spawn: {name} already runs in {mesh}; give it another --name")
    log = seat.log_file(home)
    identity = None if seat.kind == "console" else identity_of(home, seat)
    process = start_node(home, seat.argv(), log)
    started = Started(home, mesh, kind, process, log, seat, identity)
    if identity is not None:
        noted = note(home, seat, process.pid, identity)
        started.id, started.name = id_text(identity.id), noted.name
    return started


async def answered(started: Started, limit_s: float = ANSWER_LIMIT_S) -> dict[str, Any]:
    """What the started node says of itself, once it answers: `name`, `id`, `mesh`, `kind`, `pid`, `addr`, `log`.

    Ended with its last words when it ends before; Unreachable when it doesn't answer in time.
    """
    from agent.spawn import entry_of, last_words, note
    from tui.client import attach_entry

    home, process, log = started.home, started.process, started.log
    try:
        async with asyncio.timeout(limit_s):
            while process.poll() is None:
                if entry := entry_of(home, process.pid):
                    try:
                        async with await attach_entry(home, entry) as client:
                            hello = client.hello
                        if started.identity is not None:
                            note(home, started.seat, process.pid, started.identity, entry.addr)
                        return {
                            "name": hello["name"],
                            "id": hello["id"],
                            "mesh": started.mesh,
                            "kind": started.kind,
                            "pid": process.pid,
                            "addr": entry.addr,
                            "log": str(log),
                        }
                    except QuarterdeckError:
                        pass
                await asyncio.sleep(POLL_EVERY_S)
    except TimeoutError:
        pass
    if process.poll() is not None:
        words = last_words(log) or f"exit {process.returncode}"
        raise Ended(process.returncode, f"spawn: the node ended: {words}; see {log}")
    raise Unreachable(
        f"spawn: process {process.pid} runs but does not answer within {limit_s:g} s; see {log}"
    )


def choices(known: list[str]) -> str:
    """Which meshes a node can be started in, as a sentence."""
    if not known:
        return "this home has none; make one with `qd init --mesh NAME`"
    return f"name one with --mesh; this home has {', '.join(known)}"


class Spawner:
    """What the console needs to start nodes of its home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def meshes(self) -> list[str]:
        """The meshes that this home holds keys for."""
        return self.home.meshes()

    def foreign(self, client: Any) -> bool:
        """Whether the agent at the other end is none of this home: a node started here would be none of its own."""
        if getattr(client, "entry", True) is not None:
            return False
        return not any(entry.id == getattr(client, "id", "") for entry in self.home.running())

    async def start(self, mesh: str, kind: str) -> Started:
        """Starts a node, and waits for its end from then on: it is this process's child, and has to be reaped."""
        started = await asyncio.to_thread(start, self.home, mesh, kind)
        threading.Thread(target=started.process.wait, daemon=True).start()
        return started

    async def answered(self, started: Started) -> dict[str, Any]:
        return await answered(started)
