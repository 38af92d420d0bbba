"""What the engine shows: an immutable picture of its state, made of sections that are shared while they hold.

A snapshot may be read from any thread, at any later time: it holds loop times, and ages are computed when it
is turned into a document. A section that did not change is the very same object as before, and when none did,
so is the snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from agent.meshos.actual import Emitted, FailureRecord, MeshOsState
from agent.meshos.daemons import Daemon
from agent.meshos.events import DaemonHealth, Health, Id, by_id
from agent.meshos.own import Drain
from agent.meshos.peers import UNTOUCHED, AvoidEntry
from agent.meshos.reconcile import held_by_cordon, waits_for
from agent.meshos.shown import document
from agent.meshos.states import MaintenanceState
from discovery.lifecycle import State

__all__ = ["Snapshot", "SnapshotBuilder", "document"]


class DaemonView(msgspec.Struct, frozen=True):
    """A daemon, and what is wanted of it. `state` is a word of `qd daemons`."""

    intent: str | None
    pinned: Id | None
    state: str
    health: DaemonHealth | None
    reason: str
    saturation: float | None
    restarts: int
    until_ms: int | None
    """The gate: a loop time before which it is not started."""
    since_ms: int | None
    """When it began to run, or ceased to; None: it never was there."""
    held_by_cordon: bool
    waits_for: Id | None
    held: str
    """Why it can't run here although it is wanted."""


class ReplicaView(msgspec.Struct, frozen=True):
    """A chain: who holds it and how many shall, who leads, and what this node shall do about it."""

    holders: tuple[Id, ...]
    desired: int | None
    leader: Id | None
    intent: str | None
    eviction_pending: bool
    last_rebalance_ms: int | None


class PeerView(msgspec.Struct, frozen=True):
    """A peer's latest samples; None where there is none, or none recent enough. And what is asked of it."""

    rtt_ms: float | None
    rtt_at_ms: int | None
    health: Health | None
    health_reason: str
    health_at_ms: int | None
    maintenance: MaintenanceState
    cordoned: bool
    draining: bool


class DrainView(msgspec.Struct, frozen=True):
    """A drain in force. `left`: what is still to be stopped or moved, in words."""

    since_ms: int
    deadline_at_ms: int
    by: str | None
    op_id: str | None
    left: tuple[str, ...] = ()


class LocalView(msgspec.Struct, frozen=True):
    """This node's own life."""

    state: State
    since_ms: int
    reason: str
    by: str | None
    op_id: str | None
    cordoned: bool
    drain: DrainView | None
    update_deadline_at_ms: int | None
    backpressure: bool


