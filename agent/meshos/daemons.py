"""The daemons of this node as they are, and what each signal of one means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from agent.meshos.backoff import Backoff
from agent.meshos.events import DaemonHealth, DaemonIntent, DaemonLifecycle, Id

if TYPE_CHECKING:
    from agent.meshos.actual import MeshOsState
    from agent.meshos.own import Transition


class Daemon:
    """One daemon. `stopping`: we asked it to end, so its end is no crash. `restart`: it shall end and be
    started again. `ran`: it has run since the cordon, so a cordon does not hold it back."""

    __slots__ = (
        "applied_until_ms",
        "backoff",
        "ever_started",
        "health",
        "ran",
        "reason",
        "restart",
        "restarts",
        "running",
        "saturation",
        "since_ms",
        "started_ms",
        "stopping",
    )

    def __init__(self, now_ms: int) -> None:
        self.running = self.ever_started = self.stopping = self.restart = self.ran = False
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

    @property
    def well(self) -> bool:
        """It runs, and doesn't say that it is not healthy."""
        return self.running and self.health in (None, DaemonHealth.HEALTHY)

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
    if event.signal == "started":
        _started(state, daemon)
    elif event.signal == "health":
        daemon.health, daemon.reason = event.health, event.reason
    elif event.signal == "saturation":
        value = event.saturation
        daemon.saturation = None if value is None or math.isnan(value) else min(1.0, max(0.0, value))
    else:
        _ended(state, key, daemon, event)
    return changed(state, key, daemon)


def _started(state: MeshOsState, daemon: Daemon) -> None:
    if not daemon.running:
        daemon.restarts += daemon.ever_started
        daemon.started_ms = daemon.since_ms = state.now_ms
        daemon.health, daemon.reason, daemon.saturation = None, "", None
    daemon.running = daemon.ever_started = daemon.ran = True
    daemon.stopping = daemon.restart = False


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
    daemon.running = daemon.stopping = daemon.restart = False
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
    state.work.daemons.add(key)
    state.changed.add("daemons")
    state.changed_daemons.add(key)
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


def intent(state: MeshOsState, event: DaemonIntent) -> None:
    """What is wanted of a daemon; a change frees what was asked for."""
    key = event.daemon
    if not state.desired.daemon_intent(event):
        return
    state.free(("start_daemon", key))
    state.free(("stop_daemon", key))
    state.work.daemons.add(key)
    state.changed.add("daemons")
    state.changed_daemons.add(key)
