"""The fold of the admin chain: the same records give the same state on every node, in whatever order they came.

Records count in the order of their positions. One that comes late is put in its place, and what follows is folded
again from a checkpoint before it. The state only says what is desired, so folding again is safe.

A revocation reaches back: what the key signed beyond the position that it names is void wherever it stands, also
what stands before the revocation. Then the fold begins again from before that position, with the cut known. A cut
that was made stays, even if what it makes void had given its author the right to make it: the first in the order wins.
So the state is that of one pass over all records with the last cuts known from its beginning, which is what `judged` is.

Only the newest records are held (`trim`); what stands before them is a checkpoint. What belongs before that makes
the fold `behind`: it goes on with what it has, and whoever keeps the records begins another from an older checkpoint.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from agent.chain.adminop import AdminEvent
from agent.chain.adminrules import Rules, Void
from agent.chain.adminstate import AdminState, Cut, Folded, genesis_roster
from agent.chain.hlc import BEGINNING, Position, ahead
from agent.opmessage import ulid_bytes
from discovery.errors import Refused

FOLD_VERSION = 1
"""Of what the same records come to. Whatever changes that makes it another, and checkpoints of before void."""
CHECKPOINT_EVERY = 32
ID_BYTES = 16
IDS_LOOSE = 1024


class Checkpoint(msgspec.Struct, frozen=True):
    """The fold of the first `count` records, those up to `end`, and of no other."""

    count: int
    end: Position
    state: Folded
    ids: bytes = b""
    """Op ids that count, 16 bytes each, in order."""
    tops: dict[int, int] = {}
    """Highest number of each node's records among them."""
    forks: dict[int, int] = {}
    """As they were known."""

    def fits(self, cuts: Mapping[str, Cut], forks: Mapping[int, int]) -> bool:
        """Whether the fold of all records with these cuts and forks passes through it."""
        forked = any(
            self.forks.get(node) != number and self.tops.get(node, 0) >= number
            for node, number in forks.items()
        )
        return not forked and _untouched(self.end, self.state, cuts)


class _Point(NamedTuple):
    """The state on reaching that many of the records held."""

    at: int
    end: Position
    state: Folded

    @property
    def final(self) -> bool:
        """Whether it is the fold of these records alone: no cut in it was made by one that stands after them."""
        return all(cut.set_at <= self.end for cut in self.state.cuts.values())


