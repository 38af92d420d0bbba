"""Feeds as their neighbours see them: what is kept over crashes, damage and full disks, and what is not believed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chain import feeds as feeds_room
from agent.chain import record
from agent.chain.feedreading import Want
from agent.chain.feeds import Draft, FeedStore
from agent.chain.feedtables import key_of
from agent.chain.record import DISPATCHED, Record, encode, genesis, hash_of, sign
from agent.chain.weighing import Feed, Head, Link, Parcel, first_link, weigh
from discovery.errors import LocalError, Refused
from discovery.identity import Identity, id_text, verify
from tests.discovery.loopback import until

ME = Identity.from_seed(b"f" * 32)
OTHER = Identity.from_seed(b"g" * 32)
MESH = "alpha"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "chains.db"


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def opened(path: Path, identity: Identity = ME, **options: Any):
    store = FeedStore(path, identity, MESH, **options)
    try:
        yield store
    finally:
        await store.close()


async def filled(path: Path, count: int = 50, identity: Identity = ME, chain: str = "admin") -> None:
    async with opened(path, identity) as store:
        await store.append_all(chain, [Draft("n", {"n": n}, at_ms=n) for n in range(1, count + 1)])


async def copied(
    source: FeedStore, to: FeedStore, chain: str = "admin", limit: int = 10**6
) -> feeds_room.Taken:
    """Brings `to` up to `source`, as replication does."""
    while True:
        wants = [Want(w, to.end_of(chain, w)) for w in source.heads(chain)]
        given = source.since(chain, wants, limit)
        taken = await to.take(chain, given.parcels, durable=False)
        if not given.more:
            return taken


def numbers(store: FeedStore, chain: str = "admin", writer: bytes | None = None) -> list[int]:
    return [stored.record.id for stored in store.records(chain, writer)]


@contextlib.contextmanager
def raw(path: Path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        yield db
        db.commit()


def forged(identity: Identity, number: int, prev: bytes, body: dict[str, Any]) -> tuple[bytes, bytes]:
    """A record signed by its writer, made outside of any store."""
    record = Record(id=number, kind="n", emitted_at_ms=1, disposition=DISPATCHED, prev=prev, body=body)
    blob = encode(record)
    return blob, sign(hash_of(blob), identity.sign)


# -- keeping -----------------------------------------------------------


def test_records_appended_are_there_after_reopening_and_follow_each_other(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            assert await store.append("admin", "a", {"x": 1}) == store.end_of("admin", ME.pub)
            await store.append_all("notes", [Draft("b"), Draft("c")])
        async with opened(path) as store:
            assert store.chains() == ["admin", "notes"]
            assert numbers(store, "notes") == [1, 2]
            first, second = store.tail("notes", ME.pub, 2)
            assert second.record.prev == first.digest
            assert (
                first.record.prev == first_link(MESH, "notes", ME.pub) != first_link("beta", "notes", ME.pub)
            )
            assert (await store.append("notes", "d")).id == 3
            assert store.problems == [] and await store.scrub() == []
        assert all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir())

    run(scenario)


def test_appends_at_once_share_a_commit(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            commits = 0
            was = store._file.transact

            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal commits
                commits += 1
                return was(*args, **kwargs)

            store._file.transact = counted  # type: ignore[method-assign]
            links = await asyncio.gather(*(store.append("admin", "n", {"n": n}) for n in range(300)))
            assert sorted(link.id for link in links) == list(range(1, 301))
            assert commits < 60

    run(scenario)


def test_record_that_cannot_be_encoded_fails_alone(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            good, bad = await asyncio.gather(
                store.append("admin", "a"),
                store.append("admin", "b", {"x": object()}),
                return_exceptions=True,
            )
            assert good.id == 1
            assert isinstance(bad, LocalError)
            assert (await store.append("admin", "c")).id == 2

    run(scenario)


def test_chain_of_a_node_begins_as_its_journal_does() -> None:
    assert first_link(MESH, f"node/{id_text(ME.id)}", ME.pub) == genesis(ME.pub)
    assert first_link(MESH, f"node/{id_text(OTHER.id)}", ME.pub) != genesis(ME.pub)


def written_by_a_process(path: Path, until: int) -> list[tuple[int, int, int]]:
    """What a process that appends in four lanes was told is kept, before it was killed at its `until`th word."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(_write_for_ever(path, write))
        finally:
            os._exit(1)
    os.close(write)
    told = []
    with os.fdopen(read) as lines:
        for line in lines:
            if line.endswith("\n"):
                number, lane, n = map(int, line.split())
                told.append((number, lane, n))
            if len(told) == until:
                os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return told


