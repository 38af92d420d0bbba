"""The rules that decide between two claims, each a small pure function."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from ipaddress import ip_address

from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Record, SignedRecord, supersedes
from discovery.wire import Accuse


@dataclass(slots=True)
class Tombstone:
    """What is kept of a member that is gone: `record` is the last one held (a goodbye's is the goodbye
    itself)."""

    record: Record
    signed: SignedRecord
    evidence: Evidence
    at: float
    """When it became so in this view: monotonic seconds."""
    by: tuple[int, ...] = ()
    accusations: list[Accuse] = field(default_factory=list)

    @property
    def incarnation(self) -> int:
        return self.record.incarnation

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def kind(self) -> str:
        return self.record.kind

    @property
    def mesh(self) -> str:
        return self.record.mesh

    @property
    def final(self) -> bool:
        """Whether nothing of this incarnation can refute it: only its own goodbye is."""
        return self.evidence is Evidence.LEFT


class Ruling(Enum):
    """What to do about a record: nothing, take it as the member's newest word, or see its subject off."""

    IGNORE = "ignore"
    ADOPT = "adopt"
    DEPART = "depart"


def ruling(new: Record, held: Record | None, tomb: Tombstone | None) -> Ruling:
    """Whether a valid record counts against what is held of the same node.

    A tombstone bars its incarnation and all before it: late packets raise nobody. The one word of the dead
    that is heard is a goodbye of that very incarnation: it left, and what observers made of it was mistaken.
    """
    leaving = new.state is State.LEAVING
    if tomb is not None and new.incarnation <= tomb.incarnation:
        late_goodbye = leaving and not tomb.final and new.incarnation == tomb.incarnation
        return Ruling.DEPART if late_goodbye else Ruling.IGNORE
    if held is not None and not supersedes(new, held):
        return Ruling.IGNORE
    return Ruling.DEPART if leaving else Ruling.ADOPT


class TombRuling(Enum):
    """What to do about another's tombstone: nothing, keep it too, or look at the member myself."""

    IGNORE = "ignore"
    KEEP = "keep"
    CHECK = "check"
    REFUTED = "refuted"
    """I hold a later incarnation: the other will learn it from me."""


def tomb_ruling(incarnation: int, held: Record | None, mine: Tombstone | None) -> TombRuling:
    """Whether a Dead tombstone of another counts. Nobody is dead here because somebody says so: one that I
    hold present is only checked, one that I don't know is kept (and refuted by any higher incarnation)."""
    if mine is not None and incarnation <= mine.incarnation:
        return TombRuling.IGNORE
    if held is None:
        return TombRuling.KEEP
    if mine is not None and held.incarnation <= mine.incarnation:
        return TombRuling.KEEP
    return TombRuling.REFUTED if held.incarnation > incarnation else TombRuling.CHECK


@lru_cache(maxsize=8_192)
def _reach(host: str) -> str:
    try:
        ip = ip_address(host)
    except ValueError:
        return "no"
    if ip.is_multicast or ip.is_unspecified or (ip.version == 4 and host == "255.255.255.255"):
        return "no"
    return "loopback" if ip.is_loopback else "yes"


def is_loopback(addr: Addr) -> bool:
    """Whether only processes of the same host can mean the same by it."""
    return _reach(addr[0]) == "loopback"


def dialable(addr: Addr, same_host: bool) -> bool:
    """Whether a packet to it can reach the node that gave it: an IP address (never a name to be looked up),
    no multicast, loopback only on one host."""
    reach = _reach(addr[0])
    return reach == "yes" or (same_host and reach == "loopback")


def same_host(a: Record, b: Record) -> bool:
    """Whether both processes share their loopback (boot id and network namespace)."""
    return bool(a.host) and a.host == b.host


def bears_witness(addr: Addr, accuser: Record, target: Record) -> bool:
    """Whether a refused connect of `accuser` at `addr` says anything about `target`: at an address of the
    accuser's own host only when both run there."""
    if same_host(accuser, target):
        return True
    return not is_loopback(addr) and all(addr[0] != own[0] for own in accuser.addrs)