class AdminFold:
    """Folds the admin chain of a mesh that began with `genesis` (lines of `authorized_keys`).

    `add` takes events, each once, in any order; `advance` gives the state as of `now_ms`. It begins from `base`, with
    `cuts` and `forks` known."""

    def __init__(
        self,
        genesis: str | list[str],
        *,
        base: Checkpoint | None = None,
        cuts: Mapping[str, Cut] | None = None,
        forks: Mapping[int, int] | None = None,
        checkpoint_every: int = CHECKPOINT_EVERY,
    ) -> None:
        self._genesis = genesis
        self._every = checkpoint_every
        base = base or Checkpoint(0, BEGINNING, Folded(roster=genesis_roster(genesis)))
        self._first = base.count
        """Records before those that are held."""
        self._tops = dict(base.tops)
        self._ids = _Ids(base.ids)
        """Op ids that count, of the records before those held."""
        self._points = [_Point(0, base.end, base.state.copy())]
        self._events: list[AdminEvent] = []
        """Those held whose time has come, in order."""
        self._waiting: list[AdminEvent] = []
        """Added and not in order yet: new, or too far ahead."""
        self._done = 0
        """So many of those held are folded."""
        self._rules = Rules(forks)
        self._state = base.state.copy()
        self._state.cuts |= cuts or {}
        self._ops: dict[str, int] = {}
        """Op ids that count, and which of the events held is theirs."""
        self.behind = False
        """Something belongs before what is held here: the state is to be folded again from an older checkpoint."""
        self.refolded = 0
        """Events folded again because something came late."""

    # --- taking

    def add(self, events: Iterable[AdminEvent]) -> None:
        """Takes events for the next `advance`; none that was added before."""
        self._waiting += events

    def fork(self, node: int, number: int) -> None:
        """The feed of that node has two records of this number: from there on nothing of it counts."""
        if number >= self._rules.forks.get(node, number + 1):
            return
        self._rules.forks[node] = number
        if self._tops.get(node, 0) >= number:
            self.behind = True
            return
        for index, event in enumerate(self._events[: self._done]):
            if event.position.node == node and event.position.number >= number:
                at = self._point_before(index)
                if at is None:
                    self.behind = True
                else:
                    self._rewind(at)
                return

    def advance(self, now_ms: int) -> AdminState:
        """The state of all events whose time has come: those at most 30 s ahead of `now_ms`."""
        ready = [event for event in self._waiting if not ahead(event.position.wall_ms, now_ms)]
        self._waiting = [event for event in self._waiting if ahead(event.position.wall_ms, now_ms)]
        first = min((self._place(event) for event in ready), default=self._done)
        at = self._point_before(first) if first < self._done else None
        for event in ready:
            if at is None and self._place(event) < self._done:
                self.behind = True
            else:
                self._events.insert(self._place(event), event)
        if at is not None:
            self._rewind(at)
        self._run()
        return self.state

    @property
    def state(self) -> AdminState:
        """As of the last `advance`."""
        now = self._state
        return AdminState(dict(now.nodes), dict(now.roster), dict(now.cuts), now.spec, dict(self.forks))

    @property
    def forks(self) -> Mapping[int, int]:
        return self._rules.forks

    @property
    def count(self) -> int:
        """Records before those that are held."""
        return self._first

    def __contains__(self, op_id: object) -> bool:
        return op_id in self._ops or op_id in self._ids

    def last_of(self, fingerprint: str) -> Position | None:
        """Position of the newest record that this key signed and that counts: what a revocation may name."""
        return self._state.last.get(fingerprint)

    def refusal(self, event: AdminEvent, now_ms: int) -> Refused | None:
        """Why this event would not count if it were committed now, or None. Nothing changes."""
        if event.wrong is not None:
            return _refused(event.wrong)
        if event.op is not None and ahead(event.op.message.issued_at_ms, now_ms):
            by_s = (event.op.message.issued_at_ms - now_ms) / 1000
            return Refused("not_yet", f"the op is dated {by_s:.0f} s ahead of this node's clock")
        try:
            self._rules.fold(self._state.copy(), event, self)
        except Void as why:
            return _refused(str(why))
        return None

    def judge(self) -> Judge:
        """What judges all records in order, from the first, as the state has it now."""
        return Judge(self._genesis, self._state.cuts, self.forks)

    def judged(self) -> list[tuple[AdminEvent, str | None]]:
        """Every event in order with why it is void, None where it counts; those held back come last. Of a fold that
        was never trimmed."""
        judge = self.judge()
        held = sorted(self._waiting, key=_order)
        return [*((e, judge.fold(e)) for e in self._events), *((e, ahead_of_time(e)) for e in held)]

    # --- holding less

    def trim(self, keep: int) -> None:
        """Holds no longer what stands before the last checkpoint that leaves at least `keep` events."""
        fit = [n for n, p in enumerate(self._points) if p.at <= self._done - keep and self._fits(p)]
        if self.behind or not fit or fit[-1] == 0:
            return
        at = fit[-1]
        gone = self._points[at].at
        for event in self._events[:gone]:
            node, number = event.position.node, event.position.number
            self._tops[node] = max(number, self._tops.get(node, 0))
        self._ids.add(op_id for op_id, index in self._ops.items() if index < gone)
        self._ops = {op_id: index - gone for op_id, index in self._ops.items() if index >= gone}
        del self._events[:gone]
        self._points = [point._replace(at=point.at - gone) for point in self._points[at:]]
        self._done -= gone
        self._first += gone

    def checkpoint(self) -> Checkpoint | None:
        """What stands before the events held; None while that isn't certain."""
        point = self._points[0]
        if self.behind or not point.final:
            return None
        ids = self._ids.packed()
        return Checkpoint(self._first, point.end, point.state.copy(), ids, dict(self._tops), dict(self.forks))

    def held(self) -> list[AdminEvent]:
        """The events that are in no checkpoint."""
        return [*self._events, *self._waiting]

    # --- folding

    def _place(self, event: AdminEvent) -> int:
        """Which of the events held comes after it; -1 where it stands before all that may be."""
        if event.position <= self._points[0].end:
            return -1
        return bisect.bisect(self._events, _order(event), key=_order)

    def _point_before(self, index: int) -> int | None:
        """The last point from which to fold again what is changed from that event on; None where none is held."""
        for at in range(len(self._points) - 1, -1, -1):
            point = self._points[at]
            if point.at <= index and point.final and self._fits(point):
                return at
        return None

    def _fits(self, point: _Point) -> bool:
        return _untouched(point.end, point.state, self._state.cuts)

    def _rewind(self, at: int) -> None:
        """Forgets what was folded since that point."""
        del self._points[at + 1 :]
        point = self._points[at]
        self.refolded += max(0, self._done - point.at)
        self._state = point.state.copy()
        self._done = point.at
        self._ops = {op_id: index for op_id, index in self._ops.items() if index < point.at}

    def _run(self) -> None:
        while self._done < len(self._events):
            done = self._done
            if done % self._every == 0 and done > self._points[-1].at:
                self._points.append(_Point(done, self._events[done - 1].position, self._state.copy()))
            event = self._events[done]
            before, last = self._state.cuts, dict(self._state.last) if _revokes(event) else {}
            self._done += 1
            try:
                self._rules.fold(self._state, event, self)
            except Void:
                continue
            if event.op is not None:
                self._ops[event.op.op_id] = done
            if self._state.cuts is not before:
                self._reach_back(before, last)

    def _reach_back(self, before: Mapping[str, Cut], last: Mapping[str, Position]) -> None:
        """Begins again from before what the new cut makes void, if anything that counted."""
        cuts = self._state.cuts
        new = next(cut for key, cut in cuts.items() if before.get(key) != cut)
        counted = last.get(new.fingerprint)
        if counted is None or counted <= new.upto:
            return
        for at in range(len(self._points) - 1, -1, -1):
            if self._fits(self._points[at]):
                self._rewind(at)
                self._state.cuts = dict(cuts)
                return
        self.behind = True