async def _write_for_ever(path: Path, out: int) -> None:
    store = FeedStore(path, ME, MESH)

    async def write(lane: int) -> None:
        for n in range(10**6):
            link = await store.append("admin", "sure", {"lane": lane, "n": n})
            os.write(out, f"{link.id} {lane} {n}\n".encode())

    await asyncio.gather(*(write(lane) for lane in range(4)))


def test_kill_9_at_any_moment_loses_no_acknowledged_record(path: Path) -> None:
    dice = random.Random(5)
    acknowledged: dict[int, dict[str, int]] = {}
    for _ in range(20):
        for number, lane, n in written_by_a_process(path, dice.randrange(60, 140)):
            assert number not in acknowledged
            acknowledged[number] = {"lane": lane, "n": n}

    async def check() -> None:
        async with opened(path) as store:
            assert store.problems == [] and store.missing() == []
            kept = {s.record.id: s.record.body for s in store.records("admin")}
            assert list(kept) == list(range(1, len(kept) + 1))
            assert {n: kept.get(n) for n in acknowledged} == acknowledged
            assert await store.scrub(10**6) == []

    assert len(acknowledged) >= 1200
    run(check)


FULL = """
import asyncio, resource, sys
from pathlib import Path
from agent.chain.feeds import FeedStore
from discovery.errors import Refused
from discovery.identity import Identity

async def main():
    path = Path(sys.argv[1])
    store = FeedStore(path, Identity.from_seed(b"f" * 32), "alpha")
    await store.append("admin", "first")
    room = max(file.stat().st_size for file in path.parent.iterdir()) + 40_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    done, refused = 0, None
    while refused is None:
        try:
            await store.append("admin", "more", {"pad": "x" * 4000})
            done += 1
        except Refused as why:
            refused = why
    assert refused.code == "journal_full", refused.code
    assert len(list(store.records("admin"))) == done + 1
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)
    ticking = asyncio.create_task(tick())
    for _ in range(3):
        try:
            await store.append("admin", "more", {"pad": "x" * 4000})
        except Refused:
            pass
    assert ticks > 3
    ticking.cancel()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    link = await store.append("admin", "after")
    assert link.id == done + 2, (link.id, done)
    assert await store.scrub(10**6) == []
    await store.close()
    print("recovered", done)

asyncio.run(main())
"""


