"""The journal as its neighbours see it: what it keeps, what it says of damage and of a disk that is full."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.chain import Failed, Handover, Journal, log, tables
from agent.chain.feedreading import Want
from agent.chain.journalfeed import JournalFeed
from agent.chain.record import EmptyRecord
from agent.chain.weighing import Link
from discovery.errors import LocalError, Refused
from discovery.identity import Identity

ME = Identity.from_seed(b"j" * 32)
OTHER = Identity.from_seed(b"k" * 32)
OP = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


def reserve(journal: Journal, op_id: str = OP, content: bytes = b"c" * 32, at_ms: int = 1000) -> object:
    return journal.reserve(op_id, content, verb="kill", target="t" * 16, operator="anna", at_ms=at_ms)


@contextlib.contextmanager
def raw(path: Path):
    """The file behind the journal's back."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        yield db
        db.commit()


class Failing:
    """A connection whose commits fail as long as `failing` holds: stands for a full or broken disk."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.failing = True

    def execute(self, sql: str, *params: object):
        if self.failing and sql == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self.db.execute(sql, *params)

    def executescript(self, sql: str):
        return self.db.executescript(sql)

    def executemany(self, *args: object):
        return self.db.executemany(*args)

    def close(self) -> None:
        self.db.close()


def kinds(journal: Journal, count: int = 100) -> list[str]:
    return [record.kind for record in journal.tail(count)]


# -- records -----------------------------------------------------------


def test_records_appended_are_there_after_reopening(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.append("a", {"n": 1}, at_ms=5)
        journal.append("b", None, Failed("no route", 10), at_ms=6, durable=True)
    with Journal(path, ME) as journal:
        a, b = journal.tail(10)
        assert (a.id, a.kind, a.body, a.emitted_at_ms) == (1, "a", {"n": 1}, 5)
        assert (b.id, b.disposition) == (2, Failed("no route", 10))
        assert journal.append("c") == 3
        assert journal.verify().ok
        assert not journal.problems


def test_file_is_private(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.append("a", durable=True)
        for file in path.parent.iterdir():
            assert file.stat().st_mode & 0o077 == 0, file


def test_plain_appends_are_gathered_into_one_commit(path: Path) -> None:
    async def scenario() -> None:
        with Journal(path, ME) as journal:
            for n in range(10):
                journal.append("event", {"n": n})
            with raw(path) as db:
                assert db.execute("SELECT count(*) FROM records").fetchone() == (0,)
            assert len(journal.tail(20)) == 10
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                await asyncio.sleep(0.02)
                with raw(path) as db:
                    if db.execute("SELECT count(*) FROM records").fetchone() == (10,):
                        return
            pytest.fail("never committed")

    asyncio.run(scenario())


def test_durable_append_takes_what_waits_along_in_order(path: Path) -> None:
    async def scenario() -> None:
        with Journal(path, ME) as journal:
            journal.append("first")
            journal.append("second", durable=True)
            with raw(path) as db:
                assert db.execute("SELECT count(*) FROM records").fetchone() == (2,)
            assert kinds(journal) == ["first", "second"]

    asyncio.run(scenario())


def test_body_that_cannot_be_encoded_is_a_local_error_and_changes_nothing(path: Path) -> None:
    with Journal(path, ME) as journal:
        with pytest.raises(LocalError):
            journal.append("a", {"x": object()})
        with pytest.raises(LocalError):
            journal.append("a", {"x": 2**70})
        assert journal.append("b") == 1


def test_many_records_are_cut_at_the_old_end_and_stay_verifiable(path: Path) -> None:
    with Journal(path, ME, keep_records=50) as journal:
        for n in range(1400):
            journal.append("event", {"n": n})
        report = journal.verify()
        assert report.ok, report.damage
        assert report.records <= 50 + log.PRUNE_SLACK + 2
        assert journal.tail(1)[0].body == {"n": 1399}
    with Journal(path, ME, keep_records=50) as journal:
        assert not journal.problems
        assert journal.verify().ok


# -- damage -----------------------------------------------------------


def filled(path: Path, count: int = 100) -> None:
    with Journal(path, ME) as journal:
        journal.next_incarnation()
        for n in range(count):
            journal.append("event", {"n": n})


def flip(path: Path, number: int) -> None:
    with raw(path) as db:
        blob = bytearray(db.execute("SELECT blob FROM records WHERE id = ?", (number,)).fetchone()[0])
        blob[-1] ^= 1
        db.execute("UPDATE records SET blob = ? WHERE id = ?", (bytes(blob), number))


def test_altered_record_is_named_set_aside_and_the_chain_goes_on(path: Path) -> None:
    filled(path)
    flip(path, 90)
    with Journal(path, ME) as journal:
        assert journal.problems == ["journal record 90: its bytes don't fit the writer's signature"]
        said = journal.tail(1)[0]
        assert said.kind == "chain.damage"
        assert said.body == {"first": 90, "last": 90, "reason": "its bytes don't fit the writer's signature"}
        journal.append("after", durable=True)
        report = journal.verify()
        assert report.ok, report.damage
        assert report.records == 99 + 2
    with raw(path) as db:
        assert db.execute("SELECT id FROM quarantine").fetchall() == [(90,)]
    with Journal(path, ME) as journal:
        assert journal.problems == []
        assert journal.next_incarnation() == 2


@pytest.mark.parametrize(
    ("statement", "seq", "reason"),
    [
        ("UPDATE records SET blob = x'' WHERE id = 100", 100, "zero bytes"),
        ("UPDATE records SET blob = 7 WHERE id = 100", 100, "not bytes"),
        ("UPDATE records SET sig = x'00' WHERE id = 99", 99, "signature"),
        ("DELETE FROM records WHERE id = 99", 99, "missing"),
        ("DELETE FROM records WHERE id > 97", 98, "missing at the end"),
        ("UPDATE records SET id = 777 WHERE id = 100", 777, "record 100 by its own word"),
        (
            "UPDATE records SET id = 9223372036854775807 WHERE id = 100",
            2**63 - 1,
            "record 100 by its own word",
        ),
        ("UPDATE records SET id = -5 WHERE id = 100", 100, "missing at the end"),
        ("UPDATE records SET id = 1000000000 WHERE id = 50", 50, "missing"),
        ("DELETE FROM records WHERE id IN (96, 98)", 98, "missing"),
        ("DELETE FROM records WHERE id BETWEEN 94 AND 96", "94–96", "missing"),
        ("DELETE FROM records WHERE id > 20", "21–100", "missing at the end"),
        ("DELETE FROM records", "1–100", "missing at the end"),
    ],
)
def test_torn_or_missing_record_is_named_once_and_the_journal_lives(
    path: Path, statement: str, seq: int | str, reason: str
) -> None:
    filled(path)
    with raw(path) as db:
        db.execute(statement)
    with Journal(path, ME) as journal:
        assert any(f"record {seq}" in p and reason in p for p in journal.problems), journal.problems
        number = journal.append("after", durable=True)
        assert 100 < number < 110
        assert journal.verify().ok, journal.verify().damage
    with Journal(path, ME) as journal:
        assert journal.problems == []
        assert kinds(journal, 1) == ["after"]


def test_new_gaps_on_both_sides_of_an_old_damage_are_both_named(path: Path) -> None:
    filled(path)
    flip(path, 92)
    Journal(path, ME).close()
    with raw(path) as db:
        db.execute("DELETE FROM records WHERE id BETWEEN 90 AND 94")
    with Journal(path, ME) as journal:
        assert journal.problems == ["journal record 90–91: missing", "journal record 93–94: missing"]
        assert journal.verify().ok


def test_damage_far_from_the_end_is_found_by_a_full_check_and_repaired(path: Path) -> None:
    filled(path, 300)
    flip(path, 3)
    with Journal(path, ME) as journal:
        assert journal.problems == []
        report = journal.verify()
        assert [(d.seq, d.present) for d in report.damage] == [(3, True)]
        journal.verify(repair=True)
        assert journal.verify().ok
        assert journal.problems


def test_record_of_another_writer_in_the_file_is_named(path: Path, tmp_path: Path) -> None:
    filled(path, 5)
    with Journal(tmp_path / "theirs.db", OTHER) as theirs:
        for n in range(5):
            theirs.append("event", {"n": n})
    with raw(tmp_path / "theirs.db") as db:
        row = db.execute("SELECT blob, sig FROM records WHERE id = 4").fetchone()
    with raw(path) as db:
        db.execute("UPDATE records SET blob = ?, sig = ? WHERE id = 4", row)
    with Journal(path, ME) as journal:
        assert "record 4" in journal.problems[0]


def test_own_record_of_another_time_in_its_place_breaks_the_link(path: Path, tmp_path: Path) -> None:
    filled(path, 5)
    with Journal(tmp_path / "earlier.db", ME) as earlier:
        for n in range(5):
            earlier.append("other", {"n": n})
    with raw(tmp_path / "earlier.db") as db:
        row = db.execute("SELECT blob, sig FROM records WHERE id = 4").fetchone()
    with raw(path) as db:
        db.execute("UPDATE records SET blob = ?, sig = ? WHERE id = 4", row)
    with Journal(path, ME) as journal:
        assert "record 4: doesn't follow record 3" in journal.problems[0]
        assert journal.verify().ok


def test_record_of_a_newer_format_is_kept_named_and_a_hole_to_others(path: Path) -> None:
    from agent.chain import record

    filled(path, 3)
    with raw(path) as db:
        blob = b"\x02" + db.execute("SELECT blob FROM records WHERE id = 3").fetchone()[0]
        sig = record.sign(record.hash_of(blob), ME.sign)
        db.execute("UPDATE records SET blob = ?, sig = ? WHERE id = 3", (blob, sig))
        db.execute(*tables.put_link("head", tables.Link(3, record.hash_of(blob))))
    with Journal(path, ME) as journal:
        assert journal.problems == [
            "journal: chain record of version 2, this build reads 1; update this node"
        ]
        journal.append("after", durable=True)
        assert journal.verify().ok
        assert [r.id for r in journal.tail(10)] == [1, 2, 4]
        feed = JournalFeed(journal, ME.pub, "node/me")
        (parcel,) = feed.since("node/me", [Want(ME.pub, Link(0, record.genesis(ME.pub)))], 10**6).parcels
        assert [record.decode(blob).id for blob, _ in parcel.rows] == [1, 2, 4]
        assert parcel.holes == [(3, 3)] and feed.missing() == []


def test_file_that_is_no_database_is_moved_aside_and_a_new_one_begun(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database, not even nearly" * 200)
    with Journal(path, ME, now_ms=lambda: 42) as journal:
        assert "journal.db.damaged-42" in journal.problems[0]
        assert (path.parent / "journal.db.damaged-42").read_bytes().startswith(b"not a database")
        assert journal.next_incarnation() == 1
        assert kinds(journal) == ["chain.damage"]
        assert journal.verify().ok
    with Journal(path, ME) as journal:
        assert journal.problems == []


def test_database_with_a_broken_page_keeps_facts_and_ops(path: Path) -> None:
    with Journal(path, ME) as journal:
        for _ in range(7):
            journal.next_incarnation()
        reserve(journal)
        journal.finish(OP, {"result": "done"}, at_ms=2000)
        for n in range(400):
            journal.append("event", {"n": n, "pad": "x" * 100})
    with raw(path) as db:
        root = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'records'").fetchone()[0]
        size = db.execute("PRAGMA page_size").fetchone()[0]
    whole = bytearray(path.read_bytes())
    whole[(root - 1) * size : root * size] = b"\xff" * size
    path.write_bytes(whole)
    with Journal(path, ME) as journal:
        assert "moved to" in journal.problems[0]
        assert journal.next_incarnation() == 8
        entry = journal.lookup(OP)
        assert entry is not None
        assert entry.result == {"result": "done"}
        assert journal.append("after", durable=True) > 400
        assert journal.verify().ok, journal.verify().damage


def test_table_laid_out_otherwise_is_moved_aside(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with raw(path) as db:
        db.execute("CREATE TABLE meta (empty_one)")
        db.execute("CREATE TABLE records (empty_one)")
    with Journal(path, ME) as journal:
        assert "moved to" in journal.problems[0]
        assert journal.append("a", durable=True) > 2
        assert kinds(journal) == ["chain.damage", "a"] and journal.verify().ok


def test_journal_of_another_key_is_moved_aside_with_all_it_knew(path: Path) -> None:
    filled(path, 3)
    with Journal(path, OTHER) as journal:
        assert "another key" in journal.problems[0]
        assert journal.next_incarnation() == 1
        assert journal.verify().ok


def test_journal_of_a_newer_layout_is_left_alone(path: Path) -> None:
    filled(path, 3)
    with raw(path) as db:
        db.execute("UPDATE meta SET value = 9 WHERE key = 'schema'")
    before = path.read_bytes()
    with pytest.raises(LocalError, match="newer build"):
        Journal(path, ME)
    assert path.read_bytes() == before


def test_altered_meta_does_not_end_the_agent(path: Path) -> None:
    for key, value in (("schema", "zzz"), ("head", b"\xc1"), ("base", "??"), ("writer", None)):
        filled(path, 3)
        with raw(path) as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        with Journal(path, ME) as journal:
            journal.append("after", durable=True)
            assert journal.verify().ok, (key, journal.verify().damage)


def test_unreadable_fact_is_forgotten_and_named(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.set("cordoned", True)
        journal.set("override", {"state": "draining"})
    with raw(path) as db:
        db.execute("UPDATE facts SET value = '{' WHERE key = 'override'")
    with Journal(path, ME) as journal:
        assert journal.get("override") is None
        assert journal.get("cordoned") is True
        assert "override" in journal.problems[0]


def test_only_the_newest_damaged_files_are_kept(path: Path) -> None:
    path.parent.mkdir(parents=True)
    for n in range(6):
        path.write_bytes(b"garbage" * 100)
        Path(f"{path}-wal").unlink(missing_ok=True)
        Journal(path, ME, now_ms=lambda n=n: 100 + n).close()
    left = sorted(p.name for p in path.parent.glob("journal.db.damaged-*"))
    assert left == [f"journal.db.damaged-{n}" for n in (103, 104, 105)]


def test_last_record_replaced_by_another_of_ours_is_named(path: Path) -> None:
    from agent.chain import Record, record

    filled(path, 5)
    with raw(path) as db:
        old = record.decode(db.execute("SELECT blob FROM records WHERE id = 5").fetchone()[0])
        new = Record(id=5, kind="forged", emitted_at_ms=1, disposition=old.disposition, prev=old.prev)
        blob = record.encode(new)
        db.execute(
            "UPDATE records SET blob = ?, sig = ? WHERE id = 5",
            (blob, record.sign(record.hash_of(blob), ME.sign)),
        )
    with Journal(path, ME) as journal:
        assert journal.problems == ["journal record 5: not the record that was written"]
        assert "forged" not in kinds(journal)
        assert journal.verify().ok


class Broken(Failing):
    """A connection to a file that SQLite finds broken from now on."""

    def execute(self, sql: str, *params: object):
        if sql == "BEGIN IMMEDIATE":
            why = sqlite3.DatabaseError("database disk image is malformed")
            why.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise why
        return self.db.execute(sql, *params)


def test_database_found_broken_on_a_full_disk_refuses_and_recovers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Failing] = []
    real = sqlite3.connect

    def connect(*args: object, **kw: object):
        made.append(Failing(real(*args, **kw)))
        return made[-1]

    async def scenario() -> None:
        with Journal(path, ME) as journal:
            journal.next_incarnation()
            reserve(journal, "EARLIER")
            journal.append("waits")
            journal.set("cordoned", True)
            journal._db = Broken(journal._db)
            with monkeypatch.context() as patch:
                patch.setattr(log.sqlite3, "connect", connect)
                with pytest.raises(Refused):
                    journal.append("sure", durable=True)
            made[-1].failing = False
            journal._db = made[-1]
            assert kinds(journal) == ["chain.damage", "waits"]
            journal.append("after", durable=True)
            assert kinds(journal) == ["chain.damage", "waits", "after"]
            assert journal.verify().ok
        with Journal(path, ME) as journal:
            assert journal.next_incarnation() == 2
            assert journal.lookup("EARLIER") is not None
            assert journal.get("cordoned") is True

    asyncio.run(scenario())


def test_database_found_broken_while_running_is_replaced_and_nothing_that_waits_is_lost(path: Path) -> None:
    with Journal(path, ME, keep_records=50) as journal:
        assert journal.next_incarnation() == 1
        journal.append("before", durable=True)
        journal._db = Broken(journal._db)
        assert reserve(journal) is None
        assert kinds(journal) == ["chain.damage", "control.op"]
        assert journal.next_incarnation() == 2
        assert journal.verify().ok, journal.verify().damage
        assert "moved to" in journal.problems[0]
        for n in range(log.PRUNE_SLACK + 100):
            journal.append("event", {"n": n})
        assert journal.verify().ok, journal.verify().damage
    with Journal(path, ME) as journal:
        assert journal.lookup(OP) is not None
        assert journal.next_incarnation() == 3


# -- a disk that can't be written -----------------------------------------------------------


def test_full_disk_refuses_durable_writes_and_changes_nothing(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.append("a", durable=True)
        journal._db = broken = Failing(journal._db)
        for write in (
            lambda: journal.append("b", durable=True),
            lambda: reserve(journal),
            journal.next_incarnation,
        ):
            with pytest.raises(Refused) as caught:
                write()
            assert caught.value.code == "journal_full"
        assert journal.counters["append_failed"] == 3
        assert journal.get("incarnation") is None
        broken.failing = False
        assert journal.lookup(OP) is None
        assert journal.append("c", durable=True) == 2
        assert journal.verify().ok
        assert kinds(journal) == ["a", "c"]
    with Journal(path, ME) as journal:
        assert journal.next_incarnation() == 1


def test_full_disk_never_fails_a_plain_append_and_what_waited_is_kept_for_later(path: Path) -> None:
    async def scenario() -> None:
        with Journal(path, ME) as journal:
            journal._db = broken = Failing(journal._db)
            for n in range(5):
                journal.append("event", {"n": n})
            assert journal.flush() is False
            assert journal.counters["append_failed"] == 1
            broken.failing = False
            assert journal.flush() is True
            assert [r.body for r in journal.tail(9)] == [{"n": n} for n in range(5)]
            assert journal.verify().ok

    asyncio.run(scenario())


def test_full_disk_for_long_keeps_memory_bounded_and_the_chain_whole(path: Path) -> None:
    async def scenario() -> None:
        with Journal(path, ME) as journal:
            journal.append("kept", durable=True)
            journal._db = broken = Failing(journal._db)
            for n in range(log.PENDING_MAX + 500):
                journal.append("event", {"n": n})
            assert journal.counters["append_dropped"] == log.PENDING_MAX
            assert journal.counters["append_failed"] < 10
            broken.failing = False
            journal.append("after", durable=True)
            assert journal.verify().ok
            assert kinds(journal, 1) == ["after"]

    asyncio.run(scenario())


def test_place_that_cannot_be_made_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="journal"):
        Journal(tmp_path / "file" / "journal.db", ME)


def test_real_full_file_system_refuses_and_recovers(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.append("a", durable=True)
        limit = int(journal._db.execute("PRAGMA page_count").fetchone()[0])
        journal._db.execute(f"PRAGMA max_page_count = {limit}")
        with pytest.raises(Refused, match="full"):
            for _ in range(200):
                journal.append("big", {"x": "y" * 2000}, durable=True)
        journal._db.execute("PRAGMA max_page_count = 100000")
        journal.append("after", durable=True)
        assert journal.verify().ok


def test_closed_journal_counts_appends_and_refuses_durable_ones(path: Path) -> None:
    journal = Journal(path, ME)
    journal.close()
    journal.close()
    journal.append("late")
    assert journal.counters["append_after_close"] == 1
    with pytest.raises(Refused):
        journal.append("late", durable=True)


# -- facts -----------------------------------------------------------


def test_start_is_later_than_the_last_one_even_where_the_clock_was_set_back(path: Path) -> None:
    for wall_ms, expected in ((5_000, 5_000), (9_000, 9_000), (2_000, 9_001), (2_000, 9_002), (9_500, 9_500)):
        with contextlib.closing(Journal(path, ME)) as journal:
            assert journal.next_start_ms(wall_ms) == expected
            journal.next_incarnation()


def test_incarnation_grows_by_one_a_start_and_is_never_lowered(path: Path) -> None:
    for expected in (1, 2, 3):
        with Journal(path, ME) as journal:
            assert journal.next_incarnation() == expected
    with Journal(path, ME) as journal:
        journal.set_incarnation(40)
        journal.set_incarnation(12)
    with Journal(path, ME) as journal:
        assert journal.next_incarnation() == 41


def test_facts_survive_reopening_and_none_forgets(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.set("cordoned", True)
        journal.set("remembered", [["10.0.0.1", 7420]], durable=True)
        journal.set("last_port", 7420)
        journal.set("last_port", None)
    with Journal(path, ME) as journal:
        assert journal.get("cordoned") is True
        assert journal.get("remembered") == [["10.0.0.1", 7420]]
        assert journal.get("last_port", 5) == 5


def test_unchanged_fact_costs_no_write(path: Path) -> None:
    with Journal(path, ME) as journal:
        journal.set("cordoned", True, durable=True)
        before = journal._db.total_changes
        for _ in range(20):
            journal.set("cordoned", True, durable=True)
        assert journal._db.total_changes == before


def test_handover_is_kept_until_taken_up(path: Path) -> None:
    left = Handover(op_id=OP, earlier="draining", by="anna", started_ms=9, build="0123456789ab")
    with Journal(path, ME) as journal:
        assert journal.handover() is None
        journal.set_handover(left)
    with Journal(path, ME) as journal:
        assert journal.handover() == left
        journal.set_handover(None)
    with Journal(path, ME) as journal:
        assert journal.handover() is None


# -- ops -----------------------------------------------------------


def test_op_reserved_is_answered_with_its_entry_and_later_its_result(path: Path) -> None:
    with Journal(path, ME) as journal:
        assert reserve(journal) is None
        again = reserve(journal)
        assert (again.op_id, again.content, again.result) == (OP, b"c" * 32, None)
        assert [e.op_id for e in journal.unfinished()] == [OP]
        journal.finish(OP, {"result": "done"}, at_ms=2000)
        assert reserve(journal).result == {"result": "done"}
        assert journal.unfinished() == []
    with Journal(path, ME) as journal:
        assert reserve(journal).result == {"result": "done"}
        assert kinds(journal) == ["control.op", "control.result"]


def test_ops_are_forgotten_by_age_and_number_but_never_young(path: Path) -> None:
    with Journal(path, ME) as journal:
        for n in range(20):
            reserve(journal, f"OP{n}", at_ms=1000 * n)
        for sql, params in tables.forget_ops(20_000, 15_000, 5, 3_000):
            journal._db.execute(sql, params)
        left = [row[0] for row in journal._db.execute("SELECT op_id FROM ops ORDER BY received_ms")]
        assert left == [f"OP{n}" for n in range(15, 20)]
        for sql, params in tables.forget_ops(20_000, 15_000, 1, 3_000):
            journal._db.execute(sql, params)
        left = [row[0] for row in journal._db.execute("SELECT op_id FROM ops ORDER BY received_ms")]
        assert left == ["OP17", "OP18", "OP19"]


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_write_ahead_log_cut_anywhere_gives_a_whole_chain_of_what_was_written_before(
    path: Path, tmp_path: Path, part: float
) -> None:
    copy = tmp_path / "copy.db"
    with Journal(path, ME) as journal:
        for n in range(50):
            journal.append("event", {"n": n}, durable=True)
        copy.write_bytes(path.read_bytes())
        ahead = Path(f"{path}-wal").read_bytes()
        Path(f"{copy}-wal").write_bytes(ahead[: int(len(ahead) * part)])
    with Journal(copy, ME) as journal:
        assert journal.problems == []
        kept = [r.body for r in journal.tail(100)]
        assert kept == [{"n": n} for n in range(len(kept))]
        assert 0 < len(kept) < 50
        journal.append("after", durable=True)
        assert journal.verify().ok


def test_file_of_a_stopped_node_can_be_checked_by_another_process(path: Path) -> None:
    filled(path, 20)
    assert tables.verify_file(path, ME.pub).ok
    flip(path, 7)
    report = tables.verify_file(path, ME.pub)
    assert [d.name for d in report.damage] == ["7"]
    assert not tables.verify_file(path, OTHER.pub).ok
    assert not tables.verify_file(path.with_name("nothing"), ME.pub).ok


CHILD = """
import sys
from pathlib import Path
from agent.chain import Journal
from discovery.identity import Identity
journal = Journal(Path(sys.argv[1]), Identity.from_seed(b"j" * 32))
n = 0
while True:
    number = journal.append("sure", {"n": n}, durable=True)
    journal.reserve(f"{sys.argv[2]}-{n}", b"c" * 32, verb="kill", target="t", operator="o", at_ms=n)
    print(n, number, flush=True)
    n += 1
