"""What shall run on this node: the spec in force and this view of the mesh, turned into intents for the engine.

Every node works out its own share (`spec.placing`); nobody is told what to run. Nothing is begun before the node has
joined: alone in its own view it would take the whole mesh's work upon itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from agent.daemons.runs import fingerprint_of
from agent.data.holdings import Key
from agent.meshos.events import DaemonIntent
from agent.spec.keeping import packed, unpacked
from agent.spec.model import DaemonSpec, FleetSpec
from agent.spec.placing import Candidate, Plan, Planner, Settling, may_run, own_affair
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node

LOOK_SOON_S = 0.02
"""Changes of the view that come together are looked at once."""
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
        self._kept: dict[int, frozenset[str]] = {}
        """What cordoned members were last known to keep: a spec reaches them and this node a moment apart."""
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._joined_at: float | None = None

    @property
    def spec(self) -> FleetSpec:
        """The spec in force here; an empty one before the first."""
        return self._node.chains.spec

    async def begin(self) -> None:
        """Takes up the daemons that an earlier process left running."""
        specs = {daemon.name: daemon for daemon in self.spec.daemon}
        for name in await self._node.engine.begin_daemons(specs):
            if name not in specs:
                self._say(DaemonIntent(name, "stop"))
        self._count()
        self.look_soon()

    def accepted(self, spec: FleetSpec) -> None:
        """Another spec came into force."""
        if not hasattr(self._node, "engine"):
            return  # `begin` takes it up
        self._node.engine.daemons.define({daemon.name: daemon for daemon in spec.daemon})
        self._count()
        self._node.engine.state_record()
        self.look()

    def _count(self) -> None:
        """How many shall hold what."""
        counts: dict[Key, int] = {("artifact", found.name): found.replicas for found in self.spec.artifact}
        chains = {found.name: found.replicas for found in self.spec.chain}
        counts |= {("chain", name): count for name, count in chains.items()}
        self._node.chains.users.spec(chains)
        self._node.data.spec(counts)

    def packed(self) -> bytes:
        """What this cordoned node still runs, for its member record: it stays, and is nobody else's."""
        return packed([daemon.name for daemon in self.spec.daemon], self._node.engine.kept())

    def keeps(self) -> dict[int, frozenset[str]]:
        """What cordoned nodes in view still run, by node id."""
        swim, names = self._node.swim, [daemon.name for daemon in self.spec.daemon]
        found: dict[int, frozenset[str]] = {}
        for member in swim.members.values():
            if member.record.cordoned:
                told = unpacked(names, member.record.keeps)
                found[member.id] = self._kept.get(member.id, frozenset()) if told is None else told
        self._kept = found
        if swim.me.record.cordoned:
            found = {**found, swim.me.id: self._node.engine.kept().intersection(names)}
        return found

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
        if not node.engine.loop.life.joined or node.stopping:
            return
        now_ms = round(time.monotonic() * 1000)
        plan = self._planner.plan(self.spec, node.identity.id, self._candidates())
        there = set(node.engine.daemons.names())
        if (settles_s := self._settles_s()) > 0:
            known = there | self._told.keys()
            plan = replace(
                plan, here={n: spec for n, spec in plan.here.items() if own_affair(spec) or n in known}
            )
            self.look_soon(settles_s)
        self.plan = plan
        wanted = self._settling.step(self.spec, plan, now_ms)
        for name, spec in wanted.items():
            self._say(DaemonIntent(name, "run", None, tuple(spec.after), fingerprint_of(spec)))
        for name in (self._told.keys() | there) - wanted.keys():
            self._say(DaemonIntent(name, "stop" if name in there else "none"))
        if (due_ms := self._settling.due_ms) is not None:
            self.look_soon(max(0.05, (due_ms - now_ms) / 1000))

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
    )
