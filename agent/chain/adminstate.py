"""What the admin chain says at one moment: who may what, and what each node is to be."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.chain.hlc import BEGINNING, Position
from agent.operators import Line, parse
from discovery.errors import LocalError
from discovery.sshkey import PublicKey


class Grant(msgspec.Struct, frozen=True):
    """A key of the roster, or a certificate authority of it."""

    fingerprint: str
    line: str
    """As in `authorized_keys`."""
    role: str
    comment: str
    by: str | None = None
    """Who granted it; None for a key of the beginning."""
    at_ms: int | None = None
    op_id: str | None = None


class Cut(msgspec.Struct, frozen=True):
    """A key was revoked: what it signed at a later position than `upto` counts nowhere."""

    fingerprint: str
    upto: Position
    by: str
    op_id: str | None
    at: Position
    """Of the revocation that made it."""
    set_at: Position = BEGINNING
    """Of the one that set `upto`."""


class Drain(msgspec.Struct, frozen=True):
    at_ms: int
    deadline_ms: int | None
    """A duration from `at_ms`; None: the target's default."""
    by: str
    op_id: str


class Desired(msgspec.Struct, frozen=True):
    """What one node is to be. A drain cordons too, and its end lifts only what it brought."""

    cordoned: bool = False
    drain: Drain | None = None
    maintenance: bool = False
    """Whether operators want it in maintenance."""
    maintenance_deadline_ms: int | None = None
    maintenance_state: str = "active"
    """How far it has come, by its own word."""
    maintenance_reason: str | None = None
    changed: Position | None = None


class Spec(msgspec.Struct, frozen=True):
    """The spec in force. Its bytes are in its record: `AdminChain.content`."""

    op_id: str
    sha256: str
    by: str
    position: Position


class AdminState(msgspec.Struct, frozen=True):
    """The fold of the admin chain. Nodes by id text, keys by fingerprint; never changed once handed out."""

    nodes: dict[str, Desired] = {}
    roster: dict[str, Grant] = {}
    cuts: dict[str, Cut] = {}
    spec: Spec | None = None
    forks: dict[int, int] = {}
    """Nodes whose feed is forked, and the record number at which it is frozen."""

    def desired(self, node: str) -> Desired:
        """What that node is to be; a node that nobody spoke of is to be as it is."""
        return self.nodes.get(node, Desired())


class Folded(msgspec.Struct):
    """What the fold goes on from: the state of so many records, and what judges the next one. Copied before it changes
    in another direction; its values are never changed."""

    nodes: dict[str, Desired] = {}
    roster: dict[str, Grant] = {}
    cuts: dict[str, Cut] = {}
    spec: Spec | None = None
    last: dict[str, Position] = {}
    """Position of the newest record of each key that counts."""

    def copy(self) -> Folded:
        return Folded(dict(self.nodes), dict(self.roster), dict(self.cuts), self.spec, dict(self.last))


def genesis_roster(lines: str | list[str]) -> dict[str, Grant]:
    """The roster that a mesh begins with, of lines of `authorized_keys`. LocalError names the first void one."""
    text = lines if isinstance(lines, str) else "\n".join(lines)
    roster: dict[str, Grant] = {}
    for raw in text.splitlines():
        if raw.strip() and not raw.strip().startswith("#"):
            grant, _ = grant_of(raw.strip())
            roster.setdefault(grant.fingerprint, grant)
    return roster


def grant_of(line: str, **how: Any) -> tuple[Grant, Line]:
    """The grant that a line of `authorized_keys` is; LocalError when it would not mean the same on every node."""
    found, problems = parse(line)
    if problems or len(found) != 1:
        raise LocalError(problems[0] if problems else "not one line with a key")
    parsed = found[0]
    if parsed.expires_s is not None and not _in_utc(line):
        raise LocalError(
            "its expiry-time has no Z, so it would end at another moment on each host; add the Z"
        )
    key: PublicKey = parsed.key
    return Grant(key.fingerprint, line, parsed.role, parsed.comment, **how), parsed


def _in_utc(line: str) -> bool:
    value = line[line.lower().find('expiry-time="') + len('expiry-time="') :]
    return value.partition('"')[0].upper().endswith("Z")
