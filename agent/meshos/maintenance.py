"""The maintenance of one node: its states, the arcs between them, and when the next one is due.

An operator's op moves the node into entering and exiting at once. Every further move is first asked for
(CommitMaintenanceTransition) and made when it comes back as observed, along an arc of `ARCS` only; so all who
see the node fold the same walk. A repeated observation changes nothing, a late one that no longer fits neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.meshos.states import MaintenanceState

ACTIVE = MaintenanceState.ACTIVE
ENTERING = MaintenanceState.ENTERING
MAINTENANCE = MaintenanceState.MAINTENANCE
EXITING = MaintenanceState.EXITING
RECOVERY = MaintenanceState.RECOVERY
DRAIN_FAILED = MaintenanceState.DRAIN_FAILED

ENTERED_FROM = frozenset({ACTIVE, RECOVERY, EXITING, DRAIN_FAILED})
EXITED_FROM = frozenset({ENTERING, MAINTENANCE, DRAIN_FAILED})
ARCS: frozenset[tuple[MaintenanceState, MaintenanceState]] = frozenset(
    {(state, ENTERING) for state in ENTERED_FROM}
    | {(state, EXITING) for state in EXITED_FROM}
    | {(ENTERING, MAINTENANCE), (ENTERING, DRAIN_FAILED), (EXITING, RECOVERY), (RECOVERY, ACTIVE)}
)
"""The legal moves. The only table of them."""

DRAINING = frozenset({ENTERING, MAINTENANCE, DRAIN_FAILED})
"""States in which the node runs no daemons, counts as no holder, and shows as Draining."""


@dataclass(slots=True)
class Maintenance:
    """Where this node stands. Times are loop times, anchored on the last tick."""

    state: MaintenanceState = ACTIVE
    since_ms: int | None = None
    """None: it was always active."""
    deadline_at_ms: int | None = None
    """Of entering; None in every other state."""
    reason: str = ""
    """Why the drain failed."""
    by: str | None = None
    op_id: str | None = None

    @property
    def draining(self) -> bool:
        return self.state in DRAINING

    def enter(self, now_ms: int, deadline_ms: int, by: str | None, op_id: str | None) -> bool:
        """An operator's enter: begins, or gives one that has begun a new deadline. False: it has no effect."""
        if self.state is not ENTERING and self.state not in ENTERED_FROM:
            return False
        if self.state is not ENTERING:
            self._move(ENTERING, now_ms)
        self.deadline_at_ms, self.by, self.op_id = now_ms + max(0, deadline_ms), by, op_id
        return True

    def exit(self, now_ms: int, by: str | None, op_id: str | None) -> bool:
        """An operator's exit, which is also how an entering is cancelled. False: it has no effect."""
        if self.state not in EXITED_FROM:
            return False
        self._move(EXITING, now_ms)
        self.by, self.op_id = by, op_id
        return True

    def observed(
        self, state: MaintenanceState, reason: str | None, now_ms: int, deadline_ms: int
    ) -> bool | None:
        """A committed transition came back. None: no legal one, ignored; False: it stands already.

        `deadline_ms` is for an entering that was observed and not told by an op."""
        if state is self.state:
            return False
        if (self.state, state) not in ARCS:
            return None
        self._move(state, now_ms)
        if state is ENTERING:
            self.deadline_at_ms = now_ms + deadline_ms
        if state is DRAIN_FAILED:
            self.reason = reason or "its deadline passed"
        return True

    def _move(self, state: MaintenanceState, now_ms: int) -> None:
        self.state, self.since_ms = state, now_ms
        self.deadline_at_ms, self.reason = None, ""


def due(
    maintenance: Maintenance, now_ms: int, left: list[str], unhealthy: bool, recovery_ramp_ms: int
) -> tuple[MaintenanceState, str | None] | None:
    """The transition to ask for now, with its reason, or None.

    `left`: what keeps this node from being empty, in words; `unhealthy`: a desired daemon doesn't run well. An
    entering that is met on the tick of its deadline is met."""
    state, since_ms = maintenance.state, maintenance.since_ms or 0
    if state is ENTERING:
        if not left:
            return MAINTENANCE, None
        deadline_ms = maintenance.deadline_at_ms
        if deadline_ms is not None and now_ms >= deadline_ms:
            took_s = (deadline_ms - since_ms) / 1000
            return DRAIN_FAILED, f"not empty after {took_s:g} s: {', '.join(left)}"
    elif state is EXITING and not unhealthy:
        return RECOVERY, None
    elif state is RECOVERY and now_ms >= since_ms + recovery_ramp_ms:
        return ACTIVE, None
    return None
