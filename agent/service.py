"""What a node answers over its SSH links: to other members, to the consoles and commands of its home, to operators.

Each method names the logins that may call it. An op is never judged by who carries it here: any login may hand one
over, and its target decides by the op's own signature.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from agent.chain.audit import page
from agent.events import wall_ms
from agent.opmessage import glimpse, suffices
from agent.view import Row, stamp
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.identity import id_text
from discovery.lifecycle import State
from discovery.links import Handler, Link
from discovery.member import Member

if TYPE_CHECKING:
    from agent.node import Node

WATCH_MIN_GAP_S = 0.1
WATCH_KEEPALIVE_S = 1.0
EVENTS_DEFAULT = 200
EVENTS_MAX = 10_000
ROWS_A_FRAME = 400
EVENTS_A_FRAME = 1_000
"""What goes into one frame of a link, which may not exceed 1 MiB."""
CHALLENGE_TIMEOUT_S = 5.0
PAGE_TIMEOUT_S = 2.0
ASK_EACH_S = 1.0
ASKED_AT_ONCE = 64
ROWS_A_NODE = 2000
FAILURE_KEY = ("node_id", "at_ms", "source", "action", "target", "reason")
"""What makes two tellings of a failure the same one."""
LOG_LINES = 2048
RECORDS_DEFAULT = 2048
AUDIT_MAX = 10_000_000
REFUSALS_TOLD = 2000
LISTED = 8
OP_TIMEOUT_S = 125.0
"""An update answers within its deadline of 120 s; everything else in milliseconds."""

MEMBER, HOME, OP, JOIN, MESH = "member", "home", "op", "join", "mesh"
READERS = frozenset({HOME, OP})
ANYBODY = frozenset({MEMBER, HOME, OP, MESH})
CARRIERS = frozenset({MEMBER, MESH})
"""Nodes that hand over an op of somebody else: for this node, or not at all."""


class Service:
    """The methods of one node. `methods()` is what its listener serves and what its own links answer to."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._watchers: set[_Watcher] = set()
        self._audits: dict[Link, list[Row]] = {}
        """Audits that are being read page by page."""

    def methods(self) -> dict[str, Handler]:
        node = self._node
        return {
            "hello": _for(ANYBODY, self.hello),
            "push_pull": _for({MEMBER}, self.push_pull),
            "gossip": _for({MEMBER}, self.gossip),
            "challenge": _for(ANYBODY, self.challenge),
            "op": _for(ANYBODY, self.op),
            "nodes": _stream_for(READERS, self.nodes),
            "node": _for({*READERS, MEMBER, MESH}, self.node),
            "directory": _stream_for({MEMBER, MESH}, node.meshes.telling.directory),
            "by_relay": _for({MEMBER}, self.by_relay),
            "backbone_push_pull": _for({"backbone"}, self.backbone_push_pull),
            "meshes": _for(READERS, self.meshes),
            "events": _stream_for({*READERS, MEMBER, MESH}, self.events),
            "follow": _stream_for({*READERS, MEMBER, MESH}, self.follow),
            "watch": _stream_for(READERS, self.watch),
            **node.relay.methods(),
            "daemons": _stream_for(READERS, self.daemons),
            "failures": _stream_for(READERS, self.failures),
            "own_daemons": _for(CARRIERS, self.own_daemons),
            "own_failures": _for(CARRIERS, self.own_failures),
            "dead_failures": _for(CARRIERS, self.dead_failures),
            "daemon_log": _stream_for({*READERS, MEMBER, MESH}, self.daemon_log),
            "spec": _for(ANYBODY, self.spec),
            "audit": _for(READERS, self.audit),
            "operators": _for(READERS, self.roster),
            "own_refusals": _for({MEMBER}, self.own_refusals),
            **node.chains.replicas.methods(),
            "resolve": _for(READERS, self.resolve),
            "doctor": _for(READERS, self.doctor),
            "keyring": _for({MEMBER}, self._node.keys.serve),
            "keys": _for(READERS, self._node.keys.serve_status),
            "invite": _for({HOME, OP}, self._node.admission.serve_invite),
            "admission": _for({JOIN}, self._node.admission.serve_glance),
            "join": _for({JOIN}, self._node.admission.serve_join),
            **node.data.methods(),
            "chains": _for(READERS, self.chains),
            "own_chains": _for({MEMBER}, self.own_chains),
            "holders": _for(READERS, self.holders),
            "tail": _stream_for({*READERS, MEMBER}, self.tail),
        }

    def changed(self, remotes: Iterable[int] = ()) -> None:
        """Tells every watcher that a row or an event is new; `remotes`: which rows of other meshes."""
        for watcher in self._watchers:
            watcher.remotes.update(remotes)
            watcher.wake.set()

    # --- between members

    async def push_pull(self, link: Link, params: Any) -> Any:
        node, now = self._node, time.monotonic()
        answer = node.swim.push_pull_answer(_bytes(params, "body"), _sender(link), now)
        node.pool.flush()
        node.meshes.synced()
        told = _dict(params)
        for name, notes in node.contacts.notes.items():
            notes.heard(_sender(link), told.get(name))
        return {"body": answer, **{name: notes.note() for name, notes in node.contacts.notes.items()}}

    async def by_relay(self, link: Link, params: Any) -> Any:
        """A member says that the link it has opened goes through a relay."""
        self._node.reach.came_by_relay(link)
        return {}

    async def backbone_push_pull(self, link: Link, params: Any) -> Any:
        """What the backbone's members compare over a link."""
        return {"body": self._node.meshes.backbone.answer(link, _bytes(params, "body"))}

    async def gossip(self, link: Link, params: Any) -> Any:
        """A datagram's body over a link: for what must not be lost, such as a goodbye."""
        node = self._node
        node.swim.receive(_bytes(params, "body"), _sender(link), link.addr, time.monotonic())
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
        target = await self._target(link, _text(params, "target"))
        me = node.swim.me.record
        if target is None:
            return {**node.control.challenge(link.login), "mesh": me.mesh, "name": me.name, "route": "local"}
        name, request = target.record.name, {"target": id_text(target.id)}
        await self._reach(target)
        try:
            answer, route = await node.reach.call(target, "challenge", request, CHALLENGE_TIMEOUT_S)
        except Unreachable as why:
            raise Unreachable(f"{name}: gave no answer; it may be stopped, or cut off") from why
        return {**_dict(answer), "route": route}

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
        message, signature = _bytes(params, "message"), _text(params, "signature")
        content = _bytes(params, "content") if _dict(params).get("content") is not None else None
        target = await self._target(link, _text(params, "target"))
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
                result = dict(_dict(answer))
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
        known = node.meshes.known()
        if mesh is not None and mesh not in known:
            sees = ", ".join(known)
            raise Refused("unknown_mesh", f"mesh {mesh}: not known to {node.name}; it sees {sees}")
        found = [row for row in node.pages.rows() if mesh in (None, row["mesh"])]
        for rows in _chunks(found, ROWS_A_FRAME):
            yield {"rows": rows, "answered_by": node.name, "meshes": known}

    async def node(self, link: Link, params: Any) -> Any:
        """The page of a node: as it tells of itself where it can be asked (`told_by`), else as this node knows it."""
        node = self._node
        target = await self._target(link, _text(params, "id"))
        if target is not None and target.state is State.DEAD and target.record.mesh == node.settings.mesh:
            return await node.pages.page_of_dead(id_text(target.id))
        page = node.pages.page(_text(params, "id"))
        if target is not None and target.present:
            request = {"id": id_text(target.id)}
            with contextlib.suppress(QuarterdeckError):
                answer, _ = await node.reach.call(target, "node", request, PAGE_TIMEOUT_S)
                told = _dict(answer)
                page = {**told, "node": page["node"], "why": told.get("why") or page["why"]}
                page["told_by"] = target.record.name
                if target.record.mesh == node.settings.mesh:
                    page["answered_by"] = node.name
        return page

    async def own_daemons(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.pages.daemons()}

    async def own_failures(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.pages.failures()}

    async def dead_failures(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.chains.failures_of_dead()[-ROWS_A_NODE:]}

    async def daemons(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Every live node's daemons, each as that node tells of them."""
        async for part in self._of_all(params, "own_daemons", self._node.pages.daemons):
            yield part

    async def failures(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Every live node's ring of failures, each as that node keeps it."""
        async for part in self._of_all(params, "own_failures", self._node.pages.failures):
            yield part
        rows: dict[tuple[Any, ...], Row] = {}
        async for part in self._of_all(
            params, "dead_failures", self._node.chains.failures_of_dead, keep_names=True
        ):
            for row in part["rows"]:
                rows.setdefault(tuple(row.get(key) for key in FAILURE_KEY), row)
        for some in _chunks(list(rows.values()), ROWS_A_FRAME):
            yield {"rows": some, "silent": [], "answered_by": self._node.name}

    async def _of_all(
        self, params: Any, method: str, own: Callable[[], list[dict[str, Any]]], *, keep_names: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """Rows of this node and of every live node in its view (with `mesh`, of that mesh), asked side by side, each for
        at most ASK_EACH_S; ROWS_A_FRAME at a time. `silent` names those that gave no answer."""
        node = self._node
        mesh = params.get("mesh") if isinstance(params, dict) else None
        with node.meshes.following.reading():
            await node.meshes.following.ready()
        if mesh is not None and mesh not in node.meshes.known():
            sees = ", ".join(node.meshes.known())
            raise Refused("unknown_mesh", f"mesh {mesh}: not known to {node.name}; it sees {sees}")
        rows = own() if mesh in (None, node.settings.mesh) else []
        everybody: list[Member] = [m for m in node.swim.members.values() if m.present]
        everybody += [m for listing, m in node.meshes.remotes() if m.present and not listing.expired]
        asked = [m for m in everybody if mesh in (None, m.record.mesh)]
        slots = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(member: Member) -> list[dict[str, Any]] | None:
            async with slots:
                try:
                    async with asyncio.timeout(ASK_EACH_S):
                        answer, _ = await node.reach.call(member, method, {}, ASK_EACH_S)
                    told = _dict(answer).get("rows")
                except (QuarterdeckError, TimeoutError):
                    return None
            if not isinstance(told, list):
                return None
            name = {"node": member.record.name, "node_id": id_text(member.id), "mesh": member.record.mesh}
            if keep_names:
                name = {"mesh": member.record.mesh, "from_replica": member.record.name}
            return [{**row, **name} for row in told[:ROWS_A_NODE] if isinstance(row, dict)]

        answers = await asyncio.gather(*(ask(m) for m in asked))
        for answer in answers:
            rows += answer or []
        silent = sorted(m.record.name for m, a in zip(asked, answers, strict=True) if a is None)
        for part in _chunks(rows, ROWS_A_FRAME):
            yield {"rows": part, "silent": silent, "answered_by": node.name}

    async def daemon_log(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` lines of a daemon's output, and with `follow` every further one as it comes. Refused
        `unknown` where that node has no such daemon."""
        name, limit = _text(params, "daemon"), _limit(params, LOG_LINES)
        follow = params.get("follow") is True
        if (target := await self._asked(link, params)) is not None:
            more = {"daemon": name, "limit": limit, "follow": follow}
            async for item in self._pass_on(target, "daemon_log", more):
                yield item
            return
        node = self._node
        log = node.engine.daemons.log(name)
        if log is None:
            has = ", ".join(row["name"] for row in node.pages.daemons()[:LISTED]) or "none"
            raise Refused("unknown", f"{name[:64]}: no daemon of {node.name}; it has {has}")
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
        text = _dict(params).get("target")
        target = None if text is None else await self._target(link, _text(params, "target"))
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

    async def audit(self, link: Link, params: Any) -> Any:
        """Rows of the audit from `offset` on, `{rows, next}`; with `bytes` what was signed, too."""
        offset = _limit(params, 0, "offset", AUDIT_MAX)
        kept = self._audits.get(link)
        if offset == 0 or kept is None:
            with_bytes = _dict(params).get("bytes") is True
            rows = self._node.chains.audit(with_bytes=with_bytes)
            rows += await self._refusals_elsewhere(rows, with_bytes)
            rows.sort(key=lambda row: (row["at_ms"], row["op_id"] or ""))
            kept = self._audits[link] = rows
            link.on_close(lambda: _forget(self._audits, link))
        answer = page(kept, offset)
        if answer["next"] is None:
            self._audits.pop(link, None)
        return answer

    async def _refusals_elsewhere(self, known: list[Row], with_bytes: bool) -> list[Row]:
        """What other live nodes of the mesh took or refused, and this one holds no copy of."""
        node = self._node
        held = {(row["node"], row["at_ms"], row["op_id"]) for row in known}
        slots = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(member: Member) -> list[Row]:
            async with slots:
                try:
                    async with asyncio.timeout(ASK_EACH_S):
                        answer, _ = await node.reach.call(
                            member, "own_refusals", {"bytes": with_bytes}, ASK_EACH_S
                        )
                    told = _dict(answer).get("rows")
                except (QuarterdeckError, TimeoutError):
                    return []
            rows = told if isinstance(told, list) else []
            return [{**row, "node": member.record.name} for row in rows if _audit_row(row)]

        members = [m for m in node.swim.members.values() if m.present]
        found = await asyncio.gather(*(ask(m) for m in members))
        return [
            row for rows in found for row in rows if (row["node"], row["at_ms"], row["op_id"]) not in held
        ]

    async def chains(self, link: Link, params: Any) -> Any:
        """Every artifact and chain of this mesh, and who holds it; each live node tells what it has."""
        node = self._node
        members = [m for m in node.swim.members.values() if m.present]
        answers = await asyncio.gather(*(self._told(m, "own_chains") for m in members))
        told = {node.identity.id: node.chains.own_rows()}
        told |= {m.id: rows for m, rows in zip(members, answers, strict=True) if rows is not None}
        artifacts = _dict(await node.data.desk.chains(link, params))["rows"]
        silent = sorted(m.record.name for m, rows in zip(members, answers, strict=True) if rows is None)
        held = [node.chains.sized(row, told) for row in artifacts]
        return {"rows": [*held, *node.chains.rows(told)], "silent": silent, "answered_by": node.name}

    async def own_chains(self, link: Link, params: Any) -> Any:
        return {"rows": self._node.chains.own_rows()}

    async def holders(self, link: Link, params: Any) -> Any:
        """`{"holders": [{"id", "name"}]}`: who can take a record for a user's chain, this node first, then its leader.
        Refused `not_held` where nobody can."""
        node, chain = self._node, _text(params, "chain")
        found = node.chains.users.holders(chain)
        if not found:
            raise node.chains.users.not_held(chain)
        return {"holders": [{"id": id_text(n), "name": node.name_of(n)} for n in found]}

    async def tail(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The newest `limit` records of a user's chain, and with `follow` every further one as it comes; asked of a
        holder where this node is none. Refused `not_held` where nobody holds it."""
        node, chain = self._node, _text(params, "chain")
        limit, follow = _limit(params, RECORDS_DEFAULT), _dict(params).get("follow") is True
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

    async def _told(self, member: Member, method: str) -> list[Any] | None:
        """Rows that a member gives, each a list with a name first; None when it gives none that make sense in time."""
        try:
            async with asyncio.timeout(ASK_EACH_S):
                answer, _ = await self._node.reach.call(member, method, {}, ASK_EACH_S)
            return msgspec.convert(_dict(answer).get("rows"), list[tuple[str, int | None, int, int]])
        except (QuarterdeckError, TimeoutError, msgspec.ValidationError):
            return None

    async def own_refusals(self, link: Link, params: Any) -> Any:
        """The newest refusals of this node, as many as go into a frame."""
        rows = self._node.chains.own_refusals(with_bytes=_dict(params).get("bytes") is True)
        return {"rows": page(rows[-REFUSALS_TOLD:], 0)["rows"]}

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
            async for item in self._pass_on(target, "events", {"limit": _limit(params, EVENTS_MAX)}):
                yield item
            return
        for events in _chunks(self._node.events.recent(_limit(params, EVENTS_MAX)), EVENTS_A_FRAME):
            yield {"events": events}

    async def _asked(self, link: Link, params: Any) -> Member | None:
        """The node whose own word is asked for, when that is another one."""
        text = params.get("node") if isinstance(params, dict) else None
        return None if text is None else await self._target(link, _text(params, "node"))

    async def _pass_on(self, target: Member, method: str, params: dict[str, Any]) -> AsyncIterator[Any]:
        """A stream of another node, direct or by relay."""
        link, _ = await self._node.reach.link_to(target)
        items: Any = link.stream(method, params)
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    async def resolve(self, link: Link, params: Any) -> Any:
        await self._node.meshes.following.ready()
        return self._node.pages.resolve(_text(params, "name"))

    async def doctor(self, link: Link, params: Any) -> Any:
        return {"checks": self._node.pages.checks()}

    async def follow(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` events, then every new one as it happens; with `node` what that one tells."""
        if (target := await self._asked(link, params)) is not None:
            async for item in self._pass_on(target, "follow", {"limit": _limit(params, 0)}):
                yield item
            return
        with self._node.events.subscribe(_limit(params, 0)) as feed:
            async for event in feed:
                yield event

    async def watch(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Rows and events as they change: a full frame, then deltas at most 10 times a second, at least once a second."""
        node = self._node
        watcher = _Watcher()
        try:
            with (
                node.meshes.following.reading(),
                node.events.subscribe(_limit(params, EVENTS_DEFAULT, "events")) as feed,
            ):
                await node.meshes.following.ready()
                self._watchers.add(watcher)
                watcher.remotes.update(member.id for _, member in node.meshes.remotes())
                full = True
                while True:
                    watcher.wake.clear()
                    sent_at = time.monotonic()
                    frame = self._frame(watcher, feed.take(), full=full)
                    if len(frame["rows"]) >= ROWS_A_FRAME:
                        watcher.wake.set()
                    yield frame
                    full = False
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(WATCH_KEEPALIVE_S):
                            await watcher.wake.wait()
                    await asyncio.sleep(max(0.0, sent_at + WATCH_MIN_GAP_S - time.monotonic()))
        finally:
            self._watchers.discard(watcher)

    def _frame(self, watcher: _Watcher, events: list[Any], *, full: bool) -> dict[str, Any]:
        """One frame of `watch`; brings what the watcher has up to date."""
        node = self._node
        now = time.monotonic()
        sent = watcher.sent
        everybody: list[Member] = [node.swim.me, *node.swim.members.values()]
        build = node.pages.disk_build
        others = sum(m.present for m in everybody) - 1
        rows: list[Row] = []
        for member in everybody:
            mark = (stamp(member), build)
            if sent.get(member.id) != mark and len(rows) < ROWS_A_FRAME:
                rows.append(node.pages.row(member, now, others=others, history=member.id not in sent))
                sent[member.id] = mark
        gone = sent.keys() - {m.id for m in everybody}
        for member_id in gone:
            del sent[member_id]
        away = self._remote_rows(watcher, rows, now)
        news = {code: n for code, n in node.counters().items() if watcher.counters.get(code) != n}
        watcher.counters.update(news)
        frame: dict[str, Any] = {
            "full": full,
            "at_ms": wall_ms(),
            "rows": rows + (node.pages.spawned() if full else []),
            "gone": [id_text(g) for g in gone | away],
            "events": events,
            "counters": news,
        }
        if (
            full
            or away
            or now - watcher.meshes_at >= WATCH_KEEPALIVE_S
            or node.meshes.version != watcher.meshes
        ):
            watcher.meshes, watcher.meshes_at = node.meshes.version, now
            frame["meshes"] = node.meshes.rows()
        if full:
            record = node.swim.me.record
            frame["me"] = {
                "id": id_text(record.id),
                "name": record.name,
                "mesh": record.mesh,
                "kind": record.kind,
                "build": record.build,
                "wire": record.wire,
            }
        return frame

    def _remote_rows(self, watcher: _Watcher, rows: list[Row], now: float) -> set[int]:
        """Adds the changed rows of other meshes, as far as there is room; returns the ids of those that are gone."""
        away: set[int] = set()
        for member_id in list(watcher.remotes):
            if len(rows) >= ROWS_A_FRAME:
                break
            watcher.remotes.discard(member_id)
            row = self._node.pages.remote_row(member_id, now)
            if row is not None:
                rows.append(row)
                watcher.told_remotes.add(member_id)
            elif member_id in watcher.told_remotes:
                watcher.told_remotes.discard(member_id)
                away.add(member_id)
        return away


@dataclass(eq=False)
class _Watcher:
    """What one `watch` stream has been told."""

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sent: dict[int, object] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    remotes: set[int] = field(default_factory=set)
    """Rows of other meshes that have changed since."""
    told_remotes: set[int] = field(default_factory=set)
    meshes: int = -1
    meshes_at: float = 0.0


def _for(kinds: frozenset[str] | set[str], method: Callable[[Link, Any], Any]) -> Handler:
    async def guarded(link: Link, params: Any) -> Any:
        _permit(kinds, link)
        return await method(link, params)

    return guarded


def _stream_for(
    kinds: frozenset[str] | set[str], method: Callable[[Link, Any], AsyncIterator[Any]]
) -> Handler:
    async def guarded(link: Link, params: Any) -> AsyncIterator[Any]:
        _permit(kinds, link)
        async for item in method(link, params):
            yield item

    return guarded


def _permit(kinds: frozenset[str] | set[str], link: Link) -> None:
    if link.login.kind not in kinds:
        raise Refused("login", f"a {link.login.kind} login may not call this")


def _sender(link: Link) -> int:
    if link.login.node is None:
        raise Refused("login", "not a member")
    return link.login.node


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RemoteError("answer is not a map")
    return value


def _bytes(params: Any, key: str) -> bytes:
    value = _dict(params).get(key)
    if not isinstance(value, bytes):
        raise RemoteError(f"{key}: bytes expected")
    return value


def _text(params: Any, key: str) -> str:
    value = _dict(params).get(key)
    if not isinstance(value, str):
        raise RemoteError(f"{key}: text expected")
    return value


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The items in lists of at most `size`; one empty list when there are none."""
    for start in range(0, max(1, len(items)), size):
        yield items[start : start + size]


def _forget(kept: dict[Link, list[Row]], link: Link) -> None:
    kept.pop(link, None)


def _audit_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("at_ms"), int)
        and {"op_id", "op", "target"} <= row.keys()
    )


def _limit(params: Any, default: int, key: str = "limit", most: int = EVENTS_MAX) -> int:
    value = params.get(key, default) if isinstance(params, dict) else default
    if not isinstance(value, int) or not 0 <= value <= most:
        raise RemoteError(f"{key}: a number from 0 to {most} expected")
    return value
