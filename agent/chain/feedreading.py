"""Reading feeds: version vectors, what is newer than another node has, the records themselves.

What is read is what is committed, checked by each row's sum; a row that doesn't fit is left out and reported to the
thread that writes, which sets it aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.chain import feedtables, tables
from agent.chain.feedtables import BETWEEN, key_of, number_of
from agent.chain.file import CACHE
from agent.chain.record import Record, decode, hash_of, readable
from agent.chain.weighing import Feed, Head, Link, Parcel, Row, Span, first_link
from discovery.errors import RemoteError

READ_ROWS = 512
_NONE: Mapping[bytes, Feed] = {}
RECORD_BYTES_MIN = 64
"""No record is shorter: more of them than fit into a feed's bytes are not there."""


class Stored(NamedTuple):
    """A record as it was read: whose, what, and its hash."""

    writer: bytes
    record: Record
    digest: bytes


class Missing(NamedTuple):
    """Records that this node should have and has not."""

    chain: str
    writer: bytes
    spans: tuple[Span, ...]


class Want(NamedTuple):
    """A feed, and the record after which it is asked for."""

    writer: bytes
    after: Link


class Given(NamedTuple):
    """An answer to wants: parcels, whose feed is another than ours, and whether there is more."""

    parcels: list[Parcel]
    diverged: list[bytes]
    more: bool


