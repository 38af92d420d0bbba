"""Which nodes run which daemons: every node works it out for itself, from the same spec and its own view of the mesh.

Nobody schedules and nothing is negotiated. Nodes are ranked for each daemon by a hash of its name and their id
(rendezvous hashing), and the first `count` of them run it: equal views agree, a node that goes leaves its daemons to
the next in rank and moves no other, a node that comes takes only what it ranks first for. While views differ, a daemon
may run on one node too many for a moment, and `Settling` sees to it that it doesn't run on one too few.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from agent.spec.model import DaemonSpec, FleetSpec
from agent.spec.selector import read_selector

PLACEMENT_SETTLE_MS = 3_000
RUNNABLE_STATES = frozenset({"joining", "alive", "degraded", "updating"})
RUNNABLE_MAINTENANCE = frozenset({"active", "exiting_maintenance", "recovery"})


@dataclass(frozen=True)
class Candidate:
    """A node as placement sees it. `keeps`: the counted daemons that a cordoned node still runs, by its own word."""

    id: int
    name: str
    kind: str
    tags: Mapping[str, str] = field(default_factory=dict)
    eligible: bool = True
    cordoned: bool = False
    keeps: frozenset[str] = frozenset()


def may_run(state: str, maintenance: str) -> bool:
    """Whether a node in that lifecycle state and maintenance (their words) is to run daemons at all. An updating one
    is: it will be back."""
    return state in RUNNABLE_STATES and maintenance in RUNNABLE_MAINTENANCE


@dataclass(frozen=True)
class Shortfall:
    """A counted daemon for which there are too few nodes."""

    daemon: str
    wanted: int
    placed: int

    def __str__(self) -> str:
        nodes = "no node" if self.placed == 0 else f"{self.placed} node{'s' * (self.placed != 1)}"
        return f"{self.daemon}: {self.wanted} wanted, {nodes} can run it"


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


@dataclass(frozen=True)
class _Able:
    """The eligible nodes that one selector means."""

    ids: tuple[int, ...]
    """In their order."""
    free: frozenset[int]
    """Those that are not cordoned."""
    cordoned: tuple[Candidate, ...]

    @classmethod
    def among(cls, on: str, candidates: Iterable[Candidate]) -> _Able:
        selector = read_selector(on)
        found = sorted((c for c in candidates if c.eligible and selector.matches(c)), key=lambda c: c.id)
        return cls(
            tuple(c.id for c in found),
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
    return list(Planner().place(spec, _Able.among(spec.on, candidates)))


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
        self._steps: dict[tuple[int, int], tuple[frozenset[int], frozenset[int]]] = {}
        """By the identity of two sets of nodes: who has gone, who has come."""

    def plan(self, spec: FleetSpec, me: int, candidates: Iterable[Candidate]) -> Plan:
        """As the function of the same name."""
        self._before, self._now, self._steps = self._now, {}, {}
        view = list(candidates)
        matching: dict[str, _Able] = {}
        where: dict[str, tuple[int, ...]] = {}
        here: dict[str, DaemonSpec] = {}
        outranked: set[str] = set()
        shortfalls: list[Shortfall] = []
        mine: dict[str, bool] = {}
        for daemon in spec.daemon:
            if (able := matching.get(daemon.on)) is None:
                able = matching[daemon.on] = _Able.among(daemon.on, view)
                mine[daemon.on] = me in able.ids
            ids = where[daemon.name] = self.place(daemon, able)
            if me in ids:
                here[daemon.name] = daemon
            elif mine[daemon.on]:
                outranked.add(daemon.name)
            wanted = wanted_count(daemon)
            if wanted is not None and len(ids) < wanted:
                shortfalls.append(Shortfall(daemon.name, wanted, len(ids)))
        self._before = {}
        return Plan(here, frozenset(outranked), where, tuple(shortfalls))

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
