"""The directory as this node tells it: rows of its own mesh to other meshes, rows of other meshes to its own members.

A follower gets everything once, then what changes. Changes are worked out once, whoever follows: each is a `Delta`
on a board, and a follower is a place on that board. One that falls too far behind is given everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from discovery.directory import Entry, encode_entries, entry_of
from discovery.errors import Refused, RemoteError
from discovery.lifecycle import Evidence
from discovery.member import Member, Vitals

if TYPE_CHECKING:
    from agent.node import Node

DELTAS_KEPT = 512
ENTRIES_A_FRAME = 400
LOOK_GAP_S = 0.03
"""Changes within this long of each other are told together."""
LOAD_GAP_S = 1.0
"""Figures alone are looked at this often."""
LOAD_STEP_PERMILLE = 20
LOAD_AGAIN_S = 15.0
"""Figures are told when one has moved by 2 points, or this long after they were told last."""
SEEN_EVERY_S = 2.5
SEEN_ROWS_A_S = 40
"""When nodes were last heard of is told every SEEN_EVERY_S, more seldom where that would be more rows a second."""
KEEPALIVE_S = 2.0
ANSWER_EVERY_S = 1.0
"""A member that asks hears something this often."""
FOLLOWERS_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed at one look: rows of one mesh, and who is gone by which evidence."""

    mesh: str
    entries: tuple[Entry, ...]
    gone: tuple[tuple[int, str], ...]
    full: bool = False
    """The rows of this mesh are replaced as a whole."""


@dataclass(eq=False)
class Place:
    """How far one follower has come."""

    at: int
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Board:
    """Deltas in order, and who follows them."""

    def __init__(self) -> None:
        self._deltas: deque[Delta] = deque(maxlen=DELTAS_KEPT)
        self._end = 0
        self.places: set[Place] = set()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._end += 1
        self.wake()

    def wake(self) -> None:
        """Something besides the rows is new."""
        for place in self.places:
            place.news.set()

    @contextlib.contextmanager
    def follow(self) -> Iterator[Place]:
        """A place at the end of the board; Refused `busy` when there are too many."""
        if len(self.places) >= FOLLOWERS_MAX:
            raise Refused("busy", f"{FOLLOWERS_MAX} followers already")
        place = Place(self._end)
        self.places.add(place)
        try:
            yield place
        finally:
            self.places.discard(place)

    def take(self, place: Place) -> list[Delta] | None:
        """What came since that place, which moves to the end; None when it is too far behind."""
        behind = self._end - place.at
        place.at = self._end
        place.news.clear()
        if behind > len(self._deltas):
            return None
        return [self._deltas[i] for i in range(len(self._deltas) - behind, len(self._deltas))]


