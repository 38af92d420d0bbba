"""A node's engine played by hand: events at times, and what each tick asks for."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from agent.meshos.actions import document
from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import DaemonControl
from agent.meshos.events import (
    Admin,
    AdminOp,
    Blob,
    DaemonHealth,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    Id,
    LocalReplicaIntent,
    MaintenanceObserved,
    PlacementIntent,
    ReplicaUpdate,
    Scores,
    Tick,
)
from agent.meshos.own import Transition
from agent.meshos.reconcile import run_pass
from agent.meshos.snapshot import SnapshotBuilder
from agent.meshos.snapshot import document as snapshot_document
from agent.meshos.state import MeshOsState, fold
from agent.meshos.states import MaintenanceState

ME = 100


class Play:
    """One node. `now_ms` is the time of what comes next."""

    def __init__(self, config: MeshOsConfig | None = None) -> None:
        self.state = MeshOsState(ME, config)
        self.now_ms = 0
        self.moves: list[Transition] = []
        self.controls: list[DaemonControl] = []

    def at(self, now_ms: int) -> Play:
        self.now_ms = now_ms
        return self

    def tell(self, *events: Event) -> Play:
        for event in events:
            move = fold(self.state, msgspec.structs.replace(event, at_ms=self.now_ms))
            if move is not None:
                self.moves.append(move)
            while self.state.controls:
                self.controls.append(self.state.controls.popleft())
        return self

    def tick(self, now_ms: int | None = None) -> list[dict[str, Any]]:
        """What a tick asks for, as it is shown."""
        if now_ms is not None:
            self.now_ms = now_ms
        self.tell(Tick())
        return [document(action) for action in run_pass(self.state)]

    def snapshot(self) -> dict[str, Any]:
        return snapshot_document(SnapshotBuilder(self.state).last, self.now_ms)

    # --- words for events

    def want(
        self, daemon: Id, intent: Literal["run", "stop", "none"] = "run", node: Id | None = None
    ) -> Play:
        return self.tell(DaemonIntent(daemon, intent, node))

    def signal(self, daemon: Id, signal: Any, **fields: Any) -> Play:
        return self.tell(DaemonLifecycle(daemon, signal, **fields))

    def healthy(self, daemon: Id, health: str) -> Play:
        return self.signal(daemon, "health", health=DaemonHealth(health))

    def running(self, *daemons: Id) -> Play:
        """Daemons that are wanted and run."""
        for daemon in daemons:
            self.want(daemon).signal(daemon, "started")
        return self

    def holds(self, chain: Id, *holders: Id, leader: Id | None = None) -> Play:
        for holder in holders:
            self.tell(ReplicaUpdate(chain, "added", holder))
        if leader is not None:
            self.tell(ReplicaUpdate(chain, "added", holders[0], leader=leader))
        return self

    def gone(self, chain: Id, holder: Id) -> Play:
        return self.tell(ReplicaUpdate(chain, "removed", holder))

    def place(self, chain: Id, count: int | None) -> Play:
        return self.tell(PlacementIntent(chain, count))

    def local(self, chain: Id, intent: Literal["hold", "drop", "none"]) -> Play:
        return self.tell(LocalReplicaIntent(chain, intent))

    def score(self, chain: Id, **scores: float | None) -> Play:
        return self.tell(Scores(chain, {name.removeprefix("n"): value for name, value in scores.items()}))

    def blob(self, blob: Id, *holders: Id) -> Play:
        return self.tell(*[Blob(blob, "added", holder) for holder in holders])

    def admin(self, op: Any, node: Id = ME, **fields: Any) -> Play:
        return self.tell(Admin(AdminOp(op, node, **fields)))

    def observed(self, state: str, node: Id = ME, reason: str | None = None) -> Play:
        return self.tell(MaintenanceObserved(node, MaintenanceState(state), reason))


def start(daemon: Id) -> dict[str, Any]:
    return {"kind": "start_daemon", "daemon": daemon}


def stop(daemon: Id, deadline_ms: int) -> dict[str, Any]:
    return {"kind": "stop_daemon", "daemon": daemon, "deadline_ms": deadline_ms}


def backoff(daemon: Id, until_ms: int) -> dict[str, Any]:
    return {"kind": "apply_backoff", "daemon": daemon, "until_ms": until_ms}


def commit(target: str, reason: str | None = None) -> dict[str, Any]:
    return {"kind": "commit_maintenance_transition", "target": target, "reason": reason}


def evict(chain: Id, victim: Id) -> dict[str, Any]:
    return {"kind": "request_eviction", "chain": chain, "victim": victim}


def pull(chain: Id, source: Id) -> dict[str, Any]:
    return {"kind": "pull_replica", "chain": chain, "source": source}


def drop(chain: Id) -> dict[str, Any]:
    return {"kind": "drop_replica", "chain": chain}


def place(chain: Id, *exclude: Id) -> dict[str, Any]:
    return {"kind": "request_placement", "chain": chain, "exclude": list(exclude)}
