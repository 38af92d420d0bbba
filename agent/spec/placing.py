"""Which nodes run which daemons: every node works it out for itself, from the same spec and its own view of the mesh.

Nobody schedules and nothing is negotiated. Nodes are ranked for each daemon by a hash of its name and their id
(rendezvous hashing), and the first `count` of them run it: equal views agree, a node that goes leaves its daemons to
the next in rank and moves no other, a node that comes takes only what it ranks first for. While views differ, a daemon
may run on one node too many for a moment, and `Settling` sees to it that it doesn't run on one too few.

A daemon with `resources` goes only where they fit beside what is there already. Room is taken in turn: first by what
nodes have taken on (each tells in its member record), then by what no other node can run instead, then by the rest,
each by name. So such a daemon stays where it is, whatever comes beside it and whoever comes or goes: it moves when its
node goes or is drained, when its own entry changes, or when another on its node is given greater needs. In which order
nodes hear of each other's daemons makes no difference: who takes on what the plan gives it leaves the plan as it was.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice

from agent.spec.model import DaemonSpec, FleetSpec
from agent.spec.resources import UNKNOWN, Books, Capacity
from agent.spec.selector import read_selector

PLACEMENT_SETTLE_MS = 3_000
RUNNABLE_STATES = frozenset({"joining", "alive", "degraded", "updating"})
RUNNABLE_MAINTENANCE = frozenset({"active", "exiting_maintenance", "recovery"})


@dataclass(frozen=True)
class Candidate:
    """A node as placement sees it. `keeps`: what it has taken on, by its own word: those daemons with resources, and
    on a cordoned node all that it still runs."""

    id: int
    name: str
    kind: str
    tags: Mapping[str, str] = field(default_factory=dict)
    eligible: bool = True
    cordoned: bool = False
    keeps: frozenset[str] = frozenset()
    capacity: Capacity = UNKNOWN


def may_run(state: str, maintenance: str) -> bool:
    """Whether a node in that lifecycle state and maintenance (their words) is to run daemons at all. An updating one
    is: it will be back."""
    return state in RUNNABLE_STATES and maintenance in RUNNABLE_MAINTENANCE


@dataclass(frozen=True)
class Shortfall:
    """A counted daemon for which there are too few nodes. `reason`: why the next node in rank can't run it too, where
    that is for lack of room."""

    daemon: str
    wanted: int
    placed: int
    reason: str = ""

    def __str__(self) -> str:
        nodes = "no node" if self.placed == 0 else f"{self.placed} node{'s' * (self.placed != 1)}"
        said = f"{self.daemon}: {self.wanted} wanted, {nodes} can run it"
        return f"{said}; {self.reason}" if self.reason else said


@dataclass(frozen=True)
class Plan:
    """The placement of a spec in one view, as one of its nodes (`me`) acts on it."""

    here: Mapping[str, DaemonSpec]
    """What shall run on this node."""
    outranked: frozenset[str]
    """What could run here, but others come first."""
    placed: Mapping[str, tuple[int, ...]]
    """Node ids by daemon."""
    shortfalls: tuple[Shortfall, ...]
    held: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Daemon → the nodes that would run it but for lack of room, and the reason: those that shall by `all` or by name, and
    of a counted one as many as are wanting, the first in rank."""


@dataclass(frozen=True)
class _Able:
    """The eligible nodes that one selector means."""

    ids: tuple[int, ...]
    """In their order."""
    by_id: Mapping[int, Candidate]
    """The same, in the same order."""
    free: frozenset[int]
    """Those that are not cordoned."""
    cordoned: tuple[Candidate, ...]

    @classmethod
    def among(cls, on: str, candidates: Iterable[Candidate]) -> _Able:
        selector = read_selector(on)
        found = sorted((c for c in candidates if c.eligible and selector.matches(c)), key=lambda c: c.id)
        return cls(
            tuple(c.id for c in found),
            {c.id: c for c in found},
            frozenset(c.id for c in found if not c.cordoned),
            tuple(c for c in found if c.cordoned),
        )


@dataclass(frozen=True)
class _First:
    """The `count` free nodes that come first for a daemon, as they were worked out."""

    free: frozenset[int]
    count: int
    ranked: tuple[tuple[bytes, int], ...]


def placed(spec: DaemonSpec, candidates: Iterable[Candidate]) -> list[int]:
    """The ids of the nodes that shall run a daemon, in their order."""
    return list(plan(FleetSpec(daemon=[spec]), -1, candidates).placed[spec.name])


