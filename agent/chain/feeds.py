"""Feeds of many chains in one file: this node's own, which it signs, and those of others, which it replicates.

One thread writes. What arrives while it waits for the disk is taken along in the next transaction, so one fsync
serves many (`append` and `take` return when theirs is done); the event loop never waits for a disk. Reading is
from a connection of its own, of what is committed.

Nothing is believed for being in the file: each row has a sum that is checked when it is read, `scrub` checks
signatures and links as well, a little at a time. What is wrong is named, moved to `quarantine`, and is then a hole
that `missing` lists until a replica fills it. A file that SQLite can't read is moved aside and what it still gives is
taken over; a chain of which this node no longer knows its own end takes no record of it until `settle` was called,
when others were asked: two records of one number would freeze its feed for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from agent.chain import feedtables, tables
from agent.chain.feedreading import FeedReader
from agent.chain.feedtables import key_of, number_of
from agent.chain.file import ChainFile
from agent.chain.record import (
    DISPATCHED,
    Disposition,
    Record,
    UnsupportedVersion,
    encode,
    hash_of,
    sign,
)
from agent.chain.weighing import NUMBER_MAX, Feed, Head, Link, Parcel, Weighed, first_link, weigh
from discovery.errors import LocalError, Refused, RemoteError
from discovery.identity import Identity, id_text, node_id, verify

T = TypeVar("T")

FEEDS_MAX = 10_000
"""Feeds of one chain: as many as a mesh may have members."""
CHAINS_MAX = 10_000
CHAIN_NAME_MAX = 128
JOBS_TOGETHER = 512
CHECKPOINT_COMMITS = 64
CLOSE_TIMEOUT_S = 10.0
ADMIN = "admin"


class Draft(NamedTuple):
    """A record to be appended."""

    kind: str
    body: dict[str, Any] | None = None
    disposition: Disposition = DISPATCHED
    at_ms: int | None = None


class Taken(msgspec.Struct):
    """What came of parcels: how far each feed is now, and the feeds about which something is to be done."""

    heads: dict[bytes, Head]
    added: int = 0
    diverged: list[bytes] = []
    behind: list[bytes] = []
    trouble: list[str] = []


@dataclass
class _Job:
    work: Callable[[], Any]
    durable: bool
    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | None
    alone: bool = False


@dataclass
class _Change:
    """What the jobs of one transaction have changed so far; the feeds' own record of it when it is committed."""

    feeds: dict[tuple[str, bytes], Feed] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)


