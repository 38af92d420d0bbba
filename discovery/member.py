"""What one node says of itself, and one viewer's row about it.

A record is signed by its subject, so nobody can speak for another: a viewer needs no trust in whoever passed
it on. Which of two records of one node counts is decided by `supersedes` alone. What a viewer believes beyond
the record (dead, last heard, round-trip time) lives in `Member` and never travels as the node's own word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from discovery.errors import RemoteError
from discovery.identity import KIND_NAME, MESH_NAME, NODE_NAME, node_id
from discovery.lifecycle import Evidence, State

RECORD_MAX_BYTES = 900
RECORD_CONTEXT = b"quarterdeck/member/1\0"
MAX_ADDRS = 8
MAX_TAGS = 16
MAX_KEEPS_BYTES = 132
MAX_MAINTENANCE = 24
LONGEST_INT = 2**62

Addr = tuple[str, int]
"""An IP address as text, and the port that serves both gossip (UDP) and SSH (TCP)."""

U64 = Annotated[int, Meta(ge=0, le=LONGEST_INT)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Short = Annotated[str, Meta(max_length=64)]


def addr_text(addr: Addr) -> str:
    """`HOST:PORT`, with the brackets that IPv6 needs."""
    host, port = addr
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A node's own word about itself. Field order is the wire order: only ever append, with a truthful default."""

    pub: Annotated[bytes, Meta(min_length=32, max_length=32)]
    mesh: Annotated[str, Meta(max_length=64)]
    name: Annotated[str, Meta(max_length=128)]
    kind: Annotated[str, Meta(max_length=32)]
    incarnation: U64
    version: U64
    state: State
    addrs: Annotated[list[tuple[Short, Port]], Meta(max_length=MAX_ADDRS)]
    build: Annotated[str, Meta(max_length=12)] = ""
    wire: Annotated[int, Meta(ge=0, le=255)] = 1
    host: Annotated[bytes, Meta(max_length=8)] = b""
    """Hash of boot id and network namespace: equal on processes that share their loopback."""
    deadline_ms: U64 | None = None
    """While Updating or Draining: how long it may take, counted from when a viewer first receives it."""
    maintenance: Annotated[str, Meta(max_length=MAX_MAINTENANCE)] = "active"
    cordoned: bool = False
    tags: Annotated[dict[Short, Short], Meta(max_length=MAX_TAGS)] = {}
    reason: Annotated[str, Meta(max_length=96)] = ""
    """Why the node is in this state, in a few words for people (`cpu over 95 % for 15 s`)."""
    keeps: Annotated[bytes, Meta(max_length=MAX_KEEPS_BYTES)] = b""
    """Which daemons stay on this node (`agent.spec.keeping`): those with resources that it has taken on; while cordoned
    all that it still runs."""
    millicores: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    """Thousandths of a core that this node has for daemons, as it found at its start; None: not known."""
    memory_mib: Annotated[int, Meta(ge=0, le=2**42)] | None = None
    """Memory likewise, in MiB."""

    @property
    def id(self) -> int:
        return node_id(self.pub)


class SignedRecord(msgspec.Struct, frozen=True, array_like=True):
    """The exact bytes of a record and their 64-byte signature. These bytes travel verbatim from hand to hand."""

    blob: Annotated[bytes, Meta(max_length=RECORD_MAX_BYTES)]
    sig: Annotated[bytes, Meta(min_length=64, max_length=64)]


class Vitals(msgspec.Struct, frozen=True, array_like=True):
    """Load of a node's host in permille (None: not measured yet), and its daemon and failure counts. Display only."""

    cpu: Annotated[int, Meta(ge=0, le=1000)] | None = None
    mem: Annotated[int, Meta(ge=0, le=1000)] | None = None
    disk: Annotated[int, Meta(ge=0, le=1000)] | None = None
    daemons_running: Annotated[int, Meta(ge=0, le=65535)] = 0
    daemons_total: Annotated[int, Meta(ge=0, le=65535)] = 0
    failures: Annotated[int, Meta(ge=0, le=2**31)] = 0


_encode = msgspec.msgpack.Encoder()
_decode_record = msgspec.msgpack.Decoder(Record)


