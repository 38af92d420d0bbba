"""The admin chain of a mesh on one node: what was committed here and elsewhere, folded; and what is committed here.

Commits are judged by the fold before they are written, so what would be void is refused with that reason. Records
that come later than their place (or after damage) are read when they come and folded in their place.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from agent.chain import adminop
from agent.chain.adminfold import AdminFold
from agent.chain.adminop import ADMIN, OP, OWN, RESULT, AdminEvent
from agent.chain.adminstate import AdminState, Command, Spec
from agent.chain.feedreading import Stored
from agent.chain.feeds import FeedStore
from agent.chain.hlc import Clock, Position, following
from agent.chain.record import DISPATCHED, Record, hash_of
from discovery.errors import Refused
from discovery.identity import Identity

STEP = 20
CHECKED = "admin checked"


class Commits(Protocol):
    """`Replicating`, as far as this goes."""

    clock: Clock

    async def commit(
        self, chain: str, kind: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 2.0
    ) -> Any: ...


class AdminChain:
    """`genesis`: the mesh's first roster, lines of `authorized_keys`."""

    def __init__(
        self,
        store: FeedStore,
        commits: Commits,
        identity: Identity,
        mesh: str,
        genesis: str | list[str],
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.fold = AdminFold(genesis)
        self._store = store
        self._commits = commits
        self._pub = identity.pub
        self._mesh = mesh
        self._now_ms = now_ms
        self._read: dict[bytes, int] = {}
        """Number up to which each feed was read."""
        self._checked: dict[bytes, int] = {}
        self._kept: dict[bytes, int] = {}
        """Up to which number the signatures of each feed were checked in an earlier life."""
        self._catching_up = asyncio.Lock()
        self._filled = 0
        """Records that had been filled in behind the ends of their feeds by then."""

    async def load(self) -> AdminState:
        """What `catch_up` does, when a process starts: what this node checked in an earlier life is not checked again."""
        self._checked = self._kept = _numbers(self._store.recall(CHECKED))
        state = await self.catch_up()
        await self.save()
        return state

    async def catch_up(self) -> AdminState:
        """Reads and folds what is new in short steps, so that the loop is not held up however much it is."""
        async with self._catching_up:
            events: list[AdminEvent] = []
            ends: dict[bytes, int] = {}
            for writer, after, head in self._unread():
                ends[writer] = head
                for count, stored in enumerate(self._store.records(ADMIN, writer, after)):
                    event = self._event(stored)
                    if event is not None:
                        events.append(event)
                    if count % STEP == STEP - 1:
                        await asyncio.sleep(0)
            events.sort(key=lambda event: event.position)
            for first in range(0, len(events), STEP):
                self.fold.add(events[first : first + STEP])
                self.fold.advance(self._now_ms())
                await asyncio.sleep(0)
            self._read |= {writer: max(head, self._read.get(writer, 0)) for writer, head in ends.items()}
        return self.state()

    async def save(self) -> None:
        """Keeps how far the signatures of each feed were checked; call it once in a while, and at the end."""
        missing = {gap.writer: gap.spans[0][0] - 1 for gap in self._store.missing(ADMIN)}
        checked = {w: min(n, missing.get(w, n)) for w, n in self._read.items()}
        if checked != self._kept:
            with contextlib.suppress(Refused):
                await self._store.remember(CHECKED, msgspec.msgpack.encode(list(checked.items())))
                self._kept = checked

    def state(self) -> AdminState:
        """The state as of now: reads what is new, at once (0.3 ms a record), and folds it."""
        for writer, after, head in self._unread():
            events = [self._event(stored) for stored in self._store.records(ADMIN, writer, after)]
            self.fold.add(event for event in events if event is not None)
            self._read[writer] = head
        return self.fold.advance(self._now_ms())

    def take_commands(self) -> list[Command]:
        """Commands that came to count since the last call, of any target; none twice in the life of this process.
        Who carries one out still has to see to its op id and its expiry."""
        self.state()
        return self.fold.take_commands()

    def content(self, spec: Spec) -> bytes | None:
        """The bytes of a spec, from its record; None while that is missing here."""
        for feed in self._store.feeds(ADMIN):
            if feed.node != spec.position.node:
                continue
            for stored in self._store.records(ADMIN, feed.writer, spec.position.number - 1):
                found = (stored.record.body or {}).get("content")
                whole = isinstance(found, bytes) and hashlib.sha256(found).hexdigest() == spec.sha256
                return found if whole and stored.record.id == spec.position.number else None
        return None

    def judged(self) -> list[tuple[AdminEvent, str | None]]:
        """Every record in order, with why it is void; None where it counts."""
        self.state()
        return self.fold.judged()

    def last_of(self, fingerprint: str) -> Position | None:
        """Position of the newest record of a key that counts: what a revocation now should name."""
        self.state()
        return self.fold.last_of(fingerprint)

    async def commit_op(
        self, message: bytes, signature: str, by: str, content: bytes | None = None, *, timeout_s: float = 2.0
    ) -> Any:
        """Commits an operator's op, whose signature this node has judged; `by` is whom it found the signer to be.

        What `Replicating.commit` answers. Refused with the reason for which the fold would call it void, as
        `opmessage.decode_op` does, or as the store refuses."""
        await self.catch_up()
        op = adminop.decode(message)
        body = adminop.op_body(op, message, signature, by, content)
        refusal = self._refusal(body)
        if refusal is not None:
            raise refusal
        return await self._commits.commit(ADMIN, OP, body, timeout_s=timeout_s)

    async def commit_own(self, verb: str, **fields: Any) -> Any:
        """Commits this node's word on itself: `maintenance` with `state` and `reason`."""
        return await self._commits.commit(ADMIN, OWN, adminop.own_body(verb, **fields))

    async def commit_result(self, op_id: str, verb: str | None, result: str, reason: str | None) -> Any:
        """Commits what became of an op at this node."""
        return await self._commits.commit(ADMIN, RESULT, adminop.result_body(op_id, verb, result, reason))

    def _refusal(self, body: dict[str, Any]) -> Refused | None:
        """Why the fold would not count a record with this body, committed now."""
        self.state()
        now_ms = self._now_ms()
        stamp = following(self._commits.clock.last, now_ms)
        record = Record(
            id=self._store.end_of(ADMIN, self._pub).id + 1,
            kind=OP,
            emitted_at_ms=stamp.wall_ms,
            disposition=DISPATCHED,
            prev=bytes(32),
            body={**body, "hlc": list(stamp)},
        )
        event = adminop.read_event(record, hash_of(b""), self._pub, self._mesh)
        assert event is not None
        return self.fold.refusal(event, now_ms)

    def _unread(self) -> list[tuple[bytes, int, int]]:
        """Feeds of which there is more than was read: writer, number read, number of the newest."""
        filled = self._store.counters["record_filled"]
        if filled != self._filled:
            self._filled = filled
            self._read.clear()
        found = []
        for feed in self._store.feeds(ADMIN):
            if feed.fork is not None:
                self.fold.fork(feed.node, feed.fork)
            after = self._read.get(feed.writer, 0)
            if feed.head.id > after:
                found.append((feed.writer, after, feed.head.id))
        return found

    def _event(self, stored: Stored) -> AdminEvent | None:
        """The event of a record that is new to the fold."""
        if self.fold.knows(stored.digest):
            return None
        record = stored.record
        checked = record.id <= self._checked.get(stored.writer, 0)
        event = adminop.read_event(record, stored.digest, stored.writer, self._mesh, checked=checked)
        if event is not None:
            self._commits.clock.hear(event.position.stamp, self._now_ms())
        return event


def _numbers(kept: bytes | None) -> dict[bytes, int]:
    try:
        return dict(msgspec.msgpack.decode(kept or b"\x90", type=list[tuple[bytes, int]]))
    except msgspec.MsgspecError:
        return {}
