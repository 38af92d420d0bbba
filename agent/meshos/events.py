"""What the engine folds: one frozen struct an event, told apart by its `event` tag.

`at_ms` is the loop's own time in milliseconds, stamped once when the loop takes the event; whoever publishes
leaves it alone. The same structs are the lines of a recorded run: `encode_line` and `decode_line`. A new
event is a new struct in `Event`; nothing else here changes.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent.meshos.states import MaintenanceState
from discovery.errors import LocalError

Id: TypeAlias = int | str
"""A node, chain or daemon. Numbers and strings are never equal; numbers come first."""


def by_id(key: Id) -> tuple[bool, Id]:
    """Sort key of ids: compared within their type."""
    return isinstance(key, str), key


class Health(StrEnum):
    """How the pool sees a peer: answering, answering late or suspected, not answering."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNREACHABLE = "unreachable"


class Stamped(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """What every event has."""

    at_ms: int = 0


Count: TypeAlias = Annotated[int, Meta(ge=0)]
Duration: TypeAlias = Annotated[int, Meta(ge=0)]


class DaemonHealth(StrEnum):
    """What a daemon says of itself."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


class Tick(Stamped, frozen=True, tag="tick"):
    """Time passed. `late_ms`: how much later than due the loop got to it. `polled`: how many of the events
    that follow were polled within this tick: they are folded before its reconcile, as they were live."""

    late_ms: int = 0
    polled: Count = 0


class Started(Stamped, frozen=True, tag="started"):
    """This node's process began. `updated`: it took the place of one that was Updating, on `by`'s `op_id`. `survey`: a
    `Surveyed` follows, and until then maintenance moves no further by itself."""

    updated: bool = False
    by: str | None = None
    op_id: str | None = None
    survey: bool = False


class Synced(Stamped, frozen=True, tag="synced"):
    """Synced with a first peer: joined."""


class Alone(Stamped, frozen=True, tag="alone"):
    """Nobody to look for, or nobody answered for long enough: joined, as a mesh of one."""

    reason: str = "nobody to look for"


class Stopping(Stamped, frozen=True, tag="stopping"):
    """This node is about to leave: its daemons have to end first."""

    by: str | None = None
    op_id: str | None = None


class Leaving(Stamped, frozen=True, tag="leaving"):
    """This node says goodbye; `reason` as in `node.stopping`."""

    reason: str
    by: str | None = None
    op_id: str | None = None


class UpdateStarted(Stamped, frozen=True, tag="update_started"):
    """An update op took hold; `deadline_ms` is a duration."""

    deadline_ms: int
    by: str | None = None
    op_id: str | None = None


class UpdateFailed(Stamped, frozen=True, tag="update_failed"):
    """The update changed nothing: the command or the self-check failed."""

    reason: str


class SelfHealth(Stamped, frozen=True, tag="self_health"):
    """A sample of this host's load in permille; None where it can't be measured."""

    cpu: int | None = None
    mem: int | None = None


class RttSample(Stamped, frozen=True, tag="rtt_sample"):
    """A measured round trip to a peer; null, like a number that is none, says nothing."""

    peer: Id
    rtt_ms: float | None


class NodeHealth(Stamped, frozen=True, tag="node_health"):
    """How the pool sees a peer now."""

    peer: Id
    health: Health
    reason: str = ""


class DaemonIntent(Stamped, frozen=True, tag="daemon_intent"):
    """Whether a daemon shall run, and on which node if on one only. `none` forgets the intent. `after`: which
    daemons of this node have to run well before it is started. Another `version` of one that runs restarts it.
    `held`: why it can't run here although it is wanted; as long as it is given, it does not."""

    daemon: Id
    intent: Literal["run", "stop", "none"]
    node: Id | None = None
    after: tuple[Id, ...] = ()
    version: str = ""
    held: str = ""


class DaemonLifecycle(Stamped, frozen=True, tag="daemon_lifecycle"):
    """What became of a daemon of this node, or what it says of itself. `starting`: its process is there and has
    not said yet that it is ready; `started` says so. `version`: of what it was started as, where that is known."""

    daemon: Id
    signal: Literal["starting", "started", "crashed", "exited_cleanly", "health", "saturation"]
    health: DaemonHealth | None = None
    reason: str = ""
    saturation: float | None = None
    version: str | None = None


class PlacementIntent(Stamped, frozen=True, tag="placement_intent"):
    """How many holders a chain shall have; null forgets it."""

    chain: Id
    count: Count | None


class ReplicaUpdate(Stamped, frozen=True, tag="replica_update"):
    """A node began or ceased to hold a chain. A step-down is one event: it may carry the leader that results
    (null: none)."""

    chain: Id
    change: Literal["added", "removed"]
    holder: Id
    leader: Id | UnsetType | None = UNSET


class ReplicaLeader(Stamped, frozen=True, tag="replica_leader"):
    """Who leads a chain, or nobody."""

    chain: Id
    leader: Id | None


class LocalReplicaIntent(Stamped, frozen=True, tag="local_replica_intent"):
    """Whether this node shall hold a chain; `none` forgets the intent."""

    chain: Id
    intent: Literal["hold", "drop", "none"]


class Blob(Stamped, frozen=True, tag="blob"):
    """A node began or ceased to hold an artifact."""

    blob: Id
    change: Literal["added", "removed"]
    holder: Id


class Scores(Stamped, frozen=True, tag="scores"):
    """How good each node is as a holder of a chain, 0 to 1, by the node's id as text; null: unknown."""

    chain: Id
    scores: dict[str, float | None]


AdminVerb: TypeAlias = Literal[
    "drain",
    "resume",
    "cordon",
    "uncordon",
    "enter_maintenance",
    "exit_maintenance",
    "restart_all_daemons",
    "clear_avoid_list",
    "drop_replicas",
    "invalidate_placement",
]


class AdminOp(msgspec.Struct, frozen=True):
    """An operator's will for one node. `deadline_ms` is a duration; None takes the default."""

    op: AdminVerb
    node: Id
    deadline_ms: int | None = None
    by: str | None = None
    op_id: str | None = None
    chains: tuple[Id, ...] = ()


class Admin(Stamped, frozen=True, tag="admin"):
    """An admin op that was judged and accepted."""

    admin: AdminOp


class MaintenanceObserved(Stamped, frozen=True, tag="maintenance_observed"):
    """A maintenance transition of a node came back from where it was committed."""

    node: Id
    state: MaintenanceState
    reason: str | None = None


class Restored(Stamped, frozen=True, tag="restored"):
    """What this node's last process left in force: its own cordon with the daemons that `ran` in spite of it, and
    its maintenance, `age_ms` old and due in `left_ms`. It comes before anything else that moves either."""

    cordoned: bool = False
    maintenance: MaintenanceState = MaintenanceState.ACTIVE
    reason: str = ""
    age_ms: Duration = 0
    left_ms: int | None = None
    by: str | None = None
    op_id: str | None = None
    ran: tuple[Id, ...] = ()


class Surveyed(Stamped, frozen=True, tag="surveyed"):
    """What runs here, what is held here and what shall run here has been told since the start: what was not told isn't
    there."""


class BackoffRestored(Stamped, frozen=True, tag="backoff_restored"):
    """What this node's last process knew of a daemon that had crashed, in loop times of this one (`crashes_ms` oldest
    first): its gate, its latest delay and the crashes that still count. It ceased to run at `since_ms`."""

    daemon: Id
    until_ms: int | None
    looping: bool
    delay_ms: Duration
    crashes_ms: tuple[int, ...]
    since_ms: int
    reason: str = ""


class PeerState(Stamped, frozen=True, tag="peer_state"):
    """What a peer says of itself that placement has to know."""

    peer: Id
    cordoned: bool = False
    draining: bool = False
    maintenance: MaintenanceState = MaintenanceState.ACTIVE


class Backpressure(Stamped, frozen=True, tag="backpressure"):
    """The actions that wait crossed a limit: `depth` of them now."""

    on: bool
    depth: Count


class ActionOutcome(Stamped, frozen=True, tag="action_outcome"):
    """How an action that reconcile emitted ended. `retry_after_ms` is a duration (with it, `failed` is not the
    end: the executor tries again), `until_ms` a loop time."""

    kind: str
    target: Id | None
    outcome: Literal["dispatched", "failed", "gated", "dropped"]
    reason: str = ""
    retry_after_ms: int | None = None
    until_ms: int | None = None


class LocalFailure(Stamped, frozen=True, tag="local_failure"):
    """Something of this node's own went wrong and was survived: a probe raised, a callback, the recording."""

    source: str
    target: str
    reason: str


class Shutdown(Stamped, frozen=True, tag="shutdown"):
    """The loop ends; whatever is queued behind is not folded."""


Event: TypeAlias = (
    Tick
    | Started
    | Synced
    | Alone
    | Stopping
    | Leaving
    | UpdateStarted
    | UpdateFailed
    | SelfHealth
    | RttSample
    | NodeHealth
    | PeerState
    | DaemonIntent
    | DaemonLifecycle
    | PlacementIntent
    | ReplicaUpdate
    | ReplicaLeader
    | LocalReplicaIntent
    | Blob
    | Scores
    | Admin
    | MaintenanceObserved
    | Restored
    | Surveyed
    | BackoffRestored
    | Backpressure
    | ActionOutcome
    | LocalFailure
    | Shutdown
)

_decoder = msgspec.json.Decoder(Event)
_encoder = msgspec.json.Encoder()


def encode_line(event: Event) -> bytes:
    """One line of a recorded run, its newline included."""
    return _encoder.encode(event) + b"\n"


def decode_line(line: bytes | str) -> Event:
    """The event of a recorded line; LocalError says what is wrong with it. `NaN` and `Infinity`, which other
    writers of JSON put where a number is none, are read."""
    try:
        event: Event
        try:
            event = _decoder.decode(line)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            event = msgspec.convert(json.loads(line), Event)
    except (ValueError, RecursionError) as why:
        raise LocalError(f"not an event: {why}") from why
    if isinstance(event, DaemonLifecycle) and event.signal == "health" and event.health is None:
        raise LocalError("not an event: the signal `health` needs a `health`")
    return event
