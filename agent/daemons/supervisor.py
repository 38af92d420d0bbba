"""The daemons of one node, as processes: started and stopped as the engine says, and reported as they are.

When to start and stop, how long to wait after a crash, what is wanted at all: that is the engine's. Here it is
carried out, and every event it leads to is told, in order: `starting`, `started`, `health`, `saturation`,
`crashed`, `exited_cleanly`. One timer looks after all of them; the rest wakes up when something happens.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from agent.daemons.inside import Inside
from agent.daemons.log import DaemonLog
from agent.daemons.process import boot_id, kill_marked, leader_among, marked
from agent.daemons.program import Office, Program
from agent.daemons.runs import PlaceLock, Run, fingerprint_of, read_run
from agent.executor import DispatchError
from agent.meshos.controls import DaemonControl
from agent.meshos.events import DaemonHealth, DaemonLifecycle
from agent.spec.model import DaemonSpec, Resources
from discovery.errors import LocalError

SWEEP_S = 1.0
WARM_S = 0.2
"""Instead of it, while somebody writes a log, or follows one."""
KILL_MARGIN_S = 5.0
"""How long `stop_all` waits for the ends after it had everything killed."""
SEARCH_AGAIN_S = 0.05
STOPPING_RETRY_MS = 500
UNWATCHED = "ended while no agent watched it"


class DaemonFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a daemon now. `pid` is None while it doesn't run."""

    name: str
    pid: int | None = None
    started_ms: int | None = None
    """Unix milliseconds."""
    ready: bool = False
    stopping: bool = False
    adopted: bool = False
    """It was started by an earlier agent process."""
    inside: bool = False
    """It runs in the agent's own process."""
    status: str = ""
    """What it says it is doing (STATUS=)."""
    health: DaemonHealth | None = None
    """None while neither it nor its check has told."""
    reason: str = ""
    saturation: float | None = None
    log: str | None = None
    """Where its output is."""
    heard: int = 0
    refused: int = 0
    """Of its notifications: taken; lines and datagrams that made no sense, or came from a stranger."""
    throttled: int = 0
    """How often it was made to wait because it said too much."""


