"""The tables of replicated feeds: rows with a sum over their bytes, so that a flipped one is seen at every read."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from agent.chain.record import CONTEXT, UnsupportedVersion, decode, hash_of
from agent.chain.tables import QUARANTINE_MAX, WAL_PAGES_MAX, Newer
from agent.chain.weighing import NUMBER_MAX, Feed, Fork, Link, Row, Span, first_link
from discovery.errors import RemoteError
from discovery.identity import verify

SCHEMA_VERSION = 1
SHIFT = 40
"""A row's key is its feed's number and its own: `feed << SHIFT | number`."""
TAIL_CHECKED = 16

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feeds (id INTEGER PRIMARY KEY, chain TEXT NOT NULL, writer BLOB NOT NULL,
  ends BLOB NOT NULL, sum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, blob BLOB NOT NULL,
  sig BLOB NOT NULL, sum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS forks (feed INTEGER PRIMARY KEY, proof BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine
  (n INTEGER PRIMARY KEY, id INTEGER, blob BLOB, sig BLOB, reason TEXT, found_ms INTEGER);
"""
PUT_FEED = "INSERT OR REPLACE INTO feeds VALUES (?, ?, ?, ?, ?)"
PUT_RECORD = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)"
BETWEEN = "SELECT id, blob, sig, sum FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?"


class _Ends(msgspec.Struct, array_like=True):
    base: Link
    head: Link
    fork: int | None


def key_of(feed: int, number: int) -> int:
    return feed << SHIFT | number


def number_of(key: int) -> int:
    return key & NUMBER_MAX


def sum_of(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()[:16]


def sound(row: tuple[Any, ...]) -> bool:
    """Whether a row's bytes are those that were written, by its sum."""
    key, blob, sig, kept = row
    return isinstance(blob, bytes) and isinstance(sig, bytes) and kept == _row_sum(key, blob, sig)


def _row_sum(key: int, blob: bytes, sig: bytes) -> bytes:
    return sum_of(key.to_bytes(8, "big", signed=True), blob, sig)


def _feed_sum(feed: int, chain: str, writer: bytes, ends: bytes) -> bytes:
    return sum_of(feed.to_bytes(8, "big", signed=True), chain.encode("utf-8", "replace"), writer, ends)


def put_feed(db: sqlite3.Connection, feed: Feed) -> None:
    ends = msgspec.msgpack.encode(_Ends(feed.base, feed.head, feed.fork))
    check = _feed_sum(feed.id, feed.chain, feed.writer, ends)
    db.execute(PUT_FEED, (feed.id, feed.chain, feed.writer, ends, check))


def put_rows(db: sqlite3.Connection, feed: int, rows: Iterable[tuple[int, bytes, bytes, int]]) -> None:
    keyed = [(key_of(feed, n), at, blob, sig) for n, blob, sig, at in rows]
    db.executemany(PUT_RECORD, [(*row, _row_sum(row[0], row[2], row[3])) for row in keyed])


def put_fork(db: sqlite3.Connection, feed: int, fork: Fork) -> None:
    db.execute("INSERT OR REPLACE INTO forks VALUES (?, ?)", (feed, msgspec.msgpack.encode(fork.rows)))


def fork_rows(db: sqlite3.Connection, feed: int) -> list[Row]:
    found = db.execute("SELECT proof FROM forks WHERE feed = ?", (feed,)).fetchone()
    try:
        return msgspec.msgpack.decode(found[0], type=list[tuple[bytes, bytes]]) if found else []
    except (msgspec.MsgspecError, TypeError):
        return []


def put_note(db: sqlite3.Connection, key: str, value: bytes) -> None:
    db.execute(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"note {key}", sum_of(key.encode(), value) + value)
    )