def plan(spec: FleetSpec, me: int, candidates: Iterable[Candidate]) -> Plan:
    """Who runs what. `candidates`: every node in view, this one (`me`) among them; without it nothing runs here."""
    return Planner().plan(spec, me, candidates)


def wanted_count(spec: DaemonSpec) -> int | None:
    """On how many nodes a daemon shall run; None: on every one that matches."""
    return None if spec.all else spec.count or 1


def own_affair(spec: DaemonSpec) -> bool:
    """Whether no other node runs a daemon in this one's place: it is on all that match, or on a node by name."""
    return spec.all or read_selector(spec.on).one


class Planner:
    """Plans again and again, for views that differ by little: remembers who came first and works out the rest.

    The answer is that of `plan`. A node that comes costs one hash a daemon; one that goes, one hash a node for each
    daemon that it had."""

    def __init__(self) -> None:
        self._before: dict[str, _First] = {}
        self._now: dict[str, _First] = {}
        self._ranked: dict[str, tuple[frozenset[int], tuple[int, ...]]] = {}
        """Daemons with resources that not all who shall have taken on yet → free nodes, and these in rank."""
        self._steps: dict[tuple[int, int], tuple[frozenset[int], frozenset[int]]] = {}
        """By the identity of two sets of nodes: who has gone, who has come."""

    def plan(self, spec: FleetSpec, me: int, candidates: Iterable[Candidate]) -> Plan:
        """As the function of the same name."""
        self._before, self._now, self._steps = self._now, {}, {}
        view = list(candidates)
        able: dict[str, _Able] = {}
        for daemon in spec.daemon:
            if daemon.on not in able:
                able[daemon.on] = _Able.among(daemon.on, view)
        mine = {on for on, found in able.items() if me in found.ids}
        booked, held = self._book([daemon for daemon in spec.daemon if daemon.resources], able, view)
        where: dict[str, tuple[int, ...]] = {}
        here: dict[str, DaemonSpec] = {}
        outranked: set[str] = set()
        shortfalls: list[Shortfall] = []
        for daemon in spec.daemon:
            ids = booked[daemon.name] if daemon.resources else self.place(daemon, able[daemon.on])
            where[daemon.name] = ids
            if me in ids:
                here[daemon.name] = daemon
            elif daemon.on in mine and me not in held.get(daemon.name, ()):
                outranked.add(daemon.name)
            wanted = wanted_count(daemon)
            if wanted is not None and len(ids) < wanted:
                why = _first_held(held.get(daemon.name, {}), able[daemon.on])
                shortfalls.append(Shortfall(daemon.name, wanted, len(ids), why))
        self._before = {}
        return Plan(here, frozenset(outranked), where, tuple(shortfalls), held)

    def _book(
        self, daemons: Iterable[DaemonSpec], able: Mapping[str, _Able], view: Iterable[Candidate]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[int, str]]]:
        """Where those with resources go, and where they are held back."""
        order = sorted(daemons, key=lambda daemon: (not own_affair(daemon), daemon.name))
        kept: dict[str, list[int]] = {}
        for candidate in view if order else ():
            for name in candidate.keeps:
                kept.setdefault(name, []).append(candidate.id)
        books = Books()
        placed: dict[str, list[int]] = {}
        ending: list[tuple[DaemonSpec, Candidate]] = []
        for daemon in order:
            among, count = able[daemon.on].by_id, wanted_count(daemon)
            keepers = sorted(node for node in kept.get(daemon.name, ()) if node in among)
            if count is not None and len(keepers) > count:
                keepers = _in_rank(daemon.name, keepers)
            found = placed[daemon.name] = _take(books, daemon, (among[node] for node in keepers), count)[0]
            ending += [(daemon, among[node]) for node in keepers if node not in found]
        for daemon, candidate in ending:  # until they have, they take room
            _take(books, daemon, [candidate], None)
        held: dict[str, dict[int, str]] = {}
        ranked, self._ranked = self._ranked, {}
        for daemon in order:
            name, count, found = daemon.name, wanted_count(daemon), placed[daemon.name]
            nodes = able[daemon.on]
            if len(found) == (len(nodes.ids) if count is None else count):
                continue
            turn = nodes.ids
            if count is not None:
                free, known = ranked.get(name, (None, ()))
                turn = known if free == nodes.free else tuple(_in_rank(name, nodes.free))
                self._ranked[name] = nodes.free, turn
            others = (nodes.by_id[node] for node in turn if node not in found)
            more, full = _take(books, daemon, others, None if count is None else count - len(found))
            found += more
            wanting = len(full) if count is None else count - len(found)
            if full and wanting:
                held[name] = dict(islice(full.items(), wanting))
        return {name: tuple(sorted(ids)) for name, ids in placed.items()}, held

    def place(self, spec: DaemonSpec, able: _Able) -> tuple[int, ...]:
        """A cordoned node keeps a counted daemon that it runs, before anybody else, and gets no other."""
        count = wanted_count(spec)
        if count is None:
            return able.ids
        keepers = [c.id for c in able.cordoned if spec.name in c.keeps]
        if len(keepers) >= count:
            best = heapq.nlargest(count, keepers, key=lambda node: _weight(spec.name, node))
            return tuple(sorted(best))
        return tuple(sorted([*keepers, *self._first(spec.name, able.free, count - len(keepers))]))

    def _first(self, name: str, free: frozenset[int], count: int) -> Iterable[int]:
        if count >= len(free):
            return free
        before = self._before.get(name)
        choice: Iterable[tuple[bytes, int]] | None = None
        if before is not None and before.count == count:
            gone, come = self._step(before.free, free)
            if not any(node in gone for _, node in before.ranked):
                choice = [*before.ranked, *((_weight(name, node), node) for node in come)]
        if choice is None:
            choice = ((_weight(name, node), node) for node in free)
        first = _First(free, count, tuple(heapq.nlargest(count, choice)))
        self._now[name] = first
        return [node for _, node in first.ranked]

    def _step(self, before: frozenset[int], now: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
        """Who is gone and who has come; worked out once for all daemons of a selector."""
        pair = (id(before), id(now))
        if pair not in self._steps:
            self._steps[pair] = (before - now, now - before)
        return self._steps[pair]


def _take(
    books: Books, daemon: DaemonSpec, turn: Iterable[Candidate], most: int | None
) -> tuple[list[int], dict[int, str]]:
    """Those of the nodes in turn that have room for a daemon, `most` at most, and why the others have none."""
    assert daemon.resources is not None
    found: list[int] = []
    full: dict[int, str] = {}
    for candidate in turn:
        if len(found) == most:
            break
        if why := books.take(candidate.id, candidate.capacity, daemon.resources):
            full[candidate.id] = why
        else:
            found.append(candidate.id)
    return found, full


def _first_held(held: Mapping[int, str], able: _Able) -> str:
    return next((f"{able.by_id[node].name} {why}" for node, why in held.items()), "")


def _in_rank(name: str, nodes: Iterable[int]) -> list[int]:
    return sorted(nodes, key=lambda node: _weight(name, node), reverse=True)


def _weight(name: str, node: int) -> bytes:
    """What ranks a node for a daemon, the highest first: equal on every host."""
    return sha256(name.encode() + b"\0" + node.to_bytes(8, "big")).digest()


class Settling:
    """Puts off giving up a daemon to a node that has only just appeared: that node may be gone again, or see it otherwise.

    Gains count at once, and so does everything that isn't another node's doing: another spec, a drain, another tag.
    What others outrank this node for is kept until the nodes it is placed on have been the same for `settle_ms`."""

    def __init__(self, settle_ms: int = PLACEMENT_SETTLE_MS) -> None:
        self._settle_ms = settle_ms
        self._acted: dict[str, DaemonSpec] = {}
        self._losing: dict[str, tuple[tuple[int, ...], int]] = {}
        """Daemon → the nodes it goes to, and since when they are these."""

    @property
    def due_ms(self) -> int | None:
        """When the next daemon is given up, if all stays as it is: `step` again then, on the same clock."""
        return min((since + self._settle_ms for _, since in self._losing.values()), default=None)

    def step(self, spec: FleetSpec, plan: Plan, now_ms: int) -> dict[str, DaemonSpec]:
        """What to run here now, given the plan of now. `now_ms`: a clock that never goes back."""
        now_wanted = {daemon.name: daemon for daemon in spec.daemon} if plan.outranked else {}
        kept: dict[str, DaemonSpec] = {}
        losing: dict[str, tuple[tuple[int, ...], int]] = {}
        for name, daemon in self._acted.items():
            if name not in plan.outranked or now_wanted.get(name) != daemon:
                continue
            winners = plan.placed[name]
            before = self._losing.get(name)
            since = before[1] if before is not None and before[0] == winners else now_ms
            if now_ms - since < self._settle_ms:
                kept[name] = daemon
                losing[name] = (winners, since)
        self._losing = losing
        self._acted = {**plan.here, **kept}
        return dict(self._acted)
