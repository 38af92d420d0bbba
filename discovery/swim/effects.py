"""What the engine asks of its surroundings, and what it tells them: frozen values, in the order they must be
done."""

from __future__ import annotations

from dataclasses import dataclass

from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Member


@dataclass(frozen=True, slots=True)
class Send:
    """Seal `body` and send it as one datagram."""

    addr: Addr
    body: bytes


@dataclass(frozen=True, slots=True)
class Connect:
    """Make a fresh TCP connect to each address and report each by `connect_result`, with this incarnation."""

    node: int
    incarnation: int
    addrs: tuple[Addr, ...]


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Keep links to exactly these members (the next present ones in id order)."""

    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PushPull:
    """Do a push/pull with this member over a link: `push_pull_request` → its `push_pull_answer` →
    `push_pull_merge`."""

    node: int


@dataclass(frozen=True, slots=True)
class PersistIncarnation:
    """Must be durable before any later effect is carried out."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class LeaveDone:
    """The goodbye is acknowledged by enough members, or has had its time: the process may go."""


@dataclass(frozen=True, slots=True)
class Synced:
    """The first exchange with another member is done: this node knows its mesh."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A member not in view before."""

    member: Member


@dataclass(frozen=True, slots=True)
class Changed:
    """A member in view changed: its state (old ≠ new), or else its record or whether it is suspected.

    `member` is the living row; `old`, `new` and `incarnation` are of the moment. `evidence` and `by` (ids) go with
    `new` Dead.
    """

    member: Member
    old: State
    new: State
    evidence: Evidence | None = None
    by: tuple[int, ...] = ()
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class Evicted:
    """A member is gone from view: with `left` at its goodbye, else when it has been shown Dead long
    enough."""

    id: int
    name: str
    kind: str
    mesh: str
    evidence: Evidence
    incarnation: int
    by: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Counted:
    """Something was refused or dropped; the same code is counted in `counters`."""

    code: str
    sender: int | None = None
    addr: Addr | None = None


Effect = (
    Send
    | Connect
    | Sentinels
    | PushPull
    | PersistIncarnation
    | LeaveDone
    | Synced
    | Joined
    | Changed
    | Evicted
    | Counted
)
