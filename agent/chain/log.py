"""The file below a node's journal: a signed chain of records that survives crashes, full disks and damage.

One SQLite file in WAL mode, used from the thread of the event loop. Two promises, by who asks:

- *durable* writes return after one fsync, or raise Refused("journal_full") and have changed nothing;
- all others are gathered and committed together FLUSH_DELAY_S later without an fsync: they survive the end of
  the process once committed, cost an idle node nothing, and never fail the caller (`counters` tells).

Damage never ends the agent. A record that is torn, altered or missing is named, moved to the table
`quarantine`, and the chain goes on with a `chain.damage` record that follows the last good one. A file that
SQLite can't read is moved aside, what is still readable of the facts and ops is taken over, and a new file
begins. `problems` holds a line for people about each. Long chains are cut at the old end: a `chain.pruned`
record and `base` keep the number and hash of the last record cut, so the rest stays verifiable.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from agent.chain import tables
from agent.chain.file import CHECKPOINT_BYTES, ChainFile
from agent.chain.record import (
    DISPATCHED,
    Disposition,
    Record,
    decode,
    encode,
    genesis,
    hash_of,
    sign,
)
from agent.chain.tables import Damage, Report
from agent.chain.weighing import Link
from discovery.errors import LocalError, Refused, RemoteError
from discovery.identity import Identity

FLUSH_DELAY_S = 0.2
FLUSH_RECORDS = 64
RETRY_DELAY_S = 5.0
PENDING_MAX = 1024
KEEP_RECORDS = 50_000
PRUNE_SLACK = 500
TAIL_CHECKED = 64
NUMBERS_A_MINUTE = 64
NUMBERS_FROM_MINUTE = 28_927_000
"""A minute in 2024, before which no journal was written."""
CHECKPOINT_COMMITS = 64

__all__ = ["CHECKPOINT_BYTES", "Log"]


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Log:
    """The chain in the file `path`, written by `identity`. LocalError when the place can't be used."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        now_ms: Callable[[], int] = _wall_ms,
        keep_records: int = KEEP_RECORDS,
        wrote_before: bool = False,
    ) -> None:
        """`wrote_before`: this identity is known to have written here; an empty file is then a lost one."""
        self.path = path
        self.counters: Counter[str] = Counter()
        self.problems: list[str] = []
        """What was found damaged since this journal was opened, a line each."""
        self.grown: Callable[[], None] = lambda: None
        """Called when records were committed."""
        self._identity = identity
        self._now_ms = now_ms
        self._keep = keep_records
        self._pending: list[tuple[int, bytes, bytes]] = []
        self._pending_facts: dict[str, str | None] = {}
        self._facts: dict[str, str] = {}
        self._carried: list[tuple[str, Sequence[Any]]] = []
        """What was saved of a damaged file and is not in the new one yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._failing = False
        self._commits = 0
        self._file = ChainFile(path)
        self._closed = False
        self._checkpointing: asyncio.Future[None] | None = None
        self._head = self._committed = self._base = Link(0, genesis(identity.pub))
        self._open()
        if wrote_before and self._head.id == 0:
            self._begin_again()

    @property
    def _db(self) -> sqlite3.Connection:
        return self._file.db

    @_db.setter
    def _db(self, db: sqlite3.Connection) -> None:
        self._file.db = db

    @property
    def _sync(self) -> str:
        return self._file.sync

    # -- records -------------------------------------------------------------------------

    def append(
        self,
        kind: str,
        body: dict[str, Any] | None = None,
        disposition: Disposition = DISPATCHED,
        *,
        at_ms: int | None = None,
        durable: bool = False,
    ) -> int:
        """Adds a record and returns its number. LocalError when the body can't be encoded."""
        if self._closed:
            self.counters["append_after_close"] += 1
            if durable:
                raise Refused("journal_full", "the journal is closed")
            return self._head.id
        if durable:
            before = len(self._pending)
            number = self._seal(kind, body, disposition, at_ms)
            self._write([], durable=True, undo_to=before)
            return number
        if len(self._pending) >= PENDING_MAX:
            self.counters["append_dropped"] += len(self._pending)
            self._pending.clear()
            self._head = self._committed
        number = self._seal(kind, body, disposition, at_ms)
        self._flush_soon()
        return number

    def tail(self, count: int) -> list[Record]:
        """The newest `count` records, oldest first; one that doesn't decode is left out."""
        pending = [blob for _, blob, _ in self._pending[-count:]] if count > 0 else []
        wanted = count - len(pending)
        stored: list[bytes] = []
        if wanted > 0:
            with contextlib.suppress(sqlite3.Error):
                rows = self._db.execute(
                    "SELECT blob FROM records ORDER BY id DESC LIMIT ?", (wanted,)
                ).fetchall()
                stored = [row[0] for row in reversed(rows)]
        found = []
        for blob in stored + pending:
            with contextlib.suppress(RemoteError, TypeError):
                found.append(decode(blob))
        return found

    @property
    def head(self) -> Link:
        """Number and hash of the newest record, committed or not."""
        return self._head

    @property
    def committed(self) -> Link:
        """Number and hash of the newest record in the file."""
        return self._committed

    @property
    def base(self) -> Link:
        """Number and hash of the last record that was cut at the old end."""
        return self._base

    def rows(self, first: int, last: int, most: int) -> list[tuple[int, bytes, bytes]]:
        """Number, bytes and signature of the committed records `first`…`last`, `most` of them."""
        sql = "SELECT id, blob, sig FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?"
        with contextlib.suppress(sqlite3.Error):
            found = self._db.execute(sql, (first, last, most)).fetchall()
            return [row for row in found if isinstance(row[1], bytes) and isinstance(row[2], bytes)]
        return []

    def missing(self) -> list[tuple[int, int]]:
        """First and last number of each stretch that was lost here, and may still be held elsewhere."""
        with contextlib.suppress(sqlite3.Error):
            return tables.gaps(self._db, self._base, self._committed)
        return []

    def fill(self, rows: Sequence[tuple[bytes, bytes]]) -> int:
        """Puts back lost records that another node held (bytes and signature of each); how many fit."""
        missing = self.missing()
        statements: list[tuple[str, Sequence[Any]]] = []
        for blob, sig in rows:
            try:
                number = tables.fits(self._db, self._identity.pub, blob, sig)
            except (RemoteError, sqlite3.Error, TypeError):
                self.counters["fill_refused"] += 1
                continue
            if any(first <= number <= last for first, last in missing):
                statements.append((tables.FILL_RECORD, (number, blob, sig)))
        if not statements or self._closed:
            return 0
        try:
            self._write(statements, durable=False)
        except Refused:
            return 0
        self.append("chain.mended", {"records": len(statements)})
        return len(statements)

    def verify(self, *, repair: bool = False) -> Report:
        """Checks every record: bytes, signature, links, gaps. About 0.1 ms a record; `repair` quarantines.

        `tables.verify_file` does the same from another thread or process."""
        self.flush()
        report = tables.verify_file(self.path, self._identity.pub)
        if repair and report.damage:
            self._quarantine(report.damage)
        return report

    def flush(self) -> bool:
        """Commits what waits, without an fsync. False when that failed; it is tried again."""
        self._cancel_timer()
        if self._closed or not (self._pending or self._pending_facts):
            return True
        try:
            self._write([], durable=False)
        except Refused:
            self._flush_soon()
            return False
        return True

    def close(self) -> None:
        """Commits what waits and closes the file. Twice is once."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        self._cancel_timer()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- writing -------------------------------------------------------------------------

    def _undo(self, keep: int) -> None:
        """Forgets the records sealed after the first `keep` that wait."""
        del self._pending[keep:]
        self._head = (
            Link(self._pending[-1][0], hash_of(self._pending[-1][1])) if self._pending else self._committed
        )

    def _seal(
        self, kind: str, body: dict[str, Any] | None, disposition: Disposition, at_ms: int | None
    ) -> int:
        number = self._head.id + 1
        when = self._now_ms() if at_ms is None else at_ms
        record = Record(
            id=number,
            kind=kind,
            emitted_at_ms=max(0, when),
            disposition=disposition,
            prev=self._head.hash,
            body=body,
        )
        try:
            blob = encode(record)
        except (TypeError, ValueError, OverflowError, RecursionError) as why:
            raise LocalError(f"record {kind!r} can't be kept: {why}") from why
        digest = hash_of(blob)
        self._pending.append((number, blob, sign(digest, self._identity.sign)))
        self._head = Link(number, digest)
        return number

    def _write(
        self,
        statements: list[tuple[str, Sequence[Any]]],
        *,
        durable: bool,
        undo_to: int | None = None,
        again: bool = True,
    ) -> None:
        """One transaction of all that waits and `statements`.

        On failure: counted, what was sealed after the first `undo_to` is forgotten, Refused."""
        if self._closed:
            if undo_to is not None:
                self._undo(undo_to)
            raise Refused("journal_full", "the journal is closed")

        def work() -> None:
            self._db.executemany(tables.INSERT_RECORD, self._pending)
            for key, text in self._pending_facts.items():
                self._db.execute(*tables.put_fact(key, text))
            for sql, params in [*self._carried, *statements]:
                self._db.execute(sql, params)
            if self._head != self._committed:
                self._db.execute(*tables.put_link("head", self._head))

        try:
            self._file.transact(work, durable=durable)
        except (sqlite3.Error, OverflowError) as why:
            if again and tables.damaged(why) and self._replaced(str(why)):
                undo_to = None if undo_to is None else undo_to + 1
                self._write(statements, durable=durable, undo_to=undo_to, again=False)
                return
            self.counters["append_failed"] += 1
            self._failing = True
            if undo_to is not None:
                self._undo(undo_to)
            raise Refused("journal_full", f"the journal can't be written: {why}") from why
        self._pending.clear()
        self._pending_facts.clear()
        self._carried.clear()
        grew, self._committed = self._head != self._committed, self._head
        self._failing = False
        self._cancel_timer()
        self._after_commit(durable)
        if grew:
            self.grown()

    def _after_commit(self, durable: bool) -> None:
        self._commits += 1
        if not durable and self._head.id - self._base.id > self._keep + PRUNE_SLACK:
            self._prune()
        if self._commits % CHECKPOINT_COMMITS == 0:
            self._checkpoint_aside()

    def _prune(self) -> None:
        cut = self._head.id - self._keep
        try:
            row = self._db.execute(
                "SELECT id, blob FROM records WHERE id <= ? ORDER BY id DESC LIMIT 1", (cut,)
            )
            found = row.fetchone()
            if found is None:
                return
            base = Link(found[0], hash_of(found[1]))
            before = len(self._pending)
            self._seal("chain.pruned", {"upto": base.id, "hash": base.hash}, DISPATCHED, None)
            self._base, old = base, self._base
            try:
                self._write(
                    [("DELETE FROM records WHERE id <= ?", (base.id,)), tables.put_link("base", base)],
                    durable=False,
                    undo_to=before,
                )
            except Refused:
                self._base = old
        except (sqlite3.Error, TypeError):
            self.counters["prune_failed"] += 1

    def _flush_soon(self) -> None:
        """Commits later while an event loop runs, at once when none does."""
        if len(self._pending) >= FLUSH_RECORDS and not self._failing:
            self.flush()
            return
        if self._timer is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            if self._pending or self._pending_facts:
                with contextlib.suppress(Refused):
                    self._write([], durable=False)
            return
        self._timer = loop.call_later(RETRY_DELAY_S if self._failing else FLUSH_DELAY_S, self.flush)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _checkpoint_aside(self) -> None:
        """Moves the WAL into the file off the event loop: that is where the slow fsyncs are."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if not self._file.checkpoint_due():
            return
        if self._checkpointing is None or self._checkpointing.done():
            self._checkpointing = loop.run_in_executor(None, tables.checkpoint, self.path)

    # -- opening and damage --------------------------------------------------------------

    def _remember(self, key: str, text: str | None) -> None:
        if text is None:
            self._facts.pop(key, None)
        else:
            self._facts[key] = text

    def _open(self) -> None:
        self._file.create()
        db = self._file.connect()
        try:
            found = tables.read(db, self._identity.pub, TAIL_CHECKED)
        except sqlite3.Error as why:
            db.close()
            if not tables.damaged(why) and getattr(why, "sqlite_errorcode", 1) != sqlite3.SQLITE_ERROR:
                raise LocalError(f"journal {self.path}: {why}; check the disk and who owns it") from why
            self._start_over(str(why), carry=False)
            return
        except (tables.AnotherWriter, ValueError, TypeError) as why:
            db.close()
            self._start_over(str(why), carry=False, salvage=not isinstance(why, tables.AnotherWriter))
            return
        except tables.Newer as why:
            db.close()
            raise LocalError(
                f"journal {self.path}: {why}; start the newer build, or move the file away"
            ) from why
        self._facts = found.facts
        self._base = found.base
        self._head = self._committed = found.head
        self.problems += found.notes
        if found.damage:
            self._quarantine(found.damage)

    def _quarantine(self, damage: Sequence[Damage]) -> None:
        """Takes damaged records out, says so in the chain, and goes on after the last good one."""
        self.flush()
        before = len(self._pending)
        taken = [d.seq for d in damage if d.present and d.seq is not None]
        try:
            good = tables.last_good(self._db, set(taken)) or self._base
            self._head = Link(max(self._head.id, good.id), good.hash)
            for d in damage:
                body = {"first": d.seq, "last": d.last, "reason": d.reason}
                self._seal("chain.damage", body, DISPATCHED, None)
                self.problems.append(f"journal record {d.name}: {d.reason}")
                self.counters["records_damaged"] += 1
            self._write(tables.quarantine(damage, self._now_ms()), durable=True, undo_to=before)
        except (Refused, sqlite3.Error) as why:
            self._undo(before)
            self.problems.append(f"journal damage could not be set aside: {why}")

    def _replaced(self, reason: str) -> bool:
        """Whether a file found broken while in use could be replaced by a new one."""
        try:
            self._start_over(reason, carry=True)
        except (LocalError, sqlite3.Error) as why:
            self.problems.append(f"journal {self.path}: {reason}, and no new one could be begun: {why}")
            return False
        return True

    def _begin_again(self) -> None:
        """Goes on where no record can have been, and says so: two records of one number would end this chain for those
        who hold the lost ones."""
        reason = "no journal was there, though this node had written one"
        self._base = self._committed = self._head = self._unused()
        self.problems.append(f"journal {self.path}: {reason}; a new one begun")
        self.counters["journal_replaced"] += 1
        self._seal("chain.damage", {"first": None, "last": self._head.id, "reason": reason}, DISPATCHED, None)
        self._carried = [tables.put_link("base", self._base)]
        try:
            self._write([], durable=True, again=False)
        except Refused as why:
            raise LocalError(f"journal {self.path}: {why}; check the disk") from why

    def _unused(self) -> Link:
        """Below the first number that a new file of this writer may take: no journal grows faster for long."""
        minutes = max(0, self._now_ms() // 60_000 - NUMBERS_FROM_MINUTE)
        return Link(minutes * NUMBERS_A_MINUTE, genesis(self._identity.pub))

    def _start_over(self, reason: str, *, carry: bool, salvage: bool = True) -> None:
        """Moves the file aside under a name that says when, and begins a new one with what could be saved."""
        if carry:
            self._file.close()
        try:
            aside = tables.move_aside(self.path, self._now_ms())
        except OSError as why:
            raise LocalError(f"journal {self.path}: {reason}, and can't be moved: {why.strerror}") from why
        saved = tables.salvage(aside, self._identity.pub) if salvage else tables.Saved()
        if carry:
            saved.facts = self._facts
            saved.head = self._committed
        pending = [decode(blob) for _, blob, _ in self._pending]
        db = self._file.connect()
        self.path.chmod(0o600)
        tables.read(db, self._identity.pub, TAIL_CHECKED)
        self._facts = saved.facts
        self._pending_facts = dict(saved.facts)
        self._base = self._committed = self._head = saved.head or self._unused()
        self._pending.clear()
        self.problems.append(f"journal {self.path}: {reason}; moved to {aside.name}, a new one begun")
        self.counters["journal_replaced"] += 1
        body = {"first": None, "last": self._head.id, "reason": reason, "moved_to": aside.name}
        self._seal("chain.damage", body, DISPATCHED, None)
        for r in pending:
            self._seal(r.kind, r.body, r.disposition, r.emitted_at_ms)
        self._carried = [(tables.INSERT_WHOLE_OP, op) for op in saved.ops]
        self._carried.append(tables.put_link("base", self._base))
        if not carry:
            try:
                self._write([], durable=True, again=False)
            except Refused as why:
                raise LocalError(f"journal {self.path}: {why}; check the disk") from why