def note(db: sqlite3.Connection, key: str) -> bytes | None:
    """What was put under this key, unless its bytes were altered."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (f"note {key}",)).fetchone()
    kept = row[0] if row is not None else None
    if not isinstance(kept, bytes) or kept[:16] != sum_of(key.encode(), kept[16:]):
        return None
    return kept[16:]


def held(db: sqlite3.Connection, feed: Feed, number: int) -> Row | None:
    row = db.execute("SELECT blob, sig FROM records WHERE id = ?", (key_of(feed.id, number),)).fetchone()
    return None if row is None else (row[0], row[1])


def quarantine(db: sqlite3.Connection, key: int, reason: str, now_ms: int) -> bool:
    """Takes a record out of its feed, keeping its bytes for whoever wants to look. False if it is not there."""
    moved = db.execute(
        "INSERT INTO quarantine (id, blob, sig, reason, found_ms)"
        " SELECT id, blob, sig, ?, ? FROM records WHERE id = ?",
        (reason, now_ms, key),
    )
    db.execute("DELETE FROM records WHERE id = ?", (key,))
    db.execute(
        "DELETE FROM quarantine WHERE n <= (SELECT coalesce(max(n), 0) FROM quarantine) - ?",
        (QUARANTINE_MAX,),
    )
    return moved.rowcount > 0


def prepare(db: sqlite3.Connection, mesh: str) -> None:
    """Makes the tables that are missing; Newer when a newer build laid them out, ValueError for another mesh's."""
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES_MAX}")
    db.execute("PRAGMA synchronous=NORMAL")
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'quarantine'").fetchone():
        db.executescript(f"BEGIN; {TABLES} COMMIT;")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?), ('mesh', ?)", (SCHEMA_VERSION, mesh))
    meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
    if isinstance(schema := meta.get("schema"), int) and SCHEMA_VERSION < schema < 1000:
        raise Newer(f"laid out by a newer build (schema {schema}, this build knows {SCHEMA_VERSION})")
    if meta.get("mesh") != mesh:
        raise ValueError(f"not the chains of mesh {mesh}")


def load(db: sqlite3.Connection, mesh: str) -> tuple[list[Feed], list[tuple[str | None, str]]]:
    """The feeds; and for each thing about them that was altered its chain, if that can be told, and a line. What a
    feed's row doesn't tell any more is read from its records."""
    feeds: list[Feed] = []
    problems: list[tuple[str | None, str]] = []
    for number, chain, writer, ends, check in db.execute("SELECT * FROM feeds ORDER BY id").fetchall():
        if not isinstance(chain, str) or not isinstance(writer, bytes) or len(writer) != 32:
            problems.append((None, f"feed {number} of the chains: its row was altered"))
            continue
        intact = isinstance(ends, bytes) and check == _feed_sum(number, chain, writer, ends)
        try:
            found = msgspec.msgpack.decode(ends, type=_Ends) if intact else None
        except msgspec.MsgspecError:
            found = None
        if found is None:
            problems.append((chain, f"chain {chain}: the row of its feed {number} was altered"))
            found = _ends_by_records(db, number, mesh, chain, writer)
            if found is None:
                continue
        feeds.append(_measured(db, Feed(number, chain, writer, found.base, found.head, found.fork)))
    return feeds, problems


def strays(db: sqlite3.Connection, feeds: Iterable[Feed]) -> list[int]:
    """Keys of records that belong to no feed: their key was altered, or their feed's row was."""
    spans = {f.id: (f.base.id, f.head.id) for f in feeds}
    counted = sum(head - base for base, head in spans.values())
    counted -= sum(last - first + 1 for f in feeds for first, last in f.holes)
    if db.execute("SELECT count(*) FROM records").fetchone()[0] == counted:
        return []
    found = []
    for (key,) in db.execute("SELECT id FROM records"):
        base, head = spans.get(key >> SHIFT, (0, -1))
        if not base < number_of(key) <= head:
            found.append(key)
    return found


def _ends_by_records(db: sqlite3.Connection, feed: int, mesh: str, chain: str, writer: bytes) -> _Ends | None:
    """Base and head by the oldest and newest record; None where the feed is not this writer's by its records."""
    span = (key_of(feed, 0), key_of(feed, NUMBER_MAX))
    ends = []
    for order in ("ASC", "DESC"):
        sql = f"SELECT id, blob, sig FROM records WHERE id BETWEEN ? AND ? ORDER BY id {order} LIMIT 1"
        row = db.execute(sql, span).fetchone()
        if (
            row is None
            or not isinstance(row[1], bytes)
            or not verify(writer, CONTEXT + hash_of(row[1]), row[2])
        ):
            return None
        ends.append(row)
    first = decode(ends[0][1])
    base = Link(first.id - 1, first.prev)
    if first.id == 1 and first.prev != first_link(mesh, chain, writer):
        return None
    proof = fork_rows(db, feed)
    fork = decode(proof[0][0]).id if proof else None
    return _Ends(base, Link(number_of(ends[1][0]), hash_of(ends[1][1])), fork)