class Judge:
    """One pass over all records in order, with the `cuts` and `forks` of the state known: why each is void."""

    def __init__(self, genesis: str | list[str], cuts: Mapping[str, Cut], forks: Mapping[int, int]) -> None:
        self.cuts, self.forks = dict(cuts), dict(forks)
        self.end = BEGINNING
        self.state = Folded(roster=genesis_roster(genesis), cuts=dict(cuts))
        self._rules = Rules(forks)
        self._ids = _Ids(b"")

    def fold(self, event: AdminEvent) -> str | None:
        """Why the next record is void; None where it counts."""
        self.end = event.position
        try:
            self._rules.fold(self.state, event, self._ids)
        except Void as why:
            return str(why)
        if event.op is not None:
            self._ids.add([event.op.op_id])
        return None


class _Ids:
    """Op ids, 16 bytes each."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._loose: set[bytes] = set()

    def __contains__(self, op_id: object) -> bool:
        if not isinstance(op_id, str):
            return False
        key = ulid_bytes(op_id)
        if key in self._loose:
            return True
        count = len(self._packed) // ID_BYTES
        at = bisect.bisect_left(range(count), key, key=self._at)
        return at < count and self._at(at) == key

    def add(self, op_ids: Iterable[str]) -> None:
        self._loose.update(map(ulid_bytes, op_ids))
        if len(self._loose) > IDS_LOOSE:
            self.packed()

    def packed(self) -> bytes:
        """All of them, in order."""
        if self._loose:
            old = map(self._at, range(len(self._packed) // ID_BYTES))
            self._packed = b"".join(sorted({*old, *self._loose}))
            self._loose.clear()
        return self._packed

    def _at(self, index: int) -> bytes:
        return self._packed[index * ID_BYTES : (index + 1) * ID_BYTES]


def mark_of_genesis(mesh: str, genesis: str | list[str]) -> bytes:
    """What a fold's checkpoints are kept under: another for another fold, mesh or roster of the beginning."""
    lines = sorted(grant.line for grant in genesis_roster(genesis).values())
    return hashlib.sha256("\n".join([f"{FOLD_VERSION} {mesh}", *lines]).encode()).digest()[:16]


def ahead_of_time(event: AdminEvent) -> str:
    """Why a record that is dated ahead doesn't count yet."""
    return f"ahead: dated {event.position.wall_ms}, its time has not come"


def _untouched(end: Position, state: Folded, cuts: Mapping[str, Cut]) -> bool:
    """Whether none of the cuts that this state doesn't know reaches back to before its end."""
    return all(end <= cut.upto for key, cut in cuts.items() if state.cuts.get(key) != cut)


def _revokes(event: AdminEvent) -> bool:
    return event.op is not None and event.op.verb == "revoke_operator"


def _order(event: AdminEvent) -> tuple[Position, bytes]:
    return event.position, event.digest


def _refused(text: str) -> Refused:
    code, _, sentence = text.partition(": ")
    return Refused(code, sentence or code)
