"""Where meshes find each other: a pool of every mesh's candidates, or a NATS cluster with that pool as its stand-in.

Nothing above notices which of the two carries a summary. While the cluster is away the pool takes over, and every
view says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from agent import addresses
from agent.config import host_port
from agent.contacts import Contacts
from agent.home import RunEntry, read_secret
from discovery.errors import LocalError, QuarterdeckError
from discovery.identity import id_text
from discovery.lifecycle import Evidence, State
from discovery.links import Link
from discovery.member import Addr, Member
from discovery.summary import SignedSummary
from discovery.swim.effects import Effect, Evicted, PushPull

if TYPE_CHECKING:
    from agent.meshes import Meshes
    from agent.node import Node
    from discovery.backbone.nats import NatsBackbone
    from discovery.backbone.pool import PoolBackbone

LOOK_ALONE_S = 1.0
LOOK_S = 20.0
REMEMBERED = "backbone_remembered"
REMEMBERED_MAX = 64
LEAVE_MAX_S = 0.3


class Backbone:
    """A candidate's way to the other meshes. `mode` is what carries summaries just now, for people."""

    def __init__(self, node: Node, meshes: Meshes) -> None:
        self._node = node
        self._meshes = meshes
        self._hosts = [host_port(text) for text in node.settings.backbone if "://" not in text]
        self._urls = [text for text in node.settings.backbone if "://" in text]
        self._key: bytes | None = None
        self._pool: PoolBackbone | None = None
        self._contacts: Contacts | None = None
        self._nats: NatsBackbone | None = None
        self._nats_up = False
        self._starts = 0
        self._problem = ""
        self._counters: Counter[str] = Counter()
        self._seeking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def mode(self) -> str | None:
        """`pool`, `nats`, `pool (nats away)`; None on a node that takes no part, or can't."""
        if self._nats is not None and self._nats_up:
            return "nats"
        if self._pool is None:
            return None
        return "pool (nats away)" if self._urls else "pool"

    @property
    def well(self) -> bool:
        """Whether it works as it was asked to."""
        return self.mode is not None and not (self._urls and not self._nats_up)

    @property
    def text(self) -> str:
        """How it is, for `qd doctor`."""
        if self.mode is None:
            return "takes no part: gateways and consoles carry the backbone" if self._key else self._problem
        there = sum(m.present for m in self._pool.members.values()) if self._pool is not None else None
        members = "" if there is None else f", {there} other members"
        return f"{self.mode}{members}" + (f": {self._problem}" if self._problem else "")

    def start(self) -> None:
        """Begins to look for other meshes; says so when this home lacks the key."""
        try:
            self._key = read_secret(self._node.home.backbone_key_file, "backbone key")
            if self._urls:
                self._start_nats()
        except LocalError as why:
            self._problem = str(why)
            self._node.events.emit("backbone.changed", to="none", reason=str(why))
            if self._key is None:
                return
        if self._nats is None:
            self._start_pool()

    # --- the embedded pool

    def _start_pool(self) -> None:
        from discovery.backbone.pool import PoolBackbone

        node, record = self._node, self._node.swim.me.record
        if self._pool is not None or self._key is None:
            return
        self._starts += 1
        self._pool = PoolBackbone(
            port=node.port,
            key=self._key,
            identity=node.identity,
            mesh=record.mesh,
            name=record.name,
            kind=record.kind,
            host=record.host,
            addrs=record.addrs,
            build=record.build,
            start_ms=node.start_ms + self._starts,
            incarnation=node.swim.me.record.incarnation * 1000 + self._starts,
            heard=lambda signed, age_s, now, addr: self._meshes.hear(signed, age_s, addr),
            held=self._held,
            on_effect=self._on_effect,
        )
        self._contacts = Contacts(
            self._pool.pool, node.identity, node.methods, node.usable_addrs, username="backbone"
        )
        self._pool.start()
        self._seeking = node.spawn(self._seek())

    async def _stop_pool(self) -> None:
        """NATS carries the summaries again. That is no goodbye: who is still in the pool takes one for the node's end."""
        pool, self._pool = self._pool, None
        contacts, self._contacts = self._contacts, None
        if self._seeking is not None:
            self._seeking.cancel()
        if pool is not None:
            pool.close()
        if contacts is not None:
            await contacts.close()

    def _held(self, now: float) -> list[tuple[SignedSummary, float]]:
        mine = self._meshes.publishing.newest
        return [*([mine] if mine else []), *self._meshes.directory.held(now)]

    def _on_effect(self, effect: Effect) -> None:
        match effect:
            case PushPull(node=node):
                self._run(self._push_pull(node))
            case Evicted(id=node, evidence=Evidence.LEFT):
                self._meshes.left(node)

    async def _push_pull(self, member_id: int) -> None:
        pool, contacts = self._pool, self._contacts
        member = pool.members.get(member_id) if pool is not None else None
        if pool is None or contacts is None or member is None:
            return
        try:
            request = pool.push_pull_request()
            answer = await contacts.call(member, "backbone_push_pull", {"body": request}, 5.0)
            pool.push_pull_merge(answer["body"], member_id)
        except (QuarterdeckError, KeyError, TypeError):
            self._counters["push_pull_failed"] += 1

    def answer(self, link: Link, body: bytes) -> bytes:
        """The answer to another backbone member's push/pull."""
        if self._pool is None or link.login.node is None:
            return b"\x90"
        return self._pool.push_pull_answer(body, link.login.node)

    def member(self, node: int) -> Member | None:
        """A current member of the backbone pool."""
        return self._pool.members.get(node) if self._pool is not None else None

    def adopt(self, link: Link) -> None:
        """Takes in a link that a backbone member has opened."""
        if self._contacts is not None:
            self._contacts.adopt(link)

    def found(self, addrs: list[Addr]) -> None:
        """Where candidates of any mesh may be: greeted, and they answer for themselves."""
        if self._pool is not None:
            mine = set(self._node.swim.me.record.addrs) | {self._node.local_addr}
            new = [a for a in dict.fromkeys(addrs) if a not in mine]
            if new:
                self._pool.greet(new)

    async def _seek(self) -> None:
        """Greets whoever may belong to the backbone: seldom once somebody is there, until then again and again."""
        loop = asyncio.get_running_loop()
        remembered = [(str(a[0]), int(a[1])) for a in self._node.journal.get(REMEMBERED, [])]
        while self._pool is not None:
            found = [*self._near(), *remembered]
            for addr in self._hosts:
                found += await loop.run_in_executor(None, addresses.resolve, addr)
            known = {a for m in self._pool.members.values() if m.present for a in m.record.addrs}
            self.found([a for a in found if a not in known])
            if known:
                self._remember()
            began = time.monotonic()
            while self._pool is not None and time.monotonic() - began < LOOK_S:
                await asyncio.sleep(LOOK_ALONE_S)
                if not any(m.present for m in self._pool.members.values()) or self._new_near():
                    break

    def _near(self) -> list[Addr]:
        """Candidates of this home's meshes that run here, of the own mesh anywhere, and publishers heard of."""
        from agent.meshes import CANDIDATES

        found = [e.host_port for e in self._entries()]
        for member in self._node.swim.members.values():
            if member.record.kind in CANDIDATES and member.present:
                found += self._node.usable_addrs(member)
        for listing in self._meshes.directory.listings.values():
            found += [(host, port) for host, port in listing.summary.addrs]
        return found

    def _entries(self) -> list[RunEntry]:
        from agent.meshes import CANDIDATES

        mine = id_text(self._node.identity.id)
        return [e for e in self._node.home.running() if e.kind in CANDIDATES and e.id != mine]

    def _new_near(self) -> bool:
        """Whether a candidate of this home runs that the pool doesn't know."""
        assert self._pool is not None
        known = {id_text(m.id) for m in self._pool.members.values() if m.present}
        return any(e.id not in known for e in self._entries())

    def _remember(self) -> None:
        assert self._pool is not None
        known = sorted(
            list(m.addr or m.record.addrs[0])
            for m in self._pool.members.values()
            if m.present and m.record.addrs
        )
        with contextlib.suppress(QuarterdeckError):
            self._node.journal.set(REMEMBERED, known[:REMEMBERED_MAX])

    # --- NATS

    def _start_nats(self) -> None:
        from discovery.backbone.nats import NatsBackbone

        assert self._key is not None and self._meshes.identity is not None
        self._nats = NatsBackbone(
            urls=self._urls,
            key=self._key,
            mesh=self._node.settings.mesh,
            mesh_pub=self._meshes.identity.pub,
            me=self._node.identity.id,
            on_summary=self._on_summary,
            on_status=self._on_status,
            may_take=self._meshes.publishing.may_take,
        )
        self._run(self._nats.start())

    def _on_summary(self, signed: SignedSummary, age_s: float) -> None:
        self._meshes.hear(signed, age_s, None)

    def _on_status(self, up: bool, reason: str) -> None:
        before = self.mode
        self._nats_up = up
        self._problem = "" if up else reason
        if up:
            self._run(self._stop_pool())
        else:
            self._start_pool()
        now = "nats" if up else "pool (nats away)"
        if now != before:
            self._node.events.emit("backbone.changed", from_=before, to=now, reason=reason or None)
            self._meshes.carried_anew()

    # --- what the lease asks for

    async def hold(self, epoch: int) -> bool:
        """Whether this node may publish: with NATS, only while the lease's entry there is its own."""
        if self._nats is not None and self._nats_up:
            return await self._nats.hold(epoch)
        return True

    def lost(self, node: int) -> None:
        """A link to that node broke: whether it still lives is looked at now."""
        if self._pool is not None and node in self._pool.members:
            self._pool.link_closed(node)

    def updating(self, deadline_ms: int) -> None:
        """This process is about to be replaced: the other meshes are not to take that for its end."""
        if self._pool is not None:
            self._pool.update_self(state=State.UPDATING, deadline_ms=deadline_ms)

    def withdraw(self) -> None:
        """Another node publishes this mesh from now on."""
        if self._pool is not None:
            self._pool.withdraw()

    def tell(self, node: int, signed: SignedSummary, age_s: float) -> None:
        """Sends one member a newer summary of its own mesh than it seems to know of."""
        if self._pool is not None:
            self._pool.tell(node, signed, age_s)

    def publish(self, signed: SignedSummary, *, urgent: bool) -> None:
        """Tells the other meshes: everybody when it is news, else only those that don't hear it over a link."""
        if self._nats is not None and self._nats_up:
            self._run(self._nats.publish(signed, urgent))
        elif self._pool is not None:
            if urgent:
                self._pool.publish(signed)
            else:
                following = self._meshes.telling.following
                others = [
                    m.id for m in self._pool.members.values() if m.present and id_text(m.id) not in following
                ]
                self._pool.renew(signed, others)

    async def leave(self) -> None:
        """The goodbye on the backbone; the lease's entry in NATS is given back."""
        if self._nats is not None and self._nats_up:
            with contextlib.suppress(QuarterdeckError, TimeoutError):
                async with asyncio.timeout(LEAVE_MAX_S):
                    await self._nats.release()
        if self._pool is not None:
            self._remember()
            self._pool.leave()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_MAX_S):
                    await self._pool.left.wait()

    def _run(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def counters(self) -> Counter[str]:
        found = Counter({f"backbone_{code}": n for code, n in self._counters.items()})
        for room in (self._pool, self._nats):
            if room is not None:
                found.update({f"backbone_{code}": n for code, n in room.counters.items()})
        return found

    async def close(self) -> None:
        for task in (*self._tasks, *([self._seeking] if self._seeking else ())):
            task.cancel()
        if self._nats is not None:
            await self._nats.close()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        if self._contacts is not None:
            await self._contacts.close()


__all__ = ["Backbone"]
