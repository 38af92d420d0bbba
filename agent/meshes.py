"""This node's part among many meshes: the lease on its own mesh's summary, and the directory of the others.

Pure rooms decide (`discovery.lease`, `discovery.directory`); this one hands them what arrives, keeps their deadlines,
and carries out what they ask for. Everything it tells others is signed: claims by the node, summaries by the mesh.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent.backbone import Backbone
from agent.following import Following, publisher
from agent.home import read_identity
from agent.listed import ListedMeshes
from agent.reach import relays_among
from agent.telling import Delta, Telling
from discovery import directory as dy
from discovery import lease as ls
from discovery.directory import Directory, Entry, Listing, Remote, entry_of
from discovery.errors import LocalError, Refused
from discovery.identity import Identity, id_text, verify
from discovery.lifecycle import EVIDENCE_TEXT, Evidence, State
from discovery.member import Addr, Member, addr_text
from discovery.sshkey import pub_fingerprint
from discovery.summary import LEASE_TOPIC, SignedSummary, Summary, pack, seal_summary
from discovery.wire import Note

if TYPE_CHECKING:
    from agent.node import Node

CANDIDATES = frozenset({"gateway", "console"})
SUMMARY_TTL_MS = 8_000
"""Longer than a claim on the lease by what a takeover may take, so that no view sees the mesh expire meanwhile."""
HOLD_AGAIN_S = 0.3
BEHIND_S = 6.0
"""A higher epoch of the own mesh that nobody renews for this long is a memory of others, and is gone beyond."""
PUBLISH_GAP_S = 1.0
"""A change of the counts is published at once, but not more often than this."""
EPOCH = "lease_epoch"
PINS = "mesh_pins"
GONE_KEPT = 1_000

Row = dict[str, Any]


class Meshes:
    """The other meshes as this node knows them, and who publishes its own."""

    def __init__(self, node: Node) -> None:
        settings, now = node.settings, time.monotonic()
        self._node = node
        self.candidate = settings.kind in CANDIDATES
        self.identity = self._mesh_identity()
        self.listed = ListedMeshes(node.home)
        self.telling = Telling(node)
        self.following = Following(node)
        self.lease = ls.Lease(
            mesh=settings.mesh,
            pub=node.identity.pub,
            candidate=self.candidate and self.identity is not None,
            sign=node.identity.sign,
            verify=verify,
            config=ls.LeaseConfig(),
            now=now,
        )
        self.lease.floor(int(node.journal.get(EPOCH, 0)), now)
        remembered = {str(k): bytes.fromhex(v) for k, v in dict(node.journal.get(PINS, {})).items()}
        self.directory = Directory(
            home=settings.mesh,
            home_pub=self.identity.pub if self.identity else None,
            verify=verify,
            pins={name: pub for pub, name in self.listed.of_home().items()},
            remembered=remembered,
        )
        self.backbone = Backbone(node, self)
        self.gone: OrderedDict[int, tuple[str, Evidence, float]] = OrderedDict()
        """Nodes of other meshes that are gone: name, evidence, when."""
        self._summary: SignedSummary | None = None
        self._summary_at = 0.0
        self._told: Summary | None = None
        """The last summary that said something new."""
        self._published_at = 0.0
        self._renewal = 0
        self.version = 0
        """Grows with every change of a mesh as a whole."""
        self._home_order = (0, 0)
        self._home_order_at = now
        """Of the newest summary of the own mesh that others hold, and when it was first heard of."""
        self._publishing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._closed = False

    def _mesh_identity(self) -> Identity | None:
        home, mesh = self._node.home, self._node.settings.mesh
        try:
            return read_identity(home.mesh_identity_file(mesh), f"identity of mesh {mesh}")
        except LocalError as why:
            self._node.events.emit("backbone.changed", to="none", reason=str(why))
            return None

    # --- life

    def start(self) -> None:
        self._node.swim.keep_notes(self)
        if self.candidate and self.identity is not None:
            self.backbone.start()
        self.members_changed()

    def resign(self, *, leaving: bool) -> None:
        """Gives up the lease at once: this node leaves, or replaces itself."""
        self.lease.resign(time.monotonic())
        self._flush()
        if leaving:
            self.telling.farewell()

    def left(self, node: int) -> None:
        """A node of another mesh has said goodbye on the backbone: out of view at once."""
        mesh = self.directory.mesh_of(node)
        if mesh is not None:
            self.feed(mesh, [], {node: Evidence.LEFT.value}, time.monotonic(), full=False)

    async def close(self) -> None:
        self._closed = True
        self.following.close()
        self.telling.close()
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        await self.backbone.close()

    # --- summaries, and the notes on the mesh's own pool (`discovery.swim.Keeper`)

    def hear(
        self, signed: SignedSummary, age_s: float, addr: Addr | None, *, of_member: bool = False
    ) -> bool:
        """A summary by whatever way; whether it was news. What is no summary is refused and counted. `of_member`: a
        candidate of this mesh hands on its directory, expired meshes and all."""
        now = time.monotonic()
        news = self.directory.heard(signed, age_s, now, addr, even_expired=of_member)
        if self.directory.home_order != self._home_order:
            self._home_order, self._home_order_at = self.directory.home_order, now
        if self.directory.home_order > (self.lease.epoch, self._renewal):
            self.lease.floor(self.directory.home_order[0], now)
            if self.lease.mine and self.directory.home_order[0] == self.lease.epoch:
                self._renewal = max(self._renewal, self.directory.home_order[1])
        self._flush_soon()
        return news

    def heard(self, note: Note, sender: int, now: float) -> bool:
        if note.topic != LEASE_TOPIC or note.subject != self._node.settings.mesh:
            return False
        news = self.lease.heard(note.body, note.age_ms / 1000, sender, now)
        self._flush_soon()
        return news

    def held(self, now: float) -> Iterable[Note]:
        held = self.lease.held(now)
        if held is None:
            return []
        body, age_s = held
        return [Note(LEASE_TOPIC, self._node.settings.mesh, body, max(0, round(age_s * 1000)))]

    # --- the lease

    def synced(self) -> None:
        self.lease.synced(time.monotonic())
        self._flush_soon()

    def members_changed(self) -> None:
        """Rows of the own mesh have changed: who may hold the lease, and what the summary says."""
        if self._closed:
            return
        swim = self._node.swim
        may = {
            m.id: m.record.kind
            for m in (swim.me, *swim.members.values())
            if m.record.kind in CANDIDATES and m.present and m.state is not State.UPDATING
        }
        if self._node.stopping or self.identity is None:
            may.pop(swim.me.id, None)
        self.lease.set_candidates(may, time.monotonic())
        self.telling.look()
        if self._node.settings.kind != "gateway":
            self._node.contacts.keep_gateway(tuple(m.id for m in relays_among(swim.members.values())))
        self._flush_soon()

    def relays(self, mesh: str) -> list[Member]:
        """Who may relay to members of that mesh, best first."""
        if mesh == self._node.settings.mesh:
            return relays_among(self._node.swim.members.values())
        listing = self.directory.listings.get(mesh)
        if listing is None or listing.expired:
            return []
        first = listing.summary.publisher_id
        others = (m for m in listing.members.values() if m.id != first)
        return [publisher(listing.summary), *relays_among(others)]

    def tellers(self) -> list[Member]:
        """Candidates of the own mesh that may be asked for the directory, the holder first."""
        swim = self._node.swim
        found = [m for m in swim.members.values() if m.record.kind in CANDIDATES and m.present]
        return sorted(
            found,
            key=lambda m: (
                m.id != self.lease.holder,
                m.suspect_since is not None,
                m.record.kind != "gateway",
            ),
        )

    def _flush_soon(self) -> None:
        """After the turn of gossip that is under way: effects must not call into it."""
        if self._soon is None and not self._closed:
            self._soon = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Carries out what lease and directory ask for, and notes when to wake them."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._closed:
            return
        for effect in self.lease.drain():
            self._lease_effect(effect)
        for event in self.directory.drain():
            self._directory_event(event)
        self._republish_if_changed()
        self._node.pool.flush()
        self._arm()

    def _arm(self) -> None:
        at = min(self.lease.deadline(), self.directory.deadline())
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(max(at, loop.time()), self._wake) if at < float("inf") else None

    def _wake(self) -> None:
        self._timer = None
        now = time.monotonic()
        self.lease.wake(now)
        self.directory.wake(now)
        self._flush()

    def _lease_effect(self, effect: object) -> None:
        node, now, mesh = self._node, time.monotonic(), self._node.settings.mesh
        match effect:
            case ls.Persist(epoch=epoch):
                try:
                    node.journal.set(EPOCH, epoch, durable=True)
                except Refused as why:
                    node.journal_refused(why)
            case ls.Spread(body=body, age_s=age_s):
                node.swim.spread(LEASE_TOPIC, mesh, body, now, age_s)
            case ls.Tell(nodes=nodes, body=body, age_s=age_s):
                node.swim.send_note(nodes, LEASE_TOPIC, mesh, body, now, age_s)
            case ls.Changed(holder=holder, epoch=epoch, reason=reason, mine=mine):
                if not mine:
                    self._summary = self._told = None
                    self.backbone.withdraw()
                node.events.emit(
                    "lease.changed",
                    to=node.name_of(holder) if holder is not None else None,
                    epoch=epoch,
                    reason=reason or None,
                )
                self.changed()
            case ls.Publish(epoch=epoch):
                self._publish(epoch)

    def carried_anew(self) -> None:
        """Another backbone carries the summaries from now on: it is told at once what this node publishes."""
        if self.lease.mine:
            self._publish(self.lease.epoch)
        self.changed()

    def _publish(self, epoch: int) -> None:
        if self._publishing is None or self._publishing.done():
            self._publishing = self._node.spawn(self._publish_now(epoch))

    async def _publish_now(self, epoch: int) -> None:
        """Makes the summary anew, signs it, and hands it to the backbone and to those that follow this node."""
        if self.identity is None or not self.lease.mine:
            return
        if self._home_order[0] > epoch and time.monotonic() - self._home_order_at > BEHIND_S:
            self._claim_anew()
            return
        while not (held := await self.backbone.hold(epoch)) and self.lease.mine and self.lease.epoch == epoch:
            self.lease.published(False, time.monotonic())
            self._flush_soon()
            await asyncio.sleep(HOLD_AGAIN_S)
        now = time.monotonic()
        self.lease.published(held, now)
        if held and self.lease.mine:
            self._renewal += 1
            summary = self._make(epoch)
            urgent = self._told is None or dy.material(self._told, summary)
            self._told = summary if urgent else self._told
            self._published_at = now
            self._summary, self._summary_at = seal_summary(summary, self.identity.sign), now
            self.backbone.publish(self._summary, urgent=urgent)
            self.telling.own.wake()
        self._flush_soon()

    def _claim_anew(self) -> None:
        """Others remember this mesh at a higher epoch than this node's, and believe nothing below it."""
        now = time.monotonic()
        self.lease.resign(now)
        self.lease.set_candidates({}, now)
        self.members_changed()

    def _make(self, epoch: int) -> Summary:
        node = self._node
        swim, record = node.swim, node.swim.me.record
        members = [swim.me, *swim.members.values()]
        cpu = [m.vitals.cpu for m in members if m.present and m.vitals and m.vitals.cpu is not None]
        mem = [m.vitals.mem for m in members if m.present and m.vitals and m.vitals.mem is not None]
        assert self.identity is not None
        return Summary(
            mesh=record.mesh,
            mesh_pub=self.identity.pub,
            epoch=epoch,
            renewal=self._renewal,
            publisher=record.pub,
            publisher_name=record.name,
            addrs=record.addrs,
            host=record.host,
            counts=dict(Counter(m.state for m in members)),
            cpu=round(sum(cpu) / len(cpu)) if cpu else None,
            mem=round(sum(mem) / len(mem)) if mem else None,
            version=self.telling.version,
            ttl_ms=SUMMARY_TTL_MS,
        )

    def _republish_if_changed(self) -> None:
        """A node came, went or changed its state: others should know before the next renewal."""
        swim = self._node.swim
        if not self.lease.mine or self._told is None:
            return
        if dict(Counter(m.state for m in (swim.me, *swim.members.values()))) == self._told.counts:
            return
        wait = self._published_at + PUBLISH_GAP_S - time.monotonic()
        if wait <= 0:
            self._publish(self.lease.epoch)
        else:
            asyncio.get_running_loop().call_later(wait, self._flush_soon)

    def published(self, now: float) -> tuple[SignedSummary, float] | None:
        """What this node published last as holder of the lease, and its age in seconds."""
        return None if self._summary is None else (self._summary, now - self._summary_at)

    def may_take(self, holder: int, epoch: int) -> bool:
        """Whether the lease's entry in NATS may be taken from that node before it runs out: the mesh's own pool, in
        which that node is or was, has given the lease to this one."""
        swim = self._node.swim
        known = holder in swim.members or holder in swim.tombstones
        return self.lease.mine and known and epoch < self.lease.epoch

    def own_summary(self) -> dict[str, Any]:
        """The newest summary of the own mesh that this node published, and its age; empty when it doesn't publish."""
        if self._summary is None:
            return {}
        return {"summary": pack(self._summary), "age_ms": _ms(time.monotonic() - self._summary_at)}

    # --- the directory

    def feed(
        self, mesh: str, entries: Sequence[Entry], gone: Mapping[int, str], now: float, *, full: bool
    ) -> None:
        """Rows of another mesh, from who publishes it."""
        listing = self.directory.listings.get(mesh)
        before = {node: m.state for node, m in listing.members.items()} if listing is not None else {}
        names = {node: m.record.name for node, m in listing.members.items()} if listing is not None else {}
        fed = listing is not None and listing.fed
        self.directory.feed(mesh, list(entries), list(gone), now, full=full)
        if fed:
            self._tell_changes(mesh, before, names, gone)
        self._flush()

    def _tell_changes(
        self, mesh: str, before: Mapping[int, State], names: Mapping[int, str], gone: Mapping[int, str]
    ) -> None:
        """Events about nodes of another mesh: came, changed its state, went."""
        emit = self._node.events.emit
        listing = self.directory.listings.get(mesh)
        members = listing.members if listing is not None else {}
        for node, member in members.items():
            old = before.get(node)
            about = {"node": member.record.name, "id": id_text(node), "mesh": mesh}
            if old is None:
                emit("node.joined", **about, to=member.state.word, source="directory")
            elif old is not member.state:
                source = member.evidence.value if member.evidence else "directory"
                emit(
                    "node.changed",
                    **about,
                    from_=old.word,
                    to=member.state.word,
                    source=source,
                    by=list(member.by_names) or None,
                    reason=member.record.reason or None,
                )
        for node in before.keys() - members.keys():
            evidence = _evidence(gone.get(node))
            self.gone[node] = (names[node], evidence, time.monotonic())
            if len(self.gone) > GONE_KEPT:
                self.gone.popitem(last=False)
            emit(
                "node.evicted",
                node=names[node],
                id=id_text(node),
                mesh=mesh,
                from_=before[node].word,
                source=evidence.value,
            )

    def refreshed(self, mesh: str, now: float) -> None:
        """The stream of that mesh has said something: its rows are as fresh as that."""
        self.directory.refreshed(mesh, now)

    def seen(self, mesh: str, seen: list[tuple[int, int]], now: float) -> None:
        """When the publisher last had news of each of its nodes."""
        listing = self.directory.listings.get(mesh)
        if listing is None:
            return
        changed = []
        for node, age_ms in seen:
            member = listing.members.get(node)
            if member is not None:
                member.last_seen = max(member.last_seen, now - max(0, age_ms) / 1000)
                changed.append(node)
        self._node.service.changed(changed)

    def _directory_event(self, event: object) -> None:
        node = self._node
        emit = node.events.emit
        match event:
            case dy.Seen(mesh=mesh) | dy.Revived(mesh=mesh):
                summary = self._summary_of(mesh)
                if summary is None:
                    return
                back = "back after it had expired" if isinstance(event, dy.Revived) else None
                emit(
                    "mesh.seen",
                    mesh=mesh,
                    node=summary.publisher_name,
                    id=id_text(summary.publisher_id),
                    reason=back,
                )
                self._follow(summary)
                self._rows_changed(mesh)
            case dy.PublisherChanged(mesh=mesh):
                summary = self._summary_of(mesh)
                if summary is None:
                    return
                emit(
                    "lease.changed",
                    mesh=mesh,
                    node=summary.publisher_name,
                    id=id_text(summary.publisher_id),
                    to=summary.publisher_name,
                    epoch=summary.epoch,
                    source="directory",
                )
                self._follow(summary)
                self.changed()
            case dy.Expired(mesh=mesh):
                emit(
                    "mesh.expired", mesh=mesh, node=None, id=None, reason=f"nothing heard from {mesh} in time"
                )
                self.following.drop(mesh)
                self._rows_changed(mesh)
            case dy.Dropped(mesh=mesh):
                emit("mesh.dropped", mesh=mesh, node=None, id=None)
                self.following.drop(mesh)
                self.changed()
            case dy.ImpostorSeen(mesh=mesh, pub=pub, addr=addr):
                emit(
                    "mesh.impostor",
                    mesh=mesh,
                    node=None,
                    id=None,
                    key=pub_fingerprint(pub),
                    addr=addr_text(addr) if addr else None,
                    reason=f"another key publishes {mesh}; it is shown and not believed",
                )
                self.changed()
            case dy.Pinned():
                with contextlib.suppress(Refused):
                    node.journal.set(PINS, {m: pub.hex() for m, pub in self.directory.remembered.items()})
            case dy.Behind(mesh=mesh, node=behind, newest=newest):
                listing = self.directory.listings.get(mesh)
                age_s = listing.silent_s(time.monotonic()) if listing is not None else 0.0
                self.backbone.tell(behind, newest, age_s)
            case dy.RowsChanged(mesh=mesh, changed=changed, gone=gone):
                self._tell_others(mesh, changed, gone)
                node.service.changed([*changed, *gone])

    def _follow(self, summary: Summary) -> None:
        if self.candidate:
            self.following.publisher(summary)

    def _tell_others(self, mesh: str, changed: Iterable[int], gone: Iterable[int]) -> None:
        """Passes rows of another mesh on to members of the own one that ask this node."""
        listing = self.directory.listings.get(mesh)
        if listing is None or not self.telling.others.places:
            return
        now = time.monotonic()
        entries = tuple(
            entry_of(listing.members[n], now, self._node.name_of) for n in changed if n in listing.members
        )
        told = tuple((n, self.gone[n][1].value if n in self.gone else "silent") for n in gone)
        self.telling.others.put(Delta(mesh, entries, told))

    def _rows_changed(self, mesh: str) -> None:
        listing = self.directory.listings.get(mesh)
        self._node.service.changed(list(listing.members) if listing is not None else [])
        self.changed()

    def changed(self) -> None:
        """Something about a mesh as a whole is new: its publisher, its route, whether it lists this one."""
        self.version += 1
        self._node.service.changed()
        self.telling.others.wake()

    # --- what others ask

    def find(self, node: int) -> Remote | None:
        """A node of another mesh, while its mesh is live."""
        member = self.directory.find(node)
        listing = self.directory.listings.get(member.record.mesh) if member is not None else None
        return None if listing is None or listing.expired or member is None or not member.present else member

    def remotes(self) -> Iterable[tuple[Listing, Remote]]:
        """Every row of other meshes."""
        for listing in self.directory.listings.values():
            for member in listing.members.values():
                yield listing, member

    def gone_text(self, node: int) -> str | None:
        """How a node of another mesh went, when that is known: with its mesh, by itself, or out of view."""
        now = time.monotonic()
        member = self.directory.find(node)
        listing = self.directory.listings.get(self.directory.mesh_of(node) or "")
        if member is not None and listing is not None:
            name = member.record.name
            if listing.expired:
                return f"{name}: mesh {listing.mesh} expired: nothing heard from it for {round(listing.silent_s(now))} s"
            if member.state is State.DEAD and member.evidence is not None:
                return f"{name}: dead; {EVIDENCE_TEXT[member.evidence]}"
        if node not in self.gone:
            return None
        name, evidence, at = self.gone[node]
        ago = f"{max(0, round(now - at))} s ago"
        if evidence is Evidence.LEFT:
            return f"{name}: said goodbye {ago}"
        return f"{name}: dead, evicted from view; {EVIDENCE_TEXT[evidence]}"

    def known(self) -> list[str]:
        """Names of the meshes in view, the own one first."""
        return [self._node.settings.mesh, *sorted(self.directory.listings)]

    def _summary_of(self, mesh: str) -> Summary | None:
        listing = self.directory.listings.get(mesh)
        return listing.summary if listing is not None else None

    def summary_of(self, mesh: str) -> dict[str, Any]:
        """A mesh's signed summary and its age, to be passed on to members."""
        listing = self.directory.listings.get(mesh)
        if listing is None:
            return {}
        return {"summary": pack(listing.signed), "age_ms": _ms(time.monotonic() - listing.born)}

    def summaries(self) -> list[dict[str, Any]]:
        """The signed summaries of all other meshes."""
        return [found for mesh in self.directory.listings if (found := self.summary_of(mesh))]

    def rows(self) -> list[Row]:
        """`qd meshes`: the own mesh first, then the others by name."""
        passed = self.following.mesh_rows if not self.candidate else {}
        own = self._own_row()
        if own["mesh"] in passed:
            own |= _completed(own, *passed[own["mesh"]])
        rows = [own]
        for mesh in sorted(self.directory.listings):
            rows.append(self._row(self.directory.listings[mesh], passed.get(mesh)))
        return rows

    def _own_row(self) -> Row:
        node, swim = self._node, self._node.swim
        members = [swim.me, *swim.members.values()]
        holder = self.lease.holder
        member = next((m for m in members if m.id == holder), None)
        expires_s = self.lease.expires_in_s(time.monotonic())
        addr = (member.addr or (member.record.addrs[0] if member.record.addrs else None)) if member else None
        cpu = [m.vitals.cpu for m in members if m.present and m.vitals and m.vitals.cpu is not None]
        mem = [m.vitals.mem for m in members if m.present and m.vitals and m.vitals.mem is not None]
        return {
            "mesh": node.settings.mesh,
            "publisher": {
                "id": id_text(holder) if holder is not None else None,
                "name": node.name_of(holder) if holder is not None else None,
                "addr": addr_text(addr) if addr else None,
            },
            "epoch": self.lease.epoch or None,
            "version": self.telling.version if self.lease.mine else None,
            "expires_in_ms": None if expires_s is None else _ms(expires_s),
            "expired": False,
            "nodes": _counts(Counter(m.state for m in members)),
            "cpu": round(sum(cpu) / len(cpu) / 1000, 3) if cpu else None,
            "mem": round(sum(mem) / len(mem) / 1000, 3) if mem else None,
            "age_ms": 0,
            "home": True,
            "pub": pub_fingerprint(self.identity.pub) if self.identity else None,
            "impostors": self._impostors(node.settings.mesh),
            "backbone": self.backbone.mode,
            "route": None,
            "rtt_ms": None,
            "listed": None,
            "reason": None,
        }

    def _row(self, listing: Listing, passed: tuple[float, Row] | None) -> Row:
        """A row about another mesh. `passed`: the same row as the candidate that was asked has it."""
        now, summary = time.monotonic(), listing.summary
        tie = self.following.ties.get(listing.mesh)
        via = passed[1] if passed else {}
        if listing.fed:
            counts = Counter(m.state for m in listing.members.values())
        else:
            counts = Counter(dict(summary.counts))
        if listing.expired:
            counts = Counter({State.DEAD: sum(counts.values())})
        left_s = self.directory.expires_in_s(listing.mesh, now)
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
            "home": listing.pub in self.listed.of_home(),
            "pub": pub_fingerprint(listing.pub),
            "impostors": self._impostors(listing.mesh) or via.get("impostors") or [],
            "backbone": self.backbone.mode or via.get("backbone"),
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
            for pub, impostor in self.directory.impostors.get(mesh, {}).items()
        ]

    def counters(self) -> Counter[str]:
        found = Counter(self.directory.counters) + Counter(self.lease.counters) + self.backbone.counters()
        del found["old_summary"]  # a copy of what is known already: the way of gossip
        return found


def _completed(own: Row, at: float, row: Row) -> Row:
    """What only a candidate knows of the own mesh, as one told it at `at`."""
    told = {key: row.get(key) for key in ("version", "backbone") if own[key] is None}
    left_ms = row.get("expires_in_ms")
    if own["publisher"]["id"] is not None and isinstance(left_ms, int):
        told["expires_in_ms"] = max(0, left_ms - _ms(time.monotonic() - at))
    return told


def _counts(states: Mapping[State, int]) -> dict[str, int]:
    return {"total": sum(states.values()), **{s.word: states.get(s, 0) for s in State}}


def _evidence(word: str | None) -> Evidence:
    try:
        return Evidence(str(word))
    except ValueError:
        return Evidence.SILENT


def _share(permille: int | None) -> float | None:
    return None if permille is None else permille / 1000


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