class _Broken(sqlite3.DatabaseError):
    """The file's structure is damaged, by SQLite's own check."""


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class FeedStore(FeedReader):
    """The feeds in the file `path` of a node of `mesh`. LocalError when the place can't be used.

    `problems` holds a line for people about each damage found; `counters` counts what was refused and what failed."""

    def __init__(
        self, path: Path, identity: Identity, mesh: str, *, now_ms: Callable[[], int] = _wall_ms
    ) -> None:
        super().__init__(path, mesh)
        self.pub = identity.pub
        self.problems: list[str] = []
        self.unsupported: dict[tuple[str, bytes], str] = {}
        """Feeds that go on in a format that this build doesn't read, by chain and writer."""
        self.changed: Callable[[str], None] = lambda chain: None
        """Called on the event loop when a chain has new records."""
        self._identity = identity
        self._now_ms = now_ms
        self._file = ChainFile(path, "chains")
        self._unsettled: set[str] = set()
        self._all_unsettled = False
        self._settled: set[str] = set()
        self._change = _Change()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._commits = 0
        self._scrub_at: tuple[int, int] = (0, 0)
        self._file.create()
        self._open()
        self._reader = self._read_connection()
        self._thread = threading.Thread(target=self._serve, name=f"chains {path.name}", daemon=True)
        self._thread.start()

    # -- writing -------------------------------------------------------------------------

    async def append(
        self,
        chain: str,
        kind: str,
        body: dict[str, Any] | None = None,
        disposition: Disposition = DISPATCHED,
        *,
        at_ms: int | None = None,
        durable: bool = True,
    ) -> Link:
        """Adds a record to this node's own feed of a chain; on disk when it returns, if `durable`.

        Refused: `journal_full` (nothing changed), `feed_forked`, `unsettled`. LocalError: it can't be encoded."""
        links = await self.append_all(chain, [Draft(kind, body, disposition, at_ms)], durable=durable)
        return links[-1]

    async def append_all(self, chain: str, drafts: Sequence[Draft], *, durable: bool = True) -> list[Link]:
        """Adds records in one transaction: all or none."""
        return await self._do(lambda: self._append(chain, drafts), durable)

    async def take(self, chain: str, parcels: Sequence[Parcel], *, durable: bool) -> Taken:
        """Takes what another node gave. Each record is weighed; what is wrong is told in the answer and counted.

        Refused: `journal_full` (nothing changed), `too_many` (feeds or chains), `bad_chain`."""
        return await self._do(lambda: self._take(chain, parcels), durable)

    async def settle(self, chain: str) -> None:
        """Says that others were asked, or that there are none: this node's own feed may go on."""
        self._settled.add(chain)
        self._unsettled.discard(chain)

    def settled(self, chain: str) -> bool:
        """Whether this node knows the end of its own feed of that chain."""
        return chain in self._settled or not (self._all_unsettled or chain in self._unsettled)

    async def retain(
        self, chain: str, *, keep_bytes: int, keep_ms: int, floor: dict[bytes, int] | None = None
    ) -> int:
        """Cuts the old end of a chain's feeds: what is older than `keep_ms`, and the oldest beyond `keep_bytes` in all,
        whosever they are.
        No record above a feed's `floor` is cut (its number in the last checkpoint; for the admin chain 0 unless
        given), nor the newest. How many went."""
        return await self._do(lambda: self._retain(chain, keep_bytes, keep_ms, floor), False)

    async def drop(self, chain: str, *, own: bool = False) -> None:
        """Forgets a chain that is kept elsewhere. Refused `own_chain` for this node's own records in it, unless the
        caller sees to it (`own`) that none is written before those are here again."""
        await self._do(lambda: self._drop(chain, own), False)

    async def resume(self, chain: str, after: Link) -> None:
        """Has this node's own feed of a chain of which it has nothing go on after that record: what came before it is
        elsewhere, or nowhere."""
        await self._do(lambda: self._resume(chain, after), True)

    async def scrub(self, records: int = 1000) -> list[str]:
        """Checks the next so many records in full, and the file's structure each time it comes round; a line for each
        that was wrong. About 0.1 ms a record, in the thread that writes."""
        return await self._do(lambda: self._scrub(records), False)

    async def remember(self, key: str, value: bytes) -> None:
        """Keeps a small value beside the feeds: something that can be found out again, only slower."""
        await self._do(lambda: feedtables.put_note(self._file.db, key, value), False)

    async def flush(self) -> None:
        """Returns when everything given before is committed and on disk."""
        await self._do(lambda: None, True)

    async def close(self) -> None:
        """Finishes what waits and closes the file. Twice is once."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(sqlite3.Error):
                self._reader.close()
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)

    def _suspect(self, what: tuple[Feed, int] | None, reason: str, *, broken: bool = False) -> None:
        """Has the writing thread deal with damage that a reader met."""
        if self._closed:
            return
        if what is not None:
            feed, number = what
            job = _Job(lambda: self._set_aside(feed.chain, feed.writer, number, reason), False, None, None)
        elif broken:
            job = _Job(lambda: self._replace(reason), False, None, None, alone=True)
        else:
            return
        self._jobs.put(job)

    # -- the writing thread --------------------------------------------------------------

    async def _do(self, work: Callable[[], T], durable: bool) -> T:
        if self._closed:
            raise Refused("journal_full", "the chains are closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(work, durable, loop, future))
        return await future

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            last = job.alone
            ended = False
            while not last and len(jobs) < JOBS_TOGETHER:
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    ended = True
                    break
                jobs.append(following)
                last = following.alone
            self._commit(jobs)
            if ended:
                break
        self._file.close()

    def _commit(self, jobs: list[_Job]) -> None:
        """One transaction for all of them. One that is refused fails alone; a disk that refuses fails them all."""
        outcomes: list[tuple[_Job, Any, BaseException | None]] = []
        self._change = _Change()
        if jobs[-1].alone:
            alone = jobs.pop()
            if jobs:
                self._commit(jobs)
            with contextlib.suppress(LocalError, sqlite3.Error):
                alone.work()
            return

        def work() -> None:
            for job in jobs:
                try:
                    outcomes.append((job, job.work(), None))
                except (Refused, LocalError, RemoteError) as why:
                    outcomes.append((job, None, why))

        try:
            self._file.transact(work, durable=any(job.durable for job in jobs))
        except Exception as why:
            self.counters["commit_failed"] += 1
            if isinstance(why, _Broken) or tables.damaged(why):
                with contextlib.suppress(LocalError, sqlite3.Error):
                    self._replace(str(why))
            refused = Refused("journal_full", f"the chains can't be written: {why}")
            for job in jobs:
                self._answer(job, None, refused)
            return
        names = {chain for chain, _ in self._change.feeds} | self._change.dropped
        self._keep_feeds(self._change.feeds, self._change.dropped)
        for job, result, error in outcomes:
            self._answer(job, result, error)
        loop = next((job.loop for job in jobs if job.loop is not None), None)
        if loop is not None:
            for chain in names:
                self._tell(loop, self._told, chain)
        self._commits += 1
        if self._commits % CHECKPOINT_COMMITS == 0 and self._file.checkpoint_due():
            with contextlib.suppress(sqlite3.Error):
                self._file.db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _told(self, chain: str) -> None:
        self.changed(chain)

    def _answer(self, job: _Job, result: Any, error: BaseException | None) -> None:
        future = job.future
        if future is None or job.loop is None:
            return

        def set_it() -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        self._tell(job.loop, set_it)

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(call, *args)

    def _keep_feeds(self, feeds: dict[tuple[str, bytes], Feed], dropped: Collection[str] = ()) -> None:
        """What others see: replaced whole, so that a reader in another thread sees one state or the other."""
        self._feeds = {key: f for key, f in self._feeds.items() if key[0] not in dropped} | feeds
        grown = {name: of for name, of in self._chains.items() if name not in dropped}
        for (chain, writer), feed in feeds.items():
            grown[chain] = {**grown.get(chain, {}), writer: feed}
        self._chains = grown

    def _feeds_of(self, chain: str) -> dict[bytes, Feed]:
        """The feeds of a chain as they are within this transaction: after all that goes into the file with it."""
        before = {} if chain in self._change.dropped else self._chains.get(chain, {})
        return {
            **before,
            **{writer: feed for (name, writer), feed in self._change.feeds.items() if name == chain},
        }

    def _feed(self, chain: str, writer: bytes) -> Feed:
        """A feed as it is within this transaction; a new one if there is none."""
        feed = self._feeds_of(chain).get(writer)
        if feed is not None:
            return feed
        if not 0 < len(chain) <= CHAIN_NAME_MAX or not chain.isprintable():
            raise Refused("bad_chain", "a chain's name has 1 to 128 printable characters")
        known = {*self._chains, *(name for name, _ in self._change.feeds)}
        fresh = sum(1 for name, _ in self._change.feeds if name == chain)
        if len(self._chains.get(chain, {})) + fresh >= FEEDS_MAX or (
            chain not in known and len(known) >= CHAINS_MAX
        ):
            raise Refused("too_many", f"chain {chain}: no room for another feed")
        beginning = Link(0, first_link(self._mesh, chain, writer))
        top = max((f.id for f in [*self._feeds.values(), *self._change.feeds.values()]), default=0)
        return Feed(top + 1, chain, writer, beginning, beginning)

    def _keep(self, feed: Feed) -> None:
        feedtables.put_feed(self._file.db, feed)
        self._change.feeds[(feed.chain, feed.writer)] = feed

    def _append(self, chain: str, drafts: Sequence[Draft]) -> list[Link]:
        feed = self._feed(chain, self.pub)
        if feed.fork is not None:
            raise Refused(
                "feed_forked",
                f"chain {chain}: this node's feed is forked at record {feed.fork}; give it a new key",
            )
        if not self.settled(chain):
            raise Refused(
                "unsettled", f"chain {chain}: this node lost the end of its feed; it asks others for it"
            )
        links: list[Link] = []
        rows = []
        head = feed.head
        for draft in drafts:
            record = Record(
                id=head.id + 1,
                kind=draft.kind,
                emitted_at_ms=max(0, self._now_ms() if draft.at_ms is None else draft.at_ms),
                disposition=draft.disposition,
                prev=head.hash,
                body=draft.body,
            )
            try:
                blob = encode(record)
            except (TypeError, ValueError, OverflowError, RecursionError) as why:
                raise LocalError(f"record {draft.kind!r} can't be kept: {why}") from why
            digest = hash_of(blob)
            rows.append((record.id, blob, sign(digest, self._identity.sign), record.emitted_at_ms))
            head = Link(record.id, digest)
            links.append(head)
        feedtables.put_rows(self._file.db, feed.id, rows)
        size = sum(len(blob) + len(sig) for _, blob, sig, _ in rows)
        self._keep(msgspec.structs.replace(feed, head=head, bytes=feed.bytes + size))
        return links

    def _take(self, chain: str, parcels: Sequence[Parcel]) -> Taken:
        taken = Taken({})
        for parcel in parcels:
            feed = self._feed(chain, parcel.writer)
            db = self._file.db
            weighed = weigh(feed, parcel, partial(feedtables.held, db, feed), verify)
            self._note(chain, feed, weighed, taken)
            now = weighed.feed
            if weighed.add:
                feedtables.put_rows(db, feed.id, weighed.add)
                size = sum(len(blob) + len(sig) for _, blob, sig, _ in weighed.add)
                now = msgspec.structs.replace(now, bytes=feed.bytes + size)
            if weighed.fork is not None:
                feedtables.put_fork(db, feed.id, weighed.fork)
            if now != feed:
                self._keep(now)
            taken.added += len(weighed.add)
            self.counters["record_filled"] += sum(1 for row in weighed.add if row[0] <= feed.head.id)
            taken.heads[parcel.writer] = Head(parcel.writer, now.head, now.fork)
            for number in weighed.damaged:
                self._set_aside(chain, parcel.writer, number, "its bytes don't fit the writer's signature")
        return taken

    def _note(self, chain: str, feed: Feed, weighed: Weighed, taken: Taken) -> None:
        who = f"chain {chain}, feed of {id_text(feed.node)}"
        if weighed.unsupported is not None:
            taken.trouble.append(self._unread(feed, weighed.unsupported))
        elif weighed.add and (said := self.unsupported.pop((chain, feed.writer), None)) in self.problems:
            self.problems.remove(said or "")
        if weighed.bad is not None:
            taken.trouble.append(f"{who}: {weighed.bad}")
            self.counters["record_refused"] += 1
        if weighed.fork is not None:
            self.problems.append(f"{who}: two records {weighed.fork.number}; frozen there")
            self.counters["forks"] += 1
        if weighed.diverged:
            taken.diverged.append(feed.writer)
        if weighed.behind:
            taken.behind.append(feed.writer)

    def _found(self, feed: Feed, wrong: Sequence[tuple[int, RemoteError]]) -> None:
        """Sets aside what was found damaged, and names what is only in another format: it stays for a build that reads
        it."""
        for number, why in wrong:
            if isinstance(why, UnsupportedVersion):
                self._unread(feed, why)
            else:
                self._set_aside(feed.chain, feed.writer, number, str(why))

    def _unread(self, feed: Feed, why: UnsupportedVersion) -> str:
        said = f"chain {feed.chain}, feed of {id_text(feed.node)}: {why}"
        if self.unsupported.get((feed.chain, feed.writer)) != said:
            self.unsupported[(feed.chain, feed.writer)] = said
            self.problems.append(said)
        self.counters["unsupported_version"] += 1
        return said

    def _set_aside(self, chain: str, writer: bytes, number: int, reason: str) -> None:
        feed = self._feed(chain, writer)
        if feedtables.quarantine(self._file.db, key_of(feed.id, number), reason, self._now_ms()):
            self.problems.append(
                f"chain {chain}, feed of {id_text(node_id(writer))}, record {number}: {reason}"
            )
            self.counters["record_damaged"] += 1
            if feed.base.id < number <= feed.head.id:
                holes = tuple(sorted({*feed.holes, (number, number)}))
                self._keep(msgspec.structs.replace(feed, holes=holes))

    def _retain(self, chain: str, keep_bytes: int, keep_ms: int, floor: dict[bytes, int] | None) -> int:
        db, gone = self._file.db, 0
        before_ms = self._now_ms() - keep_ms
        feeds = self._feeds_of(chain)
        over = sum(feed.bytes for feed in feeds.values()) - keep_bytes
        cuts: dict[bytes, tuple[Link, int]] = {}
        for writer, at_ms, link, size in merge(
            *(self._oldest(feed, floor) for feed in feeds.values()), key=lambda row: row[1]
        ):
            if at_ms >= before_ms and over <= 0:
                break
            over -= size
            gone += 1
            cuts[writer] = (link, size + (cuts[writer][1] if writer in cuts else 0))
        for writer, (cut, freed) in cuts.items():
            feed = feeds[writer]
            span = (key_of(feed.id, 0), key_of(feed.id, cut.id))
            db.execute("DELETE FROM records WHERE id BETWEEN ? AND ?", span)
            holes = tuple((max(a, cut.id + 1), b) for a, b in feed.holes if b > cut.id)
            self._keep(msgspec.structs.replace(feed, base=cut, holes=holes, bytes=feed.bytes - freed))
        return gone

    def _oldest(self, feed: Feed, floor: dict[bytes, int] | None) -> Iterator[tuple[bytes, int, Link, int]]:
        """Of each record that may be cut, from the oldest on: its writer, when it was emitted (no earlier than those
        before it), its link and its size."""
        most = feed.head.id - 1
        if floor is not None or feed.chain == ADMIN:
            most = min(most, (floor or {}).get(feed.writer, 0))
        sql = "SELECT id, at_ms, blob, length(sig) FROM records WHERE id BETWEEN ? AND ? ORDER BY id"
        latest = 0
        span = (key_of(feed.id, feed.base.id + 1), key_of(feed.id, most))
        for key, at_ms, blob, sig_size in self._file.db.execute(sql, span):
            latest = max(latest, at_ms)
            yield feed.writer, latest, Link(number_of(key), hash_of(blob)), len(blob) + sig_size

    def _drop(self, chain: str, own: bool) -> None:
        feeds = self._feeds_of(chain)
        if (self.pub in feeds and not own) or chain == ADMIN:
            raise Refused("own_chain", f"chain {chain}: this node writes it")
        for feed in feeds.values():
            span = (key_of(feed.id, 0), key_of(feed.id, NUMBER_MAX))
            for sql in ("DELETE FROM feeds WHERE id = ?", "DELETE FROM forks WHERE feed = ?"):
                self._file.db.execute(sql, (feed.id,))
            self._file.db.execute("DELETE FROM records WHERE id BETWEEN ? AND ?", span)
        for writer in feeds:
            self._change.feeds.pop((chain, writer), None)
        self._change.dropped.add(chain)

    def _resume(self, chain: str, after: Link) -> None:
        feed = self._feed(chain, self.pub)
        if feed.head.id == 0:
            self._keep(msgspec.structs.replace(feed, base=after, head=after))

    def _scrub(self, records: int) -> list[str]:
        said = len(self.problems)
        feed_id, number = self._scrub_at
        for feed in sorted(self._feeds.values(), key=lambda f: f.id):
            if feed.id < feed_id or records <= 0:
                continue
            first = max(number if feed.id == feed_id else 0, feed.base.id) + 1
            wrong, seen = feedtables.judge(self._file.db, feed, first, feed.head.id, records)
            self._found(feed, wrong)
            records -= max(1, seen - first + 1)
            self._scrub_at = (feed.id, seen)
        if records > 0:
            self._scrub_at = (0, 0)
            pages = [row[0] for row in self._file.db.execute("PRAGMA quick_check(5)").fetchall()]
            if pages != ["ok"]:
                raise _Broken(f"SQLite: {'; '.join(str(p).strip() for p in pages)}"[:500])
        return self.problems[said:]

    # -- opening and damage --------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._read()
        except sqlite3.Error as why:
            self._file.close()
            if not tables.damaged(why) and getattr(why, "sqlite_errorcode", 1) != sqlite3.SQLITE_ERROR:
                raise LocalError(f"chains {self.path}: {why}; check the disk and who owns it") from why
            self._replace(str(why), opening=True)
        except ValueError as why:
            self._file.close()
            self._replace(str(why), opening=True, carry=False)
        except tables.Newer as why:
            self._file.close()
            raise LocalError(
                f"chains {self.path}: {why}; start the newer build, or move the file away"
            ) from why

    def _read(self) -> None:
        db = self._file.connect(any_thread=True)
        feedtables.prepare(db, self._mesh)
        feeds, altered = feedtables.load(db, self._mesh)
        for chain, problem in altered:
            self.problems.append(problem)
            self._all_unsettled |= chain is None
            self._unsettled |= {chain} if chain else set()
        self._feeds, self._chains = {}, {}
        self._keep_feeds({(f.chain, f.writer): f for f in feeds})
        for key in feedtables.strays(db, feeds):
            feedtables.quarantine(db, key, "belongs to no feed", self._now_ms())
            self.problems.append(f"chains {self.path}: record {number_of(key)} belongs to no feed")
        for feed in feeds:
            first = max(feed.base.id, feed.head.id - feedtables.TAIL_CHECKED) + 1
            wrong, _ = feedtables.judge(db, feed, first, feed.head.id, feedtables.TAIL_CHECKED + 1)
            self._change = _Change()
            self._found(feed, wrong)
            self._keep_feeds(self._change.feeds)

    def _replace(self, reason: str, *, opening: bool = False, carry: bool = True) -> None:
        """Moves the file aside and begins another with what can still be read of it."""
        known = dict(self._feeds)
        self._file.close()
        try:
            aside = tables.move_aside(self.path, self._now_ms())
        except OSError as why:
            raise LocalError(f"chains {self.path}: {reason}, and can't be moved: {why.strerror}") from why
        self._file.create()
        db = self._file.connect(any_thread=True)
        feedtables.prepare(db, self._mesh)
        if carry:
            self._file.transact(lambda: self._carry(db, aside, known), durable=True)
        self._all_unsettled = opening
        self._settled.clear()
        self.problems.append(f"chains {self.path}: {reason}; moved to {aside.name}, what it held taken over")
        self.counters["file_replaced"] += 1
        self._read()
        self._stale = True

    def _carry(self, db: sqlite3.Connection, aside: Path, known: dict[tuple[str, bytes], Feed]) -> None:
        marks = {"feeds": 5, "records": 5, "forks": 2}
        for table, row in feedtables.salvage(aside):
            sql = f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * marks[table])})"
            if table != "records" or feedtables.sound((row[0], *row[2:])):
                db.execute(sql, row)
        for feed in known.values():
            feedtables.put_feed(db, feed)
