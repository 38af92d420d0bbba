"""One node's view of its mesh as rows: what `qd nodes`, the console and `watch` show, folded once, here.

A row's ages are computed when it is made, by this host's monotonic clock; nothing that this node doesn't know is
filled in. The keys are those of the interface contract; `period_ms`, `incarnation`, `suspect`, `history`, `host`,
`reason`, `deadline_ms`, `capacity`, `incompatible` and `expired` are extensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from discovery.directory import Remote
from discovery.identity import id_text
from discovery.lifecycle import EVIDENCE_TEXT, Evidence, State
from discovery.member import Member, Record, Vitals, addr_text

Row = dict[str, Any]
MIB = 1 << 20

HISTORY_SAMPLES = 60
HISTORY_PERIOD_S = 5.0
VITALS_PERIOD_S = 5.0
PROBE_PERIOD_MIN_S = 1.0
REMOTE_PERIOD_MS = 5_000
"""How often a publisher tells when it last heard of its nodes."""
VITALS_MAX_AGE_PERIODS = 6
"""Figures older than this many periods are no longer shown at all: unknown beats ancient."""


@dataclass
class View:
    """Builds rows from members. `resolve` names a node id for evidence; `disk_build` is the code on this disk."""

    me: int
    resolve: Callable[[int], str]
    history: dict[int, deque[int | None]] = field(default_factory=dict)
    incompatible: set[int] = field(default_factory=set)
    """Members last heard in another wire version."""

    def row(
        self, member: Member, now: float, *, others: int, disk_build: str | None, history: bool = False
    ) -> Row:
        """One node as this view has it. `others` is the number of other present members (it sets the probe period)."""
        mine = member.id == self.me
        record = member.record
        gone = member.state is State.DEAD or member.state is State.LEAVING
        period_s = VITALS_PERIOD_S if mine else max(PROBE_PERIOD_MIN_S, float(others))
        vitals, vitals_age_s = member.vitals, None
        if vitals is not None and member.vitals_at is not None:
            vitals_age_s = now - member.vitals_at
            if gone or vitals_age_s > VITALS_MAX_AGE_PERIODS * max(period_s, VITALS_PERIOD_S):
                vitals = None
        addr = member.addr or (record.addrs[0] if record.addrs else None)
        deadline_ms = None
        if record.deadline_ms is not None and not gone:
            deadline_ms = round(record.deadline_ms - (now - member.received) * 1000)
        row: Row = {
            "id": id_text(record.id),
            "name": record.name,
            "mesh": record.mesh,
            "kind": record.kind,
            "state": member.state.word,
            "since_ms": _ms(now - member.since),
            "source": "self" if mine else "gossip",
            "cpu": _share(vitals.cpu if vitals else None),
            "mem": _share(vitals.mem if vitals else None),
            "disk": _share(vitals.disk if vitals else None),
            "rtt_ms": None if mine or gone or member.rtt_s is None else round(member.rtt_s * 1000, 3),
            "addr": addr_text(addr) if addr else None,
            "build": record.build or None,
            "fresh": record.build == disk_build if record.build and disk_build else None,
            "wire": record.wire,
            "maintenance": record.maintenance,
            "maintenance_until_ms": deadline_ms if record.maintenance == "entering_maintenance" else None,
            "cordoned": record.cordoned,
            "daemons": _daemons(vitals),
            "failures": vitals.failures if vitals else None,
            "last_seen_ms": 0 if mine else _ms(now - member.last_seen),
            "tags": dict(record.tags),
            "evidence": self.evidence(member, now),
            "period_ms": round(period_s * 1000),
            "vitals_age_ms": None if vitals is None or vitals_age_s is None else _ms(vitals_age_s),
            "incarnation": record.incarnation,
            "suspect": member.suspect_since is not None and not gone,
            "host": record.host.hex(),
            "reason": record.reason or None,
            "deadline_ms": deadline_ms,
            "capacity": _capacity(record),
            "incompatible": member.id in self.incompatible,
            "expired": False,
        }
        if history:
            row["history"] = list(self.history.get(record.id, ()))
        return row

    def remote_row(
        self, member: Remote, now: float, *, silent_s: float, expired_s: float | None, disk_build: str | None
    ) -> Row:
        """One node of another mesh, as its publisher tells of it. `silent_s`: how long nothing was heard of its mesh;
        `expired_s`: since when it is expired, if it is."""
        row = self.row(member, now, others=0, disk_build=disk_build)
        row.update(source="directory", rtt_ms=None, period_ms=REMOTE_PERIOD_MS, expired=expired_s is not None)
        if row["evidence"] is not None:
            row["evidence"] = self._told(member, now)
        if expired_s is not None:
            text = f"mesh {member.record.mesh} expired: nothing heard from it for {round(silent_s)} s"
            row.update(
                state=State.DEAD.word,
                since_ms=_ms(expired_s),
                evidence={"kind": Evidence.SILENT.value, "by": [], "text": text},
                suspect=False,
                **dict.fromkeys(("cpu", "mem", "disk", "failures", "deadline_ms", "vitals_age_ms")),
                daemons={"running": None, "total": None},
            )
        return row

    def _told(self, member: Remote, now: float) -> dict[str, Any]:
        """The evidence of a death in another mesh, with the witnesses that its publisher names."""
        assert member.evidence is not None
        return _evidence(member, list(member.by_names), now)

    def evidence(self, member: Member, now: float) -> dict[str, Any] | None:
        """How this view knows that a node is gone, or None while it is not."""
        if member.evidence is None or member.state is not State.DEAD:
            return None
        return _evidence(member, [self.resolve(node) for node in member.evidence_by], now)

    def sample(self, members: Mapping[int, Member], me: Member) -> None:
        """Adds one CPU sample a node to its history (call every HISTORY_PERIOD_S); forgets nodes that are gone."""
        for gone in self.history.keys() - members.keys() - {me.id}:
            del self.history[gone]
        for member in (me, *members.values()):
            cpu = member.vitals.cpu if member.vitals and member.present else None
            self.history.setdefault(member.id, deque(maxlen=HISTORY_SAMPLES)).append(cpu)


def stamp(member: Member) -> tuple[object, ...]:
    """Everything about a member that a watcher should be told when it changes, as a comparable value."""
    record = member.record
    return (
        record.incarnation,
        record.version,
        member.state,
        member.evidence,
        member.suspect_since is None,
        member.vitals,
        member.vitals_at,
        member.addr,
        int(member.last_seen),
    )


def spawned_row(node: str, name: str, mesh: str, kind: str, addr: str | None, age_s: float) -> Row:
    """A node that this home started and that gossip has not met yet: the process runs, the rest is unknown."""
    return {
        "id": node,
        "name": name,
        "mesh": mesh,
        "kind": kind,
        "state": State.JOINING.word,
        "since_ms": _ms(age_s),
        "source": "spawned",
        **dict.fromkeys(("cpu", "mem", "disk", "rtt_ms")),
        "addr": addr,
        **dict.fromkeys(("build", "fresh", "wire", "maintenance", "maintenance_until_ms", "cordoned")),
        "daemons": {"running": None, "total": None},
        "failures": None,
        "last_seen_ms": None,
        "tags": {},
        "evidence": None,
    }


def _evidence(member: Member, by: list[str], now: float) -> dict[str, Any]:
    assert member.evidence is not None
    text = EVIDENCE_TEXT[member.evidence]
    if member.evidence is Evidence.EXITED:
        text = f"{text}: refused to {', '.join(by)}" if by else text
    elif member.evidence is Evidence.SILENT:
        text = f"no answer for {round(now - member.last_seen)} s: host down, stopped or cut off"
    return {"kind": member.evidence.value, "by": by, "text": text}


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _share(permille: int | None) -> float | None:
    return None if permille is None else permille / 1000


def _capacity(record: Record) -> dict[str, float | None] | None:
    """What a node has for daemons: cores, and bytes of memory."""
    if record.millicores is None and record.memory_mib is None:
        return None
    return {
        "cpu": None if record.millicores is None else record.millicores / 1000,
        "memory": None if record.memory_mib is None else record.memory_mib * MIB,
    }


def _daemons(vitals: Vitals | None) -> dict[str, int | None]:
    if vitals is None:
        return {"running": None, "total": None}
    return {"running": vitals.daemons_running, "total": vitals.daemons_total}