class Supervisor:
    """Carries out starts and stops in `place`, from one event loop. `tell` gets the events for the engine, in order;
    `trouble(daemon, reason)` what of ours went wrong and was survived. `room_for(daemon, needs)` says whether a class
    that was loaded and asks for so much may begin; one that may not is not told of. `begin` comes first."""

    def __init__(
        self,
        place: Path,
        *,
        node: str,
        tell: Callable[[DaemonLifecycle], None],
        trouble: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
        mesh: str = "",
        room_for: Callable[[str, Resources | None], bool] = lambda daemon, needs: True,
    ) -> None:
        self._office = Office(place, node, mesh, tell, trouble, self._ended, clock, room_for)
        self._lock = PlaceLock(place / ".lock")
        self._specs: dict[str, DaemonSpec] = {}
        self._units: dict[str, Program | Inside] = {}
        self._starting: set[str] = set()
        self._logs: dict[str, DaemonLog] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._warm = False
        self._ends: list[asyncio.Future[None]] = []
        self._closed = False

    async def begin(self, specs: Mapping[str, DaemonSpec]) -> list[str]:
        """Re-adopts what an earlier agent process left running, those too that are in no spec any more, and tells
        `started` or `starting` of each. The names adopted. LocalError while another agent supervises here."""
        if not hasattr(os, "pidfd_open"):
            raise LocalError("daemons: this system has no pidfd_open; supervision needs Linux 5.3 or later")
        self.define(specs)
        place = self._office.place
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        await asyncio.to_thread(self._lock.take)
        runs = [run for path in sorted(place.glob("*/run.json")) if (run := read_run(path)) is not None]
        await self._search([run for run in runs if run.leader is None])
        orphaned = []
        for run in runs:
            program = Program.adopt(self._office, run, self._log_of(run.daemon))
            if program is not None:
                self._units[run.daemon] = program
            else:
                orphaned.append(run)
        if orphaned:
            await self._bury(orphaned)
        self._schedule()
        return sorted(self._units)

    def define(self, specs: Mapping[str, DaemonSpec]) -> None:
        """What the daemons are from now on; each takes effect at its next start."""
        self._specs = dict(specs)
        for name in [name for name in self._logs if name not in specs and name not in self._units]:
            if not self._logs[name].followed:
                del self._logs[name]

    def fingerprint(self, name: str) -> str | None:
        """Of the spec with which the running process was started; `fingerprint_of` a spec that would start the
        same. None while it doesn't run."""
        unit = self._units.get(name)
        return None if unit is None else fingerprint_of(unit.spec)

    async def start(self, name: str) -> None:
        """Starts it, if it doesn't run. DispatchError when it can't be executed: then it is told as crashed, so
        that it counts. With a retry, and untold, while it is still ending."""
        if (unit := self._units.get(name)) is not None:
            if unit.asked:
                raise DispatchError(f"daemon {name}: is still ending", STOPPING_RETRY_MS)
            return
        if name in self._starting:
            return
        spec = self._specs.get(name)
        try:
            if spec is None:
                raise DispatchError(f"daemon {name}: no spec of that name")
            self._office.folder(name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._starting.add(name)
            if spec.entry_point:
                if (inside := await Inside.start(self._office, spec)) is not None:
                    self._units[name] = inside
            elif spec.command:
                self._start_program(spec)
            else:
                raise DispatchError(f"daemon {name}: neither `command` nor `entry_point`; say what to run")
        except OSError as why:
            self._office.tell(DaemonLifecycle(name, "crashed", reason=f"not started: {why.strerror}"))
            raise DispatchError(f"daemon {name}: {why.strerror}; it needs a disk with room") from why
        except DispatchError as why:
            self._office.tell(DaemonLifecycle(name, "crashed", reason=f"not started: {why.reason}"))
            raise
        finally:
            self._starting.discard(name)
        self._schedule()

    async def stop(self, name: str, grace_ms: int) -> None:
        """Asks it to end, and kills it after its own grace period or this one, whichever is shorter. One that
        doesn't run is told as ended."""
        unit = self._units.get(name)
        if unit is None:
            self._office.tell(DaemonLifecycle(name, "exited_cleanly", reason="it did not run"))
        else:
            unit.stop(grace_ms / 1000)

    def tell_daemons(self, control: DaemonControl, name: str | None = None) -> None:
        """Brings a control to one daemon, or to all. Shutdown comes with `stop`, not here."""
        for key, unit in tuple(self._units.items()):
            if name in (None, key):
                unit.bring(control)

    async def stop_all(self, grace_s: float, keep: Callable[[DaemonSpec], bool] = lambda spec: False) -> None:
        """Stops all side by side but the programs to keep (judged by their latest spec), and waits for their ends:
        at most the grace period and 5 s."""
        going = {}
        for name, unit in tuple(self._units.items()):
            if isinstance(unit, Inside) or not keep(self._specs.get(name, unit.spec)):
                going[name] = unit
                unit.stop(grace_s)
        until = self._office.clock() + grace_s + KILL_MARGIN_S
        while any(self._units.get(name) is unit for name, unit in going.items()):
            left_s = until - self._office.clock()
            if left_s <= 0:
                return
            ended = asyncio.get_running_loop().create_future()
            self._ends.append(ended)
            await asyncio.wait([ended], timeout=left_s)

    def names(self) -> list[str]:
        """Those that run, or are on their way up or down."""
        return sorted(self._units)

    def facts(self, name: str) -> DaemonFacts:
        """What is known of it, whether it runs or not."""
        unit = self._units.get(name)
        log = self._office.folder(name) / "log"
        if unit is None:
            return DaemonFacts(name=name, log=str(log) if log.exists() else None)
        health, reason = unit.condition
        program = unit if isinstance(unit, Program) else None
        ear = None if program is None else program.ear
        return DaemonFacts(
            name=name,
            pid=unit.pid,
            started_ms=unit.started_ms if isinstance(unit, Inside) else unit.run.started_ms,
            ready=unit.ready,
            stopping=unit.stopping,
            adopted=unit.adopted,
            inside=program is None,
            status=unit.status,
            health=health if program is None or program.vouched or reason else None,
            reason=reason,
            saturation=unit.saturation,
            log=None if program is None else str(log),
            heard=0 if ear is None else ear.heard,
            refused=0 if ear is None else ear.refused + ear.strangers,
            throttled=0 if ear is None else ear.throttled,
        )

    def log(self, name: str) -> DaemonLog | None:
        """Its output, of earlier runs too. None when it never wrote any, or runs inside the agent."""
        if name in self._logs:
            return self._logs[name]
        if name not in self._specs or not (self._office.folder(name) / "log").exists():
            return None
        return self._log_of(name)

    async def close(self) -> None:
        """Lets go of everything; the processes run on, and the next `begin` finds them. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        units, self._units = list(self._units.values()), {}
        for unit in units:
            unit.let_go()
        for log in self._logs.values():
            await log.settle()
        self._lock.release()

    # --- inside

    def _start_program(self, spec: DaemonSpec) -> None:
        self._units[spec.name] = Program.start(self._office, spec, self._log_of(spec.name))

    async def _search(self, lost: list[Run]) -> None:
        """Finds the processes of runs whose agent was killed before it noted them."""
        for attempt in range(2):
            wanted = {run.id for run in lost if run.leader is None}
            if not wanted:
                return
            if attempt:
                await asyncio.sleep(SEARCH_AGAIN_S)
            found = await asyncio.to_thread(marked, wanted)
            for run in lost:
                if run.leader is None:
                    run.leader = leader_among(found.get(run.id, ()))

    async def _bury(self, runs: list[Run]) -> None:
        """Ends what is left of runs whose process is gone. An end that nobody watched is a crash, but where the host
        went down with it."""
        found = await asyncio.to_thread(marked, {run.id for run in runs})
        for run in runs:
            kill_marked(found.get(run.id, ()), run.id)
            path = self._office.run_file(run.daemon)
            path.unlink(missing_ok=True)
            if run.leader is None or run.asked:
                continue
            if run.boot == boot_id():
                self._office.tell(DaemonLifecycle(run.daemon, "crashed", reason=UNWATCHED))
            else:
                self._office.trouble(run.daemon, UNWATCHED)

    def _log_of(self, name: str) -> DaemonLog:
        if name not in self._logs:
            self._logs[name] = DaemonLog(self._office.folder(name) / "log", rouse=self._rouse)
        return self._logs[name]

    def _ended(self, name: str) -> None:
        self._units.pop(name, None)
        ends, self._ends = self._ends, []
        for waiting in ends:
            if not waiting.done():
                waiting.set_result(None)

    def _sweep(self) -> None:
        self._timer = None
        self._warm = False
        for unit in tuple(self._units.values()):
            self._warm |= unit.sweep()
        for log in self._logs.values():
            if log.followed:
                log.poll()
                self._warm = True
        self._schedule()

    def _rouse(self) -> None:
        """Somebody begins to follow a log."""
        if not self._warm:
            self._warm = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is None and not self._closed and (self._units or self._warm):
            every_s = WARM_S if self._warm else SWEEP_S
            self._timer = asyncio.get_running_loop().call_later(every_s, self._sweep)
