"""Artifacts as people ask for them: put one, get one from whoever holds it, and the table of what is held where."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from agent.data.artifacts import Artifacts, entry_of
from agent.data.blobs import Entry
from agent.data.fetching import LinkSource
from agent.data.holdings import Holdings, Key
from agent.data.judging import JudgedPut
from agent.data.placing import Placing
from agent.data.scoring import Candidate, nobody_else
from agent.data.serving import Serving, may_read
from agent.meshos.events import Event, Id, LocalReplicaIntent
from discovery.errors import QuarterdeckError, Refused, RemoteError, Unreachable
from discovery.links import Handler, Link

PUTS_AT_ONCE = 4
PROGRESS_EVERY_S = 0.2
ASK_TIMEOUT_S = 1.0
ASKED_MAX = 64
PUTTERS = frozenset({"home", "op"})
OFFER = "offer"
"""What a client serves while it puts: the file, as a blob is served."""

Judge = Callable[[bytes, str, str | None], JudgedPut]


class Copying(msgspec.Struct, frozen=True):
    """A copy on its way to a node: `done` of `total` bytes or records."""

    kind: str
    name: str
    done: int
    total: int


class Work(msgspec.Struct, frozen=True):
    """What a node tells of its copies: those on their way, and for how many ms changes of others still wait."""

    pulls: tuple[Copying, ...] = ()
    settling: dict[str, int] = msgspec.field(default_factory=dict)


OnPut = Callable[[Entry, JudgedPut], None]


class ArtifactDesk:
    """Serves `artifact`, `artifact_put`, `fetch`, `fetch_list`, `fetch_suspect`, `chains` and `pulls` of one node.

    `judge` decides, and makes the op durable where that is wanted, before a byte is read; `on_put` makes the put that was
    taken in part of the record (the journal, the admin chain).
    `stabilising_ms(name)`: how long admit still holds back changes of it.
    """

    def __init__(
        self,
        *,
        me: int,
        mesh: str,
        artifacts: Artifacts,
        holdings: Holdings,
        placing: Placing,
        serving: Serving,
        judge: Judge,
        members: Callable[[], Mapping[int, Candidate]],
        link_to: Callable[[int], Awaitable[Link]],
        tell: Callable[[Event], None],
        draining: Callable[[], bool],
        on_put: OnPut = lambda entry, judged: None,
        stabilising_ms: Callable[[Id], int] = lambda name: 0,
        reserved: frozenset[str] = frozenset({"admin"}),
    ) -> None:
        self._me = me
        self._mesh = mesh
        self._artifacts = artifacts
        self._holdings = holdings
        self._placing = placing
        self._serving = serving
        self._judge = judge
        self._members = members
        self._link_to = link_to
        self._tell = tell
        self._draining = draining
        self._on_put = on_put
        self._stabilising_ms = stabilising_ms
        self._reserved = reserved
        self._putting = 0
        self.counters: Counter[str] = Counter()
        """`put`, `put_refused`, `passed_on`."""

    def methods(self) -> Mapping[str, Handler]:
        return {
            "artifact": self.artifact,
            "artifact_put": self.artifact_put,
            "fetch": self.fetch,
            "fetch_list": self.fetch_list,
            "fetch_suspect": self.fetch_suspect,
            "chains": self.chains,
            "pulls": self.pulls,
        }

    # --- put

    async def artifact_put(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """`{"message": bytes, "signature": text}` → `{"done", "total"}` in bytes as they arrive, then
        `{"result": "done", "name", "hash", "size", "replicas", "op_id", "node"}`. The file is read from the caller, who
        serves it as `offer` over the same link."""
        if link.login.kind not in PUTTERS:
            raise Refused("login", f"a {link.login.kind} login may not put artifacts")
        message = params.get("message") if isinstance(params, dict) else None
        signature = params.get("signature") if isinstance(params, dict) else None
        if not isinstance(message, bytes) or not isinstance(signature, str):
            raise RemoteError("message: bytes, and signature: text expected")
        try:
            judged = self._judge(message, signature, link.addr[0])
            entry = entry_of(judged.put, judged.fingerprint, message, signature)
            self._admit(entry)
        except Refused:
            self.counters["put_refused"] += 1
            raise
        self._putting += 1
        try:
            async for done in self._taking(entry, link):
                yield {"done": done, "total": entry.size}
        finally:
            self._putting -= 1
        self._on_put(entry, judged)
        self._tell(LocalReplicaIntent(entry.name, "hold"))
        self.counters["put"] += 1
        yield {
            "result": "done",
            "name": entry.name,
            "hash": entry.hash,
            "size": entry.size,
            "replicas": entry.replicas,
            "op_id": entry.op_id,
            "node": self._name(self._me),
        }

    def _admit(self, entry: Entry) -> None:
        key = self._holdings.key_of(entry.name)
        if entry.name in self._reserved or (key is not None and key[0] == "chain"):
            raise Refused("name_taken", f"{entry.name} is a chain; give the artifact another --name")
        if self._draining():
            raise Refused("draining", "this node is to be empty; put it through another with --via")
        if self._putting >= PUTS_AT_ONCE:
            raise Refused("busy", f"{self._putting} artifacts are being put here; try again")
        current = self._holdings.current(("artifact", entry.name))
        if current is not None and (current.at_ms, current.op_id) > entry.stamp:
            raise Refused("older", f"a later {entry.name} was put meanwhile; put it again")
        self._artifacts.store.room_for(0 if self._artifacts.store.has(entry.hash) else entry.size)

    async def _taking(self, entry: Entry, link: Link) -> AsyncIterator[int]:
        """Takes the file in; yields how many bytes are here, now and then."""
        state = {"done": 0}

        async def there() -> Link:
            return link

        source = LinkSource("the file", there, OFFER)
        task = asyncio.get_running_loop().create_task(
            self._artifacts.take_in(entry, [source], lambda done: state.update(done=done))
        )
        try:
            while not task.done():
                yield state["done"]
                await asyncio.wait([task], timeout=PROGRESS_EVERY_S)
            await task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, QuarterdeckError):
                await task

    # --- get

    async def artifact(self, link: Link, params: Any) -> Any:
        """`{"name"}` → `{"name", "hash", "list", "size", "replicas", "put_by", "at_ms", "op_id", "message", "signature",
        "holders": [names], "node"}`. A member is told what is held here; people, what any node holds."""
        if not may_read(link.login):
            raise Refused("login", f"a {link.login.kind} login may not read artifacts")
        name = params.get("name") if isinstance(params, dict) else None
        if not isinstance(name, str):
            raise RemoteError("name: text expected")
        key: Key = ("artifact", name)
        current = self._holdings.current(key)
        entry = self._artifacts.store.entry(name)
        here = entry is not None and self._artifacts.head(name) == entry.hash
        if entry is not None and here and (current is None or current.hash == entry.hash):
            return self._document(entry)
        if link.login.kind != "member":
            for node in self._others(key):
                with contextlib.suppress(QuarterdeckError):
                    there = await self._link_to(node)
                    answer = await there.call("artifact", {"name": name}, ASK_TIMEOUT_S)
                    return self._document(self._artifacts.entry_from(name, answer))
        if current is None and link.login.kind != "member":
            raise Refused("unknown", f"{name}: no such artifact; see `qd chains`")
        if link.login.kind != "member":
            raise Unreachable(f"{name}: none of its holders answers")
        raise Refused("unknown", f"{name}: not held here")

    def _document(self, entry: Entry) -> dict[str, Any]:
        return {
            "name": entry.name,
            "hash": entry.hash,
            "list": entry.list,
            "size": entry.size,
            "replicas": entry.replicas,
            "put_by": entry.put_by,
            "at_ms": entry.at_ms,
            "op_id": entry.op_id,
            "message": entry.message,
            "signature": entry.signature,
            "holders": [self._name(node) for node in self._holdings.live_holders(("artifact", entry.name))],
            "node": self._name(self._me),
        }

    async def fetch_list(self, link: Link, params: Any) -> Any:
        """`blob_list` for people: of this node's copy, else of another holder's."""
        if self._has(params):
            return await self._serving.blob_list(link, params)
        return await self._passed_on(link, params, "blob_list")

    async def fetch_suspect(self, link: Link, params: Any) -> Any:
        """`blob_suspect` for people: every holder looks at its copy, for who sent the chunk is not known."""
        if self._has(params):
            return await self._serving.blob_suspect(link, params)
        return await self._passed_on(link, params, "blob_suspect")

    async def _passed_on(self, link: Link, params: Any, method: str) -> Any:
        last: QuarterdeckError = Refused("unknown", "nobody holds such a blob")
        for node in self._holding(link, params):
            try:
                there = await self._link_to(node)
                return await there.call(method, params, ASK_TIMEOUT_S * 5)
            except QuarterdeckError as why:
                last = why
        raise last

    async def fetch(self, link: Link, params: Any) -> AsyncIterator[Any]:
        """`blob` for people: from this node's copy, else passed on from another holder, at the reader's pace."""
        if self._has(params):
            async for piece in self._serving.blob(link, params):
                yield piece
            return
        last: QuarterdeckError = Refused("unknown", "nobody holds such a blob")
        for node in self._holding(link, params):
            sent = False
            try:
                there = await self._link_to(node)
                items: Any = there.stream("blob", params)
                async with contextlib.aclosing(items):
                    async for piece in items:
                        sent = True
                        yield piece
                self.counters["passed_on"] += 1
                return
            except QuarterdeckError as why:
                if sent:
                    raise
                last = why
        raise last

    def _has(self, params: Any) -> bool:
        hash = params.get("hash") if isinstance(params, dict) else None
        return isinstance(hash, str) and self._artifacts.store.published(hash)

    def _holding(self, link: Link, params: Any) -> list[int]:
        """Live members that hold a blob, by its hash."""
        if link.login.kind == "member" or not may_read(link.login):
            raise Refused("login", f"a {link.login.kind} login may not have blobs passed on")
        hash = params.get("hash") if isinstance(params, dict) else None
        found: list[int] = []
        for key in self._holdings.all_keys():
            item = self._holdings.current(key)
            if key[0] == "artifact" and item is not None and item.hash == hash:
                found += [node for node in self._others(key) if node not in found]
        return found

    def _others(self, key: Key) -> list[int]:
        return [node for node in self._holdings.live_holders(key) if node != self._me]

    # --- the table

    async def chains(self, link: Link, params: Any) -> Any:
        """→ `{"rows": […]}`, as `qd chains` shows them: `holders` that live, `held` of them that count; `pulls` are asked
        of every live member, a second each."""
        if not may_read(link.login):
            raise Refused("login", f"a {link.login.kind} login may not see what is held")
        members = self._members()
        others = [node for node, seen in members.items() if node != self._me and seen.live][:ASKED_MAX]
        work = {self._me: self._work()}
        for node, found in zip(others, await asyncio.gather(*map(self._work_of, others)), strict=True):
            work[node] = found
        return {"rows": [self._row(key, members, work) for key in self._keys()]}

    def _keys(self) -> list[Key]:
        known = set(self._holdings.all_keys())
        known |= {("artifact", entry.name) for entry in self._artifacts.store.entries()}
        return sorted(known, key=lambda key: (key[1], key[0]))

    def _row(self, key: Key, members: Mapping[int, Candidate], work: Mapping[int, Work]) -> dict[str, Any]:
        kind, name = key
        item = self._holdings.current(key)
        entry = self._artifacts.store.entry(name) if kind == "artifact" else None
        holders = self._holdings.live_holders(key)
        counting = [n for n in holders if not ((seen := members.get(n)) and seen.draining)]
        desired = self._holdings.count(key) if item is not None else (entry.replicas if entry else None)
        missing = desired is not None and len(counting) < desired
        leader = self._holdings.leader(key)
        return {
            "name": name,
            "kind": kind,
            "mesh": self._mesh,
            "held": len(counting),
            "desired": desired,
            "leader": None if leader is None else self._name(leader),
            "holders": [self._name(node) for node in holders],
            "size": item.size if item is not None else (entry.size if entry else None),
            "hash": (item.hash or None) if item is not None else (entry.hash if entry else None),
            "held_back": nobody_else(members.values(), holders) if missing else None,
            "stabilising_ms": max(told.settling.get(name, 0) for told in work.values()),
            "pulls": [
                {"node": self._name(node), "done": pull.done, "total": pull.total}
                for node, told in sorted(work.items())
                for pull in told.pulls
                if (pull.kind, pull.name) == key
            ],
        }

    async def pulls(self, link: Link, params: Any) -> Any:
        """→ `{"pulls": [{"kind", "name", "done", "total"}], "settling": {NAME: ms}}`: copies on their way to this node,
        and how long changes of its own still wait."""
        if not may_read(link.login):
            raise Refused("login", f"a {link.login.kind} login may not see what is held")
        return msgspec.to_builtins(self._work())

    def _work(self) -> Work:
        names = [name for _, name in self._keys()]
        return Work(
            tuple(Copying(pull.kind, pull.name, pull.done, pull.total) for pull in self._placing.pulls()),
            {name: left for name in names if (left := self._stabilising_ms(name))},
        )

    async def _work_of(self, node: int) -> Work:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                link = await self._link_to(node)
                return msgspec.convert(await link.call("pulls", {}, ASK_TIMEOUT_S), Work)
        except (QuarterdeckError, TimeoutError, msgspec.ValidationError):
            return Work()

    def _name(self, node: int) -> str:
        seen = self._members().get(node)
        return seen.name if seen is not None and seen.name else f"{node:016x}"
