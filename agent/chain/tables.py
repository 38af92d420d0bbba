"""The journal's SQLite tables: statements, reading, checking, and what is saved of a damaged file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agent.chain.record import UnsupportedVersion, check, decode, genesis, hash_of, readable
from agent.chain.weighing import Link
from discovery.errors import RemoteError
from discovery.identity import verify as verify_signature

SCHEMA_VERSION = 1
NUMBER_MAX = 2**53
"""No chain gets this long: a larger number in the file is damage."""
QUARANTINE_MAX = 1000
ASIDE_MAX = 3
WAL_PAGES_MAX = 20_000
"""SQLite's own checkpoint inside a commit, only if the one aside never gets its turn."""

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, blob BLOB NOT NULL, sig BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine
  (n INTEGER PRIMARY KEY, id INTEGER, blob BLOB, sig BLOB, reason TEXT, found_ms INTEGER);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ops (op_id TEXT PRIMARY KEY, content BLOB NOT NULL,
  verb TEXT NOT NULL, target TEXT NOT NULL, operator TEXT NOT NULL, received_ms INTEGER NOT NULL,
  finished_ms INTEGER, result TEXT);
CREATE INDEX IF NOT EXISTS ops_received ON ops (received_ms);
"""
INSERT_RECORD = "INSERT INTO records (id, blob, sig) VALUES (?, ?, ?)"
FILL_RECORD = "INSERT OR IGNORE INTO records (id, blob, sig) VALUES (?, ?, ?)"
INSERT_OP = "INSERT INTO ops (op_id, content, verb, target, operator, received_ms) VALUES (?, ?, ?, ?, ?, ?)"
INSERT_WHOLE_OP = "INSERT OR IGNORE INTO ops VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
FINISH_OP = "UPDATE ops SET finished_ms = ?, result = ? WHERE op_id = ?"
_OP = "SELECT op_id, content, verb, target, operator, received_ms, finished_ms, result FROM ops"
SELECT_OP = f"{_OP} WHERE op_id = ?"
UNFINISHED_OPS = f"{_OP} WHERE result IS NULL ORDER BY received_ms, op_id"

Statement = tuple[str, Sequence[Any]]


class Damage(msgspec.Struct, frozen=True):
    """A record (or, up to `last`, several) that can't be believed, and why. `present`: its bytes exist."""

    seq: int | None
    reason: str
    last: int
    present: bool = True

    @property
    def name(self) -> str:
        if self.seq is None:
            return "file"
        return str(self.seq) if self.last == self.seq else f"{self.seq}–{self.last}"


class Report(msgspec.Struct, frozen=True):
    """What a check of the whole chain found. `first` and `last` are record numbers, None if it is empty."""

    records: int
    first: int | None
    last: int | None
    damage: list[Damage]

    @property
    def ok(self) -> bool:
        return not self.damage


class AnotherWriter(Exception):
    """The file is the journal of another key."""


class Newer(Exception):
    """The file is laid out by a newer build."""


@dataclass
class Found:
    """What an opened file holds."""

    head: Link
    base: Link
    facts: dict[str, str]
    damage: list[Damage]
    notes: list[str]


@dataclass
class Saved:
    """What could still be read of a damaged file."""

    head: Link | None = None
    facts: dict[str, str] = field(default_factory=dict)
    ops: list[Sequence[Any]] = field(default_factory=list)


def damaged(why: BaseException) -> bool:
    """Whether SQLite says that the file itself is broken (not that the disk is full or the file locked)."""
    code = getattr(why, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def put_fact(key: str, text: str | None) -> Statement:
    if text is None:
        return "DELETE FROM facts WHERE key = ?", (key,)
    return "INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (
        key,
        text,
    )


def put_link(name: str, link: Link) -> Statement:
    value = msgspec.msgpack.encode(link)
    return "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (
        name,
        value,
    )