def fitted(record: Record) -> Record:
    """The same, with a reason cut so far that the record can be sealed; if that isn't enough, without `keeps`."""
    excess = len(_encode.encode(record)) - RECORD_MAX_BYTES
    if excess > 0:
        reason = record.reason.encode()[: max(0, len(record.reason.encode()) - excess)]
        record = msgspec.structs.replace(record, reason=reason.decode("utf-8", "ignore"))
        if len(_encode.encode(record)) > RECORD_MAX_BYTES:
            record = msgspec.structs.replace(record, keeps=b"")
    return record


def tags_excess(record: Record) -> int:
    """By how many bytes the tags of a record are too long for it to be sealed whatever else in it changes while its
    node lives; 0 or less: they fit."""
    longest = msgspec.structs.replace(
        record,
        reason="",
        incarnation=LONGEST_INT,
        version=LONGEST_INT,
        deadline_ms=LONGEST_INT,
        maintenance="m" * MAX_MAINTENANCE,
        keeps=bytes(MAX_KEEPS_BYTES),
    )
    return len(_encode.encode(longest)) - RECORD_MAX_BYTES


def seal_record(record: Record, sign: Callable[[bytes], bytes]) -> SignedRecord:
    """Encodes and signs. RemoteError never; ValueError when the record exceeds RECORD_MAX_BYTES."""
    blob = _encode.encode(record)
    if len(blob) > RECORD_MAX_BYTES:
        raise ValueError(f"member record of {len(blob)} bytes exceeds {RECORD_MAX_BYTES}")
    return SignedRecord(blob, sign(RECORD_CONTEXT + blob))


def open_record(signed: SignedRecord, verify: Callable[[bytes, bytes, bytes], bool]) -> Record:
    """The record, once shape, names and signature hold; RemoteError otherwise. `verify(pub, data, sig)`."""
    try:
        record = _decode_record.decode(signed.blob)
    except (msgspec.MsgspecError, ValueError) as why:
        raise RemoteError(f"member record does not decode: {why}") from why
    if not (
        NODE_NAME.fullmatch(record.name)
        and MESH_NAME.fullmatch(record.mesh)
        and KIND_NAME.fullmatch(record.kind)
    ):
        raise RemoteError("member record with an illegal name")
    if record.state is State.DEAD:
        raise RemoteError("member record that calls itself dead")
    if not verify(record.pub, RECORD_CONTEXT + signed.blob, signed.sig):
        raise RemoteError("member record signed by another key")
    return record


def supersedes(new: Record, old: Record) -> bool:
    """Whether `new` replaces `old` of the same node: higher incarnation, or the same and a higher version."""
    return (new.incarnation, new.version) > (old.incarnation, old.version)


@dataclass(slots=True)
class Member:
    """One viewer's row about one node. Times are the viewer's monotonic clock, in seconds."""

    record: Record
    signed: SignedRecord
    state: State
    """As viewed: the record's own state, or Dead when observers say so."""
    since: float
    """When `state` became so in this view."""
    last_seen: float
    """When this viewer last had news that proves it alive: an answer, or a newer record."""
    received: float
    """When the current record arrived (deadlines count from here)."""
    evidence: Evidence | None = None
    evidence_by: tuple[int, ...] = ()
    suspect_since: float | None = None
    rtt_s: float | None = None
    addr: Addr | None = None
    """The address that last answered this viewer, if any."""
    vitals: Vitals | None = None
    vitals_at: float | None = None

    @property
    def id(self) -> int:
        return self.record.id

    @property
    def present(self) -> bool:
        """Neither Dead nor Leaving: part of the pool."""
        return self.state is not State.DEAD and self.state is not State.LEAVING


def unmet(
    pub: bytes, mesh: str, name: str, kind: str, addrs: list[Addr], host: bytes, now: float = 0.0
) -> Member:
    """A node known by hearsay alone (a run file, a summary): enough to dial it and to pin its key, no more."""
    record = Record(
        pub=pub,
        mesh=mesh,
        name=name,
        kind=kind,
        incarnation=0,
        version=0,
        state=State.JOINING,
        addrs=addrs[:MAX_ADDRS],
        host=host,
    )
    nothing = SignedRecord(b"", bytes(64))
    return Member(record, nothing, State.JOINING, since=now, last_seen=now, received=now)
