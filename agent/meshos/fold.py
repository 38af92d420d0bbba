"""The fold: one event in, the state changed, this node's own moves out.

It mutates its own state and touches nothing else: no clock, no file, no randomness. The same events give the
same state, and no sequence of them makes it raise. Time is the event's `at_ms`; one that runs backwards counts
as the latest seen. Maintenance is anchored on the last tick.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from copy import copy
from typing import Any

from agent.meshos import daemons, peers, replicas
from agent.meshos.actual import FailureRecord, MeshOsState
from agent.meshos.controls import BackpressureOff, BackpressureOn, DrainFinish, DrainStart
from agent.meshos.events import (
    ActionOutcome,
    Admin,
    AdminOp,
    Alone,
    BackoffRestored,
    Backpressure,
    Blob,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    Leaving,
    LocalFailure,
    LocalReplicaIntent,
    MaintenanceObserved,
    NodeHealth,
    PeerState,
    PlacementIntent,
    ReplicaLeader,
    ReplicaUpdate,
    Restored,
    RttSample,
    Scores,
    SelfHealth,
    Started,
    Stopping,
    Surveyed,
    Synced,
    Tick,
    UpdateFailed,
    UpdateStarted,
)
from agent.meshos.maintenance import DRAINING, ENTERED_FROM, ENTERING, EXITED_FROM, EXITING
from agent.meshos.own import Transition, refusal
from agent.meshos.states import MaintenanceState

COMMIT = "commit_maintenance_transition"


def fold(state: MeshOsState, event: Event) -> Transition | None:
    """Takes one event; the move this node made by it, if any. Never raises, whatever the sequence."""
    if event.at_ms > state.now_ms:
        state.now_ms = event.at_ms
    taken = _FOLDS.get(type(event))
    if taken is None:
        return None
    move = taken(state, event)
    if move is not None:
        state.counts.transitions += 1
        state.changed.update(("local", "stats"))
    return move


def _tick(state: MeshOsState, event: Tick) -> Transition | None:
    now_ms = state.last_tick_ms = state.now_ms
    config = state.config
    state.own_health.tick(event.late_ms, config)
    peers.expire(state)
    gone = [peer for peer, entry in state.avoid.items() if entry.until_ms <= now_ms]
    for peer in gone:
        del state.avoid[peer]
        state.work.peers.add(peer)
        state.changed.add("avoid_list")
    while state.emitted:
        key = next(iter(state.emitted))
        if now_ms - state.emitted[key].at_ms < config.in_flight_ms:
            break
        del state.emitted[key]
        state.changed.add("recently_emitted")
    move = None
    while state.timers and state.timers[0][0] <= now_ms:
        _, _, what, about = heapq.heappop(state.timers)
        move = _TIMERS[what](state, about) or move
    return move


def _flight_over(state: MeshOsState, key: Any) -> None:
    if state.in_flight.get(key, state.now_ms + 1) <= state.now_ms:
        state.free(key)


def _cooled(state: MeshOsState, chain: Any) -> None:
    state.work.chains.add(chain)


_TIMERS: dict[str, Callable[[MeshOsState, Any], Transition | None]] = {
    "gate": daemons.elapsed,
    "dead": peers.died,
    "flight": _flight_over,
    "cooled": _cooled,
}

# --- this node's life


def _started(state: MeshOsState, event: Started) -> Transition | None:
    state.surveyed = not event.survey
    return state.life.started(event, state.now_ms)


def _synced(state: MeshOsState, event: Synced) -> Transition | None:
    return _joined(state, "synced with a first peer")


def _alone(state: MeshOsState, event: Alone) -> Transition | None:
    return _joined(state, event.reason)


def _joined(state: MeshOsState, reason: str) -> Transition | None:
    state.life.joined = True
    return state.life.settle(state.causes, state.now_ms, reason)


def _stopping(state: MeshOsState, event: Stopping) -> Transition | None:
    def act() -> str:
        state.life.stopping = state.life.stopping or event
        return "stopping"

    return _operate(state, act, event.by, event.op_id)


def _leaving(state: MeshOsState, event: Leaving) -> Transition | None:
    if state.life.leaving is None:
        state.life.leaving = event
        state.work.all_daemons = True
    return state.life.settle(state.causes, state.now_ms, event.reason, event.by, event.op_id)


def _update_started(state: MeshOsState, event: UpdateStarted) -> Transition | None:
    if refusal(state.life.state, "update"):
        _refused(state)
        return None
    state.life.update_started(event, state.now_ms)
    state.work.all_daemons = True
    return state.life.settle(state.causes, state.now_ms, "update", event.by, event.op_id)


def _update_failed(state: MeshOsState, event: UpdateFailed) -> Transition | None:
    state.changed.add("local")
    state.work.all_daemons = True
    return state.life.update_failed(event, state.causes, state.now_ms)


def _self_health(state: MeshOsState, event: SelfHealth) -> Transition | None:
    before = state.life.reason
    recovered = state.own_health.sample(event.cpu, event.mem, state.config)
    move = state.life.settle(state.causes, state.now_ms, ", ".join(recovered))
    if state.life.reason != before:
        state.changed.add("local")
    return move


def _refused(state: MeshOsState) -> None:
    state.counts.ops_refused += 1
    state.changed.add("stats")


# --- operators


def _admin(state: MeshOsState, event: Admin) -> Transition | None:
    op = event.admin
    if op.node != state.this_node:
        _admin_elsewhere(state, op)
        return None
    if refusal(state.life.state, op.op, state.maintenance.state):
        _refused(state)
        return None
    do = _OPS.get(op.op)
    if do is not None:
        do(state, op)
        return None
    return _operate(state, lambda: _life_op(state, op), op.by, op.op_id)


def _life_op(state: MeshOsState, op: AdminOp) -> str:
    """An op that moves this node's own life; what it did, in a word or two."""
    if op.op == "enter_maintenance":
        default_ms = state.config.maintenance_deadline_ms
        deadline_ms = default_ms if op.deadline_ms is None else op.deadline_ms
        _free_commits(state)
        state.maintenance.enter(state.last_tick_ms, deadline_ms, op.by, op.op_id)
        return "maintenance"
    if op.op == "exit_maintenance":
        _free_commits(state)
        state.maintenance.exit(state.last_tick_ms, op.by, op.op_id)
        return "leaving maintenance"
    return state.life.admin(op, state.now_ms, state.config)


