"""The chains that users made, on one node: which it holds, how it comes to hold one, what is appended and read.

Each holder that commits writes a feed of its own, so a chain that two nodes begin is one chain: feeds merge. A chain of
the spec that no live node holds is begun by the node that comes first for its name among those that may hold things, once
its view has held still; how many hold it from then on is the engine's to see to, as with artifacts. A chain that the spec
no longer names is kept as it was: `drop-replicas` gives it up, nothing else does.

A node that gives a chain up remembers how far its own feed went, and writes no further record until it has those again:
two records of one number would freeze the feed. Only where it begins the chain anew, because nobody who holds it is left,
its feed goes on after a gap: whoever comes back with the earlier records has them still.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from agent.chain import holding
from agent.chain.hlc import Position, Stamp, stamp_of
from agent.chain.record import Record, decode
from agent.chain.replicating import Committed, Replicating
from agent.chain.serving import ADMIN, Peer
from agent.chain.weighing import Link
from agent.data.holdings import Item, Key
from agent.data.room import DataRoom
from agent.data.scoring import Candidate, nobody_else
from agent.opmessage import APPEND_MAX_BYTES, NAMESPACE, Append, Op, decode_op
from discovery import sshsig
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.identity import id_text, node_id

APPEND = "append"
"""Kind of a record of a user's chain."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
BEGIN_AFTER_S = 3.0
"""How long the view has to hold still before a chain that nobody holds is begun."""
LOOK_EVERY_S = 0.5
COMMIT_WAIT_S = 0.5
ROUNDS = 5
"""A source that goes on growing is followed so often before its chain counts as not got."""
KEEP: tuple[int, int | None] = (64 << 20, None)
"""Bytes of a chain of which no spec says how much is kept, and any age."""
SLACK = 10
"""The part of a chain that has grown too large by which it is cut, so that it is not cut at every record."""
AGED_EVERY_S = 60.0
ANY_AGE_MS = 2**53
HELD = "user chains"
"""Where the store keeps which are held."""

Signed = Callable[[Any, Op], str]
"""`(who signed, op)`: that operator's name; Refused unless the key may append, or might when it did."""


class _Kept(msgspec.Struct):
    """What is remembered over a restart: chains held with the count last wanted, and own ends of those given up."""

    held: dict[str, int] = {}
    ends: dict[str, Link] = {}
    keep: dict[str, tuple[int, int | None]] = {}
    """Bytes, and milliseconds or None for any age."""


class _Place(NamedTuple):
    """Where a record stands in the chain's order, and where it is kept."""

    position: Position
    writer: bytes


def is_user_chain(name: str) -> bool:
    """Whether a chain of that name is a user's to make."""
    return name != ADMIN and NAME.fullmatch(name) is not None


