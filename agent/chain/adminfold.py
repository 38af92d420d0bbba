"""The fold of the admin chain: the same records give the same state on every node, in whatever order they came.

Records count in the order of their positions. One that comes late is put in its place, and what follows is folded
again from a checkpoint before it. The state only says what is desired, so folding again is safe; commands are
listed, and each is handed out once (`take_commands`), however often the fold passes it.

A revocation reaches back: what the key signed beyond the position that it names is void wherever it stands, also
what stands before the revocation. Then the fold begins again from before that position, with the cut known. A cut
that was made stays, even if what it makes void had given its author the right to make it: the first in the order wins.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from agent.chain.adminop import (
    COMMANDS,
    OWN,
    RESULT,
    AdminEvent,
)
from agent.chain.adminstate import (
    AdminState,
    Command,
    Cut,
    Desired,
    Drain,
    Grant,
    Spec,
    genesis_roster,
    grant_of,
)
from agent.chain.hlc import BEGINNING, FUTURE_MAX_MS, Position, ahead
from agent.operators import Line, judge
from agent.opmessage import ApplySpec, Chains, Op, Revoke, suffices
from agent.opmessage import Grant as GrantLine
from discovery.errors import LocalError, Refused
from discovery.identity import id_text

CHECKPOINT_EVERY = 128
CHECKPOINTS_MAX = 64
COMMANDS_SHOWN = 256
MAINTENANCE_STATES = frozenset(
    {"active", "entering_maintenance", "maintenance", "drain_failed", "exiting_maintenance", "recovery"}
)


@dataclass
class _State:
    nodes: dict[str, Desired] = field(default_factory=dict)
    roster: dict[str, Grant] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    spec: Spec | None = None

    def copy(self) -> _State:
        return replace(self, nodes=dict(self.nodes), roster=dict(self.roster), cuts=dict(self.cuts))


class _Void(Exception):
    """This record doesn't count; the text begins with a stable code."""


