"""A node of another mesh in one entry: its own signed record, and what its publisher makes of it.

Only the record proves itself. The rest is the publisher's judgement, and a viewer shows it as such: whoever holds
a mesh's key may be wrong about that mesh, never about another. Entries carry ages, not times, so no two clocks need
to agree; an age counts from when its entry arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from sys import intern
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from discovery.errors import RemoteError
from discovery.identity import NODE_NAME
from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Member, Port, Record, Short, SignedRecord, Vitals

ENTRIES_PER_CALL = 400
"""As many as a caller encodes at a time: a frame of a link holds 1 MiB, an entry takes at most 2.3 KiB."""
ENTRIES_MAX = 1_000
ENTRIES_MAX_BYTES = 1_000_000
NAMES_MAX = 8
AGE_MAX_MS = 2**48

Age = Annotated[int, Meta(ge=0, le=AGE_MAX_MS)]
Name = Annotated[str, Meta(max_length=128)]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One node as its publisher tells of it. Field order is the wire order: only ever append, with a truthful
    default."""

    record: SignedRecord
    state: State
    """The record's own, or Dead where its own mesh has seen it vanish."""
    since_ms: Age
    """How long it has been in that state, in the publisher's view; so all the ages here."""
    seen_ms: Age
    received_ms: Age
    suspect: bool = False
    evidence: Evidence | None = None
    by: Annotated[list[Name], Meta(max_length=NAMES_MAX)] = []
    """Names (or ids) of those who found it dead."""
    vitals: Vitals | None = None
    vitals_age_ms: Age | None = None
    addr: tuple[Short, Port] | None = None
    """At which it last answered the publisher, which may be an address of that host only."""


@dataclass(slots=True)
class Remote(Member):
    """A member of another mesh, as its publisher tells of it, in this node's own clock. `addr` is where it answered
    the publisher: whether that address means anything here is for whoever dials to judge."""

    by_names: tuple[str, ...] = ()
    """Who found it dead; `evidence_by` is empty, for ids of another mesh say nothing here."""


def entry_of(member: Member, now: float, name_of: Callable[[int], str], *, mine: bool = False) -> Entry:
    """The entry of a member of this node's view, or of a directory that it passes on. `name_of` names whoever found
    it dead; `mine` is for this node's own row, which is always just seen."""
    dead = member.state is State.DEAD
    by = member.by_names if isinstance(member, Remote) else [name_of(node) for node in member.evidence_by]
    measured = member.vitals is not None and member.vitals_at is not None
    return Entry(
        record=member.signed,
        state=member.state,
        since_ms=_age_ms(now, member.since),
        seen_ms=0 if mine else _age_ms(now, member.last_seen),
        received_ms=_age_ms(now, member.received),
        suspect=member.suspect_since is not None and not dead,
        evidence=member.evidence if dead else None,
        by=list(by[:NAMES_MAX]) if dead else [],
        vitals=member.vitals if measured else None,
        vitals_age_ms=_age_ms(now, member.vitals_at) if measured and member.vitals_at is not None else None,
        addr=member.addr,
    )


def _age_ms(now: float, at: float) -> int:
    return min(AGE_MAX_MS, max(0, round((now - at) * 1000)))


_encode = msgspec.msgpack.Encoder().encode
_entries = msgspec.msgpack.Decoder(Annotated[list[Entry], Meta(max_length=ENTRIES_MAX)])


def encode_entries(entries: list[Entry]) -> bytes:
    """For one frame: up to ENTRIES_PER_CALL at a time."""
    return _encode(entries)


def decode_entries(body: bytes) -> list[Entry]:
    """RemoteError when it is no list of up to ENTRIES_MAX entries. Proves nothing about their records yet."""
    if len(body) > ENTRIES_MAX_BYTES:
        raise RemoteError(f"directory entries of {len(body)} bytes exceed {ENTRIES_MAX_BYTES}")
    try:
        entries: list[Entry] = _entries.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as why:
        raise RemoteError(f"directory entries do not decode: {why}") from None
    return entries