def forget_ops(now_ms: int, kept_ms: int, most: int, never_younger_ms: int) -> list[Statement]:
    """Forgets ops older than `kept_ms`, and the oldest beyond `most` that are older than the floor."""
    return [
        ("DELETE FROM ops WHERE received_ms < ?", (now_ms - kept_ms,)),
        (
            "DELETE FROM ops WHERE received_ms < ? AND op_id NOT IN"
            " (SELECT op_id FROM ops ORDER BY received_ms DESC LIMIT ?)",
            (now_ms - never_younger_ms, most),
        ),
    ]


def quarantine(damage: Iterable[Damage], now_ms: int) -> list[Statement]:
    """Moves damaged records out of the chain, keeping their bytes for whoever wants to look."""
    moves: list[Statement] = []
    for d in damage:
        if d.present and d.seq is not None:
            moves.append(
                (
                    "INSERT INTO quarantine (id, blob, sig, reason, found_ms)"
                    " SELECT id, blob, sig, ?, ? FROM records WHERE id = ?",
                    (d.reason, now_ms, d.seq),
                )
            )
            moves.append(("DELETE FROM records WHERE id = ?", (d.seq,)))
    moves.append(
        (
            "DELETE FROM quarantine WHERE n <= (SELECT coalesce(max(n), 0) FROM quarantine) - ?",
            (QUARANTINE_MAX,),
        )
    )
    return moves


def read(db: sqlite3.Connection, pub: bytes, tail: int) -> Found:
    """Makes the tables that are missing, reads the facts, and checks the newest `tail` records."""
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES_MAX}")
    meta = _meta(db) if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() else {}
    if int(meta.get("schema", SCHEMA_VERSION)) > SCHEMA_VERSION:
        raise Newer(f"laid out by a newer build (schema {meta['schema']}, this build knows {SCHEMA_VERSION})")
    if meta.get("writer", pub) != pub:
        raise AnotherWriter("written by another key")
    if not meta:
        db.executescript(f"BEGIN; {TABLES} COMMIT;")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?), ('writer', ?)", (SCHEMA_VERSION, pub))
    notes: list[str] = []
    base = _link(meta.get("base")) or Link(0, genesis(pub))
    facts = {}
    for key, value in db.execute("SELECT key, value FROM facts").fetchall():
        try:
            msgspec.json.decode(value)
            facts[key] = value
        except (msgspec.DecodeError, TypeError):
            notes.append(f"journal fact {key!r}: not readable, forgotten")
    newest_first = "SELECT id, blob, sig FROM records WHERE id > ? ORDER BY id DESC LIMIT ?"
    rows = db.execute(newest_first, (base.id, tail)).fetchall()[::-1]
    whole = len(rows) < tail
    damage = judge(rows, pub, base if whole else None)
    strays = db.execute("SELECT id FROM records WHERE id <= ? LIMIT 1000", (base.id,)).fetchall()
    damage += [Damage(number, "before the beginning of the chain", number) for (number,) in strays]
    for blob in (blob for _, blob, _ in rows if isinstance(blob, bytes) and blob and not readable(blob)):
        if (said := f"journal: {UnsupportedVersion(blob[0])}") not in notes:
            notes.append(said)
    bad = {d.seq for d in damage}
    good = [row for row in rows if row[0] not in bad]
    newest = Link(good[-1][0], _hash(good[-1][1])) if good else base
    head = _link(meta.get("head")) or newest
    if (missing := _missing_at_end(db, base, head)) is not None:
        damage.append(missing)
    elif head.id == newest.id and head.hash != newest.hash:
        damage.append(Damage(newest.id, "not the record that was written", newest.id))
    return Found(Link(max(head.id, newest.id), newest.hash), base, facts, damage, notes)


