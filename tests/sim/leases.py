"""A simulated mesh whose nodes keep their soft lease: notes ride on the real pool, candidates come from its views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from discovery import lease as ls
from discovery import wire
from discovery.lifecycle import State
from discovery.summary import LEASE_TOPIC
from tests.sim.net import MESH, Net, SimNode

CANDIDATES = ("gateway", "console")


@dataclass(frozen=True)
class LeaseTold:
    """A change of the lease, as one node told it."""

    at: float
    holder: int | None
    epoch: int
    reason: str
    mine: bool


@dataclass
class Side:
    """One node's part: what its process knows of the lease, and what outlives the process."""

    lease: ls.Lease | None = None
    epoch: int = 0
    """On its disk."""
    candidates: dict[int, str] = field(default_factory=dict)
    can_publish: bool = True
    told: list[LeaseTold] = field(default_factory=list)
    published: list[float] = field(default_factory=list)
    wake_at: float = inf

    def heard(self, note: wire.Note, sender: int, now: float) -> bool:
        assert self.lease is not None and (note.topic, note.subject) == (LEASE_TOPIC, MESH)
        return self.lease.heard(note.body, note.age_ms / 1000, sender, now)

    def held(self, now: float) -> list[wire.Note]:
        held = self.lease.held(now) if self.lease is not None else None
        return [] if held is None else [wire.Note(LEASE_TOPIC, MESH, held[0], round(held[1] * 1000))]


class LeaseNet(Net):
    """`Net` with a lease on every node; `side` has them by index."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed, **options)
        self.sides: dict[int, Side] = {}

    def side(self, node: SimNode) -> Side:
        return self.sides.setdefault(node.index, Side())

    def lease(self, node: SimNode) -> ls.Lease:
        lease = self.side(node).lease
        assert lease is not None
        return lease

    def mesh(self, *kinds: str) -> list[SimNode]:
        """Nodes of these kinds, started together, that all know the first."""
        first = len(self.nodes)
        return [self.add(kind=kind, seeds=(first,) if i else ()) for i, kind in enumerate(kinds)]

    def start(self, node: SimNode, seeds: Iterable[int] = (), **record: Any) -> None:
        side = self.side(node)
        side.lease = None
        super().start(node, seeds, **record)
        now = node.clock(self.now)
        side.lease = ls.Lease(
            mesh=MESH,
            pub=node.pub,
            candidate=node.swim.me.record.kind in CANDIDATES,
            sign=node.sign,
            verify=self.keys.verify,
            config=ls.LeaseConfig(),
            now=now,
        )
        side.lease.floor(side.epoch, now)
        side.candidates = {}
        node.swim.keep_notes(side)
        self.after(node)

    def leave(self, node: SimNode) -> None:
        self.lease(node).resign(node.clock(self.now))
        self.after(node)
        super().leave(node)

    def update(self, node: SimNode, deadline_s: float = 120.0) -> None:
        """An operator's update begins; its process goes on for now."""
        self.lease(node).resign(node.clock(self.now))
        self.call(node, "update_self", state=State.UPDATING, deadline_ms=round(deadline_s * 1000))

    def resume(self, node: SimNode) -> None:
        """SIGCONT: timers first, the lease's too, then what waits in the socket."""
        if node.up:
            self.lease(node).wake(node.clock(self.now))
        super().resume(node)

    def after(self, node: SimNode) -> None:
        super().after(node)
        side = self.side(node)
        if side.lease is None or not node.up or node.paused:
            return
        self._carry_out(node, side, side.lease)
        super().after(node)
        due = (side.lease.deadline() - node.offset) / node.rate + 1e-9
        due = max(due, self.now)
        if due < inf and due != side.wake_at:
            side.wake_at = due
            self.at(due, self._wake_lease, node, due)

    def _wake_lease(self, node: SimNode, due: float) -> None:
        side = self.side(node)
        if side.wake_at != due:
            return
        side.wake_at = inf
        if node.up and not node.paused and side.lease is not None:
            side.lease.wake(node.clock(self.now))
            self.after(node)

    def _carry_out(self, node: SimNode, side: Side, lease: ls.Lease) -> None:
        now = node.clock(self.now)
        may = {
            member.id: member.record.kind
            for member in (node.swim.me, *node.swim.members.values())
            if member.record.kind in CANDIDATES and member.present and member.state is not State.UPDATING
        }
        if may != side.candidates:
            side.candidates = may
            lease.set_candidates(may, now)
        while effects := lease.drain():
            for effect in effects:
                match effect:
                    case ls.Persist(epoch):
                        assert epoch > side.epoch, "an epoch was persisted twice, or went back"
                        side.epoch = epoch
                    case ls.Spread(body, age_s):
                        node.swim.spread(LEASE_TOPIC, MESH, body, now, age_s)
                    case ls.Tell(nodes, body, age_s):
                        node.swim.send_note(nodes, LEASE_TOPIC, MESH, body, now, age_s)
                    case ls.Publish():
                        if side.can_publish:
                            side.published.append(self.now)
                        lease.published(side.can_publish, now)
                    case ls.Changed(holder, _, epoch, reason, mine):
                        side.told.append(LeaseTold(self.now, holder, epoch, reason, mine))

    def _push_pull_answered(self, node: SimNode, life: int, answer: bytes, other: int) -> None:
        super()._push_pull_answered(node, life, answer, other)
        lease = self.side(node).lease
        if lease is not None and self._listens(node) and node.life == life:
            lease.synced(node.clock(self.now))
            self.after(node)

    # what is seen

    def holders(self) -> list[SimNode]:
        """Who takes itself to be the holder, and runs."""
        return [node for node in self.running() if self.lease(node).mine]

    def one_holder(self) -> bool:
        """Whether exactly one node holds the lease, and every running one says so, and at which epoch."""
        holders = self.holders()
        if len(holders) != 1:
            return False
        named = {(self.lease(node).holder, self.lease(node).epoch) for node in self.running()}
        return named == {(holders[0].id, self.lease(holders[0]).epoch)}

    def report(self) -> str:
        """For complaints: who says who holds, at which epoch."""
        names = {node.id: node.index for node in self.nodes}
        rows = []
        for node in self.running():
            lease = self.lease(node)
            holder = lease.holder if lease.holder is None else names[lease.holder]
            rows.append(
                f"{node.index}: {holder} at {lease.epoch}.{lease.renewal}{' (mine)' if lease.mine else ''}"
            )
        return f"seed {self.seed}, at {self.now:.3f} s: " + "; ".join(rows)
