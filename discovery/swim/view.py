"""One node's copy of the mesh: its tables, and the moves every other part makes on them."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf
from struct import Struct as Pack
from zlib import crc32

import msgspec

from discovery import wire
from discovery.errors import RemoteError
from discovery.lifecycle import Evidence, State
from discovery.member import Addr, Member, Record, SignedRecord, Vitals, fitted, open_record, seal_record
from discovery.swim import effects as fx
from discovery.swim.broadcasts import Broadcasts
from discovery.swim.config import SwimConfig, retransmit_limit
from discovery.swim.notes import Aging, Keeper
from discovery.swim.rules import Ruling, Tombstone, dialable, ruling, same_host
from discovery.swim.timers import Timers

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes, bytes], bool]

_ADDRS_TRIED = 4
_CACHE_MIN = 512
"""Verified records that are remembered, twice over; two a member where there are more. They are a KiB each."""
_LOAD_LIMIT = 4
_ID = Pack(">QQQ")


@dataclass(slots=True)
class Contact:
    """What passes between this node and one member, beyond what the member's row shows."""

    proven: dict[Addr, float] = field(default_factory=dict)
    """Addresses at which this incarnation answered me, and when it last did."""
    heard: Addr | None = None
    """Where its last ping came from: proves nothing, but behind NAT it may be the only way back."""
    probe: int | None = None
    """Nonce of my open probe of it."""
    load: tuple[int, int] = (0, 0)
    """Incarnation and sequence number of the newest vitals passed on."""
    connect_at: float = -inf
    """When the last fresh connect was asked for."""
    connecting: set[Addr] = field(default_factory=set)
    """Addresses of that connect with no result yet."""
    connected: set[Addr] = field(default_factory=set)
    """All addresses of that connect."""
    refused: set[Addr] = field(default_factory=set)
    refused_at: float = -inf
    """When a fresh connect was last refused everywhere, though I am no witness for it."""
    connect_open: bool = False
    stamp: int = 0
    """Stamp of my newest refusal of this incarnation that I have not taken back; 0 for none."""
    stamp_at: float = -inf


