"""The daemons of this node as they are, and what each signal of one means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from agent.meshos.backoff import Backoff
from agent.meshos.events import BackoffRestored, DaemonHealth, DaemonIntent, DaemonLifecycle, Id

if TYPE_CHECKING:
    from agent.meshos.actual import MeshOsState
    from agent.meshos.own import Transition


class Daemon:
    """One daemon. `running`: its process is there; `ready`: and does its work. `stopping`: we asked it to end, so
    its end is no crash. `restart`: it shall end and be started again. `ran`: it has run since the cordon, so a
    cordon does not hold it back."""

    __slots__ = (
        "applied_until_ms",
        "backoff",
        "ever_started",
        "health",
        "ran",
        "ready",
        "reason",
        "restart",
        "restarts",
        "running",
        "saturation",
        "since_ms",
        "started_ms",
        "stopping",
        "version",
    )

    def __init__(self, now_ms: int) -> None:
        self.running = self.ready = self.ever_started = self.stopping = self.restart = self.ran = False
        self.since_ms = now_ms
        self.started_ms: int | None = None
        self.health: DaemonHealth | None = None
        """None until it tells: it counts as healthy once started."""
        self.reason = ""
        self.saturation: float | None = None
        self.restarts = 0
        self.backoff = Backoff()
        self.applied_until_ms: int | None = None
        """The gate that ApplyBackoff told of last."""
        self.version: str | None = None
        """Of what runs, where that is known."""

    @property
    def well(self) -> bool:
        """It is ready, and doesn't say that it is not healthy."""
        return self.ready and self.health in (None, DaemonHealth.HEALTHY)

    def trouble(self) -> str | None:
        """Why it makes its node Degraded, in words."""
        if self.backoff.looping:
            return "crash-looping"
        if self.running and self.health is DaemonHealth.UNHEALTHY:
            return "unhealthy"
        return None


def lifecycle(state: MeshOsState, event: DaemonLifecycle) -> Transition | None:
    """A daemon started, ended, or told how it is. Any of it shows that a start arrived."""
    key = event.daemon
    daemon = state.daemon(key)
    state.free(("start_daemon", key))
    if event.signal in ("starting", "started"):
        _started(state, key, daemon, event)
    elif event.signal == "health":
        daemon.health, daemon.reason = event.health, event.reason
    elif event.signal == "saturation":
        value = event.saturation
        daemon.saturation = None if value is None or math.isnan(value) else min(1.0, max(0.0, value))
    else:
        _ended(state, key, daemon, event)
    return changed(state, key, daemon)


def _started(state: MeshOsState, key: Id, daemon: Daemon, event: DaemonLifecycle) -> None:
    """A process that gets ready is the one that was starting: what was asked of it meanwhile still stands."""
    fresh = not daemon.running
    ready = event.signal == "started"
    if fresh:
        daemon.restarts += daemon.ever_started
        daemon.started_ms = state.now_ms
        daemon.health, daemon.reason, daemon.saturation = None, "", None
    if fresh or ready is not daemon.ready:
        daemon.since_ms = state.now_ms
    if fresh or daemon.ready:
        daemon.stopping = daemon.restart = False
        daemon.version = event.version
    daemon.running = daemon.ever_started = daemon.ran = True
    daemon.ready = ready
    _compare(state, key, daemon)


def _compare(state: MeshOsState, key: Id, daemon: Daemon) -> None:
    """One that runs as another version than is wanted shall end and be started again."""
    wanted = state.desired.daemons.get(key)
    if wanted is not None and wanted.run and daemon.running and daemon.version is not None:
        daemon.restart = daemon.restart or daemon.version != wanted.version


def _ended(state: MeshOsState, key: Id, daemon: Daemon, event: DaemonLifecycle) -> None:
    now_ms, config = state.now_ms, state.config
    run_ms = None if daemon.started_ms is None else now_ms - daemon.started_ms
    short = run_ms is not None and run_ms < config.short_run_ms
    crashed = not daemon.stopping and (event.signal == "crashed" or short)
    daemon.reason = event.reason
    if crashed and event.signal == "exited_cleanly":
        daemon.reason = event.reason or f"exited after {run_ms} ms"
    if daemon.running:
        daemon.since_ms = now_ms
    daemon.running = daemon.ready = daemon.stopping = daemon.restart = False
    daemon.version = None
    daemon.started_ms = daemon.health = daemon.saturation = None
    state.free(("stop_daemon", key))
    daemon.backoff.ended(run_ms, config)
    if crashed:
        daemon.since_ms = now_ms
        daemon.backoff.crashed(now_ms, config)
        if daemon.backoff.until_ms is not None:
            state.wake(daemon.backoff.until_ms, "gate", key)


def changed(state: MeshOsState, key: Id, daemon: Daemon) -> Transition | None:
    """Notes that a daemon changed; the move this node makes by it, if it degrades or recovers."""
    _look_at(state, key)
    trouble = daemon.trouble()
    if trouble == state.troubled.get(key):
        return None
    if trouble is None:
        del state.troubled[key]
    else:
        state.troubled[key] = trouble
    state.changed.add("local")
    return state.life.settle(state.causes, state.now_ms, f"daemon {key} no longer troubled")


def elapsed(state: MeshOsState, key: Id) -> Transition | None:
    """The gate of a daemon may be over."""
    daemon = state.daemons.get(key)
    if daemon is None or not daemon.backoff.elapse(state.now_ms):
        return None
    return changed(state, key, daemon)


def crashed(state: MeshOsState) -> list[BackoffRestored]:
    """What the next process of this node has to know of the daemons that crashed: `restored` takes it up."""
    return [
        BackoffRestored(
            key,
            backoff.until_ms,
            backoff.looping,
            backoff.delay_ms,
            tuple(backoff.crashes),
            daemon.since_ms,
            daemon.reason,
        )
        for key, daemon in state.daemons.items()
        if (backoff := daemon.backoff).until_ms is not None or backoff.crashes
    ]


def restored(state: MeshOsState, event: BackoffRestored) -> Transition | None:
    """A daemon had crashed before this process began."""
    key, daemon, now_ms = event.daemon, state.daemon(event.daemon), state.now_ms
    backoff = daemon.backoff
    backoff.restore(event.until_ms, event.looping, event.delay_ms, event.crashes_ms, now_ms, state.config)
    if not daemon.running:
        daemon.since_ms, daemon.reason = min(event.since_ms, now_ms), event.reason
    if backoff.until_ms is not None:
        state.wake(backoff.until_ms, "gate", key)
    return changed(state, key, daemon)


def intent(state: MeshOsState, event: DaemonIntent) -> None:
    """What is wanted of a daemon; a change frees what was asked for."""
    key = event.daemon
    if not state.desired.daemon_intent(event):
        return
    state.free(("start_daemon", key))
    state.free(("stop_daemon", key))
    if (daemon := state.daemons.get(key)) is not None:
        _compare(state, key, daemon)
    _look_at(state, key)


def _look_at(state: MeshOsState, key: Id) -> None:
    """Has the next pass and the next snapshot look at a daemon, and at those that are started after it."""
    for each in (key, *state.desired.followers.get(key, ())):
        state.work.daemons.add(each)
        state.changed_daemons.add(each)
    state.changed.add("daemons")
