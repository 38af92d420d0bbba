"""What the engine folds: one frozen struct an event, told apart by its `event` tag.

`at_ms` is the loop's own time in milliseconds, stamped once when the loop takes the event; whoever publishes
leaves it alone. The same structs are the lines of a recorded run: `encode_line` and `decode_line`. A new
event is a new struct in `Event`; nothing else here changes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, TypeAlias

import msgspec

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


class Tick(Stamped, frozen=True, tag="tick"):
    """Time passed. `late_ms`: how much later than due the loop got to it."""

    late_ms: int = 0


class Started(Stamped, frozen=True, tag="started"):
    """This node's process began. `updated`: it took the place of one that was Updating, on `by`'s `op_id`."""

    updated: bool = False
    by: str | None = None
    op_id: str | None = None


class Synced(Stamped, frozen=True, tag="synced"):
    """Synced with a first peer: joined."""


class Alone(Stamped, frozen=True, tag="alone"):
    """Nobody to look for, or nobody answered for long enough: joined, as a mesh of one."""

    reason: str = "nobody to look for"


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
    """A measured round trip to a peer."""

    peer: Id
    rtt_ms: float


class NodeHealth(Stamped, frozen=True, tag="node_health"):
    """How the pool sees a peer now."""

    peer: Id
    health: Health
    reason: str = ""


class AdminOp(msgspec.Struct, frozen=True):
    """An operator's will for one node. `deadline_ms` is a duration; None takes the default."""

    op: Literal["drain", "resume", "cordon", "uncordon"]
    node: Id
    deadline_ms: int | None = None
    by: str | None = None
    op_id: str | None = None


class Admin(Stamped, frozen=True, tag="admin"):
    """An admin op that was judged and accepted."""

    admin: AdminOp


class ActionOutcome(Stamped, frozen=True, tag="action_outcome"):
    """How an action that reconcile emitted ended. `retry_after_ms` is a duration, `until_ms` a loop time."""

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
    | Leaving
    | UpdateStarted
    | UpdateFailed
    | SelfHealth
    | RttSample
    | NodeHealth
    | Admin
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
    """The event of a recorded line; LocalError says what is wrong with it."""
    try:
        event: Event = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as why:
        raise LocalError(f"not an event: {why}") from why
    return event
