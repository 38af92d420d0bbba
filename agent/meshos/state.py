"""The state of the engine and its fold: one event in, the state changed, this node's own moves out.

The fold mutates its own state and touches nothing else: no clock, no file, no randomness. The same events
give the same state, and no sequence of them makes it raise. Time is the event's `at_ms`; one that runs
backwards counts as the latest seen.

`changed` collects which sections of the snapshot no longer hold; whoever publishes a snapshot clears it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from agent.meshos.actions import Action, Key
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    ActionOutcome,
    Admin,
    Alone,
    Event,
    Health,
    Id,
    Leaving,
    LocalFailure,
    NodeHealth,
    RttSample,
    SelfHealth,
    Started,
    Synced,
    Tick,
    UpdateFailed,
    UpdateStarted,
)
from agent.meshos.health import OwnHealth
from agent.meshos.own import OwnLife, Transition, refusal


class Rtt(msgspec.Struct, frozen=True):
    """The latest round trip to a peer, and when it was folded."""

    rtt_ms: float
    at_ms: int


class PeerHealth(msgspec.Struct, frozen=True):
    """The latest health of a peer, and when it was folded."""

    health: Health
    reason: str
    at_ms: int


class AvoidEntry(msgspec.Struct, frozen=True):
    """A peer to keep away from until a loop time."""

    reason: str
    since_ms: int
    until_ms: int


class Emitted(msgspec.Struct, frozen=True):
    """An action that went out and whose end nobody reported yet."""

    action: Action
    at_ms: int
    in_flight: bool
    """Not to be asked for again."""


class FailureRecord(msgspec.Struct, frozen=True):
    """Something that went wrong and was survived. `retry_after_ms` is a duration, `until_ms` a loop time."""

    at_ms: int
    source: str
    action: str | None
    target: Id | None
    reason: str
    retry_after_ms: int | None = None
    until_ms: int | None = None


class Counts:
    """What only ever grows: the `stats` section."""

    __slots__ = ("actions_dropped", "actions_emitted", "failures", "ops_refused", "transitions")

    def __init__(self) -> None:
        self.transitions = self.actions_emitted = self.actions_dropped = self.failures = self.ops_refused = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in sorted(self.__slots__)}


class MeshOsState:
    """Everything the engine knows. Samples stand in the order of their times: what expires is in front."""

    __slots__ = (
        "avoid",
        "changed",
        "changed_peers",
        "config",
        "counts",
        "emitted",
        "failures",
        "health",
        "last_tick_ms",
        "life",
        "now_ms",
        "own_health",
        "rtt",
        "this_node",
    )

    def __init__(self, this_node: Id, config: MeshOsConfig | None = None) -> None:
        self.this_node = this_node
        self.config = config or MeshOsConfig()
        self.now_ms = 0
        """The latest time folded."""
        self.last_tick_ms = 0
        self.life = OwnLife()
        self.own_health = OwnHealth()
        self.rtt: dict[Id, Rtt] = {}
        self.health: dict[Id, PeerHealth] = {}
        self.avoid: dict[Id, AvoidEntry] = {}
        self.emitted: dict[Key, Emitted] = {}
        self.failures: deque[FailureRecord] = deque(maxlen=self.config.recent_failures_capacity)
        self.counts = Counts()
        self.changed: set[str] = set()
        self.changed_peers: set[Id] = set()

    @property
    def causes(self) -> list[str]:
        """Why this node is Degraded by itself, in words."""
        return self.own_health.causes(self.config)

    def fail(self, record: FailureRecord) -> None:
        """Puts a failure on the ring."""
        self.failures.append(record)
        self.counts.failures += 1
        self.changed.update(("recent_failures", "stats"))


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
    oldest_ms = now_ms - config.sample_ttl_ms
    for table in (state.rtt, state.health):
        while table and table[first := next(iter(table))].at_ms < oldest_ms:
            del table[first]
            state.changed.add("peers")
            state.changed_peers.add(first)
    gone = [peer for peer, entry in state.avoid.items() if entry.until_ms <= now_ms]
    for peer in gone:
        del state.avoid[peer]
        state.changed.add("avoid_list")
    while state.emitted:
        key = next(iter(state.emitted))
        if now_ms - state.emitted[key].at_ms < config.in_flight_ms:
            break
        del state.emitted[key]
        state.changed.add("recently_emitted")
    return None


def _started(state: MeshOsState, event: Started) -> Transition | None:
    return state.life.started(event, state.now_ms)


def _synced(state: MeshOsState, event: Synced) -> Transition | None:
    return _joined(state, "synced with a first peer")


def _alone(state: MeshOsState, event: Alone) -> Transition | None:
    return _joined(state, event.reason)


def _joined(state: MeshOsState, reason: str) -> Transition | None:
    state.life.joined = True
    return state.life.settle(state.causes, state.now_ms, reason)


def _leaving(state: MeshOsState, event: Leaving) -> Transition | None:
    if state.life.leaving is None:
        state.life.leaving = event
    return state.life.settle(state.causes, state.now_ms, event.reason, event.by, event.op_id)


def _update_started(state: MeshOsState, event: UpdateStarted) -> Transition | None:
    if refusal(state.life.state, "update"):
        state.counts.ops_refused += 1
        state.changed.add("stats")
        return None
    state.life.update_started(event, state.now_ms)
    return state.life.settle(state.causes, state.now_ms, "update", event.by, event.op_id)


def _update_failed(state: MeshOsState, event: UpdateFailed) -> Transition | None:
    state.changed.add("local")
    return state.life.update_failed(event, state.causes, state.now_ms)


def _admin(state: MeshOsState, event: Admin) -> Transition | None:
    op, life = event.admin, state.life
    if op.node != state.this_node:
        return None
    if refusal(life.state, op.op):
        state.counts.ops_refused += 1
        state.changed.add("stats")
        return None
    did = life.admin(op, state.now_ms, state.config)
    state.changed.add("local")
    return life.settle(state.causes, state.now_ms, did, op.by, op.op_id)


def _self_health(state: MeshOsState, event: SelfHealth) -> Transition | None:
    before = state.life.reason
    recovered = state.own_health.sample(event.cpu, event.mem, state.config)
    move = state.life.settle(state.causes, state.now_ms, ", ".join(recovered))
    if state.life.reason != before:
        state.changed.add("local")
    return move


def _rtt_sample(state: MeshOsState, event: RttSample) -> Transition | None:
    peer = event.peer
    if peer == state.this_node or not 0 <= event.rtt_ms < math.inf:
        return None
    state.rtt.pop(peer, None)
    state.rtt[peer] = Rtt(float(event.rtt_ms), state.now_ms)
    state.changed.add("peers")
    state.changed_peers.add(peer)
    return None


def _node_health(state: MeshOsState, event: NodeHealth) -> Transition | None:
    peer = event.peer
    if peer == state.this_node:
        return None
    state.health.pop(peer, None)
    state.health[peer] = PeerHealth(event.health, event.reason, state.now_ms)
    state.changed.add("peers")
    state.changed_peers.add(peer)
    return None


def _action_outcome(state: MeshOsState, event: ActionOutcome) -> Transition | None:
    if state.emitted.pop((event.kind, event.target), None) is not None:
        state.changed.add("recently_emitted")
    if event.outcome == "dropped":
        state.counts.actions_dropped += 1
    if event.outcome != "dispatched":
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
    return None


def _local_failure(state: MeshOsState, event: LocalFailure) -> Transition | None:
    state.fail(FailureRecord(state.now_ms, event.source, None, event.target, event.reason))
    return None


_FOLDS: dict[type, Callable[[MeshOsState, Any], Transition | None]] = {
    Tick: _tick,
    Started: _started,
    Synced: _synced,
    Alone: _alone,
    Leaving: _leaving,
    UpdateStarted: _update_started,
    UpdateFailed: _update_failed,
    Admin: _admin,
    SelfHealth: _self_health,
    RttSample: _rtt_sample,
    NodeHealth: _node_health,
    ActionOutcome: _action_outcome,
    LocalFailure: _local_failure,
}
"""What each event does. Shutdown is not here: it ends the loop and says nothing about the state."""