def test_full_disk_refuses_commits_and_nothing_else_and_is_over_when_there_is_room(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", FULL, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.stdout.startswith("recovered"), done.stderr

    async def check() -> None:
        async with opened(path) as store:
            assert store.problems == []
            assert [s.record.kind for s in store.records("admin")][-1] == "after"

    run(check)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 600 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_that_is_really_full_refuses_too_and_reading_goes_on(small_disk: Path) -> None:
    async def scenario() -> None:
        path = small_disk / "state" / "chains.db"
        async with opened(path) as store:
            await store.append("admin", "first")
            ballast = small_disk / "ballast"
            ballast.write_bytes(b"x" * 200_000)
            done = 1
            with pytest.raises(Refused) as refused:
                for _ in range(1000):
                    await store.append("admin", "more", {"pad": "x" * 4000})
                    done += 1
            assert refused.value.code == "journal_full" and "full" in refused.value.sentence
            assert numbers(store) == list(range(1, done + 1))
            ballast.unlink()
            assert (await store.append("admin", "after")).id == done + 1
        async with opened(path) as store:
            assert numbers(store) == list(range(1, done + 2)) and store.problems == []

    run(scenario)


# -- damage -----------------------------------------------------------


def test_altered_record_is_named_set_aside_and_filled_again_by_a_replica(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(path)
        async with opened(path) as mine, opened(tmp_path / "replica.db", OTHER) as replica:
            await copied(mine, replica)
        with raw(path) as db:
            blob = bytearray(
                db.execute("SELECT blob FROM records WHERE id = ?", (key_of(1, 20),)).fetchone()[0]
            )
            blob[7] ^= 4
            db.execute("UPDATE records SET blob = ? WHERE id = ?", (bytes(blob), key_of(1, 20)))
        async with opened(path) as mine, opened(tmp_path / "replica.db", OTHER) as replica:
            assert numbers(mine) == [n for n in range(1, 51) if n != 20]
            await mine.flush()
            assert [(m.chain, m.writer, m.spans) for m in mine.missing()] == [("admin", ME.pub, ((20, 20),))]
            assert "record 20: not the bytes that were written" in mine.problems[0]
            assert (await mine.append("admin", "goes on")).id == 51
            for missing in mine.missing():
                parcels = replica.between("admin", missing.writer, missing.spans, 10**6)
                await mine.take("admin", parcels, durable=True)
            assert mine.missing() == []
            assert numbers(mine) == list(range(1, 52))
            assert await mine.scrub(10**6) == []
        with raw(path) as db:
            assert db.execute("SELECT id FROM quarantine").fetchall() == [(key_of(1, 20),)]

    run(scenario)


def test_no_flipped_byte_anywhere_in_the_file_is_ever_believed(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(path, 40)
        await filled(tmp_path / "more.db", 40, OTHER)
        async with opened(path) as mine, opened(tmp_path / "more.db", OTHER) as other:
            await copied(other, mine)
            await copied(mine, other)
            truth = {(s.writer, s.record.id): s.digest for s in mine.records("admin")}
            whole = mine.mark("admin")
        assert not Path(f"{path}-wal").exists()
        original = path.read_bytes()
        dice = random.Random(11)
        named = 0
        async with opened(tmp_path / "more.db", OTHER) as other:
            for at in [16, 20, 60, 100, 105, *(dice.randrange(len(original)) for _ in range(25))]:
                copy = tmp_path / f"flip-{at}" / "chains.db"
                copy.parent.mkdir()
                altered = bytearray(original)
                altered[at] ^= 1 << dice.randrange(8)
                copy.write_bytes(altered)
                async with opened(copy) as store:
                    with contextlib.suppress(Refused):  # structure is checked once the records are
                        await store.scrub(10**6)
                    read = {(s.writer, s.record.id): s.digest for s in store.records("admin")}
                    await store.flush()
                    assert read.items() <= truth.items(), at
                    named += bool(store.problems)
                    assert read == truth or store.problems, at
                    await copied(other, store)
                    for missing in store.missing():
                        parcels = other.between("admin", missing.writer, missing.spans, 10**6)
                        await store.take("admin", parcels, durable=False)
                    again = {(s.writer, s.record.id): s.digest for s in store.records("admin")}
                    assert again == truth, (at, store.problems)
                    assert store.mark("admin") == whole
        assert named > 8

    run(scenario)


def test_node_that_lost_the_end_of_its_feed_takes_no_record_before_others_were_asked(
    path: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await filled(path, 20)
        async with opened(path) as mine, opened(tmp_path / "replica.db", OTHER) as replica:
            await copied(mine, replica)
        path.write_bytes(b"this is no database" * 100)
        async with opened(path) as mine, opened(tmp_path / "replica.db", OTHER) as replica:
            assert mine.counters["file_replaced"] == 1
            with pytest.raises(Refused) as refused:
                await mine.append("admin", "too early")
            assert refused.value.code == "unsettled"
            await copied(replica, mine)
            await mine.settle("admin")
            assert (await mine.append("admin", "after")).id == 21
            await copied(mine, replica)
            assert numbers(replica) == list(range(1, 22))
            assert replica.counters["forks"] == 0
        assert list(path.parent.glob("*.damaged-*"))

    run(scenario)


# -- what others give -----------------------------------------------------------


def test_replica_takes_a_feed_in_bounded_steps_and_is_the_same(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(path, 300)
        async with opened(path) as mine, opened(tmp_path / "r.db", OTHER) as replica:
            given = mine.since("admin", [Want(ME.pub, replica.end_of("admin", ME.pub))], 2000)
            assert given.more and 1 <= len(given.parcels[0].rows) < 20
            await copied(mine, replica, limit=2000)
            assert numbers(replica) == list(range(1, 301))
            assert replica.mark("admin") == mine.mark("admin")
            assert await replica.scrub(10**6) == []
            again = await copied(mine, replica)
            assert again.added == 0

    run(scenario)


def test_records_that_are_not_their_writers_are_refused_and_counted(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(path, 5)
        async with opened(path) as mine, opened(tmp_path / "r.db", OTHER) as replica:
            start = Link(0, first_link(MESH, "admin", ME.pub))
            rows = mine.since("admin", [Want(ME.pub, start)], 10**6).parcels[0].rows
            broken = [*rows[:4], (rows[4][0][:-1] + b"\x01", rows[4][1])]
            taken = await replica.take("admin", [Parcel(ME.pub, start, broken)], durable=False)
            assert taken.heads[ME.pub].link.id == 4 and "record 5" in taken.trouble[0]
            unsigned = forged(OTHER, 5, replica.end_of("admin", ME.pub).hash, {"n": 5})
            taken = await replica.take("admin", [Parcel(ME.pub, start, [unsigned])], durable=False)
            assert taken.added == 0 and taken.trouble
            elsewhere = await replica.take("notes", [Parcel(ME.pub, start, rows)], durable=False)
            assert elsewhere.added == 0 and elsewhere.diverged == [ME.pub]
            assert replica.counters["record_refused"] >= 2
            for odd in (b"", b"\x01", b"\x01\x90", os.urandom(50)):
                await replica.take("admin", [Parcel(ME.pub, start, [(odd, b"")])], durable=False)
            assert numbers(replica) == [1, 2, 3, 4]
            with pytest.raises(Refused) as refused:
                await replica.take("bad\nname", [Parcel(ME.pub, start, rows)], durable=False)
            assert refused.value.code == "bad_chain"

    run(scenario)


def test_record_of_another_version_is_kept_out_and_named(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            start = Link(0, first_link(MESH, "admin", OTHER.pub))
            good = forged(OTHER, 1, start.hash, {})
            newer = bytes((9,)) + good[0][1:]
            row = (newer, sign(hash_of(newer), OTHER.sign))
            taken = await store.take("admin", [Parcel(OTHER.pub, start, [row])], durable=False)
            assert taken.added == 0
            assert "chain record of version 9, this build reads 1" in taken.trouble[0]
            assert id_text(OTHER.id) in store.problems[0]
            assert list(store.unsupported) == [("admin", OTHER.pub)]
            await store.take("admin", [Parcel(OTHER.pub, start, [row])], durable=False)
            assert len(store.problems) == 1
            await store.take("admin", [Parcel(OTHER.pub, start, [good])], durable=False)
            assert numbers(store) == [1] and store.unsupported == {}

    run(scenario)


def test_own_records_of_another_version_stay_for_who_reads_them_and_are_a_hole_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*supported: int) -> None:
        monkeypatch.setattr(record, "SUPPORTED", supported)
        monkeypatch.setattr(record, "VERSION", supported[-1])

    async def scenario() -> None:
        path = tmp_path / "one.db"
        await filled(path, 2)
        reads(1, 2)
        await filled(path, 2)
        reads(1)
        async with opened(path) as store, opened(tmp_path / "two.db", OTHER) as replica:
            assert "feed of" in store.problems[0] and "version 2, this build reads 1" in store.problems[0]
            assert await store.scrub() == [] and len(store.problems) == 1
            second = store.between("admin", ME.pub, [(2, 2)], 10**6)
            with raw(path) as db:
                db.execute("UPDATE records SET blob = ? WHERE id & 15 = 2", (b"\x01altered",))
            assert numbers(store) == [1]
            await store.flush()
            await store.take("admin", second, durable=False)
            assert numbers(store) == [1, 2], "mended beside what it can't read"
            await store.append("admin", "n", {"n": 5})
            assert numbers(store) == [1, 2, 5] and store.missing() == []
            await copied(store, replica)
            assert numbers(replica) == [1, 2, 5] and replica.missing()[0].spans == ((3, 4),)
            reads(1, 2)
            parcels = store.between("admin", ME.pub, [(3, 4)], 10**6)
            await replica.take("admin", parcels, durable=False)
            assert numbers(replica) == numbers(store) == [1, 2, 3, 4, 5] and replica.missing() == []
        async with opened(path) as store:
            assert store.problems == []

    run(scenario)


def test_forked_feed_is_frozen_at_the_fork_on_both_sides_and_for_those_who_hear_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(tmp_path / "one.db", 5)
        for name in ("one.db-wal", "one.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "two.db").write_bytes((tmp_path / "one.db").read_bytes())
        async with (
            opened(tmp_path / "one.db") as one,
            opened(tmp_path / "two.db") as two,
            opened(tmp_path / "a.db", OTHER) as a,
            opened(tmp_path / "b.db", OTHER) as b,
        ):
            await one.append_all("admin", [Draft("x", {"side": 1}), Draft("x", {"side": 1})])
            await two.append_all("admin", [Draft("x", {"side": 2})])
            await copied(one, a)
            await copied(two, b)
            row = two.between("admin", ME.pub, [(6, 6)], 10**6)
            taken = await a.take("admin", row, durable=False)
            assert taken.heads[ME.pub].fork == 6
            assert "two records 6; frozen there" in a.problems[0]
            assert a.heads("admin")[ME.pub].fork == 6
            given = a.since("admin", [Want(ME.pub, b.end_of("admin", ME.pub))], 10**6)
            assert given.diverged == [] or given.parcels[0].forks
            await b.take("admin", given.parcels, durable=False)
            assert b.heads("admin")[ME.pub].fork == 6
            await one.take("admin", given.parcels, durable=False)
            with pytest.raises(Refused) as refused:
                await one.append("admin", "x")
            assert refused.value.code == "feed_forked"
        async with opened(tmp_path / "a.db", OTHER) as a, opened(tmp_path / "c.db", OTHER) as c:
            assert a.heads("admin")[ME.pub].fork == 6
            await copied(a, c)
            assert numbers(c) == [1, 2, 3, 4, 5]
            assert c.heads("admin")[ME.pub] == Head(ME.pub, c.end_of("admin", ME.pub), 6)

    run(scenario)


def test_gap_is_taken_only_where_the_sender_says_that_it_lacks_it(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(path, 30)
        async with opened(path) as mine, opened(tmp_path / "r.db", OTHER) as replica:
            rows = mine.since("admin", [Want(ME.pub, replica.end_of("admin", ME.pub))], 10**6).parcels[0].rows
            start = replica.end_of("admin", ME.pub)
            jumped = await replica.take(
                "admin", [Parcel(ME.pub, start, rows[:10] + rows[12:])], durable=False
            )
            assert jumped.behind == [ME.pub] and numbers(replica) == list(range(1, 11))
            told = Parcel(ME.pub, start, rows[:10] + rows[12:], [(11, 12)])
            assert (await replica.take("admin", [told], durable=False)).behind == []
            assert replica.missing()[0].spans == ((11, 12),)
            assert replica.end_of("admin", ME.pub).id == 30
        async with opened(path) as mine, opened(tmp_path / "r.db", OTHER) as replica:
            assert replica.missing()[0].spans == ((11, 12),)
            await replica.take("admin", mine.between("admin", ME.pub, [(11, 12)], 10**6), durable=False)
            assert replica.missing() == [] and await replica.scrub(10**6) == []

    run(scenario)


# -- the old end -----------------------------------------------------------


def test_old_end_is_cut_by_size_and_age_and_what_stays_is_believed(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(path, 100, chain="notes")
        async with opened(path, now_ms=lambda: 1000) as mine, opened(tmp_path / "r.db", OTHER) as replica:
            assert await mine.retain("notes", keep_bytes=10**9, keep_ms=1000) == 0
            assert await mine.retain("notes", keep_bytes=10**9, keep_ms=960) == 39
            assert numbers(mine, "notes") == list(range(40, 101))
            size = mine.feeds("notes")[0].bytes
            assert await mine.retain("notes", keep_bytes=size // 2, keep_ms=10**9) > 25
            left = numbers(mine, "notes")
            assert left[-1] == 100 and mine.feeds("notes")[0].bytes <= size // 2
            assert await mine.scrub(10**6) == []
            await copied(mine, replica, "notes")
            assert numbers(replica, "notes") == left
            assert await replica.scrub(10**6) == []
        async with opened(path) as mine:
            assert mine.problems == [] and numbers(mine, "notes") == left

    run(scenario)


def test_feed_whose_old_end_nobody_has_begins_later_and_costs_nobody_what_they_have(
    path: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await filled(path, 100, chain="notes")
        async with opened(path, now_ms=lambda: 100) as mine, opened(tmp_path / "r.db", OTHER) as replica:
            await replica.take("notes", mine.between("notes", ME.pub, [(1, 10)], 10**6), durable=False)
            await mine.retain("notes", keep_bytes=10**9, keep_ms=50)
            await copied(mine, replica, "notes")
            assert numbers(replica, "notes") == [*range(1, 11), *range(50, 101)]
            assert replica.missing("notes")[0].spans == ((11, 49),)
            lie = Parcel(ME.pub, Link(10**6, bytes(32)), [], [], [], True)
            row = mine.between("notes", ME.pub, [(100, 100)], 10**6)[0].rows
            for parcel in (lie, Parcel(ME.pub, Link(10**6, bytes(32)), row, [], [], True)):
                await replica.take("notes", [parcel], durable=False)
                await mine.take("other", [parcel], durable=False)
            assert numbers(replica, "notes") == [*range(1, 11), *range(50, 101)]
            assert numbers(mine, "other") == []

    run(scenario)


def test_admin_chain_is_never_cut_below_its_checkpoint(path: Path) -> None:
    async def scenario() -> None:
        await filled(path, 100)
        async with opened(path, now_ms=lambda: 10**9) as store:
            assert await store.retain("admin", keep_bytes=0, keep_ms=0) == 0
            assert await store.retain("admin", keep_bytes=0, keep_ms=0, floor={ME.pub: 30}) == 30
            assert numbers(store) == list(range(31, 101))
            assert await store.retain("admin", keep_bytes=0, keep_ms=0, floor={ME.pub: 1000}) == 69

    run(scenario)


def test_chain_kept_elsewhere_is_forgotten_and_ones_own_is_not(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        await filled(tmp_path / "other.db", 3, OTHER, "notes")
        async with opened(path) as mine, opened(tmp_path / "other.db", OTHER) as other:
            await copied(other, mine, "notes")
            await mine.append("own", "x")
            await mine.drop("notes")
            assert mine.chains() == ["own"]
            with pytest.raises(Refused):
                await mine.drop("own")
            await copied(other, mine, "notes")
            assert numbers(mine, "notes") == [1, 2, 3]

    run(scenario)


def test_closed_store_refuses(path: Path) -> None:
    async def scenario() -> None:
        store = FeedStore(path, ME, MESH)
        await store.append("admin", "a")
        await store.close()
        await store.close()
        with pytest.raises(Refused):
            await store.append("admin", "b")

    run(scenario)


# -- any way that parcels may come -----------------------------------------------------


ROWS: list[tuple[bytes, bytes]] = []
_prev = first_link(MESH, "admin", OTHER.pub)
for _n in range(1, 31):
    ROWS.append(forged(OTHER, _n, _prev, {"n": _n}))
    _prev = hash_of(ROWS[-1][0])


@settings(max_examples=100, deadline=None)
@given(order=st.randoms(use_true_random=False))
def test_parcels_cut_lost_repeated_and_altered_in_any_way_give_only_true_records_and_in_the_end_all(
    order: random.Random,
) -> None:
    beginning = Link(0, first_link(MESH, "admin", OTHER.pub))
    feed = Feed(1, "admin", OTHER.pub, beginning, beginning)
    kept: dict[int, tuple[bytes, bytes]] = {}

    def take(first: int, rows: list[tuple[bytes, bytes]], holes: list[tuple[int, int]]) -> None:
        nonlocal feed
        parcel = Parcel(OTHER.pub, Link(first - 1, bytes(32)), rows, holes)
        weighed = weigh(feed, parcel, kept.get, verify)
        feed = weighed.feed
        kept.update((number, (blob, sig)) for number, blob, sig, _ in weighed.add)
        assert weighed.fork is None
        assert all(kept[n][0] == ROWS[n - 1][0] for n in kept)
        missing = {n for a, b in feed.holes for n in range(a, b + 1)}
        assert set(kept) | missing == set(range(1, feed.head.id + 1)) and not set(kept) & missing
        assert feed.head == (
            Link(feed.head.id, hash_of(ROWS[feed.head.id - 1][0])) if feed.head.id else beginning
        )

    for _ in range(order.randrange(1, 8)):
        first = order.randrange(1, 31)
        numbers_ = [n for n in range(first, min(31, first + order.randrange(1, 20))) if order.random() < 0.8]
        rows = [ROWS[n - 1] for n in numbers_]
        if rows and order.random() < 0.4:
            at = order.randrange(len(rows))
            blob, sig = bytearray(rows[at][0]), rows[at][1]
            if order.random() < 0.5:
                blob[order.randrange(len(blob))] ^= 1 << order.randrange(8)
            else:
                sig = sig[:-1] + bytes((sig[-1] ^ 1,))
            rows[at] = (bytes(blob), sig)
        lacked = sorted(set(range(1, 31)) - set(numbers_))
        take(first, rows, [(n, n) for n in lacked] if order.random() < 0.7 else [])
    take(1, ROWS, [])
    assert sorted(kept) == list(range(1, 31)) and feed.holes == ()


@contextlib.asynccontextmanager
async def one_transaction(store: FeedStore):
    """What is asked of the store in here goes into the file together."""
    begun, gate = threading.Event(), threading.Event()
    store._jobs.put(feeds_room._Job(lambda: (begun.set(), gate.wait()), False, None, None))
    await until(begun.is_set)
    asked = asyncio.all_tasks()
    try:
        yield
        await until(lambda: store._jobs.qsize() >= len(asyncio.all_tasks() - asked))
    finally:
        gate.set()


def test_record_acknowledged_together_with_a_cut_is_there_and_its_number_is_taken(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            await store.append_all("notes", [Draft("a", {"n": n}) for n in range(9)])
            async with one_transaction(store):
                added = asyncio.ensure_future(store.append("notes", "a", {"n": 9}))
                cut = asyncio.ensure_future(store.retain("notes", keep_bytes=0, keep_ms=10**9))
                again = asyncio.ensure_future(store.append("notes", "a", {"n": 10}))
            assert ((await added).id, await cut, (await again).id) == (10, 9, 11)
            assert numbers(store, "notes") == [10, 11]
            assert sum(feed.bytes for feed in store.feeds("notes")) == sum(
                len(blob) + len(sig) for _, blob, sig in store._rows(store.feeds("notes")[0], 1, 11)
            )
        async with opened(path) as store:
            assert numbers(store, "notes") == [10, 11] and store.problems == []

    run(scenario)


def test_chain_dropped_and_taken_again_together_is_what_was_taken_last(path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store, opened(tmp_path / "other.db", OTHER) as other:
            await other.append_all("notes", [Draft("a", {"n": n}) for n in range(5)])
            given = other.since("notes", [Want(OTHER.pub, store.end_of("notes", OTHER.pub))], 10**6)
            for drops in (1, 2):
                async with one_transaction(store):
                    asked = [asyncio.ensure_future(store.take("notes", given.parcels, durable=True))]
                    asked.append(asyncio.ensure_future(store.drop("notes")))
                    if drops == 1:
                        asked.append(asyncio.ensure_future(store.take("notes", given.parcels, durable=True)))
                await asyncio.gather(*asked)
                assert numbers(store, "notes") == ([1, 2, 3, 4, 5] if drops == 1 else [])
        async with opened(path) as store:
            assert numbers(store, "notes") == [] and store.problems == []

    run(scenario)