def _measured(db: sqlite3.Connection, feed: Feed) -> Feed:
    """The feed with its size and its holes, by what is there."""
    span = (key_of(feed.id, feed.base.id + 1), key_of(feed.id, feed.head.id))
    count, size = db.execute(
        "SELECT count(*), coalesce(sum(length(blob) + length(sig)), 0) FROM records WHERE id BETWEEN ? AND ?",
        span,
    ).fetchone()
    holes: list[Span] = []
    if count != feed.head.id - feed.base.id:
        at = feed.base.id
        for (key,) in db.execute("SELECT id FROM records WHERE id BETWEEN ? AND ? ORDER BY id", span):
            if number_of(key) > at + 1:
                holes.append((at + 1, number_of(key) - 1))
            at = number_of(key)
        if at < feed.head.id:
            holes.append((at + 1, feed.head.id))
    return msgspec.structs.replace(feed, holes=tuple(holes), bytes=size)


def judge(
    db: sqlite3.Connection, feed: Feed, first: int, last: int, most: int
) -> tuple[list[tuple[int, RemoteError]], int]:
    """What is wrong with the records `first`…`last` of a feed, `most` of them, and the number of the last looked at.
    Full: sum, signature, number and link of each. UnsupportedVersion: sound, as far as this build can tell."""
    wrong: list[tuple[int, RemoteError]] = []
    before: Link | None = feed.base if first == feed.base.id + 1 else None
    seen = first - 1
    for row in db.execute(BETWEEN, (key_of(feed.id, first), key_of(feed.id, last), most)):
        number = seen = number_of(row[0])
        try:
            if not sound(row):
                raise RemoteError("not the bytes that were written")
            digest = hash_of(row[1])
            if not verify(feed.writer, CONTEXT + digest, row[2]):
                raise RemoteError("its bytes don't fit the writer's signature")
            record = decode(row[1])
            if record.id != number:
                raise RemoteError(f"record {record.id} by its own word")
            follows = before is not None and before.id == number - 1 and before.hash != record.prev
            if follows and record.kind != "chain.damage":
                raise RemoteError(f"doesn't follow record {number - 1}")
            before = Link(number, digest)
        except RemoteError as why:
            wrong.append((number, why))
            before = Link(number, digest) if isinstance(why, UnsupportedVersion) else None
    if seen < first or seen >= last:
        seen = last
    if (
        seen >= feed.head.id
        and before is not None
        and before.id == feed.head.id
        and before.hash != feed.head.hash
    ):
        wrong.append((before.id, RemoteError("not the record that was written")))
    return wrong, seen


def salvage(path: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The rows of a damaged file, table by table, as far as SQLite still reads them."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1.0)) as db:
        for table, key in (("feeds", "id"), ("records", "id"), ("forks", "feed")):
            at, missed = -1, 0
            while missed < 10_000:
                try:
                    sql = f"SELECT * FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT 50"
                    rows = db.execute(sql, (at,)).fetchall()
                except sqlite3.Error:
                    rows = _one_by_one(db, table, key, at)
                    missed += 50 - len(rows)
                    at = max([at + 50, *(row[0] for row in rows)])
                    yield from ((table, row) for row in rows)
                    if missed >= 10_000:
                        break
                    continue
                if not rows:
                    break
                at = rows[-1][0]
                yield from ((table, row) for row in rows)


def _one_by_one(db: sqlite3.Connection, table: str, key: str, at: int) -> list[tuple[Any, ...]]:
    found = []
    for each in range(at + 1, at + 51):
        with contextlib.suppress(sqlite3.Error):
            row = db.execute(f"SELECT * FROM {table} WHERE {key} = ?", (each,)).fetchone()
            if row is not None:
                found.append(row)
    return found