class AdminFold:
    """Folds the admin chain of a mesh that began with `genesis` (lines of `authorized_keys`).

    `add` takes events in any order, as often as they come; `advance` gives the state as of `now_ms`."""

    def __init__(self, genesis: str | list[str], *, checkpoint_every: int = CHECKPOINT_EVERY) -> None:
        self._every = checkpoint_every
        self._events: list[AdminEvent] = []
        """Those whose time has come, in order."""
        self._verdicts: list[str | None] = []
        """Of the events folded so far: None counts, else why not."""
        self._waiting: list[AdminEvent] = []
        """Added and not in order yet: new, or too far ahead."""
        self._known: set[bytes] = set()
        self._forks: dict[int, int] = {}
        self._state = _State(roster=genesis_roster(genesis))
        self._checkpoints: list[tuple[int, _State]] = [(0, self._state.copy())]
        """States on reaching that many events for the first time: each is the fold of exactly these."""
        self._reached = 0
        self._commands: list[tuple[int, Command]] = []
        self._given: set[str] = set()
        self._ops: dict[str, int] = {}
        """Ops that count, and which event is theirs."""
        self._lines: dict[str, Line] = {}
        self.refolded = 0
        """Events folded again because something came late."""

    # --- taking

    def add(self, events: Iterable[AdminEvent]) -> int:
        """Takes events for the next `advance`; how many were new."""
        before = len(self._known)
        for event in events:
            if event.digest not in self._known:
                self._known.add(event.digest)
                self._waiting.append(event)
        return len(self._known) - before

    def knows(self, digest: bytes) -> bool:
        """Whether the event of the record with this hash was added before."""
        return digest in self._known

    def fork(self, node: int, number: int) -> None:
        """The feed of that node has two records of this number: from there on nothing of it counts."""
        if number >= self._forks.get(node, number + 1):
            return
        self._forks[node] = number
        for index, event in enumerate(self._events):
            if event.position.node == node and event.position.number >= number:
                self._rewind(index)
                return

    def advance(self, now_ms: int) -> AdminState:
        """The state of all events whose time has come: those at most 30 s ahead of `now_ms`."""
        first = len(self._events)
        held = []
        for event in self._waiting:
            if ahead(event.position.wall_ms, now_ms):
                held.append(event)
                continue
            index = bisect.bisect(self._events, _order(event), key=_order)
            self._events.insert(index, event)
            first = min(first, index)
        self._waiting = held
        if first < len(self._verdicts):
            self._rewind(first)
        self._run()
        return self.state

    @property
    def state(self) -> AdminState:
        """As of the last `advance`."""
        now = self._state
        shown = tuple(command for _, command in self._commands[-COMMANDS_SHOWN:])
        return AdminState(
            dict(now.nodes), dict(now.roster), dict(now.cuts), now.spec, dict(self._forks), shown
        )

    def take_commands(self) -> list[Command]:
        """Commands that count and were never handed out by this fold, in order."""
        fresh = [command for _, command in self._commands if command.op_id not in self._given]
        self._given.update(command.op_id for command in fresh)
        return fresh

    def judged(self) -> list[tuple[AdminEvent, str | None]]:
        """Every event in order with why it is void, None where it counts; those held back come last."""
        held = sorted(self._waiting, key=_order)
        return [
            *zip(self._events, self._verdicts, strict=True),
            *((event, f"ahead: dated {event.position.wall_ms}, its time has not come") for event in held),
        ]

    def held(self) -> list[AdminEvent]:
        """Events too far ahead to count yet."""
        return sorted(self._waiting, key=_order)

    def last_of(self, fingerprint: str) -> Position | None:
        """Position of the newest record that this key signed and that counts: what a revocation may name."""
        for event, verdict in zip(reversed(self._events), reversed(self._verdicts), strict=True):
            if verdict is None and fingerprint in event.keys:
                return event.position
        return None

    def refusal(self, event: AdminEvent, now_ms: int) -> Refused | None:
        """Why this event would not count if it were committed now, or None. Nothing changes."""
        if event.wrong is not None:
            return _refused(event.wrong)
        if event.op is not None and ahead(event.op.message.issued_at_ms, now_ms):
            by_s = (event.op.message.issued_at_ms - now_ms) / 1000
            return Refused("not_yet", f"the op is dated {by_s:.0f} s ahead of this node's clock")
        try:
            self._judge_and_fold(self._state.copy(), event)
        except _Void as why:
            return _refused(str(why))
        return None

    # --- folding

    def _rewind(self, index: int) -> None:
        """Forgets what was folded of the events from `index` on; they have changed."""
        while self._checkpoints[-1][0] > index or not self._untouched(self._checkpoints[-1]):
            self._checkpoints.pop()
        self._reached = self._resume(self._checkpoints[-1])

    def _untouched(self, checkpoint: tuple[int, _State]) -> bool:
        """Whether no cut that was made after this checkpoint reaches back to before it."""
        count, state = checkpoint
        end = self._events[count - 1].position if count else BEGINNING
        return all(end <= c.upto for key, c in self._state.cuts.items() if state.cuts.get(key) != c)

    def _resume(self, checkpoint: tuple[int, _State]) -> int:
        """Goes back to a checkpoint; which event is next."""
        done, state = checkpoint
        self.refolded += max(0, len(self._verdicts) - done)
        self._state = state.copy()
        del self._verdicts[done:]
        while self._commands and self._commands[-1][0] >= done:
            self._commands.pop()
        self._ops = {op_id: index for op_id, index in self._ops.items() if index < done}
        return done

    def _run(self) -> None:
        done = len(self._verdicts)
        while done < len(self._events):
            if done == self._reached and done % self._every == 0 and done > self._checkpoints[-1][0]:
                self._checkpoints.append((done, self._state.copy()))
                self._thin()
            event = self._events[done]
            before = self._state.cuts
            try:
                self._judge_and_fold(self._state, event)
                self._verdicts.append(None)
                self._counts(event, done)
            except _Void as why:
                self._verdicts.append(str(why))
            done += 1
            self._reached = max(self._reached, done)
            if self._state.cuts is not before:
                done = self._reach_back(event, done)

    def _thin(self) -> None:
        """Keeps the checkpoints few: near the end close together, further back ever wider apart."""
        if len(self._checkpoints) > CHECKPOINTS_MAX:
            half = CHECKPOINTS_MAX // 2
            del self._checkpoints[1:half:2]

    def _reach_back(self, revoked_by: AdminEvent, done: int) -> int:
        """Begins again from before what the new cut makes void, if anything that counted; which event is next."""
        cuts = self._state.cuts
        assert revoked_by.op is not None and isinstance(revoked_by.op.args, Revoke)
        cut = cuts[revoked_by.op.args.fingerprint]
        hit = any(
            verdict is None and event.position > cut.upto and cut.fingerprint in event.keys
            for event, verdict in zip(self._events[: done - 1], self._verdicts, strict=False)
        )
        if not hit:
            return done
        done = self._resume(next(c for c in reversed(self._checkpoints) if self._untouched(c)))
        self._state.cuts = dict(cuts)
        return done

    def _counts(self, event: AdminEvent, index: int) -> None:
        if event.op is None:
            return
        message = event.op.message
        self._ops[message.op_id] = index
        if event.op.verb in COMMANDS:
            chains = tuple(event.op.args.chains) if isinstance(event.op.args, Chains) else ()
            command = Command(
                message.op_id,
                event.op.verb,
                message.target,
                event.by or event.fingerprint or "",
                event.position,
                message.expires_at_ms,
                chains,
            )
            self._commands.append((index, command))

    def _judge_and_fold(self, state: _State, event: AdminEvent) -> None:
        """Folds an event into the state, or raises _Void and leaves the state as it was."""
        if event.wrong is not None:
            raise _Void(event.wrong)
        position = event.position
        fork = self._forks.get(position.node)
        if fork is not None and position.number >= fork:
            raise _Void(f"forked: two records {fork} by node {id_text(position.node)}; frozen there")
        if event.kind == OWN:
            _own(state, event)
        elif event.kind != RESULT:
            assert event.op is not None
            self._judge(state, event, event.op)
            self._fold(state, event, event.op)

    def _judge(self, state: _State, event: AdminEvent, op: Op) -> None:
        message, position = op.message, event.position
        for key in event.keys:
            cut = state.cuts.get(key)
            if cut is not None and position > cut.upto:
                raise _Void(f"revoked: the key was revoked by {cut.by}")
        if message.op_id in self._ops:
            raise _Void("op_id_reused: an op of this id stands before it")
        if position.wall_ms > message.expires_at_ms + FUTURE_MAX_MS:
            raise _Void("expired: committed after it had expired")
        if message.issued_at_ms > position.wall_ms + FUTURE_MAX_MS:
            raise _Void("not_yet: committed before it was issued")
        at_host = not op.of_mesh and message.target == id_text(position.node)
        try:
            lines = [self._line(grant) for grant in state.roster.values()]
            operator = judge(lines, event.signer or b"", None, position.wall_ms)
            operator.check_presence(event.flags)
        except Refused as why:
            if at_host:
                return  # its host's file lets the key in, which the node vouches for by committing it
            raise _Void(f"{why.code}: {_of_roster(why)}") from None
        if not suffices(operator.role, op.role) and not at_host:
            raise _Void(f"role: {op.verb} needs role {op.role}, {operator.comment} has {operator.role}")

    def _fold(self, state: _State, event: AdminEvent, op: Op) -> None:
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

    def _grant(self, state: _State, event: AdminEvent, args: GrantLine, by: str) -> None:
        try:
            grant, _ = grant_of(args.line, by=by, at_ms=event.position.wall_ms, op_id=event.op_id)
        except LocalError as why:
            raise _Void(f"bad_line: {why}") from None
        cut = state.cuts.get(grant.fingerprint)
        if cut is not None and cut.at < event.position:
            raise _Void("revoked_key: that key was revoked; a new one is needed")
        roster = {**state.roster, grant.fingerprint: grant}
        if not _has_admin(roster):
            raise _Void("last_admin: nobody would be left to administer the mesh")
        state.roster = roster

    def _revoke(self, state: _State, event: AdminEvent, args: Revoke, by: str) -> None:
        key, here = args.fingerprint, event.position
        upto = here
        if args.last is not None:
            wall_ms, counter, node, number = args.last
            upto = min(here, Position(wall_ms, counter, int(node, 16), number))
        roster = {name: grant for name, grant in state.roster.items() if name != key}
        if not _has_admin(roster):
            raise _Void("last_admin: nobody would be left to administer the mesh")
        state.roster = roster
        known = state.cuts.get(key)
        if known is None:
            state.cuts = {**state.cuts, key: Cut(key, upto, by, event.op_id, here)}
        elif upto < known.upto:
            state.cuts = {**state.cuts, key: msgspec.structs.replace(known, upto=upto)}

    def _line(self, grant: Grant) -> Line:
        line = self._lines.get(grant.line)
        if line is None:
            line = self._lines[grant.line] = grant_of(grant.line)[1]
            line.sources = None  # from where it came was judged by the node that committed it
        return line


def _own(state: _State, event: AdminEvent) -> None:
    node = id_text(event.position.node)
    said, reason = event.fields.get("state"), event.fields.get("reason")
    if event.verb != "maintenance" or said not in MAINTENANCE_STATES:
        raise _Void("malformed: no word on itself that a node can give")
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


def _order(event: AdminEvent) -> tuple[Position, bytes]:
    return event.position, event.digest


def _has_admin(roster: dict[str, Grant]) -> bool:
    return any(grant.role == "admin" for grant in roster.values())


def _of_roster(why: Refused) -> str:
    return why.sentence.replace("authorized_operators here", "the roster")


def _refused(text: str) -> Refused:
    code, _, sentence = text.partition(": ")
    return Refused(code, sentence or code)