def judge(rows: Iterable[tuple[int, Any, Any]], pub: bytes, before: Link | None) -> list[Damage]:
    """The damage in these rows, which ascend. `before` is what the first must follow, None when unknown."""
    damage: list[Damage] = []
    gaps: list[tuple[int, int]] = []
    explained: list[tuple[int, int]] = []
    at = before.id if before else None
    link = before
    for number, blob, sig in rows:
        next_one = at is None or number == at + 1
        try:
            digest, said = _believe(number, blob, sig, pub, link if next_one else None)
        except RemoteError as why:
            damage.append(Damage(number, str(why), number))
            explained.append((number, number))
            link = None
            at = number if next_one else at
            continue
        if said is not None:
            explained.append(said)
        if at is not None and not next_one:
            gaps.append((at + 1, number - 1))
        at, link = number, Link(number, digest)
    for gap in gaps:
        while (missing := _unexplained(*gap, explained)) is not None:
            damage.append(Damage(missing[0], "missing", missing[1], present=False))
            explained.append(missing)
    return sorted(damage, key=lambda d: d.seq or 0)


def _believe(
    number: int, blob: Any, sig: Any, pub: bytes, follows: Link | None
) -> tuple[bytes, tuple[int, int] | None]:
    """The hash of a sound row, and the numbers whose absence it explains; RemoteError says what is wrong."""
    if not (isinstance(blob, bytes) and isinstance(sig, bytes)):
        raise RemoteError("not bytes")
    try:
        record, digest = check(blob, sig, pub=pub, verify=verify_signature)
    except UnsupportedVersion:
        return hash_of(blob), None
    if record.id != number:
        raise RemoteError(f"record {record.id} by its own word")
    if record.kind != "chain.damage":
        if follows is not None and record.prev != follows.hash:
            raise RemoteError(f"doesn't follow record {follows.id}")
        return digest, None
    if (
        not record.body
    ):  # it follows the last good one of its time; what was lost may have been filled in since
        return digest, None
    first, last = record.body.get("first"), record.body.get("last")
    return digest, (first if isinstance(first, int) else 0, last if isinstance(last, int) else 0)


def _unexplained(first: int, last: int, explained: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The first stretch of `first`…`last` that no explained range covers."""
    for a, b in sorted(explained):
        if a <= first <= b:
            first = b + 1
        elif first < a <= last:
            last = a - 1
    return (first, last) if first <= last else None


def _missing_at_end(db: sqlite3.Connection, base: Link, head: Link) -> Damage | None:
    """The records that were written, by the head that was kept, and are not there."""
    row = db.execute("SELECT max(id) FROM records WHERE id BETWEEN ? AND ?", (base.id, head.id)).fetchone()
    newest = base.id if row[0] is None else row[0]
    if newest >= head.id:
        return None
    return Damage(newest + 1, "missing at the end", head.id, present=False)


def gaps(db: sqlite3.Connection, base: Link, head: Link) -> list[tuple[int, int]]:
    """Numbers between these that no record has."""
    span = (base.id + 1, head.id)
    if (
        db.execute("SELECT count(*) FROM records WHERE id BETWEEN ? AND ?", span).fetchone()[0]
        == head.id - base.id
    ):
        return []
    found, at = [], base.id
    for (number,) in db.execute("SELECT id FROM records WHERE id BETWEEN ? AND ? ORDER BY id", span):
        if number > at + 1:
            found.append((at + 1, number - 1))
        at = number
    return [*found, (at + 1, head.id)] if at < head.id else found


def fits(db: sqlite3.Connection, pub: bytes, blob: bytes, sig: bytes) -> int:
    """The number of a record that was lost here and that somebody else still has, if it is the one that stood there:
    its writer's, and linked to what stands beside it. RemoteError otherwise."""
    record, digest = check(blob, sig, pub=pub, verify=verify_signature)
    beside = dict(
        db.execute(
            "SELECT id, blob FROM records WHERE id IN (?, ?)", (record.id - 1, record.id + 1)
        ).fetchall()
    )
    before, after = beside.get(record.id - 1), beside.get(record.id + 1)
    if before is not None and record.kind != "chain.damage" and record.prev != _hash(before):
        raise RemoteError(f"doesn't follow record {record.id - 1}")
    if after is not None and readable(after):
        following = decode(after)
        if following.kind != "chain.damage" and following.prev != digest:
            raise RemoteError(f"not the one that record {record.id + 1} follows")
    return record.id


def last_good(db: sqlite3.Connection, without: set[int]) -> Link | None:
    """The newest record that is not among those."""
    for number, blob in db.execute("SELECT id, blob FROM records ORDER BY id DESC"):
        if number not in without:
            return Link(number, _hash(blob))
    return None


def verify_file(path: Path, pub: bytes) -> Report:
    """Checks a whole journal file, read-only, from any thread or process."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=2.0)
        ) as db:
            damage = []
            pages = [row[0] for row in db.execute("PRAGMA quick_check(5)").fetchall()]
            if pages != ["ok"]:
                damage.append(
                    Damage(None, f"SQLite: {'; '.join(str(p).strip() for p in pages)}", 0, present=False)
                )
            db.execute("BEGIN")
            meta = _meta(db)
            count, first, last = db.execute("SELECT count(*), min(id), max(id) FROM records").fetchone()
            base = _link(meta.get("base")) or Link(0, genesis(pub))
            damage += judge(db.execute("SELECT id, blob, sig FROM records ORDER BY id"), pub, base)
            head = _link(meta.get("head"))
            if head is not None and (missing := _missing_at_end(db, base, head)) is not None:
                damage.append(missing)
            return Report(count, first, last, damage)
    except sqlite3.Error as why:
        return Report(0, None, None, [Damage(None, f"SQLite: {why}", 0, present=False)])


def checkpoint(path: Path) -> None:
    """Moves what the WAL holds into the file; never in the way of a writer."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1.0)) as db:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")


