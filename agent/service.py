"""What a node answers over its SSH links: to other members, to the consoles and commands of its home, to operators.

Each method names the logins that may call it. An op is never judged by who carries it here: any login may hand one
over, and its target decides by the op's own signature.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from agent.events import wall_ms
from agent.opmessage import glimpse
from agent.view import Row, stamp
from discovery.errors import Refused, RemoteError, Unreachable
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
OP_TIMEOUT_S = 125.0
"""An update answers within its deadline of 120 s; everything else in milliseconds."""

MEMBER, HOME, OP = "member", "home", "op"
READERS = frozenset({HOME, OP})
ANYBODY = frozenset({MEMBER, HOME, OP})


class Service:
    """The methods of one node. `methods()` is what its listener serves and what its own links answer to."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._watchers: set[asyncio.Event] = set()

    def methods(self) -> dict[str, Handler]:
        return {
            "hello": _for(ANYBODY, self.hello),
            "push_pull": _for({MEMBER}, self.push_pull),
            "gossip": _for({MEMBER}, self.gossip),
            "challenge": _for(ANYBODY, self.challenge),
            "op": _for(ANYBODY, self.op),
            "nodes": _stream_for(READERS, self.nodes),
            "node": _for(READERS, self.node),
            "meshes": _for(READERS, self.meshes),
            "events": _stream_for(READERS, self.events),
            "follow": _stream_for(READERS, self.follow),
            "watch": _stream_for(READERS, self.watch),
            "resolve": _for(READERS, self.resolve),
            "doctor": _for(READERS, self.doctor),
        }

    def changed(self) -> None:
        """Tells every watcher that a row or an event is new."""
        for event in self._watchers:
            event.set()

    # --- between members

    async def push_pull(self, link: Link, params: Any) -> Any:
        node, now = self._node, time.monotonic()
        answer = node.swim.push_pull_answer(_bytes(params, "body"), _sender(link), now)
        node.pool.flush()
        return {"body": answer}

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
        target = node.target(_text(params, "target"))
        me = node.swim.me.record
        if target is None:
            return {**node.control.challenge(link.login), "mesh": me.mesh, "name": me.name, "route": "local"}
        if link.login.kind == MEMBER:
            raise Refused("wrong_target", f"{me.name} is not the target")
        await self._reach(target)
        name, request = target.record.name, {"target": id_text(target.id)}
        try:
            answer = await node.contacts.call(target, "challenge", request, CHALLENGE_TIMEOUT_S)
        except Unreachable as why:
            raise Unreachable(f"{name}: gave no answer; it may be stopped, or cut off") from why
        return {**_dict(answer), "route": "direct"}

    async def _reach(self, target: Member) -> None:
        """Makes sure that there is a link to the target. Refused `in_update` while it replaces its process: it will
        be back, and the caller asks again."""
        try:
            await self._node.contacts.link_to(target)
        except Unreachable as why:
            if target.state is State.UPDATING:
                raise Refused(
                    "in_update", f"{target.record.name} is updating; try again when it is back"
                ) from why
            raise

    async def op(self, link: Link, params: Any) -> Any:
        """Judges an op for this node, or hands the signed bytes on to the member that it is for."""
        node = self._node
        started = time.monotonic()
        message, signature = _bytes(params, "message"), _text(params, "signature")
        target = node.target(_text(params, "target"))
        if target is None:
            result = dict(await node.control.submit(message, signature, link.login, link.addr[0]))
            route = "local"
        else:
            if link.login.kind == MEMBER:
                raise Refused("wrong_target", f"{node.swim.me.record.name} is not the target")
            await self._reach(target)
            request = {"target": id_text(target.id), "message": message, "signature": signature}
            try:
                result = dict(_dict(await node.contacts.call(target, "op", request, OP_TIMEOUT_S)))
            except Unreachable as why:
                op_id, verb = glimpse(message)
                self._told_sent(target, op_id, verb, "unknown", str(why))
                raise Unreachable(str(why), maybe_arrived=True) from why
            route = "direct"
            self._told_sent(target, *(result.get(key) for key in ("op_id", "op", "result", "reason")))
        result["route"] = route if link.login.kind != MEMBER else result.get("route", "direct")
        result["took_ms"] = round((time.monotonic() - started) * 1000, 2)
        result.setdefault("skew_ms", None)
        return result

    def _told_sent(self, target: Member, op_id: Any, op: Any, result: Any, reason: Any) -> None:
        """The event of an op that this node handed to its target, answered or not."""
        name = target.record.name
        self._node.events.emit("control.sent", target=name, op_id=op_id, op=op, result=result, reason=reason)

    # --- looking

    async def nodes(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Every row in view, ROWS_A_FRAME at a time."""
        node = self._node
        mesh = params.get("mesh") if isinstance(params, dict) else None
        known = [node.swim.me.record.mesh]
        if mesh is not None and mesh not in known:
            sees = ", ".join(known)
            raise Refused("unknown_mesh", f"mesh {mesh}: not known to {node.name}; it sees {sees}")
        for rows in _chunks(node.pages.rows(), ROWS_A_FRAME):
            yield {"rows": rows, "answered_by": node.name, "meshes": known}

    async def node(self, link: Link, params: Any) -> Any:
        return self._node.pages.page(_text(params, "id"))

    async def meshes(self, link: Link, params: Any) -> Any:
        return {"meshes": [self._node.pages.mesh_row()]}

    async def events(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` events that are kept, EVENTS_A_FRAME at a time."""
        for events in _chunks(self._node.events.recent(_limit(params, EVENTS_MAX)), EVENTS_A_FRAME):
            yield {"events": events}

    async def resolve(self, link: Link, params: Any) -> Any:
        return self._node.pages.resolve(_text(params, "name"))

    async def doctor(self, link: Link, params: Any) -> Any:
        return {"checks": self._node.pages.checks()}

    async def follow(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """The last `limit` events, then every new one as it happens."""
        with self._node.events.subscribe(_limit(params, 0)) as feed:
            async for event in feed:
                yield event

    async def watch(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """Rows and events as they change: a full frame, then deltas at most 10 times a second, at least once a second."""
        node = self._node
        wake = asyncio.Event()
        self._watchers.add(wake)
        sent: dict[int, object] = {}
        counters: dict[str, int] = {}
        try:
            with node.events.subscribe(_limit(params, EVENTS_DEFAULT, "events")) as feed:
                full = True
                while True:
                    wake.clear()
                    sent_at = time.monotonic()
                    frame = self._frame(sent, counters, feed.take(), full=full)
                    if len(frame["rows"]) >= ROWS_A_FRAME:
                        wake.set()
                    yield frame
                    full = False
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(WATCH_KEEPALIVE_S):
                            await wake.wait()
                    await asyncio.sleep(max(0.0, sent_at + WATCH_MIN_GAP_S - time.monotonic()))
        finally:
            self._watchers.discard(wake)

    def _frame(
        self, sent: dict[int, object], counters: dict[str, int], events: list[Any], *, full: bool
    ) -> dict[str, Any]:
        """One frame of `watch`; brings `sent` (what the watcher has) and `counters` up to date."""
        node = self._node
        now = time.monotonic()
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
        news = {code: n for code, n in node.counters().items() if counters.get(code) != n}
        counters.update(news)
        frame: dict[str, Any] = {
            "full": full,
            "at_ms": wall_ms(),
            "rows": rows + (node.pages.spawned() if full else []),
            "gone": [id_text(g) for g in gone],
            "events": events,
            "counters": news,
        }
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


def _limit(params: Any, default: int, key: str = "limit") -> int:
    value = params.get(key, default) if isinstance(params, dict) else default
    if not isinstance(value, int) or not 0 <= value <= EVENTS_MAX:
        raise RemoteError(f"{key}: a number from 0 to {EVENTS_MAX} expected")
    return value
