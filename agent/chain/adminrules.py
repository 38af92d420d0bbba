"""What one record of the admin chain does to the state: whether it counts, why not, and what changes if it does. Pure.

A record is judged by what stands before it, and by the cuts: what a revoked key signed beyond its cut counts nowhere.
A revocation is not made void by the cut that it makes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import msgspec

from agent.chain.adminop import COMMANDS, OWN, RESULT, AdminEvent
from agent.chain.adminstate import Cut, Desired, Drain, Folded, Grant, Spec, grant_of
from agent.chain.hlc import FUTURE_MAX_MS, Position
from agent.operators import Line, judge
from agent.opmessage import ApplySpec, Op, Revoke, suffices
from agent.opmessage import Grant as GrantLine
from discovery.errors import LocalError, Refused
from discovery.identity import id_text

MAINTENANCE_STATES = frozenset(
    {"active", "entering_maintenance", "maintenance", "drain_failed", "exiting_maintenance", "recovery"}
)


class Void(Exception):
    """This record doesn't count; the text begins with a stable code."""


class Rules:
    """Judges and folds records by a roster and the known `forks` (node: first number that counts no more)."""

    def __init__(self, forks: Mapping[int, int] | None = None) -> None:
        self.forks: dict[int, int] = dict(forks or {})
        self._lines: dict[str, Line] = {}

    def fold(self, state: Folded, event: AdminEvent, counted: Container[str]) -> None:
        """Folds a record into the state; Void, with the state as it was, where it doesn't count. `counted`: op ids of
        those before it that do."""
        if event.wrong is not None:
            raise Void(event.wrong)
        position = event.position
        fork = self.forks.get(position.node)
        if fork is not None and position.number >= fork:
            raise Void(f"forked: two records {fork} by node {id_text(position.node)}; frozen there")
        if event.kind == OWN:
            _own(state, event)
        elif event.kind != RESULT:
            assert event.op is not None
            self._judge(state, event, event.op, counted)
            self._fold(state, event, event.op)
            for key in event.keys:
                state.last[key] = position

    def _judge(self, state: Folded, event: AdminEvent, op: Op, counted: Container[str]) -> None:
        message, position = op.message, event.position
        for key in event.keys:
            cut = state.cuts.get(key)
            if cut is not None and position > cut.upto and position != cut.set_at:
                raise Void(f"revoked: the key was revoked by {cut.by}")
        if message.op_id in counted:
            raise Void("op_id_reused: an op of this id stands before it")
        if position.wall_ms > message.expires_at_ms + FUTURE_MAX_MS:
            raise Void("expired: committed after it had expired")
        if message.issued_at_ms > position.wall_ms + FUTURE_MAX_MS:
            raise Void("not_yet: committed before it was issued")
        at_host = not op.of_mesh and message.target == id_text(position.node)
        try:
            lines = [self._line(grant) for grant in state.roster.values()]
            operator = judge(lines, event.signer or b"", None, position.wall_ms)
            operator.check_presence(event.flags)
        except Refused as why:
            if at_host:
                return  # its host's file lets the key in, which the node vouches for by committing it
            raise Void(f"{why.code}: {_of_roster(why)}") from None
        if not suffices(operator.role, op.role) and not at_host:
            raise Void(f"role: {op.verb} needs role {op.role}, {operator.comment} has {operator.role}")

    def _fold(self, state: Folded, event: AdminEvent, op: Op) -> None:
        by, args, message = event.by or event.fingerprint or "", op.args, op.message
        at_ms = event.position.wall_ms
        if isinstance(args, GrantLine):
            self._grant(state, event, args, by)
        elif isinstance(args, Revoke):
            self._revoke(state, event, args, by)
        elif isinstance(args, ApplySpec):
            state.spec = Spec(message.op_id, args.sha256, by, event.position)
        elif op.verb not in COMMANDS:
            was = state.nodes.get(message.target, Desired())
            change = _DESIRED[op.verb]
            now = change(was, getattr(args, "deadline_ms", None), at_ms, by, message.op_id)
            state.nodes[message.target] = msgspec.structs.replace(now, changed=event.position)

    def _grant(self, state: Folded, event: AdminEvent, args: GrantLine, by: str) -> None:
        try:
            grant, _ = grant_of(args.line, by=by, at_ms=event.position.wall_ms, op_id=event.op_id)
        except LocalError as why:
            raise Void(f"bad_line: {why}") from None
        cut = state.cuts.get(grant.fingerprint)
        if cut is not None and cut.at < event.position:
            raise Void("revoked_key: that key was revoked; a new one is needed")
        roster = {**state.roster, grant.fingerprint: grant}
        if not _has_admin(roster):
            raise Void("last_admin: nobody would be left to administer the mesh")
        state.roster = roster

    def _revoke(self, state: Folded, event: AdminEvent, args: Revoke, by: str) -> None:
        key, here = args.fingerprint, event.position
        upto = here
        if args.last is not None:
            wall_ms, counter, node, number = args.last
            upto = min(here, Position(wall_ms, counter, int(node, 16), number))
        roster = {name: grant for name, grant in state.roster.items() if name != key}
        if not _has_admin(roster):
            raise Void("last_admin: nobody would be left to administer the mesh")
        state.roster = roster
        known = state.cuts.get(key)
        if known is None:
            state.cuts = {**state.cuts, key: Cut(key, upto, by, event.op_id, here, here)}
        elif upto < known.upto:
            state.cuts = {**state.cuts, key: msgspec.structs.replace(known, upto=upto, set_at=here)}

    def _line(self, grant: Grant) -> Line:
        line = self._lines.get(grant.line)
        if line is None:
            line = self._lines[grant.line] = grant_of(grant.line)[1]
            line.sources = None  # from where it came was judged by the node that committed it
        return line


def _own(state: Folded, event: AdminEvent) -> None:
    node = id_text(event.position.node)
    said, reason = event.fields.get("state"), event.fields.get("reason")
    if event.verb != "maintenance" or said not in MAINTENANCE_STATES:
        raise Void("malformed: no word on itself that a node can give")
    state.nodes[node] = msgspec.structs.replace(
        state.nodes.get(node, Desired()),
        maintenance_state=said,
        maintenance_reason=reason[:256] if isinstance(reason, str) else None,
        changed=event.position,
    )


def _changed(**fields: Any) -> Callable[..., Desired]:
    return lambda was, deadline_ms, at_ms, by, op_id: msgspec.structs.replace(was, **fields)


def _drained(was: Desired, deadline_ms: int | None, at_ms: int, by: str, op_id: str) -> Desired:
    return msgspec.structs.replace(was, drain=Drain(at_ms, deadline_ms, by, op_id))


def _entered(was: Desired, deadline_ms: int | None, at_ms: int, by: str, op_id: str) -> Desired:
    return msgspec.structs.replace(was, maintenance=True, maintenance_deadline_ms=deadline_ms)


_DESIRED: dict[str, Callable[..., Desired]] = {
    "cordon": _changed(cordoned=True),
    "uncordon": _changed(cordoned=False),
    "drain": _drained,
    "resume": _changed(drain=None),
    "maintenance_enter": _entered,
    "maintenance_exit": _changed(maintenance=False, maintenance_deadline_ms=None),
}


def _has_admin(roster: dict[str, Grant]) -> bool:
    return any(grant.role == "admin" for grant in roster.values())


def _of_roster(why: Refused) -> str:
    return why.sentence.replace("authorized_operators here", "the roster")
