"""The audit of one node, read from what is kept here: listed without its bytes, and then row by row as they are asked for.

A list goes on from the one before: what is new is judged and read. Where a record came late, or a cut or a fork made
others void, it is made anew. While nobody asks, nothing is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from agent.chain.adminchain import AdminChain
from agent.chain.adminop import ADMIN, RESULT
from agent.chain.adminreading import STEP, Mark, Place, any_place_of, place_at, position_at
from agent.chain.audit import PUT, TAKEN, Entry, Index, Row, Told, row_of_event, row_of_record, without_bytes
from agent.chain.feedreading import Stored
from agent.chain.feeds import FeedStore
from agent.chain.hlc import ahead
from agent.chain.log import Log
from agent.chain.record import Record, decode
from agent.chain.weighing import NODE_CHAIN, NUMBER_MAX
from discovery.errors import RemoteError
from discovery.identity import node_id

PAGE_BYTES = 200_000
FORGET_AFTER_S = 60.0
READ_ROWS = 512
ALONE = frozenset({PUT, "append"})
"""Ops that a node takes and that are not on the admin chain."""


class Auditing:
    """Lists and reads the audit of a node: the admin chain, this node's `journal` (the chain `own`), and the journals
    of others of which there is a copy here."""

    def __init__(
        self,
        admin: AdminChain,
        store: FeedStore,
        journal: Log,
        *,
        own: str,
        me: int,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admin = admin
        self._store = store
        self._journal = journal
        self._own = own
        self._me = me
        self._now_ms = now_ms
        self._clock = clock
        self._listing = asyncio.Lock()
        self._used_at = clock()
        self._begin()

    def _begin(self) -> None:
        self._index = Index()
        self._judge = self._admin.fold.judge()
        self._mark = Mark()
        self._held_back: list[Place] = []
        """Dated ahead when they were listed."""
        self._read: dict[tuple[str, int], int] = {}
        """Up to which number each journal was read."""
        self._alone = Index()
        self._alone_read = 0

    def forget(self) -> None:
        """Holds nothing any more, when nobody asked for a while."""
        if self._clock() - self._used_at > FORGET_AFTER_S and not self._listing.locked():
            self._begin()

    async def listing(self) -> list[Entry]:
        """All that is known here, oldest first. In short steps: about 0.2 ms a record the first time."""
        async with self._listing:
            self._used_at = self._clock()
            await self._admin.catch_up()
            places = await self._admin.reader.places(self._mark, self._admin.reader.ends(), self._place_of)
            if self._outdated(places):
                self._begin()
                places = await self._admin.reader.places(
                    self._mark, self._admin.reader.ends(), self._place_of
                )
            async for _, event in self._admin.reader.in_order(places, self._mark):
                verdict = self._admin.verdict(self._judge, event)
                if verdict is not None and ahead(event.position.wall_ms, self._now_ms()):
                    self._held_back.append(place_at(event.position))
                self._index.event(event, verdict)
            for count, (chain, node, record) in enumerate(self._journals(), 1):
                self._index.record(chain, node, record)
                if count % STEP == 0:
                    await asyncio.sleep(0)
            return self._index.listing()

    async def taken_alone(
        self, most: int, shown: Callable[[Row], Row], *, with_bytes: bool = False
    ) -> list[Row]:
        """The newest of what this node refused, and of what it took that is on no admin chain: oldest first, at most
        `most`, and as many as go into a frame."""
        async with self._listing:
            self._used_at = self._clock()
            self._journal.flush()
            last = self._journal.committed.id
            after = max(self._journal.base.id, self._alone_read)
            for count, record in enumerate(self._of_journal(self._own, self._me, after + 1, last), 1):
                if record.kind != TAKEN or (record.body or {}).get("op") in ALONE:
                    self._alone.record(self._own, self._me, record)
                if count % STEP == 0:
                    await asyncio.sleep(0)
            self._alone_read = max(after, last)
            listed = self._alone.listing()[-most:]
        answer = await self.page(listed, 0, shown, told=self._alone.told, with_bytes=with_bytes)
        return list(answer["rows"])

    def _row(self, entry: Entry, told: Told) -> Row | None:
        """A row, read from where it is kept; None where that is gone."""
        if entry.chain == ADMIN:
            writer = self._admin.reader.writer_of(entry.node)
            stored = self._admin.reader.at(writer, entry.number) if writer is not None else None
            event = self._admin.reader.event(stored) if stored is not None else None
            return row_of_event(event, entry.verdict, told) if event is not None else None
        record = next(self._of_journal(entry.chain, entry.node, entry.number, entry.number), None)
        return row_of_record(entry.node, record, told) if record is not None else None

    async def page(
        self,
        listed: Sequence[Entry | Row],
        offset: int,
        shown: Callable[[Row], Row],
        *,
        told: Told | None = None,
        with_bytes: bool = False,
        most_bytes: int = PAGE_BYTES,
    ) -> dict[str, Any]:
        """As many rows from `offset` on as go into one frame: `{rows, next}`, `next` None at the end."""
        self._used_at = self._clock()
        found: list[Row] = []
        size, at = 0, max(0, offset)
        while at < len(listed):
            each = listed[at]
            row = self._row(each, told or self._index.told) if isinstance(each, Entry) else each
            row = shown(row if with_bytes else without_bytes(row)) if row is not None else None
            size += len(msgspec.msgpack.encode(row))
            if size > most_bytes and found:
                return {"rows": found, "next": at}
            if row is not None:
                found.append(row)
            at += 1
            if at % STEP == 0:
                await asyncio.sleep(0)
        return {"rows": found, "next": None}

    def _place_of(self, stored: Stored) -> Place | None:
        """Where a record stands in the list. A result stands nowhere, and needs no order: only its target's counts."""
        if stored.record.kind != RESULT:
            return any_place_of(stored)
        node = node_id(stored.writer)
        if any_place_of(stored) and stored.record.id < self._judge.forks.get(node, NUMBER_MAX):
            self._index.result(node, stored.record.body or {})
        return None

    def _outdated(self, places: Sequence[Place]) -> bool:
        fold, judge = self._admin.fold, self._judge
        if judge.cuts != fold.state.cuts or judge.forks != fold.forks:
            return True
        if any(not ahead(position_at(place).wall_ms, self._now_ms()) for place in self._held_back):
            return True
        return bool(places) and position_at(places[0]) <= judge.end

    def _journals(self) -> Iterator[tuple[str, int, Record]]:
        """What is new in each journal that is kept here."""
        self._journal.flush()
        feeds = [(self._own, self._me, self._journal.base.id, self._journal.committed.id)]
        for chain in self._store.chains():
            if chain.startswith(NODE_CHAIN) and chain != self._own:
                feeds += [(chain, f.node, f.base.id, f.head.id) for f in self._store.feeds(chain)]
        for chain, node, base, head in feeds:
            after = max(base, self._read.get((chain, node), 0))
            for record in self._of_journal(chain, node, after + 1, head):
                yield chain, node, record
            self._read[chain, node] = max(after, head)

    def _of_journal(self, chain: str, node: int, first: int, last: int) -> Iterator[Record]:
        if chain != self._own:
            for feed in self._store.feeds(chain):
                if feed.node == node:
                    for stored in self._store.records(chain, feed.writer, first - 1, last):
                        yield stored.record
            return
        while first <= last:
            rows = self._journal.rows(first, last, READ_ROWS)
            for _, blob, _ in rows:
                with contextlib.suppress(RemoteError):
                    yield decode(blob)
            if len(rows) < READ_ROWS:
                return
            first = rows[-1][0] + 1