def _operate(
    state: MeshOsState, act: Callable[[], str], by: str | None = None, op_id: str | None = None
) -> Transition | None:
    """Lets `act` change this node's own life, and draws what follows for daemons, replicas and its state."""
    life, drained, cordoned = state.life, state.draining, state.life.cordoned
    told, stood = _told_to_drain(state), copy(state.maintenance)
    did = act()
    state.changed.add("local")
    if state.maintenance != stood:
        state.changed.add("local_maintenance")
    if state.draining is not drained:
        state.recount(state.this_node)
        state.work.all_daemons = True
    if life.cordoned is not cordoned:
        state.work.all_daemons = True
        state.changed_daemons.update(state.daemons, state.desired.daemons)
        if state.changed_daemons:
            state.changed.add("daemons")
        if life.cordoned:
            for daemon in state.daemons.values():
                daemon.ran = daemon.running
    if _told_to_drain(state) is not told:
        state.controls.append(DrainFinish() if told else DrainStart(_grace_ms(state)))
    move = life.settle(state.causes, state.now_ms, did, by, op_id)
    life.explain()
    return move


def _told_to_drain(state: MeshOsState) -> bool:
    return state.life.drain is not None or state.maintenance.state is ENTERING


def _grace_ms(state: MeshOsState) -> int:
    drain, maintenance = state.life.drain, state.maintenance
    if drain is not None:
        return max(0, drain.deadline_at_ms - state.now_ms)
    return max(0, (maintenance.deadline_at_ms or 0) - state.last_tick_ms)


def _free_commits(state: MeshOsState) -> None:
    for key in [key for key in state.in_flight if key[0] == COMMIT]:
        state.free(key)


def _restart_all(state: MeshOsState, op: AdminOp) -> None:
    """Marks what runs and shall run: each is stopped, and started again through its gate."""
    for key, daemon in state.daemons.items():
        intent = state.desired.daemons.get(key)
        if daemon.running and intent is not None and intent.run:
            daemon.restart = True
            state.work.daemons.add(key)


def _clear_avoid_list(state: MeshOsState, op: AdminOp) -> None:
    peers.clear_avoided(state)


def _drop_replicas(state: MeshOsState, op: AdminOp) -> None:
    for chain in op.chains:
        if state.desired.local_intent(chain, "drop"):
            replicas.intent_changed(state, chain)


def _invalidate_placement(state: MeshOsState, op: AdminOp) -> None:
    replicas.invalidate(state)


_OPS: dict[str, Callable[[MeshOsState, AdminOp], None]] = {
    "restart_all_daemons": _restart_all,
    "clear_avoid_list": _clear_avoid_list,
    "drop_replicas": _drop_replicas,
    "invalidate_placement": _invalidate_placement,
}


def _admin_elsewhere(state: MeshOsState, op: AdminOp) -> None:
    """Mirrors what an op means for another node; only that node acts on it."""
    before = state.mirrors.get(op.node, peers.UNTOUCHED).maintenance
    match op.op:
        case "drain":
            peers.mirror(state, op.node, drained=True)
        case "resume":
            if before not in DRAINING:
                peers.mirror(state, op.node, drained=False)
        case "cordon" | "uncordon":
            peers.mirror(state, op.node, cordoned=op.op == "cordon")
        case "enter_maintenance":
            if before in ENTERED_FROM:
                peers.mirror(state, op.node, maintenance=ENTERING)
        case "exit_maintenance":
            if before in EXITED_FROM:
                peers.mirror(state, op.node, maintenance=EXITING)


