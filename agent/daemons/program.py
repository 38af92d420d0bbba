"""One process of a daemon, from its start or its adoption to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agent.daemons.checking import watch
from agent.daemons.controls import Courier, commands_env
from agent.daemons.launching import environment, known_user, launch, let_go, other_user, stop_signal
from agent.daemons.log import DaemonLog
from agent.daemons.notify import Ear, Notice, socket_name
from agent.daemons.process import (
    RUN_MARK,
    UNKNOWN_END,
    End,
    ProcessId,
    boot_id,
    end_of,
    identify,
    pidfd_of,
    signal_group,
    signal_one,
    stat_of,
)
from agent.daemons.runs import Run
from agent.daemons.voice import Condition, Voice
from agent.executor import DispatchError
from agent.meshos.controls import DaemonControl, Shutdown
from agent.meshos.events import DaemonHealth, DaemonLifecycle
from agent.spec.model import DaemonSpec, Resources

ABORT_S = 2.0
"""From the SIGABRT of a daemon that its watchdog gave up to its SIGKILL: time for a core."""
UNKILLABLE_S = 5.0
"""A process still there so long after SIGKILL is told of as trouble."""
ADOPTED_START_S = 20.0
"""How long an adopted daemon that was not ready yet gets at least: it may have to say it again."""


@dataclass
class Office:
    """What every daemon of a supervisor works with."""

    place: Path
    node: str
    mesh: str
    tell: Callable[[DaemonLifecycle], None]
    trouble: Callable[[str, str], None]
    ended: Callable[[str], None]
    clock: Callable[[], float]
    room_for: Callable[[str, Resources | None], bool]
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def folder(self, name: str) -> Path:
        return self.place / name

    def run_file(self, name: str) -> Path:
        return self.place / name / "run.json"


class Program:
    """A process and all that listens to it. `start` or `adopt` comes first; `office.ended` is called at its end."""

    def __init__(self, office: Office, run: Run, log: DaemonLog, *, adopted: bool) -> None:
        self.run = run
        self.adopted = adopted
        self.status = ""
        self.stopping = False
        """It says that it is ending, or was told to."""
        self.ear: Ear | None = None
        self.log = log
        self._office = office
        self._loop = asyncio.get_running_loop()
        self._leader_fd: int | None = None
        self._main_fd: int | None = None
        self._voice = Voice(run.daemon, self._tell, (run.health, run.reason))
        self._env = environment(run.spec, self._told_in_environment())
        self._courier = Courier(
            run.spec,
            self._env,
            socket_name(office.node, run.daemon, run.token, "c"),
            pid=lambda: self.pid,
            send_signal=self._signal_main,
            trouble=self._trouble,
        )
        self._failure = ""
        """Why we end it, when nobody asked for that."""
        self._start_by: float | None = None
        self._heard_at = 0.0
        self._kill_at: float | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._checking: asyncio.Task[None] | None = None
        self.vouched = False
        """Whether its health was told, by itself or by its check; before that nobody knows it."""
        self._killed = self._over = False

    @property
    def asked(self) -> bool:
        """It was told to end."""
        return self.run.asked

    @classmethod
    def start(cls, office: Office, spec: DaemonSpec, log: DaemonLog) -> Program:
        """Executes it. DispatchError when that can't be done; then nothing is left of it."""
        token = secrets.token_hex(5)
        run = Run(
            daemon=spec.name,
            id=secrets.token_hex(16),
            token=token,
            boot=boot_id(),
            spec=spec,
            started_ms=time.time_ns() // 1_000_000,
        )
        stop_signal(spec)
        other_user(spec)
        program = cls(office, run, log, adopted=False)
        path = office.run_file(spec.name)
        try:
            program._listen()
            output = log.open()
            try:
                run.write(path)
                pid, fd = launch(spec, program._env, output)
            finally:
                os.close(output)
        except BaseException as why:
            program._put_away()
            if isinstance(why, OSError):
                raise DispatchError(f"{path.parent}: {why.strerror}; it needs a disk with room") from why
            raise
        program._leader_fd = program._main_fd = fd
        program.run.leader = identify(pid)
        program._write()
        program._begin(waited_s=0.0)
        return program

    @classmethod
    def adopt(cls, office: Office, run: Run, log: DaemonLog) -> Program | None:
        """Takes over what an earlier agent process left running; None when it is gone. Its children, if this is
        the same process executed anew, are still its children."""
        if run.leader is None:
            return None
        leader_fd = pidfd_of(run.leader)
        main_fd = leader_fd if run.main is None else pidfd_of(run.main)
        if main_fd is None:
            if leader_fd is not None:
                os.close(leader_fd)
            return None
        program = cls(office, run, log, adopted=True)
        program._leader_fd, program._main_fd = leader_fd, main_fd
        program.stopping = run.asked
        try:
            program._listen()
        except OSError as why:
            program._trouble(f"not heard: its notification socket: {why.strerror}")
        program._begin(waited_s=max(0.0, time.time() - run.started_ms / 1000))
        return program

    @property
    def pid(self) -> int:
        who = self.run.main or self.run.leader
        return 0 if who is None else who.pid

    @property
    def ready(self) -> bool:
        return self.run.ready

    @property
    def spec(self) -> DaemonSpec:
        """The spec with which it was started."""
        return self.run.spec

    @property
    def condition(self) -> Condition:
        return self._voice.condition

    @property
    def saturation(self) -> float | None:
        return self._voice.saturation

    def stop(self, grace_s: float) -> None:
        """Asks it to end, and kills its whole group after the grace period; a later call can only shorten it."""
        grace_s = max(0.0, min(self.spec.grace_s, grace_s))
        kill_at = self._loop.time() + grace_s
        if not self.run.asked:
            self.run.asked = self.stopping = True
            self._write()
            self._disarm("start", "watchdog")
            self._courier.bring(Shutdown(int(grace_s * 1000)))
        if self._kill_at is None:
            for number in (stop_signal(self.spec), signal.SIGCONT):
                self._signal_all(number)
        if self._kill_at is None or kill_at < self._kill_at:
            self._kill_at = kill_at
            self._arm("kill", kill_at, self._kill)

    def bring(self, control: DaemonControl) -> None:
        """Hands it a control; a Shutdown comes with `stop` alone."""
        if not isinstance(control, Shutdown):
            self._courier.bring(control)

    def sweep(self) -> bool:
        """Looks at its output; True when there was something new."""
        warm = self.log.poll()
        if self.log.trouble:
            self._trouble(self.log.trouble)
            self.log.trouble = ""
        return warm

    def let_go(self) -> None:
        """Stops listening and leaves it running; its file says what runs."""
        self._over = True
        self._close()

    # --- beginning

    def _told_in_environment(self) -> dict[str, str]:
        run, office = self.run, self._office
        told = {
            RUN_MARK: run.id,
            "QD_DAEMON": run.daemon,
            "QD_NODE": office.node,
            "QD_GRACE_MS": str(int(run.spec.grace_s * 1000)),
            "QD_CONTROL_SOCKET": socket_name(office.node, run.daemon, run.token, "c"),
        }
        if office.mesh:
            told["QD_MESH"] = office.mesh
        entry = known_user(run.spec)
        if entry is None or entry.pw_uid == os.geteuid():
            told["QD_SNAPSHOT"] = str(office.folder(run.daemon) / "snapshot")
        if run.spec.readiness != "none":
            told["NOTIFY_SOCKET"] = socket_name(office.node, run.daemon, run.token, "n")
            if run.spec.watchdog_s is not None:
                told["WATCHDOG_USEC"] = str(int(run.spec.watchdog_s * 1e6))
        return told

    def _listen(self) -> None:
        name = self._env.get("NOTIFY_SOCKET")
        if name is None or self.spec.readiness == "none":
            return
        uids = {0, os.geteuid()}
        if (entry := known_user(self.spec)) is not None:
            uids.add(entry.pw_uid)
        self.ear = Ear(name, uids, self._heard)

    def _begin(self, waited_s: float) -> None:
        for fd in self._fds():
            self._loop.add_reader(fd, self._process_ended, fd)
        if self.run.ready or self.spec.readiness != "sd_notify":
            self._ready()
            return
        self._tell(DaemonLifecycle(self.run.daemon, "starting"))
        least_s = ADOPTED_START_S if self.adopted else 0.0
        self._start_by = self._loop.time() + max(least_s, self.spec.start_timeout_s - waited_s)
        self._arm("start", self._start_by, self._not_ready)

    def _ready(self) -> None:
        if not self.run.ready:
            self.run.ready = True
            self._write()
        self._disarm("start")
        self._tell(DaemonLifecycle(self.run.daemon, "started"))
        self._voice.unmute()
        if self.spec.watchdog_s is not None and self.spec.readiness != "none":
            self._heard_at = self._loop.time()
            self._arm("watchdog", self._heard_at + self.spec.watchdog_s, self._bark)
        if self.spec.health is not None:
            env = commands_env(self._env, self.pid)
            self._checking = self._loop.create_task(watch(self.spec, env, self._checked))

    def _not_ready(self) -> None:
        waited_s = self.spec.start_timeout_s
        self._give_up(f"not ready: no READY=1 within {waited_s:g} s", signal.SIGKILL)

    # --- what it says

    def _heard(self, notice: Notice, sender: int) -> None:
        if self._over:
            return
        if notice.status is not None:
            self.status = notice.status
        if notice.main_pid is not None:
            self._main_is(notice.main_pid)
        if notice.watchdog:
            self._heard_at = self._loop.time()
        if notice.trouble and self.run.ready and not self.stopping:
            self._give_up("watchdog: the daemon itself asked for it", signal.SIGABRT)
        if notice.stopping:
            self.stopping = True
            self._disarm("watchdog")
        if notice.extend_s is not None and self._start_by is not None and not self.run.ready:
            self._start_by = max(self._start_by, self._loop.time() + notice.extend_s)
            self._arm("start", self._start_by, self._not_ready)
        if notice.health is not None:
            self._voice.said = notice.health
            self.vouched = True
        if notice.saturation is not None:
            self._voice.saturation = notice.saturation
        if notice.ready and not self.run.ready and not self._failure:
            self._ready()
        self._voice.changed()

    def _checked(self, condition: Condition) -> None:
        self._voice.checked = condition
        self.vouched = True
        self._voice.changed()

    def _main_is(self, pid: int) -> None:
        """Another process of its session is the one that counts from now on."""
        leader, stat = self.run.leader, stat_of(pid)
        if leader is None or pid == self.pid or stat is None or leader.pid not in (stat.session, stat.group):
            return
        who = identify(pid)
        fd = None if who is None else pidfd_of(who)
        if fd is None:
            return
        before, self._main_fd = self._main_fd, fd
        if before is not None and before != self._leader_fd:
            self._loop.remove_reader(before)
            os.close(before)
        self.run.main = who
        self._write()
        self._loop.add_reader(fd, self._process_ended, fd)

    def _bark(self) -> None:
        """The watchdog's time may be over. A loop that was held up itself accuses nobody: it listens anew."""
        period_s = self.spec.watchdog_s or 0.0
        now = self._loop.time()
        due = self._heard_at + period_s
        if now < due:
            self._arm("watchdog", due, self._bark)
        elif now - due > min(0.5, period_s):
            self._heard_at = now
            self._arm("watchdog", now + period_s, self._bark)
        else:
            self._give_up(f"watchdog: nothing heard for {period_s:g} s", signal.SIGABRT)

    # --- its end

    def _give_up(self, reason: str, number: signal.Signals) -> None:
        """Ends it of our own accord: a crash."""
        if self._failure or self.run.asked:
            return
        self._failure = reason
        self._disarm("start", "watchdog")
        if self.run.ready:
            self._voice.said = (DaemonHealth.UNHEALTHY, reason)
            self._voice.changed()
        if number == signal.SIGKILL:
            self._kill()
            return
        self._signal_main(number)
        self._signal_main(signal.SIGCONT)
        self._arm("kill", self._loop.time() + ABORT_S, self._kill)

    def _kill(self) -> None:
        self._killed = True
        self._signal_all(signal.SIGKILL)
        self._arm("unkillable", self._loop.time() + UNKILLABLE_S, self._unkillable)

    def _unkillable(self) -> None:
        self._trouble(f"process {self.pid} is still there {UNKILLABLE_S:g} s after SIGKILL")

    def _process_ended(self, fd: int) -> None:
        if self.ear is not None:
            self.ear.drain()
        if fd not in (self._main_fd, self._leader_fd):
            return
        end = end_of(fd, reap=False)
        if end is None:
            return
        self._loop.remove_reader(fd)
        if fd != self._main_fd:
            end_of(fd, reap=True)
            return
        self._signal_all(signal.SIGKILL)
        end_of(fd, reap=True)
        if self._leader_fd is not None and self._leader_fd != fd:
            let_go(self._loop, self._leader_fd)
            self._leader_fd = None
        self._ended(end)

    def _ended(self, end: End) -> None:
        if self._over:
            return
        self._over = True
        self.sweep()
        event = self._verdict(end)
        self._close()
        self._put_away()
        self._tell(event)
        self._office.ended(self.run.daemon)

    def _verdict(self, end: End) -> DaemonLifecycle:
        """What its end means."""
        name = self.run.daemon
        if self.run.asked:
            return DaemonLifecycle(name, "exited_cleanly", reason=self._farewell(end))
        if self._failure:
            return DaemonLifecycle(name, "crashed", reason=self._failure)
        if end.status == 0 and self.run.ready:
            return DaemonLifecycle(name, "exited_cleanly")
        reason = end.words() if self.run.ready else f"{end.words()} before READY=1"
        if end != UNKNOWN_END and (words := self.log.last_words()):
            reason = f"{reason}: {words}"
        return DaemonLifecycle(name, "crashed", reason=reason)

    def _farewell(self, end: End) -> str:
        if self._killed:
            return f"killed: it had not ended at its deadline, {self.spec.stop_signal} notwithstanding"
        if end in (UNKNOWN_END, End(0, None)) or end.signal == stop_signal(self.spec):
            return ""
        return end.words()

    def _put_away(self) -> None:
        with contextlib.suppress(OSError):
            self._office.run_file(self.run.daemon).unlink()
        if self.ear is not None:
            self.ear.close()

    def _close(self) -> None:
        for fd in self._fds():
            self._loop.remove_reader(fd)
            os.close(fd)
        self._leader_fd = self._main_fd = None
        self._disarm(*self._timers)
        if self._checking is not None:
            self._checking.cancel()
        self._courier.close()
        self._voice.close()
        if self.ear is not None:
            self.ear.close()

    # --- small things

    def _fds(self) -> set[int]:
        return {fd for fd in (self._leader_fd, self._main_fd) if fd is not None}

    def _tell(self, event: DaemonLifecycle) -> None:
        if event.signal == "health" and event.health is not None:
            said = self._voice.said
            if said != (self.run.health, self.run.reason) and not self._failure:
                self.run.health, self.run.reason = said
                self._write()
        self._office.tell(event)

    def _trouble(self, reason: str) -> None:
        self._office.trouble(self.run.daemon, reason)

    def _write(self) -> None:
        try:
            self.run.write(self._office.run_file(self.run.daemon))
        except OSError as why:
            self._trouble(
                f"what runs is not on disk: {why.strerror}; a restarted agent may have to search for it"
            )

    def _signal_main(self, number: signal.Signals) -> bool:
        return self._main_fd is not None and signal_one(self._main_fd, number)

    def _signal_all(self, number: signal.Signals) -> None:
        leader: ProcessId | None = self.run.leader
        if leader is not None:
            signal_group(self._leader_fd, leader.pid, self.run.id, number)
        if self.run.main is not None:
            self._signal_main(number)

    def _arm(self, what: str, at: float, then: Callable[[], None]) -> None:
        self._disarm(what)
        self._timers[what] = self._loop.call_at(at, then)

    def _disarm(self, *what: str) -> None:
        for name in what:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()
