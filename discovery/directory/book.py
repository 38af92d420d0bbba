"""The book of meshes: summaries by gossip, rows from publishers, kept without I/O.

**Who is believed.** A mesh is its identity key. The first key heard under a name is pinned (or a configured one is);
whoever comes with another key is an impostor: told, shown with what it claims, and never merged, however high its
epoch. This node's own mesh is pinned as well. Impostors are found by mesh name in `impostors`, and as the very same
mapping in a `Listing`; under a pinned name that was never heard of there is an entry there and no listing.

**For how long.** A summary counts for its ttl from when it was made. Its age is added up on the way and is not
signed, so the rule must hold whatever anyone says of it:

- what is taken was newer than anything taken before, for as long as this process lives, the time after a mesh was
  dropped included. So a replay of what was heard changes nothing, and *never* makes a silent mesh live again;
- one summary counts for at most one ttl from when it was first taken here, whatever ages its copies come with. A
  copy that claims to be older than that shortens nothing once a younger one is heard;
- one that claims to be past its ttl is not taken at all, so a liar can't blank a mesh by overtaking the true copy.

What is left to a holder of the backbone key who held back n summaries that this node never heard: to let them out
one at a time, and so to show the counts of a silent mesh as live for n further ttls; to a node that has just started,
any recording is new. Rows don't follow from that: they come from the publisher itself (`fed_at` tells when).

**An epoch that begins anew** (all nodes of a mesh lost their disks) is refused like any replay: the two look the same.
`Behind` asks the caller to send that publisher the newest summary known. To it that is a summary of its own mesh
under its own key: `home_order` tells the order above which it has to go on; what it signs then is new to everybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import ceil, inf
from types import MappingProxyType

from discovery.directory import events as ev
from discovery.directory.entries import Entry, Remote, is_ip, refusal, remote_of, renew, share_words
from discovery.directory.listing import DirectoryConfig, Impostor, Listing, Pin, Rank, material, rank
from discovery.errors import RemoteError
from discovery.member import RECORD_CONTEXT, Addr, Record, SignedRecord, open_record, supersedes
from discovery.summary import SUMMARY_CONTEXT, SignedSummary, Summary, open_summary
from discovery.swim.timers import Timers

Verify = Callable[[bytes, bytes, bytes], bool]


class Directory:
    """All meshes but one's own. Every input names `now`; nothing that came from elsewhere makes one raise: what is
    refused changes nothing and is counted in `counters` under a stable code."""

    def __init__(
        self,
        *,
        home: str,
        home_pub: bytes | None,
        verify: Verify,
        pins: Mapping[str, bytes] | None = None,
        remembered: Mapping[str, bytes] | None = None,
        config: DirectoryConfig | None = None,
    ) -> None:
        """`pins` are configured keys by mesh name, `remembered` those that an earlier process saw first: they bind
        alike, but only configured ones are beyond the limits. Without `home_pub` this node can't tell its own mesh
        from an impostor of it, and takes no notice of either."""
        self.home, self._home_pub = home, home_pub
        self.config = config or DirectoryConfig()
        self.counters: Counter[str] = Counter()
        self.rows = 0
        """How many rows there are in all."""
        self.home_order = (0, 0)
        """The highest (epoch, renewal) heard of this node's own mesh under its own key, its own ones included."""
        self._verify = verify
        configured = {**(pins or {}), **({home: home_pub} if home_pub is not None else {})}
        self._pins = {mesh: Pin(pub, True) for mesh, pub in configured.items()}
        self._configured = len(self._pins)
        for mesh, pub in list((remembered or {}).items())[-self.config.max_pins :]:
            self._pins.setdefault(mesh, Pin(pub, False))
        self._listings: dict[str, Listing] = {}
        self.listings: Mapping[str, Listing] = MappingProxyType(self._listings)
        self._owners: dict[int, tuple[str, ...]] = {}
        self._impersonated: set[str] = set()
        self._ahead: dict[bytes, tuple[bytes, Record | None]] = {}
        self._timers = Timers()
        self._events: list[ev.Event] = []
        self._touched: dict[str, tuple[set[int], set[int]]] = {}

    # summaries

    def heard(
        self,
        signed: SignedSummary,
        age_s: float,
        now: float,
        addr: Addr | None = None,
        *,
        even_expired: bool = False,
    ) -> bool:
        """Takes in a summary that is `age_s` old, passed on by `addr`. True when it is news that the backbone should
        pass on: a mesh new here or silent until now, or a newer summary with another content (see `material`). A mere
        renewal, whatever is not newer, this node's own mesh and impostors are not.

        `even_expired` is for a member of one's own mesh that hands on its whole directory: it may tell of an expired
        mesh too, which is then listed as such.
        """
        try:
            summary = open_summary(signed, _unproven)
        except (RemoteError, RecursionError):
            return self._count("bad_summary")
        if not all(is_ip(host) for host, _ in summary.addrs):
            return self._count("bad_addr")
        mesh, ttl_s = summary.mesh, self._ttl_s(summary)
        age_s = max(age_s, 0.0)  # In this order what is no number stays none, and is late.
        late = not age_s < ttl_s
        if mesh == self.home and self._home_pub is None:
            return self._count("home_without_key")
        self._wake_if_due(now)
        pin, listing = self._pins.get(mesh), self._listings.get(mesh)
        if pin is not None and pin.pub != summary.mesh_pub:
            return self._count("late_summary") if late else self._impostor(pin, summary, signed, now, addr)
        if mesh == self.home:
            return self._heard_home(summary, signed)
        new = rank(summary, signed)
        if pin is not None and pin.rank is not None and new <= pin.rank:
            if new == pin.rank and listing is not None:
                return self._again(listing, age_s, ttl_s, now)
            if not late and (listing is None or listing.expired):
                self._behind(pin, new, summary, signed, now)
            return self._count("old_summary")
        if late:
            told_dead = even_expired and (listing is None or listing.expired)
            if not (told_dead and age_s < ttl_s + self.config.drop_after_s):
                return self._count("late_summary")
        if not self._proves(summary, signed):
            return self._count("bad_summary")
        if listing is None:
            return self._list(summary, signed, new, now - age_s, now)
        return self._replace(listing, summary, signed, new, now - age_s, now)

    def held(self, now: float) -> list[tuple[SignedSummary, float]]:
        """What a push/pull should carry: every summary that counts, and its age in seconds."""
        return [(one.signed, now - one.born) for one in self._listings.values() if one.live(now)]

    @property
    def impostors(self) -> dict[str, Mapping[bytes, Impostor]]:
        """Keys that pose as a pinned mesh, by mesh name: this node's own and unlisted ones included."""
        return {mesh: self._pins[mesh].impostors for mesh in sorted(self._impersonated)}

    @property
    def remembered(self) -> dict[str, bytes]:
        """Keys pinned because they were the first seen, oldest first: what to keep on disk, whole."""
        return {mesh: pin.pub for mesh, pin in self._pins.items() if not pin.configured}

    def pin(self, mesh: str, pub: bytes) -> None:
        """From now on the mesh of this name is this key, because an operator says so. What was listed under another
        key is dropped, and all that was known of its order is forgotten."""
        held = self._pins.get(mesh)
        self._configured += held is None or not held.configured
        if held is not None and held.pub == pub:
            held.configured = True
            return
        listing = self._listings.get(mesh)
        if listing is not None:
            self._drop(listing)
        self._pins[mesh] = Pin(pub, True)
        self._impersonated.discard(mesh)
        if mesh == self.home:
            self._home_pub, self.home_order = pub, (0, 0)

    def expires_in_s(self, mesh: str, now: float) -> float | None:
        """How long its summary still counts; 0 once expired, None for a mesh that is not listed."""
        listing = self._listings.get(mesh)
        if listing is None:
            return None
        return 0.0 if listing.expired else max(0.0, listing.until - now)

    def _ttl_s(self, summary: Summary) -> float:
        return min(summary.ttl_ms / 1000, self.config.ttl_max_s)

    def _proves(self, summary: Summary, signed: SignedSummary) -> bool:
        return self._verify(summary.mesh_pub, SUMMARY_CONTEXT + signed.blob, signed.sig)

    def _count(self, code: str) -> bool:
        self.counters[code] += 1
        return False

    def _heard_home(self, summary: Summary, signed: SignedSummary) -> bool:
        if summary.order > self.home_order:
            if not self._proves(summary, signed):
                return self._count("bad_summary")
            self.home_order = summary.order
        return False

    def _again(self, listing: Listing, age_s: float, ttl_s: float, now: float) -> bool:
        """A copy of what is held: the youngest age told of it counts, but it was made no later than first heard."""
        born = min(listing.heard_at, now - age_s)
        if born <= listing.born:
            return self._count("old_summary")
        listing.born, listing.until = born, born + ttl_s
        return self._revive(listing) if now < listing.until else False

    def _behind(self, pin: Pin, new: Rank, summary: Summary, signed: SignedSummary, now: float) -> None:
        due = pin.behind_at is None or now - pin.behind_at >= self.config.behind_spacing_s
        if due and pin.signed is not None and new != pin.rank and self._proves(summary, signed):
            pin.behind_at = now
            self._events.append(ev.Behind(summary.mesh, summary.publisher_id, pin.signed))

    def _impostor(
        self, pin: Pin, summary: Summary, signed: SignedSummary, now: float, addr: Addr | None
    ) -> bool:
        self.counters["impostor"] += 1
        known = pin.impostors.get(summary.mesh_pub)
        if known is not None and now - known.last_at < self.config.impostor_spacing_s:
            known.count += 1
            return False
        idle = None
        if known is None and len(pin.impostors) >= self.config.max_impostors:
            idle = min(pin.impostors, key=lambda pub: pin.impostors[pub].last_at)
            if now - pin.impostors[idle].last_at < self.config.impostor_told_s:
                return self._count("impostors_full")
        if not self._proves(summary, signed):
            return self._count("bad_summary")
        mesh, name = summary.mesh, summary.publisher_name
        if known is None:
            if idle is not None:
                del pin.impostors[idle]
            known = pin.impostors[summary.mesh_pub] = Impostor(addr, now, 0, name, -inf)
            self._impersonated.add(mesh)
            self._timers.sooner(("impostors", mesh), now + self.config.impostor_shown_s)
        known.addr, known.last_at, known.publisher, known.count = addr, now, name, known.count + 1
        if now - known.told_at >= self.config.impostor_told_s:
            known.told_at = now
            self._events.append(ev.ImpostorSeen(mesh, summary.mesh_pub, name, addr, known.count))
        return False

    def _list(self, summary: Summary, signed: SignedSummary, new: Rank, born: float, now: float) -> bool:
        mesh, pin = summary.mesh, self._pins.get(summary.mesh)
        if not (pin is not None and pin.configured) and not self._room_for_mesh():
            return self._count("meshes_full")
        if pin is None:
            pin = self._pins[mesh] = Pin(summary.mesh_pub, False)
            self._events.append(ev.Pinned(mesh, pin.pub))
        pin.rank, pin.signed = new, signed
        listing = Listing(
            mesh=mesh,
            pub=pin.pub,
            summary=summary,
            signed=signed,
            heard_at=now,
            born=born,
            until=born + self._ttl_s(summary),
            impostors=pin.impostors,
            told=summary,
            alone=(mesh,),
        )
        self._listings[mesh] = listing
        self._forget_a_pin()
        self._events.append(ev.Seen(mesh))
        self._timers.set(mesh, listing.until)
        self._wake_if_due(now)
        return not listing.expired

    def _replace(
        self, listing: Listing, summary: Summary, signed: SignedSummary, new: Rank, born: float, now: float
    ) -> bool:
        pin, old = self._pins[listing.mesh], listing.summary
        pin.rank, pin.signed = new, signed
        listing.summary, listing.signed, listing.heard_at = summary, signed, now
        ttl_s = self._ttl_s(summary)
        if now < born + ttl_s:
            born = max(born, listing.born)  # It was made after the one before, whatever its age says.
        listing.born, listing.until = born, born + ttl_s
        revived = self._revive(listing) if now < listing.until else False
        if listing.expired:
            listing.expired_at = listing.until
        else:
            self._timers.sooner(listing.mesh, listing.until)
        if summary.publisher != old.publisher:
            self._events.append(
                ev.PublisherChanged(listing.mesh, old.publisher, summary.publisher, summary.epoch)
            )
        news = revived or (not listing.expired and material(listing.told, summary))
        if news:
            listing.told = summary
        return news

    def _revive(self, listing: Listing) -> bool:
        if not listing.expired:
            return False
        listing.expired, listing.expired_at = False, None
        self._timers.set(listing.mesh, listing.until)
        self._events.append(ev.Revived(listing.mesh))
        return True

    def _room_for_mesh(self) -> bool:
        """Whether one more may be listed; the one that expired first makes room."""
        if len(self._listings) < self.config.max_meshes:
            return True
        mortal = [one for one in self._listings.values() if not self._pins[one.mesh].configured]
        if len(mortal) < self.config.max_meshes:
            return True
        silent = [one for one in mortal if one.expired]
        if silent:
            self._drop(min(silent, key=lambda one: one.until))
        return bool(silent)

    def _forget_a_pin(self) -> None:
        if len(self._pins) - self._configured > self.config.max_pins:
            idle = (
                mesh for mesh, pin in self._pins.items() if not pin.configured and mesh not in self._listings
            )
            mesh = next(idle, None)
            if mesh is not None:
                del self._pins[mesh]
                self._impersonated.discard(mesh)
                self.counters["pins_full"] += 1

    # rows

    def open(self, signed: SignedRecord) -> Record | None:
        """The record if it is well formed and signed by its subject; verified once, then known by its very bytes. A
        caller with a long feed may open its records ahead, a few at a time, so that the feed takes no time."""
        held = self._ahead.get(signed.sig)
        if held is not None and held[0] == signed.blob:
            return held[1]
        record: Record | None = None
        try:
            record = open_record(signed, _unproven)
        except (RemoteError, RecursionError):
            pass
        if record is not None:
            for mesh in self._owners.get(record.id, ()):
                row = self._listings[mesh].members[record.id]
                if row.signed == signed:
                    return row.record
            if not self._verify(record.pub, RECORD_CONTEXT + signed.blob, signed.sig):
                record = None
            else:
                share_words(record)
        if len(self._ahead) >= self.config.max_proven_ahead:
            del self._ahead[next(iter(self._ahead))]
        self._ahead[signed.sig] = (signed.blob, record)
        return record

    def feed(
        self, mesh: str, entries: Iterable[Entry], gone: Iterable[int], now: float, *, full: bool
    ) -> bool:
        """Takes in rows of a listed mesh that came from its publisher, or from a member of one's own mesh: first the
        ids in `gone` go, then the entries are merged. False when nothing was taken at all.

        A full feed is the whole directory: rows that it doesn't name go, so whoever gets it in pieces gathers them
        first. Within a stream records only go forward; with a full feed a new publisher may know less than the last.
        """
        listing = self._listings.get(mesh)
        if listing is None:
            return self._count("unknown_mesh")
        accepted = list[tuple[Entry, Record]]()
        bad = 0
        for entry in entries:
            record = self.open(entry.record)
            if record is None:
                bad += 1
                self.counters["bad_record"] += 1
                if bad > self.config.max_bad_records:
                    return self._count("feed_refused")
                continue
            code = refusal(entry, record, mesh)
            if code is None:
                accepted.append((entry, record))
            else:
                self.counters[code] += 1
        for node in list(gone):
            if isinstance(node, int) and node in listing.members:
                self._remove(listing, node)
        if full:
            for node in listing.members.keys() - {record.id for _, record in accepted}:
                self._remove(listing, node)
        for entry, record in accepted:
            self._take(listing, entry, record, now, full)
            self._ahead.pop(entry.record.sig, None)
        if full or listing.fed:
            listing.fed_at = now
        return True

    def refreshed(self, mesh: str, now: float) -> None:
        """The publisher's stream says that nothing has changed: the rows are current. Keeps no mesh alive."""
        listing = self._listings.get(mesh)
        if listing is not None and listing.fed:
            listing.fed_at = now

    def find(self, node: int) -> Remote | None:
        """The row of a node id, whichever mesh it is in: of several a live mesh's first, then the latest fed."""
        mesh = self.mesh_of(node)
        return None if mesh is None else self._listings[mesh].members[node]

    def mesh_of(self, node: int) -> str | None:
        """The mesh whose row `find` gives."""
        owners = self._owners.get(node)
        if owners is None:
            return None
        if len(owners) == 1:
            return owners[0]
        listings = (self._listings[mesh] for mesh in owners)
        return max(listings, key=lambda one: (not one.expired, one.fed_at or -inf, one.mesh)).mesh

    def _take(self, listing: Listing, entry: Entry, record: Record, now: float, full: bool) -> None:
        mesh, node = listing.mesh, record.id
        owners = self._owners.get(node, ())
        for owner in owners:
            if self._listings[owner].members[node].record.pub != record.pub:
                self.counters["second_key"] += 1
                return
        row = listing.members.get(node)
        if row is None:
            of_mesh = len(listing.members)
            if self.rows >= self.config.max_rows or of_mesh >= self.config.max_rows_of_mesh:
                self.counters["rows_full"] += 1
                return
            listing.members[node] = remote_of(entry, record, now)
            self._owners[node] = (*owners, mesh) if owners else listing.alone
            self.rows += 1
        elif not full and row.signed != entry.record and not supersedes(record, row.record):
            self.counters["old_record"] += 1
            return
        elif not renew(row, entry, record, now):
            return
        changed, gone = self._touched.setdefault(mesh, (set(), set()))
        changed.add(node)
        gone.discard(node)

    def _remove(self, listing: Listing, node: int) -> None:
        del listing.members[node]
        self.rows -= 1
        others = tuple(mesh for mesh in self._owners[node] if mesh != listing.mesh)
        if others:
            self._owners[node] = others
        else:
            del self._owners[node]
        changed, gone = self._touched.setdefault(listing.mesh, (set(), set()))
        changed.discard(node)
        gone.add(node)

    # time

    def wake(self, now: float) -> None:
        """Expires and drops what is due."""
        while (due := self._timers.pop(now)) is not None:
            key = due[0]
            if isinstance(key, tuple):
                self._forget_impostors(key[1], now)
            elif isinstance(key, str) and (listing := self._listings.get(key)) is not None:
                self._review(listing, now)

    def deadline(self) -> float:
        """When to `wake`, rounded up to a grid so that many meshes share an awakening; infinity when never."""
        at, grid = self._timers.next(), self.config.wake_grid_s
        return at if at == inf or grid <= 0 else ceil(at / grid) * grid

    def drain(self) -> list[ev.Event]:
        """What happened since the last call, oldest first; row changes at the end, one event a mesh."""
        events, self._events = self._events, []
        for mesh, (changed, gone) in self._touched.items():
            if changed or gone:
                events.append(ev.RowsChanged(mesh, tuple(sorted(changed)), tuple(sorted(gone))))
        self._touched.clear()
        return events

    def _wake_if_due(self, now: float) -> None:
        if self._timers.next() <= now:
            self.wake(now)

    def _review(self, listing: Listing, now: float) -> None:
        """A listing's one timer: set when it might have expired, which most renewals need not touch."""
        if not listing.expired:
            if now < listing.until:
                self._timers.set(listing.mesh, listing.until)
                return
            listing.expired, listing.expired_at = True, listing.until
            self._events.append(ev.Expired(listing.mesh, listing.silent_s(now)))
        drop_at = listing.until + self.config.drop_after_s
        if now < drop_at:
            self._timers.set(listing.mesh, drop_at)
        else:
            self._drop(listing)

    def _drop(self, listing: Listing) -> None:
        for node in list(listing.members):
            self._remove(listing, node)
        del self._listings[listing.mesh]
        self._timers.cancel(listing.mesh)
        self._events.append(ev.Dropped(listing.mesh))

    def _forget_impostors(self, mesh: str, now: float) -> None:
        pin = self._pins.get(mesh)
        if pin is None or mesh not in self._impersonated:
            return
        limit = now - self.config.impostor_shown_s
        for pub in [pub for pub, one in pin.impostors.items() if one.last_at <= limit]:
            del pin.impostors[pub]
        if pin.impostors:
            oldest = min(one.last_at for one in pin.impostors.values())
            self._timers.set(("impostors", mesh), oldest + self.config.impostor_shown_s)
        else:
            self._impersonated.discard(mesh)


def _unproven(pub: bytes, data: bytes, sig: bytes) -> bool:
    """Stands in for `verify` where shape and names suffice, because nothing is taken in yet."""
    return True