def refusal(entry: Entry, record: Record, mesh: str) -> str | None:
    """Why an entry with this (verified) record can't be a row of `mesh`, as a stable code; None when it can."""
    if record.mesh != mesh:
        return "wrong_mesh"
    dead = entry.state is State.DEAD
    if not dead and entry.state is not record.state:
        return "impossible_state"
    if dead != (entry.evidence in (Evidence.EXITED, Evidence.SILENT)) or (entry.by and not dead):
        return "impossible_evidence"
    if (entry.vitals is None) != (entry.vitals_age_ms is None):
        return "ageless_vitals"
    if not all(map(NODE_NAME.fullmatch, entry.by)):
        return "illegal_name"
    if entry.addr is not None and not is_ip(entry.addr[0]):
        return "bad_addr"
    return None


def is_ip(host: str) -> bool:
    """Whether it is an IP address and nothing else: no name to be looked up, and no zone, which may hold anything."""
    if "%" in host:
        return False
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def share_words(record: Record) -> None:
    """Lets a record, straight from its decoder, share the words that thousands of records have in common: a fifth
    of what a row takes."""
    for field in ("mesh", "kind", "build", "maintenance"):
        force_setattr(record, field, intern(getattr(record, field)))
    if record.tags:
        force_setattr(record, "tags", {intern(key): intern(value) for key, value in record.tags.items()})


def remote_of(entry: Entry, record: Record, now: float) -> Remote:
    """The row of a node that was not known so far."""
    return Remote(
        record=record,
        signed=entry.record,
        state=entry.state,
        since=_at(now, entry.since_ms),
        last_seen=_at(now, entry.seen_ms),
        received=_at(now, entry.received_ms),
        evidence=entry.evidence,
        suspect_since=now if entry.suspect else None,
        addr=_same_addr(entry, record),
        vitals=entry.vitals,
        vitals_at=_vitals_at(entry, now),
        by_names=tuple(entry.by),
    )


def renew(row: Remote, entry: Entry, record: Record, now: float) -> bool:
    """Brings a known row up to date; True when there is something new to show.

    While record and state stay, the longest duration told of them counts: a publisher that has only just met a node
    doesn't make it young again. Ages that merely grew by the time between two entries are nothing new.
    """
    same_record = row.signed == entry.record
    same_state = same_record and row.state is entry.state
    since, received = _at(now, entry.since_ms), _at(now, entry.received_ms)
    last_seen, vitals_at = _at(now, entry.seen_ms), _vitals_at(entry, now)
    told = (entry.suspect, entry.evidence, tuple(entry.by), entry.vitals, entry.addr)
    known = (row.suspect_since is not None, row.evidence, row.by_names, row.vitals, row.addr)
    new = not same_state or told != known or _differ(row.last_seen, last_seen)
    if not (new or _differ(row.vitals_at, vitals_at)):
        return False
    row.since = min(row.since, since) if same_state else since
    row.received = min(row.received, received) if same_record else received
    if not same_record:
        row.record, row.signed = record, entry.record
    row.state, row.evidence, row.by_names = entry.state, entry.evidence, tuple(entry.by)
    if not entry.suspect:
        row.suspect_since = None
    elif row.suspect_since is None:
        row.suspect_since = now
    row.last_seen, row.addr = last_seen, _same_addr(entry, row.record)
    row.vitals, row.vitals_at = entry.vitals, vitals_at
    return True


def _same_addr(entry: Entry, record: Record) -> Addr | None:
    """The entry's address, as the record's own object where it is one of those."""
    return next((addr for addr in record.addrs if addr == entry.addr), entry.addr)


def _vitals_at(entry: Entry, now: float) -> float | None:
    return None if entry.vitals_age_ms is None else _at(now, entry.vitals_age_ms)


def _at(now: float, age_ms: int) -> float:
    return now - age_ms / 1000


def _differ(old: float | None, new: float | None) -> bool:
    """Whether two times differ by more than it takes to tell of them."""
    if old is None or new is None:
        return old is not new
    return abs(old - new) >= 1.0
