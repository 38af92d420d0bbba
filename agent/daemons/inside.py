"""A daemon inside the agent: a class of the entry point group `quarterdeck.daemons`, run as a task of its loop.

It shares the agent's fate and its loop: what blocks in it blocks the node, and it ends with the process that it
runs in. What may not do that is a program.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from agent.daemons.contract import MeshDaemon, condition_of, listens
from agent.daemons.log import escaped
from agent.daemons.program import Office
from agent.daemons.sdk import write_snapshot
from agent.daemons.voice import Condition, Voice
from agent.executor import DispatchError
from agent.meshos.controls import DaemonControl, Shutdown
from agent.meshos.events import DaemonHealth, DaemonLifecycle
from agent.spec.model import DaemonSpec, Resources
from agent.spec.reading import read_resources
from discovery.errors import LocalError

GROUP = "quarterdeck.daemons"
SNAPSHOT_EVERY_S = 30.0
REASON_MAX = 200
UNENDING_S = 5.0


def load(entry_point: str) -> Any:
    """The class (or whatever makes a daemon) of that name. DispatchError says what is wrong with it."""
    import importlib.metadata

    found = list(importlib.metadata.entry_points(group=GROUP, name=entry_point))
    if not found:
        raise DispatchError(
            f"entry point {escaped(entry_point)}: none of that name in {GROUP}; install its package"
        )
    try:
        return found[0].load()
    except Exception as why:
        raise DispatchError(f"entry point {escaped(entry_point)}: {_words(why)}") from why


class Inside:
    """One life of such a daemon. `office.ended` is called at its end."""

    def __init__(self, office: Office, spec: DaemonSpec, daemon: MeshDaemon) -> None:
        self.spec = spec
        self.status = ""
        self.stopping = False
        self.adopted = False
        self.ready = True
        self.started_ms = time.time_ns() // 1_000_000
        self._office = office
        self._daemon = daemon
        self.asked = self._cancelled = self._over = False
        self._loop = asyncio.get_running_loop()
        self._voice = Voice(spec.name, office.tell)
        self._timer: asyncio.TimerHandle | None = None
        self._cancel_at: float | None = None
        self._kept: bytes | None = None
        self._saved = office.clock()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, office: Office, spec: DaemonSpec) -> Inside | None:
        """Loads, restores and begins it; None when it asks for more than there is here. DispatchError when that can't
        be done."""
        made = await asyncio.to_thread(load, spec.entry_point or "")
        try:
            daemon = made()
            if spec.resources is None and not office.room_for(spec.name, _needs(daemon)):
                return None
            inside = cls(office, spec, daemon)
            inside._restore()
            process = daemon.process()
        except LocalError as why:
            raise DispatchError(f"entry point {escaped(spec.entry_point or '')}: {why}") from why
        except Exception as why:
            raise DispatchError(f"entry point {escaped(spec.entry_point or '')}: {_words(why)}") from why
        inside._task = inside._loop.create_task(process, name=f"daemon {spec.name}")
        inside._task.add_done_callback(inside._ended)
        office.tell(DaemonLifecycle(spec.name, "started"))
        inside._voice.unmute()
        return inside

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def condition(self) -> Condition:
        return self._voice.condition

    @property
    def saturation(self) -> float | None:
        return self._voice.saturation

    def stop(self, grace_s: float) -> None:
        """Tells it; it is cancelled at the end of the grace period, at once if it doesn't listen to controls."""
        grace_s = max(0.0, min(self.spec.grace_s, grace_s))
        if not self.asked:
            self.asked = self.stopping = True
            self._hand(Shutdown(int(grace_s * 1000)))
        cancel_at = self._loop.time() + (grace_s if listens(self._daemon) else 0.0)
        if self._cancel_at is None or cancel_at < self._cancel_at:
            self._cancel_at = cancel_at
            self._again(cancel_at)

    def bring(self, control: DaemonControl) -> None:
        if not isinstance(control, Shutdown):
            self._hand(control)

    def sweep(self) -> bool:
        """Asks it how it is."""
        voice = self._voice
        try:
            if (ask := getattr(self._daemon, "health", None)) is not None:
                voice.said = condition_of(ask())
            if (ask := getattr(self._daemon, "saturation", None)) is not None:
                said = ask()
                voice.saturation = None if said is None else min(1.0, max(0.0, float(said)))
        except Exception as why:
            voice.said = (DaemonHealth.UNHEALTHY, _words(why))
        voice.changed()
        if self._office.clock() - self._saved >= SNAPSHOT_EVERY_S:
            self._keep()
        return False

    def let_go(self) -> None:
        """It can't outlive this process: it is cancelled, and what it knows is kept."""
        self._over = True
        self._voice.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._keep()

    def _hand(self, control: DaemonControl) -> None:
        listen = getattr(self._daemon, "on_control", None)
        if listen is None:
            return
        try:
            listen(control)
        except Exception as why:
            self._office.trouble(self.spec.name, f"on_control: {_words(why)}")

    def _again(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._cancel)

    def _cancel(self) -> None:
        if self._task is None or self._task.done():
            return
        if self._cancelled:
            self._office.trouble(
                self.spec.name, "goes on although it was cancelled; only the agent's end ends it"
            )
        self._cancelled = True
        self._task.cancel()
        self._again(self._loop.time() + UNENDING_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        why = None if task.cancelled() else task.exception()
        if self._over:
            return
        self._over = True
        self._voice.close()
        if self._timer is not None:
            self._timer.cancel()
        if why is None:
            self._keep()
        name = self.spec.name
        if self.asked:
            reason = "" if why is None else _words(why)
            self._office.tell(DaemonLifecycle(name, "exited_cleanly", reason=reason))
        elif why is not None or task.cancelled():
            reason = "cancelled" if why is None else _words(why)
            self._office.tell(DaemonLifecycle(name, "crashed", reason=reason))
        else:
            self._office.tell(DaemonLifecycle(name, "exited_cleanly"))
        self._office.ended(name)

    def _file(self) -> Path:
        return self._office.folder(self.spec.name) / "snapshot"

    def _restore(self) -> None:
        try:
            self._kept = self._file().read_bytes()
        except FileNotFoundError:
            return
        self._daemon.restore(self._kept)

    def _keep(self) -> None:
        self._saved = self._office.clock()
        try:
            state = self._daemon.snapshot()
            if state and state != self._kept:
                write_snapshot(self._file(), state)
                self._kept = state
        except Exception as why:
            self._office.trouble(self.spec.name, f"snapshot not kept: {_words(why)}")


def _needs(daemon: MeshDaemon) -> Resources | None:
    ask = getattr(daemon, "requirements", None)
    return None if ask is None else read_resources(ask())


def _words(why: BaseException) -> str:
    text = str(why)
    return escaped(f"{type(why).__name__}: {text}" if text else type(why).__name__)[:REASON_MAX]
