"""What gossip says of others, carried once to each who wants to know: the event stream, the links, the rooms that count
members."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from discovery.identity import id_text
from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Member, addr_text
from discovery.swim.effects import (
    Changed,
    Effect,
    Evicted,
    Joined,
    LeaveDone,
    PushPull,
    Sentinels,
    Synced,
)

if TYPE_CHECKING:
    from agent.node import Node

INCOMPATIBLE_EVERY_S = 60.0
INCOMPATIBLE_KEPT = 1024


class Hearing:
    """Takes the effects of a node's `swim`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._incompatible_at: dict[str, float] = {}
        self._stale: dict[int, tuple[str, str]] = {}

    def take(self, effect: Effect) -> None:
        """Carries out one effect; events about other nodes are told here and nowhere else."""
        node = self._node
        match effect:
            case Joined(member=member):
                self._about(
                    "node.joined", member.record.id, member.record.name, to=member.state.word, source="gossip"
                )
                self.tell_if_stale(member)
            case Changed(member=member, old=old, new=new, evidence=evidence, by=by):
                if old is not new:
                    self._about(
                        "node.changed",
                        member.record.id,
                        member.record.name,
                        from_=old.word,
                        to=new.word,
                        source=evidence.value if evidence else "gossip",
                        reason=member.record.reason or None,
                        by=[node.name_of(n) for n in by] or None,
                    )
            case Evicted(id=gone, name=name, evidence=evidence, by=by):
                self._about(
                    "node.evicted",
                    gone,
                    name,
                    source=evidence.value,
                    from_=State.LEAVING.word if evidence is Evidence.LEFT else State.DEAD.word,
                    by=[node.name_of(n) for n in by] or None,
                )
            case Sentinels(nodes=nodes):
                node.contacts.keep(nodes)
            case PushPull(node=other):
                node.contacts.push_pull(other)
            case Synced():
                node.synced()
            case LeaveDone():
                node.left.set()
        if isinstance(effect, Joined | Changed | Evicted):
            node.meshes.members_changed()
            node.wanted.members_changed()
            node.data.members_changed()
        node.service.changed()

    def tell_if_stale(self, member: Member) -> None:
        """Tells of a member, or of this node, that runs other code than this disk holds: once for those two builds."""
        build, disk = member.record.build, self._node.pages.disk_build
        if not build or build == disk or not member.present:
            self._stale.pop(member.id, None)
        elif self._stale.get(member.id) != (build, disk):
            self._stale[member.id] = (build, disk)
            reason = f"runs {build}, the disk here holds {disk}"
            self._about("build.stale", member.id, member.record.name, reason=reason)

    def incompatible(self, addr: Addr, theirs: int, ours: int) -> None:
        """Tells of a peer that speaks another wire version, at most once a minute an address."""
        node, now = self._node, time.monotonic()
        if now - self._incompatible_at.get(addr[0], -INCOMPATIBLE_EVERY_S) < INCOMPATIBLE_EVERY_S:
            return
        if len(self._incompatible_at) > INCOMPATIBLE_KEPT:
            self._incompatible_at.clear()
        self._incompatible_at[addr[0]] = now
        node.pages.view.incompatible |= {
            m.id for m in node.swim.members.values() if addr in (m.addr, *m.record.addrs)
        }
        node.events.emit(
            "wire.incompatible",
            addr=addr_text(addr),
            theirs=theirs,
            ours=ours,
            reason=f"{addr_text(addr)} speaks wire version {theirs}, this node {ours}; update the older one",
        )
        node.service.changed()

    def _about(self, kind: str, node: int, name: str, **fields: Any) -> None:
        """An event about another node."""
        self._node.events.emit(kind, node=name, id=id_text(node), **fields)