"""


def test_kill_9_at_any_moment_loses_no_acknowledged_record(path: Path) -> None:
    for round_ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, str(path), str(round_)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert child.stdout is not None
        acknowledged = []
        for line in child.stdout:
            acknowledged.append(tuple(map(int, line.split())))
            if len(acknowledged) == 10 + 7 * round_:
                child.send_signal(signal.SIGKILL)
                break
        acknowledged += [tuple(map(int, line.split())) for line in child.stdout if line.count(" ") == 1]
        child.wait()
        with Journal(path, ME) as journal:
            assert journal.problems == []
            kept = {r.id: r.body for r in journal.tail(10_000)}
            for n, number in acknowledged:
                assert kept[number] == {"n": n}
                assert journal.lookup(f"{round_}-{n}") is not None
            assert journal.verify().ok


def test_checkpoint_aside_empties_the_wal_without_losing_anything(path: Path) -> None:
    async def scenario() -> None:
        with Journal(path, ME) as journal:
            for n in range(600):
                journal.append("event", {"n": n, "pad": "x" * 8000})
            journal.flush()
            if journal._checkpointing is not None:
                await journal._checkpointing
            assert journal.verify().ok
            assert path.stat().st_size > log.CHECKPOINT_BYTES

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(log, "CHECKPOINT_COMMITS", 2)
        asyncio.run(scenario())


def test_empty_record_is_told_apart() -> None:
    assert EmptyRecord().code == "empty_record"