class UserChains:
    """Holds users' chains: the `ChainHolder` of their kind. `signed`: who signed a record, as far as is known here.
    `name_of(node)`: its name, for people. `ready()`: whether this node has joined and goes on."""

    def __init__(
        self,
        replicas: Replicating,
        *,
        me: int,
        mesh: str,
        members: Callable[[], Mapping[int, Peer]],
        signed: Signed,
        name_of: Callable[[int], str],
        ready: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """`begun`, `held`, `dropped`, `appended`, and records `cut`."""
        self._replicas = replicas
        self._store = replicas.store
        self._me = me
        self._mesh = mesh
        self._members = members
        self._signed = signed
        self._name_of = name_of
        self._ready = ready
        self._clock = clock
        self._room: DataRoom | None = None
        self._kept = _Kept()
        self._spec: dict[str, int] = {}
        self._keeps: dict[str, tuple[int, int | None]] = {}
        """How much is kept of each chain that a spec named."""
        self._aged_at = clock()
        self._unsaved = False
        self._unheld: dict[str, tuple[frozenset[int], float]] = {}
        """Chains that are this node's to begin: in which view, and since when."""
        self._others: dict[str, frozenset[int]] = {}
        """Who else held what is held here, when that was last looked at."""
        self._appending: Counter[str] = Counter()
        self._news: dict[asyncio.Event, str] = {}
        replicas.holders_of = self.holders

    # --- life

    def begin(self, room: DataRoom) -> None:
        """Takes up what was held when the last process ended, and tells the mesh."""
        self._room = room
        note = self._store.recall(HELD)
        try:
            self._kept = msgspec.msgpack.decode(note or b"", type=_Kept)
        except msgspec.MsgspecError:  # nothing was kept, or it is damaged: what there is, is held
            self._kept = _Kept({name: 0 for name in self._store.chains() if is_user_chain(name)})
        self._keeps = self._kept.keep | self._keeps
        for name in self._kept.held:
            self._replicas.held.add(name)
            room.keep(self._item(name))
        self.spec(self._spec)

    async def run(self) -> None:
        """Begins what nobody holds, and brings what is new to new holders. Never ends."""
        while True:
            with contextlib.suppress(Refused):  # a full disk: tried again
                await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def spec(
        self, counts: Mapping[str, int], keep: Mapping[str, tuple[int, int | None]] | None = None
    ) -> None:
        """Which chains there shall be, how many shall hold each, and how much they keep, by the spec in force."""
        self._spec = {name: count for name, count in counts.items() if is_user_chain(name)}
        self._keeps |= keep or {}
        if self._room is None:
            return
        keeps = {name: self._keeps.get(name, KEEP) for name in self._kept.held}
        self._unsaved |= keeps != self._kept.keep
        self._kept.keep = keeps
        for name in self._kept.held:
            if (count := self._spec.get(name)) is not None and count != self._kept.held[name]:
                self._kept.held[name] = count
                self._room.holds(self._item(name))

    async def look(self) -> None:
        """What falls due now. Refused `journal_full`."""
        room = self._room
        if room is None or not self._ready():
            self._unheld.clear()
            return
        for name in self._kept.held:
            others = frozenset(self.holders(name)) - {self._me}
            if others - self._others.get(name, frozenset()):
                self._replicas.push(name)
            self._others[name] = others
        if self._unsaved:
            await self._save()
        await self._retain()
        able = self._able()
        mine = {
            name
            for name in self._spec
            if name not in self._replicas.held
            and not self.holders(name)
            and holding.holders(name, able, 1) == [self._me]
        }
        now = self._clock()
        self._unheld = {name: since for name, since in self._unheld.items() if name in mine}
        for name in sorted(mine):
            view, since = self._unheld.setdefault(name, (able, now))
            if view != able:
                self._unheld[name] = (able, now)
            elif now - since >= BEGIN_AFTER_S:
                del self._unheld[name]
                self._replicas.held.add(name)
                self.counters["begun"] += 1
                if (end := self._kept.ends.get(name)) is not None:
                    await self._store.resume(name, end)
                await self._keep(name)

    async def _retain(self) -> None:
        """Gives up the oldest records of chains that have grown too large, and once in a while those that are too old."""
        now = self._clock()
        aged = now - self._aged_at >= AGED_EVERY_S
        if aged:
            self._aged_at = now
        for name in list(self._kept.held):
            keep_bytes, keep_ms = self._keeps.get(name, KEEP)
            if self.size(name) > keep_bytes or (aged and keep_ms is not None):
                left = keep_bytes - keep_bytes // SLACK if self.size(name) > keep_bytes else keep_bytes
                age_ms = ANY_AGE_MS if keep_ms is None else keep_ms
                self.counters["cut"] += await self._store.retain(name, keep_bytes=left, keep_ms=age_ms)

    # --- ChainHolder

    def head(self, name: str) -> str | None:
        """The version vector: `NODE:NUMBER:HASH` of each feed's end."""
        if name not in self._kept.held:
            return None
        ends = (
            f"{id_text(node_id(head.writer))}:{head.link.id}:{head.link.hash[:16].hex()}"
            for head in self._store.heads(name).values()
        )
        return ",".join(sorted(ends))

    def covers(self, name: str, head: str) -> bool:
        """Whether every feed is here at least as far as that vector says, without a hole."""
        if name not in self._kept.held or self._store.missing(name):
            return False
        mine = {id_text(node_id(found.writer)): found for found in self._store.heads(name).values()}
        for end in filter(None, head.split(",")):
            match end.split(":"):
                case [node, number, digest] if node in mine and number.isascii() and number.isdigit():
                    found, at = mine[node], int(number[:18])
                    if at > found.link.id:
                        return False
                    base = self._store.standing(name)[found.writer].base
                    if at < base.id:
                        continue  # it was here, and was given up for its age or the chain's size
                    here = [base] if at == base.id else self._store.hashes(name, found.writer, at, at)
                    if not here or here[0].hash[:16].hex() != digest:
                        return False
                case _:
                    return False
        return True

    async def hold(self, name: str, sources: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Gets all that these holders have of it and holds it from then on. Refused `bad_chain`, `journal_full`;
        Unreachable when none of them answers. What was got until then stays for the next try."""
        if not is_user_chain(name):
            raise Refused("bad_chain", "no name of a user's chain")
        self._replicas.held.add(name)
        try:
            await self._fetch(name, sources)
            await self._store.flush()
        except BaseException:
            if name not in self._kept.held:
                self._replicas.held.discard(name)
            raise
        self.counters["held"] += 1
        await self._keep(name)
        progress(size := self.size(name), size)

    async def drop(self, name: str) -> None:
        """Gives it up: it is told as gone before its records go. Refused `busy` while something is appended here."""
        if self._appending[name]:
            raise Refused("busy", f"chain {name}: something is being appended here")
        if self._room is not None:
            self._room.lost("chain", name)
        self._kept.held.pop(name, None)
        self._kept.keep.pop(name, None)
        self._others.pop(name, None)
        self._replicas.held.discard(name)
        end = self._store.end_of(name, self._store.pub)
        if end.id and end.id >= self._own_end(name):
            self._kept.ends[name] = end
        await self._save()
        await self._replicas.forget(name)
        await self._store.drop(name, own=True)
        self.counters["dropped"] += 1

    async def _fetch(self, name: str, sources: Sequence[int]) -> None:
        """Takes from every source that answers: the newest may be with any of them."""
        last: QuarterdeckError = Unreachable(f"chain {name}: nobody who holds it answers")
        got = False
        for node in sources:
            member = self._members().get(node)
            if member is None or not member.present:
                continue
            try:
                await self._follow(member, name)
                got = True
            except QuarterdeckError as why:
                last = why
        if not got:
            raise last

    async def _follow(self, member: Peer, name: str) -> None:
        for _ in range(ROUNDS):
            await self._replicas.sync(member, name)
            if not await self._replicas.behind(member, name):
                return
        raise RemoteError(f"chain {name}: {id_text(member.id)} has records that were not got")

    async def _keep(self, name: str) -> None:
        """Holds it from now on: kept over a restart, then told."""
        self._kept.held[name] = self._spec.get(name, self._kept.held.get(name, 0))
        self._kept.keep[name] = self._keeps.get(name, KEEP)
        await self._save()
        if self._room is not None and name in self._kept.held:
            self._room.keep(self._item(name))

    def _own_end(self, name: str) -> int:
        """Number of this node's newest record of a chain that it gave up."""
        end = self._kept.ends.get(name)
        return 0 if end is None else end.id

    async def _save(self) -> None:
        self._unsaved = False
        await self._store.remember(HELD, msgspec.msgpack.encode(self._kept))

    def _item(self, name: str) -> Item:
        return Item("chain", name, count=self._kept.held[name])

    # --- looking

    def holds(self, name: str) -> bool:
        return name in self._kept.held

    def holders(self, name: str) -> list[int]:
        """Live nodes that hold it, this one first, then its leader; as far as is known here."""
        if self._room is None:
            return []
        key: Key = ("chain", name)
        found = sorted(self._room.holdings.live_holders(key), reverse=True)
        return sorted(found, key=lambda node: node != self._me)

    def size(self, name: str) -> int:
        """Of its records here, in bytes."""
        return sum(feed.bytes for feed in self._store.feeds(name))

    def unheld(self) -> dict[str, tuple[int, str]]:
        """Chains of the spec that no live node holds: how many shall, and what each waits for."""
        if self._room is None:
            return {}
        seen = self._room.candidates()
        able = self._able()
        return {
            name: (count, self._waits_for(name, able, seen))
            for name, count in sorted(self._spec.items())
            if name not in self._kept.held and not self.holders(name)
        }

    def _able(self) -> frozenset[int]:
        """Nodes that may begin a chain."""
        seen = self._room.candidates() if self._room is not None else {}
        return frozenset(n for n, c in seen.items() if c.live and not c.cordoned and not c.draining)

    def _waits_for(self, name: str, able: frozenset[int], seen: Mapping[int, Candidate]) -> str:
        if able:
            first = self._name_of(holding.holders(name, able, 1)[0])
            return f"{first} begins it once its view has held still for {BEGIN_AFTER_S:g} s"
        return nobody_else(seen.values(), ()) or ""

    def not_held(self, name: str) -> Refused:
        """Why this node can't say or do a thing about a chain, and who can."""
        names = ", ".join(self._name_of(node) for node in self.holders(name) if node != self._me)
        if names:
            return Refused(
                "not_held", f"chain {name[:64]}: not held here; {names} hold{'s' * (',' not in names)} it"
            )
        cure = (
            "a node will begin it, try again" if name in self._spec else "name it in a [[chain]] of the spec"
        )
        return Refused("not_held", f"chain {name[:64]}: no live node holds it; {cure}")

    # --- appending

    async def append(
        self, op: Op, message: bytes, signature: str, by: str, content: bytes | None
    ) -> Committed:
        """Puts a judged op's content on its chain, with what was signed. Refused `not_held`, `malformed`, `too_large`,
        `unsettled`, `journal_full`; then nothing was written."""
        args = op.args
        if not isinstance(args, Append) or content is None:
            raise Refused("malformed", "append: the record did not come with it")
        if len(content) > APPEND_MAX_BYTES:
            raise Refused(
                "too_large", f"a record of {len(content)} bytes; at most {APPEND_MAX_BYTES} are taken"
            )
        if hashlib.sha256(content).hexdigest() != args.sha256:
            raise Refused("malformed", "append: the record is not the one that was signed")
        name = args.chain
        if name not in self._kept.held:
            raise self.not_held(name)
        if self._store.end_of(name, self._store.pub).id < self._own_end(name):
            raise Refused(
                "unsettled", f"chain {name}: this node's own earlier records are not all here again"
            )
        body = {"op_id": op.op_id, "by": by, "message": message, "signature": signature, "content": content}
        self._appending[name] += 1
        try:
            committed = await self._replicas.commit(name, APPEND, body, timeout_s=COMMIT_WAIT_S)
        finally:
            self._appending[name] -= 1
        self.counters["appended"] += 1
        return committed

    # --- reading

    def changed(self, chain: str) -> None:
        """There are new records of a chain."""
        for event, name in self._news.items():
            if name == chain:
                event.set()

    async def tail(self, name: str, limit: int, follow: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The newest `limit` records in the chain's order, oldest first: `{at_ms, node, op_id, by, text | base64,
        verified}`; the first has `gone` where it is the oldest that is kept and older ones were given up. With `follow`
        each further one as it comes here; it ends with Refused `not_held` when this node holds the chain no longer.
        `verified`: its signature holds, for this chain and these bytes, by a key that may."""
        news = asyncio.Event()
        self._news[news] = name
        try:
            seen: dict[bytes, int] = {}
            places = await self._places(name, seen, limit)
            gone = {"gone": True} if len(places) <= limit and self._ends_at_cut(name, limit) else {}
            for place in places[len(places) - min(limit, len(places)) :]:
                if (row := self._row(name, place)) is not None:
                    yield {**row, **gone}
                    gone = {}
            while follow:
                if name not in self._kept.held:
                    raise self.not_held(name)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await news.wait()
                news.clear()
                for place in await self._places(name, seen):
                    if (row := self._row(name, place)) is not None:
                        yield row
        finally:
            del self._news[news]

    def _ends_at_cut(self, name: str, limit: int) -> bool:
        """Whether the newest `limit` of each feed are all that is kept, and older ones of any were given up."""
        feeds = self._store.feeds(name)
        return any(feed.base.id for feed in feeds) and all(feed.records <= limit for feed in feeds)

    async def _places(self, name: str, seen: dict[bytes, int], limit: int | None = None) -> list[_Place]:
        """Where the records after those `seen` stand, in order, and of each feed at most the newest `limit`."""
        found: list[_Place] = []
        for feed in self._store.feeds(name):
            after = seen.get(feed.writer, 0 if limit is None else max(0, feed.head.id - limit))
            for stored in self._store.records(name, feed.writer, after) if after < feed.head.id else ():
                found.append(_Place(_position(stored.record, feed.writer), feed.writer))
            seen[feed.writer] = feed.head.id
            await asyncio.sleep(0)
        return sorted(found)

    def _row(self, name: str, place: _Place) -> dict[str, Any] | None:
        number = place.position.number
        parcels = self._store.between(name, place.writer, [(number, number)], 1)
        if not parcels:
            return None
        body = decode(parcels[0].rows[0][0]).body or {}
        content = body.get("content")
        content = content if isinstance(content, bytes) else b""
        by = self._verified(name, place.position.node, body, content)
        told = body.get("by")
        row = {
            "at_ms": place.position.wall_ms,
            "node": self._name_of(place.position.node),
            "op_id": body.get("op_id") if isinstance(body.get("op_id"), str) else None,
            "by": by if by is not None else told[:128] if isinstance(told, str) else None,
        }
        try:
            row["text"] = content.decode()
        except UnicodeDecodeError:
            row["base64"] = base64.b64encode(content).decode()
        return {**row, "verified": by is not None}

    def _verified(self, name: str, node: int, body: Mapping[str, Any], content: bytes) -> str | None:
        """Who signed for this very record; None where that can't be shown."""
        message, signature = body.get("message"), body.get("signature")
        if not isinstance(message, bytes) or not isinstance(signature, str):
            return None
        try:
            signer = sshsig.verify(message, signature, NAMESPACE)
            op = decode_op(message)
            about = (op.message.mesh, op.message.target, op.op_id)
            if not isinstance(op.args, Append) or about != (self._mesh, id_text(node), body.get("op_id")):
                return None
            if (op.args.chain, op.args.sha256) != (name, hashlib.sha256(content).hexdigest()):
                return None
            return self._signed(signer, op)
        except QuarterdeckError:
            return None


def _position(record: Record, writer: bytes) -> Position:
    """By its stamp; one without a stamp by its own time."""
    try:
        stamp = stamp_of((record.body or {}).get("hlc"))
    except RemoteError:
        stamp = Stamp(record.emitted_at_ms, 0)
    return Position(stamp.wall_ms, stamp.counter, node_id(writer), record.id)


__all__ = ["UserChains", "is_user_chain"]
