"""What a node answers over its SSH links: to other members, to the consoles and commands of its home, to operators.

Each method names the logins that may call it. An op is never judged by who carries it here: any login may hand one
over, and its target decides by the op's own signature.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from agent.events import wall_ms
from agent.gathering import Gathering
from agent.opmessage import glimpse, suffices
from agent.params import (
    ANYBODY,
    CARRIERS,
    HOME,
    JOIN,
    LIMIT_MAX,
    MEMBER,
    MESH,
    OP,
    READERS,
    ROWS_A_FRAME,
    calls,
    chunked,
    limit_of,
    mapping,
    octets,
    streams,
    text_of,
)
from agent.watching import Watching
from discovery.errors import QuarterdeckError, Refused, Unreachable
from discovery.identity import id_text
from discovery.lifecycle import State
from discovery.links import Handler, Link
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node

EVENTS_A_FRAME = 1_000
"""What goes into one frame of a link, which may not exceed 1 MiB."""
CHALLENGE_TIMEOUT_S = 5.0
PAGE_TIMEOUT_S = 2.0
LOG_LINES = 2048
RECORDS_DEFAULT = 2048
LISTED = 8
OP_TIMEOUT_S = 125.0
"""An update answers within its deadline of 120 s; everything else in milliseconds."""


class Service:
    """The methods of one node. `methods()` is what its listener serves and what its own links answer to."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._all = Gathering(node)
        self._watching = Watching(node)
        self.changed = self._watching.changed
        """Tells every watcher that a row or an event is new."""

    def methods(self) -> dict[str, Handler]:
        node, every = self._node, self._all
        return {
            "hello": calls(ANYBODY, self.hello),
            "push_pull": calls({MEMBER}, self.push_pull),
            "gossip": calls({MEMBER}, self.gossip),
            "challenge": calls(ANYBODY, self.challenge),
            "op": calls(ANYBODY, self.op),
            "nodes": streams(READERS, self.nodes),
            "node": calls({*READERS, MEMBER, MESH}, self.node),
            "last": calls({*READERS, MEMBER}, self.last),
            "directory": streams({MEMBER, MESH}, node.meshes.telling.directory),
            "by_relay": calls({MEMBER}, self.by_relay),
            "backbone_push_pull": calls({"backbone"}, self.backbone_push_pull),
            "meshes": calls(READERS, self.meshes),
            "events": streams({*READERS, MEMBER, MESH}, self.events),
            "follow": streams({*READERS, MEMBER, MESH}, self.follow),
            "watch": streams(READERS, self._watching.watch),
            **node.relay.methods(),
            "daemons": streams(READERS, every.daemons),
            "failures": streams(READERS, every.failures),
            "own_daemons": calls(CARRIERS, every.own_daemons),
            "own_failures": calls(CARRIERS, every.own_failures),
            "dead_failures": calls(CARRIERS, every.dead_failures),
            "past": streams(READERS, every.past),
            "own_past": calls(CARRIERS, every.own_past),
            "daemon_log": streams({*READERS, MEMBER, MESH}, self.daemon_log),
            "spec": calls(ANYBODY, self.spec),
            "audit": calls(READERS, every.audit),
            "operators": calls(READERS, self.roster),
            "own_refusals": calls({MEMBER}, every.own_refusals),
            **node.chains.replicas.methods(),
            "resolve": calls(READERS, self.resolve),
            "doctor": calls(READERS, self.doctor),
            "keyring": calls({MEMBER}, node.keys.serve),
            "keys": calls(READERS, node.keys.serve_status),
            "invite": calls({HOME, OP}, node.admission.serve_invite),
            "admission": calls({JOIN}, node.admission.serve_glance),
            "join": calls({JOIN}, node.admission.serve_join),
            **node.data.methods(),
            "chains": calls(READERS, every.chains),
            "own_chains": calls({MEMBER}, every.own_chains),
            "holders": calls(READERS, self.holders),
            "tail": streams({*READERS, MEMBER}, self.tail),
        }

    # --- between members

    async def push_pull(self, link: Link, params: Any) -> Any:
        node, now = self._node, time.monotonic()
        answer = node.swim.push_pull_answer(octets(params, "body"), _sender(link), now)
        node.pool.flush()
        node.meshes.synced()
        told = mapping(params)
        for name, notes in node.contacts.notes.items():
            notes.heard(_sender(link), told.get(name))
        return {"body": answer, **{name: notes.note() for name, notes in node.contacts.notes.items()}}

    async def by_relay(self, link: Link, params: Any) -> Any:
        """A member says that the link it has opened goes through a relay."""
        self._node.reach.came_by_relay(link)
        return {}

    async def backbone_push_pull(self, link: Link, params: Any) -> Any:
        """What the backbone's members compare over a link."""
        return {"body": self._node.meshes.backbone.answer(link, octets(params, "body"))}

    async def gossip(self, link: Link, params: Any) -> Any:
        """A datagram's body over a link: for what must not be lost, such as a goodbye."""
        node = self._node
        node.swim.receive(octets(params, "body"), _sender(link), link.addr, time.monotonic())
        node.pool.flush()
        return {}

    # --- ops

    async def hello(self, link: Link, params: Any) -> Any:
        node = self._node
        record = node.swim.me.record
        return {
            "id": id_text(record.id),
            "name": record.name,
            "mesh": record.mesh,
            "kind": record.kind,
            "build": record.build,
            "wire": record.wire,
            "state": node.swim.me.state.word,
            "role": link.login.role,
            **node.control.challenge(link.login),
        }

    async def challenge(self, link: Link, params: Any) -> Any:
        """A fresh nonce and the wall time of the target, fetched from it when it is not this node."""
        node = self._node
        target = await self._target(link, text_of(params, "target"))
        me = node.swim.me.record
        if target is None:
            return {**node.control.challenge(link.login), "mesh": me.mesh, "name": me.name, "route": "local"}
        name, request = target.record.name, {"target": id_text(target.id)}
        await self._reach(target)
        try:
            answer, route = await node.reach.call(target, "challenge", request, CHALLENGE_TIMEOUT_S)
        except Unreachable as why:
            raise Unreachable(f"{name}: gave no answer; it may be stopped, or cut off") from why
        return {**mapping(answer), "route": route}

    async def _target(self, link: Link, text: str) -> Member | None:
        """The node that is meant, in any mesh; None for this one. A node that hands an op over means this one only."""
        node = self._node
        if text != id_text(node.identity.id):
            if link.login.kind in CARRIERS:
                raise Refused("wrong_target", f"{node.name} is not the target")
            await node.meshes.following.ready()
        return node.target(text)

    async def _reach(self, target: Member) -> None:
        """Makes sure that there is a link to the target. Refused `in_update` while it replaces its process: it will
        be back, and the caller asks again."""
        try:
            await self._node.reach.link_to(target)
        except Unreachable as why:
            if target.state is State.UPDATING:
                raise Refused(
                    "in_update", f"{target.record.name} is updating; try again when it is back"
                ) from why
            raise

    async def op(self, link: Link, params: Any) -> Any:
        """Judges an op for this node, or hands the signed bytes on to the node that it is for."""
        node = self._node
        started = time.monotonic()
        message, signature = octets(params, "message"), text_of(params, "signature")
        content = octets(params, "content") if mapping(params).get("content") is not None else None
        target = await self._target(link, text_of(params, "target"))
        if target is None:
            result = dict(await node.control.submit(message, signature, link.login, link.addr[0], content))
            route = "local"
        else:
            await self._reach(target)
            request = {"target": id_text(target.id), "message": message, "signature": signature}
            if content is not None:
                request["content"] = content
            try:
                answer, route = await node.reach.call(target, "op", request, OP_TIMEOUT_S)
                result = dict(mapping(answer))
            except Unreachable as why:
                op_id, verb = glimpse(message)
                self._told_sent(target, op_id, verb, "unknown", str(why), None)
                raise Unreachable(str(why), maybe_arrived=True) from why
            op_id, verb = result.get("op_id"), result.get("op")
            self._told_sent(target, op_id, verb, result.get("result"), result.get("reason"), route)
        result["route"] = route if link.login.kind not in CARRIERS else result.get("route", "direct")
        result["took_ms"] = round((time.monotonic() - started) * 1000, 2)
        result.setdefault("skew_ms", None)
        return result

    def _told_sent(
        self, target: Member, op_id: Any, op: Any, result: Any, reason: Any, route: str | None
    ) -> None:
        """Tells and records that this node handed an op to its target, answered or not."""
        node = self._node
        about = {"target": target.record.name, "op": op, "result": result, "reason": reason, "route": route}
        event = node.events.emit("control.sent", op_id=op_id, **about)
        body = {**about, "op_id": op_id, "target_id": id_text(target.id), "target_mesh": target.record.mesh}
        node.journal.append("control.sent", body, at_ms=event["at_ms"])

    # --- looking

    async def nodes(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Every row in view, ROWS_A_FRAME at a time."""
        node = self._node
        mesh = params.get("mesh") if isinstance(params, dict) else None
        with node.meshes.following.reading():
            await node.meshes.following.ready()
        known = node.meshes.in_view(mesh)
        found = [row for row in node.pages.rows() if mesh in (None, row["mesh"])]
        for rows in chunked(found, ROWS_A_FRAME):
            yield {"rows": rows, "answered_by": node.name, "meshes": known}

    async def node(self, link: Link, params: Any) -> Any:
        """The page of a node: as it tells of itself where it can be asked (`told_by`), else as this node knows it."""
        node = self._node
        target = await self._target(link, text_of(params, "id"))
        if target is not None and target.state is State.DEAD and target.record.mesh == node.settings.mesh:
            return await node.pages.page_of_dead(target)
        page = node.pages.page(node.pages.member(text_of(params, "id")))
        if target is not None and target.present:
            request = {"id": id_text(target.id)}
            with contextlib.suppress(QuarterdeckError):
                answer, _ = await node.reach.call(target, "node", request, PAGE_TIMEOUT_S)
                told = mapping(answer)
                page = {**told, "node": page["node"], "why": told.get("why") or page["why"]}
                page["told_by"] = target.record.name
                if target.record.mesh == node.settings.mesh:
                    page["answered_by"] = node.name
        return page

    async def last(self, link: Link, params: Any) -> Any:
        """The page of a node that died and whose row is gone: what its replicas tell of it. As `node`."""
        return await self._node.pages.page_of_gone(text_of(params, "name"))

    async def daemon_log(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` lines of a daemon's output, and with `follow` every further one as it comes. Refused
        `unknown` where that node has no such daemon."""
        name, limit = text_of(params, "daemon"), limit_of(params, LOG_LINES)
        follow = params.get("follow") is True
        if (target := await self._asked(link, params)) is not None:
            more = {"daemon": name, "limit": limit, "follow": follow}
            async for item in self._pass_on(target, "daemon_log", more):
                yield item
            return
        node = self._node
        log = node.engine.daemons.log(name)
        if log is None:
            has = [row["name"] for row in node.pages.daemons()]
            if name in has:
                raise Refused(
                    "unknown", f"{name}: no output on {node.name}; it never ran, or runs inside the agent"
                )
            listed = ", ".join(has[:LISTED]) or "none"
            raise Refused("unknown", f"{name[:64]}: no daemon of {node.name}; it has {listed}")
        if not follow:
            for line in log.tail(limit):
                yield {"at_ms": line.at_ms, "line": line.line}
            return
        async for line in log.follow(limit):
            yield {"at_ms": line.at_ms, "line": line.line}

    # --- what the chains say

    async def spec(self, link: Link, params: Any) -> Any:
        """The spec in force in this node's mesh, or in that of the node `target`: `{op_id, by, at_ms, sha256, content,
        withheld, keeps, wall_ms, mesh, name}`, the first five None when none is. A spec may hold secrets: a login of
        another mesh with role observe is not given its content (`withheld`)."""
        node = self._node
        text = mapping(params).get("target")
        target = None if text is None else await self._target(link, text_of(params, "target"))
        if target is not None and target.record.mesh != node.settings.mesh:
            await self._reach(target)
            answer, _ = await node.reach.call(target, "spec", {"target": id_text(target.id)}, PAGE_TIMEOUT_S)
            return answer
        held = node.chains.spec_of
        withheld = link.login.kind == MESH and not suffices(link.login.role, "operate")
        content = None if held is None or withheld else node.chains.admin.content(held)
        return {
            "op_id": held and held.op_id,
            "by": held and held.by,
            "at_ms": held and held.position.wall_ms,
            "sha256": held and held.sha256,
            "content": content,
            "withheld": withheld,
            "nodes": node.chains.reach(),
            "keeps": {id_text(key): sorted(names) for key, names in node.wanted.keeps().items()},
            "wall_ms": wall_ms(),
            "mesh": node.settings.mesh,
            "name": node.name,
        }

    async def holders(self, link: Link, params: Any) -> Any:
        """`{"holders": [{"id", "name"}]}`: who can take a record for a user's chain, this node first, then its leader.
        Refused `not_held` where nobody can."""
        node, chain = self._node, text_of(params, "chain")
        found = node.chains.users.holders(chain)
        if not found:
            raise node.chains.users.not_held(chain)
        return {"holders": [{"id": id_text(n), "name": node.name_of(n)} for n in found]}

    async def tail(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The newest `limit` records of a user's chain, and with `follow` every further one as it comes; asked of a
        holder where this node is none. Refused `not_held` where nobody holds it."""
        node, chain = self._node, text_of(params, "chain")
        limit, follow = limit_of(params, RECORDS_DEFAULT), mapping(params).get("follow") is True
        users = node.chains.users
        if users.holds(chain):
            async for row in users.tail(chain, limit, follow):
                yield row
            return
        why: QuarterdeckError = users.not_held(chain)
        for holder in users.holders(chain) if link.login.kind != MEMBER else ():
            if (member := node.swim.members.get(holder)) is None:
                continue
            begun = False
            try:
                async for row in self._pass_on(
                    member, "tail", {"chain": chain, "limit": limit, "follow": follow}
                ):
                    begun = True
                    yield row
                return
            except QuarterdeckError as failed:
                if begun:
                    raise
                why = failed
        raise why

    async def roster(self, link: Link, params: Any) -> Any:
        """Who may command the mesh, and whose right was taken."""
        return {"operators": self._node.chains.operators()}

    async def meshes(self, link: Link, params: Any) -> Any:
        """A row a mesh, the own one first."""
        meshes = self._node.meshes
        with meshes.following.reading():
            await meshes.following.ready()
        return {"meshes": meshes.rows()}

    async def events(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` events that are kept, EVENTS_A_FRAME at a time; with `node` those that it keeps itself."""
        if (target := await self._asked(link, params)) is not None:
            async for item in self._pass_on(target, "events", {"limit": limit_of(params, LIMIT_MAX)}):
                yield item
            return
        for events in chunked(self._node.events.recent(limit_of(params, LIMIT_MAX)), EVENTS_A_FRAME):
            yield {"events": events}

    async def _asked(self, link: Link, params: Any) -> Member | None:
        """The node whose own word is asked for, when that is another one."""
        text = params.get("node") if isinstance(params, dict) else None
        return None if text is None else await self._target(link, text_of(params, "node"))

    async def _pass_on(self, target: Member, method: str, params: dict[str, Any]) -> AsyncIterator[Any]:
        """A stream of another node, direct or by relay."""
        link, _ = await self._node.reach.link_to(target)
        items: Any = link.stream(method, params)
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    async def resolve(self, link: Link, params: Any) -> Any:
        await self._node.meshes.following.ready()
        return self._node.pages.resolve(text_of(params, "name"))

    async def doctor(self, link: Link, params: Any) -> Any:
        return {"checks": self._node.pages.checks()}

    async def follow(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` events, then every new one as it happens; with `node` what that one tells."""
        if (target := await self._asked(link, params)) is not None:
            async for item in self._pass_on(target, "follow", {"limit": limit_of(params, 0)}):
                yield item
            return
        with self._node.events.subscribe(limit_of(params, 0)) as feed:
            async for event in feed:
                yield event


def _sender(link: Link) -> int:
    if link.login.node is None:
        raise Refused("login", "not a member")
    return link.login.node
