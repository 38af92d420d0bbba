"""The rows of `qd meshes`: each mesh as a whole, as this node knows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from discovery.directory import Listing
from discovery.identity import id_text
from discovery.lifecycle import State
from discovery.member import Member, addr_text
from discovery.sshkey import pub_fingerprint

if TYPE_CHECKING:
    from agent.meshes import Meshes
    from agent.node import Node

Row = dict[str, Any]


class MeshRows:
    """Called, it makes the rows anew."""

    def __init__(self, node: Node, meshes: Meshes) -> None:
        self._node = node
        self._meshes = meshes

    def __call__(self) -> list[Row]:
        """`qd meshes`: the own mesh first, then the others by name."""
        passed = self._meshes.following.mesh_rows if not self._meshes.candidate else {}
        own = self._own_row()
        if own["mesh"] in passed:
            own |= _completed(own, *passed[own["mesh"]])
        rows = [own]
        for mesh in sorted(self._meshes.directory.listings):
            rows.append(self._row(self._meshes.directory.listings[mesh], passed.get(mesh)))
        return rows

    def _own_row(self) -> Row:
        node, swim = self._node, self._node.swim
        members = [swim.me, *swim.members.values()]
        holder = self._meshes.lease.holder
        member = next((m for m in members if m.id == holder), None)
        expires_s = self._meshes.lease.expires_in_s(time.monotonic())
        addr = (member.addr or (member.record.addrs[0] if member.record.addrs else None)) if member else None
        cpu, mem = summary_load(members)
        return {
            "mesh": node.settings.mesh,
            "publisher": {
                "id": id_text(holder) if holder is not None else None,
                "name": node.name_of(holder) if holder is not None else None,
                "addr": addr_text(addr) if addr else None,
            },
            "epoch": self._meshes.lease.epoch or None,
            "version": self._meshes.telling.version if self._meshes.lease.mine else None,
            "expires_in_ms": None if expires_s is None else _ms(expires_s),
            "expired": False,
            "nodes": _counts(Counter(m.state for m in members)),
            "cpu": _share(cpu),
            "mem": _share(mem),
            "age_ms": 0,
            "home": True,
            "pub": pub_fingerprint(self._meshes.identity.pub) if self._meshes.identity else None,
            "impostors": self._impostors(node.settings.mesh),
            "backbone": self._meshes.backbone.mode,
            "route": None,
            "rtt_ms": None,
            "listed": None,
            "reason": None,
        }

    def _row(self, listing: Listing, passed: tuple[float, Row] | None) -> Row:
        """A row about another mesh. `passed`: the same row as the candidate that was asked has it."""
        now, summary = time.monotonic(), listing.summary
        tie = self._meshes.following.ties.get(listing.mesh)
        via = passed[1] if passed else {}
        if listing.fed:
            counts = Counter(m.state for m in listing.members.values())
        else:
            counts = Counter(dict(summary.counts))
        if listing.expired:
            counts = Counter({State.DEAD: sum(counts.values())})
        left_s = self._meshes.directory.expires_in_s(listing.mesh, now)
        addr = summary.addrs[0] if summary.addrs else None
        rtt_s = tie.rtt_s if tie else None
        return {
            "mesh": listing.mesh,
            "publisher": {
                "id": id_text(summary.publisher_id),
                "name": summary.publisher_name,
                "addr": addr_text((addr[0], addr[1])) if addr else None,
            },
            "epoch": summary.epoch,
            "version": summary.version,
            "expires_in_ms": _ms(left_s) if left_s is not None else None,
            "expired": listing.expired,
            "nodes": _counts(counts),
            "cpu": _share(None if listing.expired else summary.cpu),
            "mem": _share(None if listing.expired else summary.mem),
            "age_ms": _ms(listing.silent_s(now)),
            "home": listing.pub in self._meshes.listed.of_home(),
            "pub": pub_fingerprint(listing.pub),
            "impostors": self._impostors(listing.mesh) or via.get("impostors") or [],
            "backbone": self._meshes.backbone.mode or via.get("backbone"),
            "route": tie.route if tie else via.get("route"),
            "rtt_ms": round(rtt_s * 1000, 3) if rtt_s is not None else via.get("rtt_ms"),
            "listed": tie.listed if tie else via.get("listed"),
            "reason": (tie.problem if tie else via.get("reason")) or None,
        }

    def _impostors(self, mesh: str) -> list[Row]:
        now = time.monotonic()
        return [
            {
                "pub": pub_fingerprint(pub),
                "publisher": impostor.publisher,
                "addr": addr_text(impostor.addr) if impostor.addr else None,
                "age_ms": _ms(now - impostor.last_at),
            }
            for pub, impostor in self._meshes.directory.impostors.get(mesh, {}).items()
        ]


def summary_load(members: Iterable[Member]) -> tuple[int | None, int | None]:
    """CPU and memory of the live members in the mean, in thousandths; None where nobody has told any."""
    loads = [m.vitals for m in members if m.present and m.vitals]
    cpu = [vitals.cpu for vitals in loads if vitals.cpu is not None]
    mem = [vitals.mem for vitals in loads if vitals.mem is not None]
    return round(sum(cpu) / len(cpu)) if cpu else None, round(sum(mem) / len(mem)) if mem else None


def _completed(own: Row, at: float, row: Row) -> Row:
    """What only a candidate knows of the own mesh, as one told it at `at`."""
    told = {key: row.get(key) for key in ("version", "backbone") if own[key] is None}
    left_ms = row.get("expires_in_ms")
    if own["publisher"]["id"] is not None and isinstance(left_ms, int):
        told["expires_in_ms"] = max(0, left_ms - _ms(time.monotonic() - at))
    return told


def _counts(states: Mapping[State, int]) -> dict[str, int]:
    return {"total": sum(states.values()), **{s.word: states.get(s, 0) for s in State}}


def _share(permille: int | None) -> float | None:
    return None if permille is None else permille / 1000


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