def move_aside(path: Path, now_ms: int) -> Path:
    """Renames the file and its WAL to `<name>.damaged-<ms>`; the newest ASIDE_MAX of these are kept."""
    aside = path.with_name(f"{path.name}.damaged-{now_ms}")
    while aside.exists():
        now_ms += 1
        aside = path.with_name(f"{path.name}.damaged-{now_ms}")
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    path.rename(aside)
    older = sorted(
        p for p in path.parent.glob(f"{path.name}.damaged-*") if not p.name.endswith(("-wal", "-shm"))
    )
    for old in older[:-ASIDE_MAX]:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                Path(f"{old}{suffix}").unlink()
    return aside


def salvage(path: Path, pub: bytes) -> Saved:
    """Facts, ops and the head of a damaged file, each as far as SQLite still reads it."""
    saved = Saved()
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1.0)) as db:
        meta: dict[str, Any] = {}
        with contextlib.suppress(sqlite3.Error):
            meta = _meta(db)
        if meta.get("writer", pub) != pub:
            return saved
        saved.head = _link(meta.get("head"))
        with contextlib.suppress(sqlite3.Error, msgspec.DecodeError, TypeError):
            for key, value in db.execute("SELECT key, value FROM facts"):
                msgspec.json.decode(value)
                saved.facts[str(key)] = value
        with contextlib.suppress(sqlite3.Error):
            for row in db.execute(_OP):
                saved.ops.append(row)
    return saved


def _meta(db: sqlite3.Connection) -> dict[str, Any]:
    return dict(db.execute("SELECT key, value FROM meta").fetchall())


def _hash(blob: Any) -> bytes:
    return hash_of(blob) if isinstance(blob, bytes) else b"\0" * 32


def _link(value: Any) -> Link | None:
    try:
        number, digest = msgspec.msgpack.decode(value, type=tuple[int, bytes])
    except (msgspec.MsgspecError, TypeError):
        return None
    return Link(number, digest) if 0 <= number < NUMBER_MAX and len(digest) == 32 else None
