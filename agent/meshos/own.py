"""This node's own lifecycle: what it says it is, and why.

The state is never set: it follows from what is known (leaving, updating, joined, drained or in maintenance,
healthy), in that order of precedence, which is why an operator's override beats automatic health and why ending an update
brings back exactly what it interrupted. `lifecycle.may_move` has the last word on every move.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import AdminOp, Leaving, Started, Stopping, UpdateFailed, UpdateStarted
from agent.meshos.maintenance import DRAINING, EXITED_FROM, Maintenance
from agent.meshos.states import MaintenanceState
from discovery.errors import Refused
from discovery.lifecycle import State, may_move


class Transition(msgspec.Struct, frozen=True):
    """A move this node made, once. `old` is None at the start of a process that replaced none."""

    at_ms: int
    old: State | None
    new: State
    reason: str
    by: str | None = None
    op_id: str | None = None


class Drain(msgspec.Struct, frozen=True):
    """An operator's drain. Past `deadline_at_ms` it stays, and what is left is told."""

    since_ms: int
    deadline_at_ms: int
    by: str | None
    op_id: str | None


class Update(msgspec.Struct, frozen=True):
    """An update under way."""

    deadline_at_ms: int
    by: str | None
    op_id: str | None


@dataclass(slots=True)
class OwnLife:
    """What is known of this node's life; `state` follows from it by `settle`."""

    state: State = State.JOINING
    since_ms: int = 0
    reason: str = "starting"
    by: str | None = None
    op_id: str | None = None
    begun: bool = False
    joined: bool = False
    cordon: bool = False
    """By a cordon op of its own; a drain cordons besides."""
    drain: Drain | None = None
    maintenance: Maintenance = field(default_factory=Maintenance)
    update: Update | None = None
    stopping: Stopping | None = None
    leaving: Leaving | None = None

    @property
    def cordoned(self) -> bool:
        return self.cordon or self.drain is not None

    def target(self, degraded: bool) -> State:
        """The state that follows from what is known."""
        if self.leaving is not None:
            return State.LEAVING
        if self.update is not None:
            return State.UPDATING
        if not self.joined:
            return State.JOINING
        if self.stopping is not None or self.drain is not None or self.maintenance.draining:
            return State.DRAINING
        return State.DEGRADED if degraded else State.ALIVE

    def started(self, event: Started, now_ms: int) -> Transition | None:
        """The first move of a process: Updating → Joining where it replaced one, else out of nothing."""
        if self.begun or self.state is not State.JOINING:
            return None
        self.begun = True
        self.since_ms, self.by, self.op_id = now_ms, event.by, event.op_id
        self.reason = "updated" if event.updated else "started"
        old = State.UPDATING if event.updated else None
        return Transition(now_ms, old, State.JOINING, self.reason, event.by, event.op_id)

    def settle(
        self,
        causes: list[str],
        now_ms: int,
        reason: str = "",
        by: str | None = None,
        op_id: str | None = None,
    ) -> Transition | None:
        """Moves to the state that follows from what is known; the move, or None when there is none to make.

        `causes` are those of `OwnHealth`. `reason` explains the event that led here; where it is empty, the
        new state explains itself."""
        new = self.target(bool(causes))
        if new is self.state:
            if new is State.DEGRADED:
                self.reason = _joined(causes)
            return None
        if not may_move(self.state, new):
            return None
        if new is State.DRAINING and self.state is not State.UPDATING:
            order = self.stopping or self.drain or self.maintenance
            reason, by, op_id = self.why_draining(), order.by, order.op_id
        elif new is State.DEGRADED and self.state is not State.UPDATING:
            reason = _joined(causes)
        move = Transition(now_ms, self.state, new, reason, by, op_id)
        self.state, self.since_ms, self.reason, self.by, self.op_id = new, now_ms, reason, by, op_id
        return move

    def why_draining(self) -> str:
        """What makes it Draining, in words."""
        if self.stopping is not None:
            return "stopping"
        if self.drain is not None:
            return "drain"
        if self.maintenance.state is MaintenanceState.DRAIN_FAILED:
            return f"drain failed: {self.maintenance.reason}"
        return self.maintenance.state.value.replace("_", " ")

    def explain(self) -> None:
        """Brings the reason of a Draining that goes on up to date."""
        if self.state is State.DRAINING and not self.reason.startswith("update failed"):
            self.reason = self.why_draining()

    def admin(self, op: AdminOp, now_ms: int, config: MeshOsConfig) -> str:
        """Takes an admin op that `refusal` lets pass; what it did, in a word or two."""
        if op.op == "drain":
            deadline_ms = config.drain_deadline_ms if op.deadline_ms is None else op.deadline_ms
            since_ms = self.drain.since_ms if self.drain else now_ms
            self.drain = Drain(since_ms, now_ms + deadline_ms, op.by, op.op_id)
            return "drain"
        if op.op == "resume":
            self.drain = None
            return "resumed"
        self.cordon = op.op == "cordon"
        return "cordoned" if self.cordon else "uncordoned"

    def update_started(self, event: UpdateStarted, now_ms: int) -> None:
        """Begins an update that `refusal` lets pass."""
        self.update = Update(now_ms + event.deadline_ms, event.by, event.op_id)

    def update_failed(self, event: UpdateFailed, causes: list[str], now_ms: int) -> Transition | None:
        """Ends an update in vain: back to what it interrupted, with the reason."""
        update, self.update = self.update, None
        if update is None:
            return None
        return self.settle(causes, now_ms, f"update failed: {event.reason}", update.by, update.op_id)


def refusal(state: State, op: str, maintenance: MaintenanceState = MaintenanceState.ACTIVE) -> Refused | None:
    """Why a node in `state` and `maintenance` refuses the admin op (or `update`), or None when it may be
    applied. The fold asks the same, so what was let pass has its effect."""
    if state is State.LEAVING:
        return Refused("bad_state", "the node is leaving; it takes no more ops")
    if state is State.UPDATING:
        return Refused("in_update", "the node is updating; try again when it is back")
    if op == "update" and not may_move(state, State.UPDATING):
        return Refused("bad_state", f"the node is {state.word}; it can update once it has joined")
    if op == "resume" and maintenance in DRAINING:
        return Refused("in_maintenance", "the node is in maintenance; `qd maintenance exit` ends it")
    if op == "exit_maintenance" and maintenance not in EXITED_FROM:
        words = maintenance.value.replace("_", " ")
        return Refused("not_in_maintenance", f"there is nothing to exit: its maintenance is {words}")
    return None


def _joined(causes: list[str]) -> str:
    return ", ".join(causes)