class View:
    """Members, tombstones, counters, what is to be said and what is to be done.

    Only this class changes a member's state. `now` is set by the engine at each input.
    """

    def __init__(
        self, record: Record, sign: Sign, verify: Verify, config: SwimConfig, rng: random.Random, now: float
    ) -> None:
        self.sign, self.verify, self.config, self.rng = sign, verify, config, rng
        self.now = now
        self.me = Member(
            record=record,
            signed=seal_record(record, sign),
            state=record.state,
            since=now,
            last_seen=now,
            received=now,
        )
        self.id = record.id
        self.mesh = record.mesh
        self.members: dict[int, Member] = {}
        self.contacts: dict[int, Contact] = {}
        self.tombstones: dict[int, Tombstone] = {}
        self.ring: list[int] = []
        """Ids of the present members, sorted; without oneself."""
        self.by_addr: dict[Addr, int] = {}
        self.counters: Counter[str] = Counter()
        self.timers = Timers()
        self.effects: list[fx.Effect] = []
        self.news = Broadcasts()
        self.loads = Broadcasts()
        self.awareness = 0
        self.synced = False
        self.leaving = False
        self.ring_changed = False
        self.changed_at = now
        """When the set of records last changed: views are compared only at rest."""
        self.hash = self._mark(record)
        self.keeper: Keeper | None = None
        self.hears_of_itself: Callable[[Record], None] = lambda record: None
        self.renewed: Callable[[Member, bool], None] = lambda member, reborn: None
        self.gone: Callable[[int], None] = lambda node: None
        self._limit = retransmit_limit(1, config)
        self._gossiped_at = -inf
        self._sentinels: tuple[int, ...] = ()
        self._cache: dict[bytes, tuple[bytes, Record | None]] = {}
        self._cache_old: dict[bytes, tuple[bytes, Record | None]] = {}

    # what is counted and told

    @property
    def n(self) -> int:
        """How many are present, this node included."""
        return len(self.ring) + 1

    def count(self, code: str, sender: int | None = None, addr: Addr | None = None) -> None:
        self.counters[code] += 1
        self.effects.append(fx.Counted(code, sender, addr))

    def scaled(self, seconds: float) -> float:
        """Lifeguard: a node that doubts its own health gives others more time."""
        return seconds * (self.awareness + 1)

    def feel(self, delta: int) -> None:
        """Moves the health score: 0 is well."""
        self.awareness = min(self.config.awareness_max - 1, max(0, self.awareness + delta))

    # sending

    def send(self, addr: Addr, parts: list[bytes]) -> None:
        """One datagram (more, if it takes more); what room it has left is filled with what there is to say."""
        room = self.config.max_body_bytes - wire.HEADER_MAX_BYTES - sum(map(len, parts))
        if room < 0:
            self.send_all(addr, parts)
            return
        if len(self.news):
            extra = self.news.take(room, self._limit, self.now)
            parts = parts + extra
            room -= sum(map(len, extra))
        if len(self.loads) and room > 40:
            parts = parts + self.loads.take(min(room, 300), _LOAD_LIMIT, self.now)
        self.effects.append(fx.Send(addr, wire.join(parts)))

    def send_all(self, addr: Addr, parts: list[bytes]) -> None:
        """As many datagrams as it takes."""
        room, batch = 0, list[bytes]()
        for part in parts:
            if batch and len(part) > room:
                self.effects.append(fx.Send(addr, wire.join(batch)))
                batch = []
            if not batch:
                room = self.config.max_body_bytes - wire.HEADER_MAX_BYTES
            room -= len(part)
            batch.append(part)
        if batch:
            self.effects.append(fx.Send(addr, wire.join(batch)))

    def say(self, subject: Hashable, message: wire.AnyMessage) -> None:
        """Broadcasts news, beginning at once."""
        if self.ring and self.news.put(subject, wire.encode(message)):
            at = max(self.now, self._gossiped_at + self.config.gossip_spacing_s)
            self.timers.sooner("gossip", at)

    def spread(self, note: Aging) -> None:
        """Broadcasts a note, beginning at once; a newer one about the same subject replaces it."""
        if self.ring and self.news.put((note.topic, note.subject), note):
            at = max(self.now, self._gossiped_at + self.config.gossip_spacing_s)
            self.timers.sooner("gossip", at)

    def say_load(self, node: int, message: wire.Load) -> None:
        """Passes vitals on, when there is room or time."""
        if self.ring and self.loads.put(node, wire.encode(message)):
            self.timers.sooner("gossip", self.now + self.config.load_gossip_interval_s)

    def gossip(self) -> None:
        """Tells a few random members what there is to say; again after an interval while there is more."""
        self._gossiped_at = self.now
        for node in self.some(self.config.gossip_fanout):
            if not len(self.news) and not len(self.loads):
                return
            addr = self.addr_of(self.members[node])
            if addr is not None:
                self.send(addr, [])
        if (len(self.news) or len(self.loads)) and self.ring:
            config = self.config
            wait = config.gossip_interval_s if len(self.news) else config.load_gossip_interval_s
            self.timers.sooner("gossip", self.now + wait)

    def some(self, count: int, *, but: tuple[int, ...] = ()) -> list[int]:
        """Up to `count` distinct present members at random."""
        ring = self.ring
        if len(ring) <= count + len(but):
            chosen = [node for node in ring if node not in but]
            self.rng.shuffle(chosen)
            return chosen[:count]
        chosen = []
        pick = self.rng.random
        size = len(ring)
        while len(chosen) < count:
            node = ring[int(pick() * size)]
            if node not in but and node not in chosen:
                chosen.append(node)
        return chosen

    def addrs_of(self, member: Member) -> list[Addr]:
        """Where to reach a member, the address that last answered first."""
        near = same_host(self.me.record, member.record)
        addrs = [] if member.addr is None else [member.addr]
        addrs += [addr for addr in member.record.addrs if addr != member.addr and dialable(addr, near)]
        del addrs[_ADDRS_TRIED:]
        contact = self.contacts.get(member.id)
        heard = contact.heard if contact is not None else None
        if heard is not None and heard not in addrs and dialable(heard, near):
            addrs.append(heard)
        return addrs

    def addr_of(self, member: Member) -> Addr | None:
        """The first address to try."""
        if member.addr is not None:
            return member.addr
        addrs = self.addrs_of(member)
        return addrs[0] if addrs else None

    # records

    def open(self, signed: SignedRecord) -> Record | None:
        """The record if it is well formed and signed by its subject; verified once."""
        key = signed.sig
        held = self._cache.get(key) or self._cache_old.get(key)
        if held is not None and held[0] == signed.blob:
            return held[1]
        try:
            record = open_record(signed, self.verify)
        except RemoteError:
            record = None
        if len(self._cache) >= max(_CACHE_MIN, 2 * len(self.members)):
            self._cache_old, self._cache = self._cache, {}
        self._cache[key] = (signed.blob, record)
        return record

    def admit(self, signed: SignedRecord, sender: int | None, addr: Addr | None) -> Record | None:
        """The record if it may be about a member of this mesh; counted otherwise. Changes nothing."""
        record = self.open(signed)
        if record is None:
            self.count("bad_record", sender, addr)
            return None
        if record.mesh != self.mesh:
            self.count("wrong_mesh", sender, addr)
            return None
        node = record.id
        held = self.members.get(node)
        tomb = self.tombstones.get(node)
        pinned = self.me.record if node == self.id else held.record if held else tomb.record if tomb else None
        if pinned is not None and pinned.pub != record.pub:
            self.count("second_key", sender, addr)
            return None
        return record

    def learn(
        self, signed: SignedRecord, sender: int | None, addr: Addr | None, *, tell: bool = True
    ) -> Record | None:
        """Takes in a record from anyone; None when it may not be about a member at all."""
        record = self.admit(signed, sender, addr)
        if record is None:
            return None
        node = record.id
        if node == self.id:
            if signed != self.me.signed:
                self.hears_of_itself(record)
            return record
        held = self.members.get(node)
        verdict = ruling(record, held.record if held else None, self.tombstones.get(node))
        if verdict is Ruling.ADOPT:
            if held is None and len(self.members) >= self.config.max_members:
                self.count("members_full", sender, addr)
                return record
            self._adopt(record, signed, held)
            if tell:
                self.say(("record", node), wire.Update(signed))
        elif verdict is Ruling.DEPART:
            self.depart(record, signed)
        return record

    def _adopt(self, record: Record, signed: SignedRecord, held: Member | None) -> None:
        node, now = record.id, self.now
        self.changed_at = now
        self.tombstones.pop(node, None)
        if held is None:
            member = Member(
                record=record, signed=signed, state=record.state, since=now, last_seen=now, received=now
            )
            self.members[node] = member
            self.contacts[node] = Contact()
            self._enter(member)
            self.effects.append(fx.Joined(member))
            self.renewed(member, True)
            return
        old = held.state
        reborn = record.incarnation > held.record.incarnation
        if old is not State.DEAD:
            self.hash ^= self._mark(held.record)
        self._forget_addrs(held)
        if held.addr in held.record.addrs and held.addr not in record.addrs:
            held.addr = None
        held.record, held.signed, held.received, held.last_seen = record, signed, now, now
        if record.state is not old:
            held.state, held.since = record.state, now
        if old is State.DEAD:
            held.evidence, held.evidence_by = None, ()
            self.timers.cancel(("evict", node))
            self._enter(held)
        else:
            self.hash ^= self._mark(record)
            self._note_addrs(held)
        if reborn:
            contact = self.contacts[node]
            contact.proven.clear()
            contact.stamp = 0
            contact.refused_at = -inf
            contact.connecting.clear()
            held.suspect_since = None
        self.renewed(held, reborn)
        self.effects.append(fx.Changed(held, old, held.state, incarnation=record.incarnation))

    def _enter(self, member: Member) -> None:
        insort(self.ring, member.id)
        self.hash ^= self._mark(member.record)
        self._resize()
        self._note_addrs(member)

    def _leave_ring(self, member: Member) -> None:
        at = bisect_left(self.ring, member.id)
        if at < len(self.ring) and self.ring[at] == member.id:
            del self.ring[at]
            self.hash ^= self._mark(member.record)
            self._resize()
        self._forget_addrs(member)
        self.news.drop(("record", member.id))
        self.loads.drop(member.id)
        self.changed_at = self.now

    def _resize(self) -> None:
        self.ring_changed = True
        self._limit = retransmit_limit(len(self.ring) + 1, self.config)
        if not self.ring:
            self.news.clear()
            self.loads.clear()

    def _note_addrs(self, member: Member) -> None:
        for addr in self.addrs_of(member):
            self.by_addr[addr] = member.id

    def _forget_addrs(self, member: Member) -> None:
        contact = self.contacts.get(member.id)
        for addr in (*self.addrs_of(member), *(contact.proven if contact else ())):
            if self.by_addr.get(addr) == member.id:
                del self.by_addr[addr]

    @staticmethod
    def _mark(record: Record) -> int:
        return crc32(_ID.pack(record.id, record.incarnation, record.version))

    # the end of a member

    def depart(self, record: Record, signed: SignedRecord) -> None:
        """A goodbye: out of view at once, and never back at this incarnation."""
        node = record.id
        self._entomb(Tombstone(record, signed, Evidence.LEFT, self.now))
        self._remove(node, Evidence.LEFT, record, ())
        self.say(("record", node), wire.Update(signed))

    def bury(
        self, member: Member, evidence: Evidence, by: tuple[int, ...], accusations: list[wire.Accuse]
    ) -> None:
        """Dead in this view: shown with its evidence for a while, then evicted."""
        old = member.state
        self._leave_ring(member)
        member.state, member.since = State.DEAD, self.now
        member.evidence, member.evidence_by, member.suspect_since = evidence, by, None
        self._entomb(Tombstone(member.record, member.signed, evidence, self.now, by, accusations[:8]))
        self.timers.set(("evict", member.id), self.now + self.config.dead_shown_s)
        self.gone(member.id)
        incarnation = member.record.incarnation
        self.effects.append(fx.Changed(member, old, State.DEAD, evidence, by, incarnation))

    def evict(self, node: int) -> None:
        """The row of a dead member goes; its tombstone stays."""
        member = self.members.get(node)
        if member is not None and member.state is State.DEAD:
            self._remove(node, member.evidence or Evidence.SILENT, member.record, member.evidence_by)

    def _remove(self, node: int, evidence: Evidence, record: Record, by: tuple[int, ...]) -> None:
        member = self.members.get(node)
        if member is None:
            return
        self._leave_ring(member)
        self.gone(node)
        del self.members[node], self.contacts[node]
        self.timers.cancel(("evict", node))
        self.effects.append(
            fx.Evicted(node, record.name, record.kind, record.mesh, evidence, record.incarnation, by)
        )

    def keep_tombstone(self, tomb: Tombstone) -> None:
        """Another's tombstone about a node that is not in view."""
        self._entomb(tomb)

    def _entomb(self, tomb: Tombstone) -> None:
        self.tombstones.pop(tomb.record.id, None)
        if len(self.tombstones) >= self.config.max_tombstones:
            oldest = next((node for node in self.tombstones if node not in self.members), None)
            if oldest is None:
                return
            del self.tombstones[oldest]
            self.counters["tombstones_full"] += 1
        self.tombstones[tomb.record.id] = tomb
        self.timers.sooner("tombstones", tomb.at + self.config.tombstone_s)

    def expire_tombstones(self) -> None:
        """Drops those that have had their day."""
        limit = self.now - self.config.tombstone_s
        old = [
            node for node, tomb in self.tombstones.items() if tomb.at <= limit and node not in self.members
        ]
        for node in old:
            del self.tombstones[node]
        if self.tombstones:
            first = min(tomb.at for tomb in self.tombstones.values())
            self.timers.set("tombstones", max(first, limit + 60.0) + self.config.tombstone_s)

    # oneself

    def restate(self, **changes: object) -> Record:
        """A new version of my own record, signed and broadcast."""
        old = self.me.record
        if "incarnation" not in changes:
            changes["version"] = old.version + 1
        record = fitted(msgspec.structs.replace(old, **changes))
        signed = seal_record(record, self.sign)
        self.hash ^= self._mark(old) ^ self._mark(record)
        self.me.record, self.me.signed, self.me.received = record, signed, self.now
        if record.state is not self.me.state:
            self.me.state, self.me.since = record.state, self.now
        self.changed_at = self.now
        self.say(("record", self.id), wire.Update(signed))
        return record

    # links to keep

    def sentinels(self) -> None:
        """Tells which members to keep links to, when that has changed."""
        self.ring_changed = False
        ring = self.ring
        count = min(self.config.sentinels, len(ring))
        at = bisect_right(ring, self.id)
        wanted = (
            () if self.leaving or not self.synced else tuple((ring[at : at + count] + ring[:count])[:count])
        )
        if wanted != self._sentinels:
            self._sentinels = wanted
            self.effects.append(fx.Sentinels(wanted))

    def note_vitals(self, member: Member, vitals: Vitals | None) -> None:
        """Vitals that came with a probe or an ack of the member itself."""
        if vitals is not None:
            member.vitals, member.vitals_at = vitals, self.now
