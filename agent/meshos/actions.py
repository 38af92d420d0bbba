"""What reconcile asks for: one frozen struct an action, told apart by its `kind`.

An action is named by its kind and what it is about (`target`, beside the fields that go out); while one is in
flight, the same is not asked for again. `document` gives the fields that a recorded or replayed action shows.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import msgspec

from agent.meshos.events import Id
from agent.meshos.states import MaintenanceState

Key: TypeAlias = tuple[str, Id | None]


class StartDaemon(msgspec.Struct, frozen=True, tag_field="kind", tag="start_daemon"):
    """Start a daemon that is wanted here and doesn't run."""

    KIND: ClassVar[str] = "start_daemon"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    daemon: Id

    @property
    def target(self) -> Id:
        return self.daemon


class StopDaemon(msgspec.Struct, frozen=True, tag_field="kind", tag="stop_daemon"):
    """Have a daemon end; from the loop time `deadline_ms` on it is killed."""

    KIND: ClassVar[str] = "stop_daemon"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    daemon: Id
    deadline_ms: int

    @property
    def target(self) -> Id:
        return self.daemon


class ApplyBackoff(msgspec.Struct, frozen=True, tag_field="kind", tag="apply_backoff"):
    """A daemon that is wanted is held back until a loop time. It stands once it is written back."""

    KIND: ClassVar[str] = "apply_backoff"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = True

    daemon: Id
    until_ms: int

    @property
    def target(self) -> Id:
        return self.daemon


class PullReplica(msgspec.Struct, frozen=True, tag_field="kind", tag="pull_replica"):
    """Get a copy of a chain from another holder."""

    KIND: ClassVar[str] = "pull_replica"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    chain: Id
    source: Id

    @property
    def target(self) -> Id:
        return self.chain


class DropReplica(msgspec.Struct, frozen=True, tag_field="kind", tag="drop_replica"):
    """Give up this node's copy of a chain."""

    KIND: ClassVar[str] = "drop_replica"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    chain: Id

    @property
    def target(self) -> Id:
        return self.chain


class RequestPlacement(msgspec.Struct, frozen=True, tag_field="kind", tag="request_placement"):
    """Find one more holder for a chain led here, none of `exclude`."""

    KIND: ClassVar[str] = "request_placement"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    chain: Id
    exclude: tuple[Id, ...]

    @property
    def target(self) -> Id:
        return self.chain


class RequestEviction(msgspec.Struct, frozen=True, tag_field="kind", tag="request_eviction"):
    """Have a holder give up a chain led here. `by_score`: the scheduler's, which backpressure defers."""

    KIND: ClassVar[str] = "request_eviction"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    chain: Id
    victim: Id
    by_score: bool = False

    @property
    def target(self) -> Id:
        return self.chain


class MigrateBlob(
    msgspec.Struct, frozen=True, tag_field="kind", tag="migrate_blob", rename={"receiver": "target"}
):
    """Have another node take a copy of an artifact that only this one has. `receiver` goes out as `target`."""

    KIND: ClassVar[str] = "migrate_blob"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    blob: Id
    receiver: Id

    @property
    def target(self) -> Id:
        return self.blob


class MarkAvoid(msgspec.Struct, frozen=True, tag_field="kind", tag="mark_avoid"):
    """Keep away from a peer for `ttl_ms`. It stands once it is written back, so it is never in flight."""

    KIND: ClassVar[str] = "mark_avoid"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = True

    peer: Id
    reason: str
    ttl_ms: int

    @property
    def target(self) -> Id:
        return self.peer


class CommitMaintenanceTransition(
    msgspec.Struct,
    frozen=True,
    tag_field="kind",
    tag="commit_maintenance_transition",
    rename={"state": "target"},
):
    """Commit this node's next maintenance state. `state` goes out as `target`; `reason` is given for
    drain_failed."""

    KIND: ClassVar[str] = "commit_maintenance_transition"
    ENDS_AT_WRITE_BACK: ClassVar[bool] = False

    state: MaintenanceState
    reason: str | None = None

    @property
    def target(self) -> Id:
        return self.state.value


Action: TypeAlias = (
    StartDaemon
    | StopDaemon
    | ApplyBackoff
    | PullReplica
    | DropReplica
    | RequestPlacement
    | RequestEviction
    | MigrateBlob
    | MarkAvoid
    | CommitMaintenanceTransition
)

DAEMON_KINDS = frozenset({"start_daemon", "stop_daemon", "apply_backoff"})
CHAIN_KINDS = frozenset({"pull_replica", "drop_replica", "request_placement", "request_eviction"})


def key_of(action: Action) -> Key:
    """What names an action: its kind and target."""
    return action.KIND, action.target


def document(action: Action) -> dict[str, Any]:
    """The action as it is shown: `kind` and its fields."""
    shown: dict[str, Any] = msgspec.to_builtins(action)
    shown.pop("by_score", None)
    if "exclude" in shown:
        shown["exclude"] = list(shown["exclude"])
    return shown