def _maintenance_observed(state: MeshOsState, event: MaintenanceObserved) -> Transition | None:
    if event.node != state.this_node:
        peers.mirror(state, event.node, maintenance=event.state)
        return None
    _free_commits(state)

    def act() -> str:
        moved = state.maintenance.observed(
            event.state, event.reason, state.last_tick_ms, state.config.maintenance_deadline_ms
        )
        if moved is None:
            state.counts.transitions_refused += 1
            state.changed.add("stats")
        return f"maintenance: {event.state.value}"

    return _operate(state, act, state.maintenance.by, state.maintenance.op_id)


def _restored(state: MeshOsState, event: Restored) -> Transition | None:
    def act() -> str:
        state.life.cordon = event.cordoned
        maintenance, now_ms = state.maintenance, state.last_tick_ms or state.now_ms
        maintenance.state, maintenance.reason = event.maintenance, event.reason
        maintenance.since_ms = now_ms - event.age_ms
        maintenance.deadline_at_ms = None
        if event.maintenance is MaintenanceState.ENTERING:
            default_ms = state.config.maintenance_deadline_ms
            left_ms = default_ms if event.left_ms is None else max(0, event.left_ms)
            maintenance.deadline_at_ms = now_ms + left_ms
        maintenance.by, maintenance.op_id = event.by, event.op_id
        return "taken up after a restart"

    move = _operate(state, act, event.by, event.op_id)
    for key in event.ran:
        state.daemon(key).ran = True
    return move


def _surveyed(state: MeshOsState, event: Surveyed) -> None:
    state.surveyed = True


# --- actions


def _backpressure(state: MeshOsState, event: Backpressure) -> None:
    if event.on is state.backpressure:
        return
    state.backpressure = event.on
    state.counts.backpressure_edges += 1
    state.changed.update(("stats", "local"))
    level = min(1.0, event.depth / state.config.backpressure_high)
    state.controls.append(BackpressureOn(level) if event.on else BackpressureOff())


def _action_outcome(state: MeshOsState, event: ActionOutcome) -> None:
    key = (event.kind, event.target)
    if state.emitted.pop(key, None) is not None:
        state.changed.add("recently_emitted")
    state.changed.add("stats")
    counts = state.counts
    if event.outcome == "dispatched":
        counts.actions_dispatched += 1
        return
    if event.outcome == "failed":
        counts.actions_failed += 1
    elif event.outcome == "gated":
        counts.actions_gated += 1
    else:
        counts.actions_dropped += 1
    if event.retry_after_ms is None or event.outcome != "failed":
        _given_up(state, event)
    state.fail(
        FailureRecord(
            state.now_ms,
            "action",
            event.kind,
            event.target,
            event.reason or event.outcome,
            event.retry_after_ms,
            event.until_ms,
        )
    )


def _given_up(state: MeshOsState, event: ActionOutcome) -> None:
    """The executor won't do it: it is free to be asked for again, and what it stood for did not happen."""
    if event.kind == COMMIT:
        _free_commits(state)
        return
    state.free((event.kind, event.target))
    if event.target is None:
        return
    if event.kind == "stop_daemon" and (daemon := state.daemons.get(event.target)):
        daemon.stopping = False
    elif event.kind == "request_eviction" and (chain := state.chains.get(event.target)):
        chain.pending = False
        replicas.touched(state, event.target)


def _local_failure(state: MeshOsState, event: LocalFailure) -> None:
    state.fail(FailureRecord(state.now_ms, event.source, None, event.target, event.reason))


_FOLDS: dict[type, Callable[[MeshOsState, Any], Transition | None]] = {
    Tick: _tick,
    Started: _started,
    Synced: _synced,
    Alone: _alone,
    Stopping: _stopping,
    Leaving: _leaving,
    UpdateStarted: _update_started,
    UpdateFailed: _update_failed,
    SelfHealth: _self_health,
    RttSample: peers.rtt_sample,
    NodeHealth: peers.node_health,
    PeerState: peers.peer_state,
    DaemonIntent: daemons.intent,
    DaemonLifecycle: daemons.lifecycle,
    PlacementIntent: replicas.placement,
    ReplicaUpdate: replicas.update,
    ReplicaLeader: replicas.leader,
    LocalReplicaIntent: replicas.local,
    Blob: replicas.blob,
    Scores: replicas.scores,
    Admin: _admin,
    MaintenanceObserved: _maintenance_observed,
    Restored: _restored,
    Surveyed: _surveyed,
    BackoffRestored: daemons.restored,
    Backpressure: _backpressure,
    ActionOutcome: _action_outcome,
    LocalFailure: _local_failure,
}
"""What each event does. Shutdown is not here: it ends the loop and says nothing about the state."""
