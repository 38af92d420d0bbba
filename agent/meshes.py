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
from agent.meshrows import MeshRows
from agent.publishing import Publishing
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
from discovery.summary import LEASE_TOPIC, SignedSummary, Summary, pack
from discovery.wire import Note

if TYPE_CHECKING:
    from agent.node import Node

CANDIDATES = frozenset({"gateway", "console"})
EPOCH = "lease_epoch"
PINS = "mesh_pins"
GONE_KEPT = 1_000


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
        self.rows = MeshRows(node, self)
        self.gone: OrderedDict[int, tuple[str, Evidence, float]] = OrderedDict()
        """Nodes of other meshes that are gone: name, evidence, when."""
        self.publishing = Publishing(node, self)
        self.version = 0
        """Grows with every change of a mesh as a whole."""
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
        self.publishing.remembered(self.directory.home_order, now)
        self.flush_soon()
        return news

    def heard(self, note: Note, sender: int, now: float) -> bool:
        if note.topic != LEASE_TOPIC or note.subject != self._node.settings.mesh:
            return False
        news = self.lease.heard(note.body, note.age_ms / 1000, sender, now)
        self.flush_soon()
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
        self.flush_soon()

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
        self.flush_soon()

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

    def flush_soon(self) -> None:
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
        self.publishing.look()
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
                    self.publishing.withdraw()
                node.events.emit(
                    "lease.changed",
                    to=node.name_of(holder) if holder is not None else None,
                    epoch=epoch,
                    reason=reason or None,
                )
                self.changed()
            case ls.Publish():
                self.publishing.publish()

    def carried_anew(self) -> None:
        """Another backbone carries the summaries from now on: it is told at once what this node publishes."""
        if self.lease.mine:
            self.publishing.publish()
        self.changed()

    def claim_anew(self) -> None:
        """Others remember this mesh at a higher epoch than this node's, and believe nothing below it."""
        now = time.monotonic()
        self.lease.resign(now)
        self.lease.set_candidates({}, now)
        self.members_changed()

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

    def in_view(self, mesh: Any) -> list[str]:
        """The same for who asks for one of them; for None all are meant. Refused `unknown_mesh`."""
        known = self.known()
        if mesh is not None and mesh not in known:
            sees = ", ".join(known)
            raise Refused("unknown_mesh", f"mesh {mesh}: not known to {self._node.name}; it sees {sees}")
        return known

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

    def counters(self) -> Counter[str]:
        found = Counter(self.directory.counters) + Counter(self.lease.counters) + self.backbone.counters()
        del found["old_summary"]  # a copy of what is known already: the way of gossip
        return found


def _evidence(word: str | None) -> Evidence:
    try:
        return Evidence(str(word))
    except ValueError:
        return Evidence.SILENT


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