class FeedReader:
    """The reading half of a store of feeds; used from one thread, that of the event loop."""

    def __init__(self, path: Path, mesh: str) -> None:
        self.path = path
        self.counters: Counter[str] = Counter()
        self._mesh = mesh
        self._feeds: dict[tuple[str, bytes], Feed] = {}
        self._chains: dict[str, dict[bytes, Feed]] = {}
        self._reader: sqlite3.Connection
        self._forgone: dict[tuple[str, bytes], int] = {}
        self._stale = False
        """The file is another one: the reader is to be opened again."""

    def chains(self) -> list[str]:
        """Names of the chains of which there is anything."""
        return sorted(self._chains)

    def feeds(self, chain: str) -> list[Feed]:
        """How each feed of a chain stands, by node."""
        return sorted(self._chains.get(chain, {}).values(), key=lambda feed: feed.node)

    def standing(self, chain: str) -> Mapping[bytes, Feed]:
        """The same by writer: the same object as long as none of them has changed."""
        return self._chains.get(chain, _NONE)

    def heads(self, chain: str) -> dict[bytes, Head]:
        """The version vector of a chain."""
        return {f.writer: Head(f.writer, f.head, f.fork) for f in self.feeds(chain)}

    def mark(self, chain: str) -> bytes:
        """Eight bytes that two nodes have in common when they have the same of a chain."""
        return mark_of(self.heads(chain).values())

    def missing(self, chain: str | None = None) -> list[Missing]:
        """What is to be fetched again: records that were damaged here, or that nobody asked so far had."""
        feeds = [f for f in list(self._feeds.values()) if f.holes and chain in (None, f.chain)]
        found = [Missing(f.chain, f.writer, self._wanted(f)) for f in feeds]
        return [missing for missing in found if missing.spans]

    def lacking(self, feed: Feed) -> int:
        """How many records of a feed are to be fetched again."""
        return sum(last - first + 1 for first, last in self._wanted(feed))

    def forgo(self, chain: str, writer: bytes, upto: int) -> None:
        """Asks nobody any more for what is missing up to that number: all who could have it have given it up. Until the
        process ends; then they are asked once more."""
        self._forgone[chain, writer] = max(upto, self._forgone.get((chain, writer), 0))

    def _wanted(self, feed: Feed) -> tuple[Span, ...]:
        gone = self._forgone.get((feed.chain, feed.writer), 0)
        return tuple((max(first, gone + 1), last) for first, last in feed.holes if last > gone)

    def end_of(self, chain: str, writer: bytes) -> Link:
        """Where the next record of that feed links to."""
        feed = self._feeds.get((chain, writer))
        return feed.head if feed else Link(0, first_link(self._mesh, chain, writer))

    def since(self, chain: str, wants: Sequence[Want], limit_bytes: int) -> Given:
        """What is newer than that in each feed, about `limit_bytes` of it in all."""
        parcels: list[Parcel] = []
        diverged: list[bytes] = []
        left = limit_bytes
        for want in wants:
            feed = self._feeds.get((chain, want.writer))
            if feed is None:
                continue
            after = want.after
            if after.id < feed.base.id:
                after = feed.base
            elif after.id <= feed.head.id and not self._has(feed, after):
                diverged.append(want.writer)
            if left <= 0:
                return Given(parcels, diverged, True)
            proof = self._proof(feed)
            last = feed.head.id if feed.fork is None else min(feed.head.id, feed.fork - 1)
            rows, holes, more = self._stretch(feed, after.id + 1, last, left)
            if rows or proof or after is not want.after:
                parcels.append(Parcel(want.writer, after, rows, holes, proof, after is not want.after))
                left -= sum(len(blob) + len(sig) + 16 for blob, sig in [*rows, *proof])
            if more:
                return Given(parcels, diverged, True)
        return Given(parcels, diverged, False)

    def between(self, chain: str, writer: bytes, spans: Sequence[Span], limit_bytes: int) -> list[Parcel]:
        """Records of these numbers, as far as they are here; with a parcel that says so where they were cut."""
        feed = self._feeds.get((chain, writer))
        parcels = []
        if feed is not None and any(first <= feed.base.id for first, _ in spans):
            parcels.append(Parcel(writer, feed.base, cut=True))
        for first, last in spans if feed is not None else ():
            assert feed is not None
            rows, holes, _ = self._stretch(feed, max(1, first), min(last, feed.head.id), limit_bytes)
            if rows:
                parcels.append(Parcel(writer, Link(0, bytes(32)), rows, holes))
                limit_bytes -= sum(len(blob) + len(sig) + 16 for blob, sig in rows)
            if limit_bytes <= 0:
                break
        return parcels

    def hashes(self, chain: str, writer: bytes, first: int, last: int) -> list[Link]:
        """Numbers and hashes of these records."""
        feed = self._feeds.get((chain, writer))
        return [Link(n, hash_of(blob)) for n, blob, _ in self._rows(feed, first, last)] if feed else []

    def records(
        self, chain: str, writer: bytes | None = None, after: int = 0, upto: int | None = None
    ) -> Iterator[Stored]:
        """The records of a chain, feed by feed, those of a feed in order. One that was damaged is left out and told;
        it is read in steps, so any number of them takes little memory."""
        found = [self._feeds.get((chain, writer))] if writer is not None else self.feeds(chain)
        for feed in found:
            if feed is None:
                return
            last = feed.head.id if upto is None else min(upto, feed.head.id)
            for _, blob, _ in self._rows(feed, max(after, feed.base.id) + 1, last):
                try:
                    yield Stored(feed.writer, decode(blob), hash_of(blob))
                except RemoteError:
                    self.counters["record_unreadable"] += 1

    def tail(self, chain: str, writer: bytes, count: int) -> list[Stored]:
        """The newest `count` records of a feed, oldest first."""
        return list(self.records(chain, writer, max(0, self.end_of(chain, writer).id - count)))

    def count(self, feed: Feed) -> int:
        """How many records of a feed are here; where its numbers jump (its writer lost its file) they are counted."""
        if feed.records * RECORD_BYTES_MIN <= feed.bytes:
            return feed.records
        span = (key_of(feed.id, feed.base.id + 1), key_of(feed.id, feed.head.id))
        with contextlib.suppress(sqlite3.Error):
            sql = "SELECT count(*) FROM records WHERE id BETWEEN ? AND ?"
            return int(self._reader.execute(sql, span).fetchone()[0])
        return 0

    def _proof(self, feed: Feed) -> list[Row]:
        with contextlib.suppress(sqlite3.Error):
            return feedtables.fork_rows(self._reader, feed.id) if feed.fork is not None else []
        return []

    def recall(self, key: str) -> bytes | None:
        """What `remember` kept, if it is there and unaltered."""
        with contextlib.suppress(sqlite3.Error):
            return feedtables.note(self._reader, key)
        return None

    def _has(self, feed: Feed, link: Link) -> bool:
        if link.id == feed.head.id:
            return link.hash == feed.head.hash
        if link.id == feed.base.id:
            return link.hash == feed.base.hash
        found = self.hashes(feed.chain, feed.writer, link.id, link.id)
        return not found or found[0].hash == link.hash

    def _stretch(
        self, feed: Feed, first: int, last: int, limit_bytes: int
    ) -> tuple[list[Row], list[Span], bool]:
        rows: list[Row] = []
        holes: list[Span] = []
        at = first - 1
        for number, blob, sig in self._rows(feed, first, last):
            if not readable(blob):  # a hole to others, until a build that reads it is back
                continue
            if rows and limit_bytes < len(blob) + len(sig) + 16:
                return rows, holes, True
            if number > at + 1:
                holes.append((at + 1, number - 1))
            rows.append((blob, sig))
            limit_bytes -= len(blob) + len(sig) + 16
            at = number
        return rows, holes, False

    def _rows(self, feed: Feed, first: int, last: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Sound rows only; the others are reported."""
        while first <= last:
            try:
                if self._stale:
                    self._reader.close()
                    self._reader, self._stale = self._read_connection(), False
                found = self._reader.execute(
                    BETWEEN, (key_of(feed.id, first), key_of(feed.id, last), READ_ROWS)
                ).fetchall()
            except sqlite3.Error as why:
                self.counters["read_failed"] += 1
                self._suspect(None, str(why), broken=tables.damaged(why))
                return
            for row in found:
                if feedtables.sound(row):
                    yield number_of(row[0]), row[1], row[2]
                else:
                    self._suspect((feed, number_of(row[0])), "not the bytes that were written")
            if len(found) < READ_ROWS:
                return
            first = number_of(found[-1][0]) + 1

    def _read_connection(self) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=1.0, check_same_thread=False)
        with contextlib.suppress(sqlite3.Error):
            db.execute(CACHE)
        return db

    def _suspect(self, what: tuple[Feed, int] | None, reason: str, *, broken: bool = False) -> None:
        """Reports a record, or with `broken` the file, that was found damaged."""
        raise NotImplementedError


def mark_of(heads: Iterable[Head]) -> bytes:
    """Eight bytes for a version vector."""
    digest = hashlib.sha256()
    for head in sorted(heads, key=lambda h: h.writer):
        digest.update(head.writer + head.link.hash + str((head.link.id, head.fork)).encode())
    return digest.digest()[:8]