class Telling:
    """Serves the stream `directory`. `look()` is called when rows of the own mesh may have changed."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.own = Board()
        self.others = Board()
        self.following: Counter[str] = Counter()
        """Backbone members (ids as text) that follow this node's mesh over a link just now."""
        self.version = 0
        """Of the own mesh's rows as they were told."""
        self._marks: dict[int, tuple[object, ...]] = {}
        self._loads: dict[int, tuple[Vitals, float]] = {}
        self._loads_at = self._seen_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        self._left = False

    def look(self) -> None:
        """Tells followers what changed in the own mesh: at once, or with what else changes within LOOK_GAP_S."""
        if not self.own.places or self._timer is not None or self._left:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(max(loop.time(), self._looked_at + LOOK_GAP_S), self._look)

    def _members(self) -> dict[int, Member]:
        swim = self._node.swim
        return {swim.me.id: swim.me, **swim.members}

    def farewell(self) -> None:
        """Tells followers that this node leaves, ahead of the end of their streams."""
        if self._timer is not None:
            self._timer.cancel()
        self._marks.pop(self._node.identity.id, None)
        gone = ((self._node.identity.id, Evidence.LEFT.value),)
        self.own.put(Delta(self._node.settings.mesh, (), gone))
        self._left = True

    def _look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._left:
            return
        now = self._looked_at = time.monotonic()
        members = self._members()
        changed = self._note(members, now)
        gone = [node for node in self._marks if node not in members]
        for node in gone:
            del self._marks[node]
            self._loads.pop(node, None)
        if changed or gone:
            entries = tuple(self._entry(members[node], now) for node in changed)
            self.version += 1
            told = tuple((node, self._evidence(node)) for node in gone)
            self.own.put(Delta(self._node.settings.mesh, entries, told))

    def _note(self, members: Mapping[int, Member], now: float) -> set[int]:
        """Ids of rows that differ from what was told last; figures count every LOAD_GAP_S only."""
        changed = set()
        for node, member in members.items():
            mark = _mark(member)
            if self._marks.get(node) != mark:
                self._marks[node] = mark
                changed.add(node)
        if now - self._loads_at >= LOAD_GAP_S:
            self._loads_at = now
            for node, member in members.items():
                if member.vitals is not None and _material(member.vitals, self._loads.get(node), now):
                    self._loads[node] = member.vitals, now
                    changed.add(node)
        return changed

    def _entry(self, member: Member, now: float) -> Entry:
        node = self._node
        return entry_of(member, now, node.name_of, mine=member.id == node.identity.id)

    def _evidence(self, node: int) -> str:
        tombstone = self._node.swim.tombstones.get(node)
        return (tombstone.evidence if tombstone is not None else Evidence.SILENT).value

    # --- the stream

    async def directory(self, link: Any, params: Any) -> AsyncIterator[Any]:
        """`{"scope": "mesh"|"all"}`: a mesh login follows this node's mesh, a member the other meshes."""
        params = params if isinstance(params, dict) else {}
        scope, kind = params.get("scope"), link.login.kind
        if scope == "mesh" and kind == "mesh":
            follower = str(params.get("node"))[:16]
            self.following[follower] += 1
            try:
                async for frame in self._own_frames():
                    yield frame
            finally:
                self.following[follower] -= 1
                if self.following[follower] <= 0:
                    del self.following[follower]
        elif scope == "all" and kind == "member":
            async for frame in self._other_frames():
                yield frame
        else:
            raise RemoteError(f"no directory of scope {str(scope)[:20]!r} for a {kind} login")

    async def _own_frames(self) -> AsyncIterator[dict[str, Any]]:
        node = self._node
        mesh = node.settings.mesh
        if self.own.places:
            self._look()  # what has changed until now is told to those who follow already
        with self.own.follow() as place:
            members, now = self._members(), time.monotonic()
            if len(self.own.places) == 1:
                self._marks.clear()
                self._loads.clear()
                self._note(members, now)
            entries = [self._entry(m, now) for m in members.values()]
            for frame in _pieces(mesh, entries, (), full=True):
                yield {**frame, **node.meshes.publishing.document()}
            seen_at = said_at = time.monotonic()
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOAD_GAP_S):
                        await place.news.wait()
                if time.monotonic() - self._loads_at >= LOAD_GAP_S:
                    self._look()
                renewed = place.news.is_set()
                deltas = self.own.take(place)
                if deltas is None:
                    now = time.monotonic()
                    again = [self._entry(m, now) for m in self._members().values()]
                    deltas = [Delta(mesh, tuple(again), (), full=True)]
                frame = {"mesh": mesh, **node.meshes.publishing.document()}
                for delta in deltas:
                    for piece in _pieces(mesh, delta.entries, delta.gone, full=delta.full):
                        yield {**frame, **piece}
                now = time.monotonic()
                if now - seen_at >= max(SEEN_EVERY_S, len(self._marks) / SEEN_ROWS_A_S):
                    seen_at = now
                    frame["seen"] = _seen(node.identity.id, self._members().values(), now)
                if "seen" in frame or (not deltas and (renewed or now - said_at >= KEEPALIVE_S)):
                    yield frame
                    said_at = now

    async def _other_frames(self) -> AsyncIterator[dict[str, Any]]:
        meshes = self._node.meshes
        with self.others.follow() as place:
            for frame in self._everything():
                yield frame
            yield {"whole": True, "rows": meshes.rows()}
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ANSWER_EVERY_S):
                        await place.news.wait()
                deltas = self.others.take(place)
                if deltas is None:
                    for frame in self._everything():
                        yield frame
                    deltas = []
                for delta in deltas:
                    for piece in _pieces(delta.mesh, delta.entries, delta.gone, full=delta.full):
                        yield {**meshes.summary_of(delta.mesh), **piece}
                yield {"rows": meshes.rows(), "summaries": meshes.summaries()}

    def _everything(self) -> Iterator[dict[str, Any]]:
        meshes, now = self._node.meshes, time.monotonic()
        for mesh, listing in list(meshes.directory.listings.items()):
            entries = [self._entry(m, now) for m in listing.members.values()]
            for piece in _pieces(mesh, entries, (), full=True):
                yield {**meshes.summary_of(mesh), **piece}

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _mark(member: Member) -> tuple[object, ...]:
    """What is told at once when it changes."""
    record = member.record
    return (
        record.incarnation,
        record.version,
        member.state,
        member.evidence,
        member.suspect_since is None,
        member.addr,
    )


def _material(vitals: Vitals, told: tuple[Vitals, float] | None, now: float) -> bool:
    """Whether figures are worth telling after those that were told last."""
    if told is None or (now - told[1] >= LOAD_AGAIN_S):
        return True
    old = told[0]
    if (vitals.daemons_running, vitals.daemons_total, vitals.failures) != (
        old.daemons_running,
        old.daemons_total,
        old.failures,
    ):
        return True
    pairs = ((vitals.cpu, old.cpu), (vitals.mem, old.mem), (vitals.disk, old.disk))
    return any(
        (new is None) != (was is None)
        or (new is not None and was is not None and abs(new - was) >= LOAD_STEP_PERMILLE)
        for new, was in pairs
    )


def _pieces(
    mesh: str, entries: Iterable[Entry], gone: Iterable[tuple[int, str]], *, full: bool
) -> Iterator[dict[str, Any]]:
    """Frames of ENTRIES_A_FRAME rows each; all but the last say `more`."""
    rows = list(entries)
    for start in range(0, max(1, len(rows)), ENTRIES_A_FRAME):
        yield {
            "mesh": mesh,
            "full": full and start == 0,
            "more": start + ENTRIES_A_FRAME < len(rows),
            "entries": encode_entries(rows[start : start + ENTRIES_A_FRAME]),
            "gone": [list(g) for g in gone] if start == 0 else [],
        }


def _seen(me: int, members: Iterable[Member], now: float) -> bytes:
    """`[(id, ms since it was last heard)]` of those that are there."""
    return msgspec.msgpack.encode(
        [(m.id, 0 if m.id == me else max(0, round((now - m.last_seen) * 1000))) for m in members if m.present]
    )