class MaintenanceView(msgspec.Struct, frozen=True):
    """This node's maintenance. `since_ms` is None while it was never in any. `left`: what keeps it from being
    empty, in words."""

    state: MaintenanceState
    since_ms: int | None
    deadline_at_ms: int | None
    reason: str
    by: str | None
    op_id: str | None
    left: tuple[str, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """The sections. Times in them are loop times in milliseconds; `at_ms` is when this snapshot was made."""

    at_ms: int
    this_node: Id
    local: LocalView
    local_maintenance: MaintenanceView
    daemons: Mapping[Id, DaemonView]
    replicas: Mapping[Id, ReplicaView]
    peers: Mapping[Id, PeerView]
    avoid_list: Mapping[Id, AvoidEntry]
    recently_emitted: tuple[Emitted, ...]
    recent_failures: tuple[FailureRecord, ...]
    stats: Mapping[str, int]


class SnapshotBuilder:
    """Makes snapshots of one state, each from the one before."""

    def __init__(self, state: MeshOsState) -> None:
        self._state = state
        self._settled()
        self.last = Snapshot(
            state.now_ms,
            state.this_node,
            _local(state),
            _maintenance(state),
            _daemons(state),
            _replicas(state),
            _peers(state),
            MappingProxyType(dict(state.avoid)),
            tuple(state.emitted.values()),
            tuple(state.failures),
            MappingProxyType(state.counts.as_dict()),
        )

    def build(self) -> Snapshot:
        """The snapshot of the state now; the last one itself when nothing changed since."""
        state, last = self._state, self.last
        changed = state.changed
        if not changed:
            return last
        if state.draining and not changed.isdisjoint(("daemons", "replicas")):
            changed.update(("local", "local_maintenance"))
        self.last = Snapshot(
            state.now_ms,
            state.this_node,
            _local(state) if "local" in changed else last.local,
            _maintenance(state) if "local_maintenance" in changed else last.local_maintenance,
            _daemons(state, last.daemons) if "daemons" in changed else last.daemons,
            _replicas(state, last.replicas) if "replicas" in changed else last.replicas,
            _peers(state, last.peers) if "peers" in changed else last.peers,
            MappingProxyType(dict(state.avoid)) if "avoid_list" in changed else last.avoid_list,
            tuple(state.emitted.values()) if "recently_emitted" in changed else last.recently_emitted,
            tuple(state.failures) if "recent_failures" in changed else last.recent_failures,
            MappingProxyType(state.counts.as_dict()) if "stats" in changed else last.stats,
        )
        self._settled()
        return self.last

    def _settled(self) -> None:
        state = self._state
        state.changed.clear()
        state.changed_peers.clear()
        state.changed_daemons.clear()
        state.changed_chains.clear()


def _local(state: MeshOsState) -> LocalView:
    life = state.life
    return LocalView(
        life.state,
        life.since_ms,
        life.reason,
        life.by,
        life.op_id,
        life.cordoned,
        _drain(state, life.drain),
        life.update.deadline_at_ms if life.update else None,
        state.backpressure,
    )


def _drain(state: MeshOsState, drain: Drain | None) -> DrainView | None:
    if drain is None:
        return None
    return DrainView(drain.since_ms, drain.deadline_at_ms, drain.by, drain.op_id, tuple(state.left()))


def _maintenance(state: MeshOsState) -> MaintenanceView:
    mine = state.maintenance
    left = tuple(state.left()) if mine.draining else ()
    return MaintenanceView(
        mine.state, mine.since_ms, mine.deadline_at_ms, mine.reason, mine.by, mine.op_id, left
    )


def _daemons(state: MeshOsState, before: Mapping[Id, DaemonView] | None = None) -> Mapping[Id, DaemonView]:
    """All daemons, or those of `before` with the changed ones brought up to date."""
    views = dict(before or {})
    rows, intents = state.daemons, state.desired.daemons
    for key in state.changed_daemons if before is not None else rows.keys() | intents.keys():
        daemon, intent = rows.get(key), intents.get(key)
        if daemon is None and intent is None:
            views.pop(key, None)
            continue
        run = intent is not None and intent.run and intent.node in (None, state.this_node)
        row = daemon or _NEVER_SEEN
        views[key] = DaemonView(
            None if intent is None else "run" if intent.run else "stop",
            None if intent is None else intent.node,
            _word(state, key, row),
            row.health,
            row.reason,
            row.saturation,
            row.restarts,
            row.backoff.until_ms,
            row.since_ms if daemon is not None else None,
            run and not row.running and held_by_cordon(state, row),
            waits_for(state, key, state.this_node) if run and not row.running else None,
            intent.held if intent is not None and run else "",
        )
    return MappingProxyType(views)


_NEVER_SEEN = Daemon(0)


def _word(state: MeshOsState, key: Id, daemon: Daemon) -> str:
    """The state of a daemon in one word."""
    if daemon.running:
        return "stopping" if daemon.stopping else "running" if daemon.ready else "starting"
    if ("start_daemon", key) in state.in_flight:
        return "starting"
    if daemon.backoff.until_ms is None:
        return "stopped"
    return "crash_looping" if daemon.backoff.looping else "backing_off"


def _replicas(state: MeshOsState, before: Mapping[Id, ReplicaView] | None = None) -> Mapping[Id, ReplicaView]:
    """All chains, or those of `before` with the changed ones brought up to date."""
    views = dict(before or {})
    chains, counts, intents = state.chains, state.desired.counts, state.desired.local
    for key in state.changed_chains if before is not None else chains.keys() | counts.keys() | intents.keys():
        chain, count, intent = chains.get(key), counts.get(key), intents.get(key)
        if chain is not None:
            holders = tuple(sorted(chain.holders, key=by_id))
            pending, rebalanced_ms = chain.pending, chain.last_rebalance_ms
            views[key] = ReplicaView(holders, count, chain.leader, intent, pending, rebalanced_ms)
        elif count is not None or intent is not None:
            views[key] = ReplicaView((), count, None, intent, False, None)
        else:
            views.pop(key, None)
    return MappingProxyType(views)


def _peers(state: MeshOsState, before: Mapping[Id, PeerView] | None = None) -> Mapping[Id, PeerView]:
    """All peers, or those of `before` with the changed ones brought up to date."""
    views = dict(before or {})
    rtts, healths, mirrors = state.rtt, state.health, state.mirrors
    for peer in state.changed_peers if before is not None else rtts.keys() | healths.keys() | mirrors.keys():
        rtt, health, mirror = rtts.get(peer), healths.get(peer), mirrors.get(peer, UNTOUCHED)
        if rtt is None and health is None and mirror is UNTOUCHED:
            views.pop(peer, None)
            continue
        views[peer] = PeerView(
            rtt.rtt_ms if rtt else None,
            rtt.at_ms if rtt else None,
            health.health if health else None,
            health.reason if health else "",
            health.at_ms if health else None,
            mirror.maintenance,
            mirror.cordoned,
            mirror.draining,
        )
    return MappingProxyType(views)
