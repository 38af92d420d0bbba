"""What shall run on this node: the spec in force and this view of the mesh, turned into intents for the engine.

Every node works out its own share (`spec.placing`); nobody is told what to run. Nothing is begun before the node has
joined: alone in its own view it would take the whole mesh's work upon itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from agent.chain.store import TAKEN_ON
from agent.daemons.runs import fingerprint_of
from agent.data.holdings import Key
from agent.meshos.events import DaemonIntent, Surveyed
from agent.spec.keeping import Keeping
from agent.spec.model import DaemonSpec, FleetSpec, Resources
from agent.spec.placing import Candidate, Plan, Planner, Settling, may_run, own_affair
from agent.spec.resources import UNKNOWN, Books, Capacity
from discovery.member import Member, Record

if TYPE_CHECKING:
    from agent.node import Node

LOOK_SOON_S = 0.02
"""Changes of the view that come together are looked at once."""
MIB = 1 << 20
JOIN_SETTLE_S = 2.0
"""A node that has just joined, or is alone so far, may not have met all: so long it begins no counted daemon."""


class Wanted:
    """The spec in force on one node, and the intents that follow from it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.plan: Plan | None = None
        self._planner = Planner()
        self._settling = Settling()
        self._told: dict[str, DaemonIntent] = {}
        self._keeping = Keeping(())
        self._kept: dict[int, frozenset[str]] = {}
        """What members were last known to keep: a spec reaches them and this node a moment apart."""
        self._taken_on: frozenset[str] = frozenset()
        """The daemons with resources that this node runs, and others count on; by its last look."""
        self._required: dict[str, Resources] = {}
        """What classes that were loaded here say that they require."""
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._joined_at: float | None = None
        self._surveyed = False

    @property
    def spec(self) -> FleetSpec:
        """The spec in force here; an empty one before the first."""
        return self._node.chains.spec

    async def begin(self) -> None:
        """Takes up the daemons that an earlier process left running."""
        journal, specs = self._node.journal, {daemon.name: daemon for daemon in self.spec.daemon}
        self._keeping = Keeping(specs)
        adopted = await self._node.engine.begin_daemons(specs)
        for name in adopted:
            if name not in specs and not self._node.chains.spec_missing:
                self._say(DaemonIntent(name, "stop"))
        self._take_on({name: specs[name] for name in (*adopted, *journal.get(TAKEN_ON, ())) if name in specs})
        journal.set(TAKEN_ON, None)
        self._count()
        self.look_soon()

    def hand_over(self) -> None:
        """Before an update: the process that takes this one's place runs what this one had taken on."""
        self._node.journal.set(TAKEN_ON, sorted(self._taken_on) or None)

    def accepted(self, spec: FleetSpec) -> None:
        """Another spec came into force."""
        if not hasattr(self._node, "engine"):
            return  # `begin` takes it up
        specs = {daemon.name: daemon for daemon in spec.daemon}
        self._keeping = Keeping(specs)
        self._required = {name: needs for name, needs in self._required.items() if name in specs}
        self._node.engine.daemons.define(specs)
        self._count()
        self.look()
        self._node.engine.state_record()

    def _count(self) -> None:
        """How many shall hold what."""
        counts: dict[Key, int] = {("artifact", found.name): found.replicas for found in self.spec.artifact}
        chains = {found.name: found.replicas for found in self.spec.chain}
        counts |= {("chain", name): count for name, count in chains.items()}
        self._node.chains.users.spec(chains, {found.name: found.keep for found in self.spec.chain})
        self._node.data.spec(counts)

    def packed(self, *, cordoned: bool) -> bytes:
        """What stays on this node, for its member record: it is nobody else's."""
        return self._keeping.packed(self._node.engine.kept() if cordoned else self._taken_on)

    def keeps(self) -> dict[int, frozenset[str]]:
        """What stays on each node in view, by node id: what it has taken on, or all that it runs if it is cordoned."""
        swim = self._node.swim
        found: dict[int, frozenset[str]] = {}
        for member in swim.members.values():
            told = self._keeping.unpacked(member.record.keeps)
            if kept := self._kept.get(member.id) if told is None else told:
                found[member.id] = kept
        self._kept = found
        mine = self._node.engine.kept() if swim.me.record.cordoned else self._taken_on
        if self._node.engine.loop.state.draining:
            mine -= self._sized()
        return {**found, swim.me.id: mine}

    def _sized(self) -> frozenset[str]:
        """The daemons with resources. A node that is drained gives them up at once, and for good: who takes them on
        keeps them."""
        return frozenset(daemon.name for daemon in self.spec.daemon if daemon.resources)

    def required(self, name: str) -> Resources | None:
        """What the class of that daemon says that it requires, where it was loaded here."""
        return self._required.get(name)

    def room_for(self, name: str, needs: Resources | None) -> bool:
        """Whether a class that asks for so much may begin here. If not, it is held back from now on, with the reason."""
        if needs is None:
            self._required.pop(name, None)
        else:
            self._required[name] = needs
        self.look()
        intent = self._told.get(name)
        return intent is None or not intent.held

    def look_soon(self, within_s: float = LOOK_SOON_S) -> None:
        """The view has changed, or a daemon: what shall run here may be another."""
        due_at = time.monotonic() + within_s
        if self._timer is not None:
            if due_at >= self._due_at:
                return
            self._timer.cancel()
        self._due_at = due_at
        self._timer = asyncio.get_running_loop().call_later(within_s, self.look)

    members_changed = look_soon

    def look(self) -> None:
        """Works out what shall run here and tells the engine what is new."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        node = self._node
        if not node.engine.loop.life.joined or node.stopping or node.chains.spec_missing:
            return
        now_ms = round(time.monotonic() * 1000)
        me, specs = node.identity.id, {daemon.name: daemon for daemon in self.spec.daemon}
        plan = self._planner.plan(self.spec, me, self._candidates())
        held = {name: nodes[me] for name, nodes in plan.held.items() if me in nodes}
        there = set(node.engine.daemons.names())
        if (settles_s := self._settles_s()) > 0:
            known = there | self._told.keys() | self._taken_on
            known |= {name for name, spec in specs.items() if own_affair(spec)}
            plan = replace(plan, here={name: spec for name, spec in plan.here.items() if name in known})
            held = {name: why for name, why in held.items() if name in known}
            self.look_soon(settles_s)
        if draining := node.engine.loop.state.draining:
            plan = replace(plan, outranked=plan.outranked - self._sized())
        self.plan = plan
        wanted = self._settling.step(self.spec, plan, now_ms)
        held |= self._without_room(wanted, there)
        for name, spec in {**wanted, **{name: specs[name] for name in held}}.items():
            why = held.get(name, "")
            self._say(DaemonIntent(name, "run", None, tuple(spec.after), fingerprint_of(spec), why))
        for name in (self._told.keys() | there) - wanted.keys() - held.keys():
            self._say(DaemonIntent(name, "stop" if name in there else "none"))
        self._take_on({} if draining else wanted)
        if settles_s <= 0 and not self._surveyed:
            self._surveyed = True
            node.engine.say(Surveyed())
        if (due_ms := self._settling.due_ms) is not None:
            self.look_soon(max(0.05, (due_ms - now_ms) / 1000))

    def _take_on(self, wanted: dict[str, DaemonSpec]) -> None:
        """Those of these daemons that have resources are this node's from now on, and others are told."""
        taken_on = frozenset(name for name, spec in wanted.items() if spec.resources)
        if taken_on != self._taken_on:
            self._taken_on = taken_on
            self._node.engine.state_record()

    def _without_room(self, wanted: dict[str, DaemonSpec], there: set[str]) -> dict[str, str]:
        """Of the classes that shall run here and say for themselves what they require, those that don't run yet and
        don't fit beside the rest; and why."""
        asking = {
            name: needs
            for name, needs in self._required.items()
            if name in wanted and wanted[name].resources is None
        }
        me, has, books = self._node.identity.id, _capacity(self._node.swim.me.record), Books()
        given = [spec.resources for spec in wanted.values() if spec.resources is not None]
        for needs in (*given, *(needs for name, needs in asking.items() if name in there)):
            books.take(me, UNKNOWN, needs)
        new = sorted(asking.keys() - there)
        return {name: why for name in new if (why := books.take(me, has, asking[name]))}

    def _settles_s(self) -> float:
        """How long this node still waits for those it has not met, since it joined."""
        if self._joined_at is None:
            self._joined_at = time.monotonic()
        return self._joined_at + JOIN_SETTLE_S - time.monotonic()

    def _say(self, intent: DaemonIntent) -> None:
        name = str(intent.daemon)
        if self._told.get(name) == intent:
            return
        if intent.intent == "none":
            self._told.pop(name, None)
        else:
            self._told[name] = intent
        self._node.engine.say(intent)

    def _candidates(self) -> list[Candidate]:
        swim, keeps = self._node.swim, self.keeps()
        others = [
            _candidate(
                member, member.present and may_run(member.state.word, member.record.maintenance), keeps
            )
            for member in swim.members.values()
        ]
        # What this node shall run is its own to know while it is drained too: the engine holds it back, and an exit
        # from maintenance waits for it.
        return [_candidate(swim.me, True, keeps), *others]

    def close(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def daemon(self, name: str) -> DaemonSpec | None:
        """A daemon of the spec in force."""
        return next((daemon for daemon in self.spec.daemon if daemon.name == name), None)


def _candidate(member: Member, eligible: bool, keeps: dict[int, frozenset[str]]) -> Candidate:
    record = member.record
    return Candidate(
        id=record.id,
        name=record.name,
        kind=record.kind,
        tags=dict(record.tags),
        eligible=eligible,
        cordoned=record.cordoned,
        keeps=keeps.get(record.id, frozenset()),
        capacity=_capacity(record),
    )


def _capacity(record: Record) -> Capacity:
    mib = record.memory_mib
    return Capacity(record.millicores, None if mib is None else mib * MIB)
