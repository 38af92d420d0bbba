"""The admin chain of one node over its store: checkpoints on disk, records that come late, and the audit of it."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chain import Gated, Journal, adminfold, adminop
from agent.chain.adminchain import AdminChain
from agent.chain.adminop import ADMIN, OP, RESULT, result_body
from agent.chain.adminreading import Checked
from agent.chain.auditing import Auditing
from agent.chain.feedreading import Want
from agent.chain.feeds import Draft, FeedStore
from agent.chain.hlc import Clock, Stamp
from agent.chain.weighing import Link, Parcel, first_link
from discovery.identity import Identity, id_text
from tests.agent.chains import (
    ANNA,
    BERT,
    CARL,
    GENESIS,
    MESH,
    NODES,
    NOW_MS,
    body_of,
    fingerprint,
    mesh_op,
    node_op,
)
from tests.agent.test_chain_adminfold import LATER, Made, history, lively, scratch

A, B, C, READER = NODES[:4]
FAR = 10**9


class Commits:
    """Nothing is committed here."""

    def __init__(self) -> None:
        self.clock = Clock()

    async def commit(self, *_: Any, **__: Any) -> None:
        raise AssertionError


def chain_over(store: FeedStore, now_ms: Callable[[], int] = lambda: LATER, **options: Any) -> AdminChain:
    return AdminChain(store, Commits(), READER, MESH, GENESIS, now_ms=now_ms, **options)


async def parcels_of(made: list[Made], place: Path) -> dict[bytes, list[Parcel]]:
    """A parcel of each record, by who wrote it."""
    found = {}
    for writer in {made_by.pub: made_by for made_by, *_ in made}.values():
        store = FeedStore(place / id_text(writer.id) / "chains.db", writer, MESH)
        drafts = [
            Draft(kind, {**body, "hlc": list(stamp)}, at_ms=stamp.wall_ms)
            for by, _, stamp, body, kind in made
            if by is writer
        ]
        await store.append_all(ADMIN, drafts)
        after, found[writer.pub] = Link(0, first_link(MESH, ADMIN, writer.pub)), []
        while after != store.end_of(ADMIN, writer.pub):
            [parcel] = store.since(ADMIN, [Want(writer.pub, after)], 1).parcels
            found[writer.pub].append(parcel)
            [after] = store.hashes(ADMIN, writer.pub, after.id + 1, after.id + 1)
        await store.close()
    return found


@cache
def parcels(seed: int) -> dict[bytes, list[Parcel]]:
    with TemporaryDirectory() as place:
        return asyncio.run(parcels_of(list(lively(seed)), Path(place)))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 24), dice=st.randoms(use_true_random=False), hold=st.integers(1, 9))
def test_any_way_to_come_and_any_restart_gives_the_state_of_a_fold_from_the_beginning(
    seed: int, dice: random.Random, hold: int
) -> None:
    given_by = parcels(seed)

    async def scenario(place: Path) -> None:
        now_ms = NOW_MS

        def now() -> int:
            return now_ms

        store = FeedStore(place / "chains.db", READER, MESH)
        chain = chain_over(store, now, hold=hold)
        left = {writer: list(found) for writer, found in given_by.items()}
        while left:
            writer = dice.choice(sorted(left))
            some, left[writer] = left[writer][: (n := dice.randrange(1, 9))], left[writer][n:]
            left = {writer: more for writer, more in left.items() if more}
            await store.take(ADMIN, some, durable=False)
            now_ms += dice.randrange(40_000)
            chance = dice.random()
            if chance < 0.5:
                await chain.catch_up()
            elif chance < 0.7:
                chain.state()
            if chance < 0.3:
                await chain.save()
            if dice.random() < 0.3:
                chain = chain_over(store, now, hold=hold)
                await chain.load()
        now_ms = LATER
        state = await chain.catch_up()
        wanted, verdicts = scratch(seed, None)
        assert state == wanted and chain.state() == wanted
        told = dict(verdicts)
        by_position = {event.position: told[event.digest] for event in history(seed)}
        for event, verdict in await chain.judged():
            assert by_position[event.position] == verdict
        await store.close()

    with TemporaryDirectory() as place:
        asyncio.run(scenario(Path(place)))


def drains(count: int, by: Identity = A, signer: Identity = ANNA, after_ms: int = 0) -> list[Made]:
    found = []
    for n in range(1, count + 1):
        at_ms = NOW_MS + after_ms + n
        message = node_op("drain", by.id % 1000 * FAR + after_ms * 1000 + n, NODES[n % 5], at_ms)
        found.append((by, n, Stamp(at_ms, 0), body_of(message, signer), OP))
    return found


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


async def filled(place: Path, made: list[Made]) -> FeedStore:
    store = FeedStore(place / "reader" / "chains.db", READER, MESH)
    for found in (await parcels_of(made, place)).values():
        await store.take(ADMIN, found, durable=False)
    return store


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the records that were read into events."""
    found: list[int] = []
    was = adminop.read_event

    def counted(record: Any, *args: Any, **options: Any) -> Any:
        found.append(record.id)
        return was(record, *args, **options)

    monkeypatch.setattr(adminop, "read_event", counted)
    return found


def test_start_reads_what_came_since_the_checkpoint_and_holds_few_events(
    tmp_path: Path, read: list[int]
) -> None:
    async def scenario() -> None:
        store = await filled(tmp_path, drains(200))
        chain = chain_over(store, hold=8)
        state = await chain.load()
        assert len(read) == 200 and len(chain.fold.held()) < 16
        read.clear()
        again = chain_over(store, hold=8)
        assert await again.load() == state
        assert len(read) < 16 and again.last_of(fingerprint(ANNA)) == chain.last_of(fingerprint(ANNA))
        await store.close()

    run(scenario)


def test_op_of_before_the_checkpoint_is_known_as_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        made = drains(60)
        again = (B, 1, Stamp(NOW_MS + 100, 0), made[3][3], OP)
        store = await filled(tmp_path, [*made, again])
        chain = chain_over(store, hold=4)
        await chain.load()
        chain = chain_over(store, hold=4)
        await chain.load()
        assert chain.fold.count > 40
        assert [verdict for _, verdict in await chain.judged() if verdict] == [
            "op_id_reused: an op of this id stands before it"
        ]
        event = adminop.read_event(
            next(store.records(ADMIN, A.pub, 9)).record, b"other", C.pub, MESH, checked=True
        )
        assert event is not None
        refusal = chain.fold.refusal(event, LATER)
        assert refusal is not None and refusal.code == "op_id_reused"
        await store.close()

    run(scenario)


@pytest.mark.parametrize(
    "what", ["altered", "of another fold", "of records that are gone", "of another past"]
)
def test_checkpoint_that_does_not_fit_is_no_checkpoint(
    tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def scenario() -> None:
        made = drains(100)
        store = await filled(tmp_path, made)
        state = await chain_over(store, hold=8).load()
        read.clear()
        if what == "altered":
            sql = "UPDATE meta SET value = zeroblob(length(value)) WHERE key LIKE 'note admin fold%'"
            await store._do(lambda: store._file.db.execute(sql), True)
        elif what == "of another fold":
            monkeypatch.setattr(adminfold, "FOLD_VERSION", adminfold.FOLD_VERSION + 1)
        else:
            notes = {key: store.recall(key) for key in (f"admin fold {n}" for n in range(8))}
            await store.close()
            shutil.rmtree(tmp_path / "reader")
            if what == "of another past":
                made[70:] = [
                    (by, n, Stamp(s.wall_ms + 1, 0), body, kind) for by, n, s, body, kind in made[70:]
                ]
            store = await filled(tmp_path / "other", made if what == "of another past" else made[:70])
            for key, value in notes.items():
                if value:
                    await store.remember(key, value)
        chain = chain_over(store, hold=8)
        again = await chain.load()
        assert len(read) == len(store.tail(ADMIN, A.pub, FAR)) >= 70
        assert (again == state) is (what in ("altered", "of another fold"))
        await store.close()

    run(scenario)


def test_revocation_reaches_back_behind_the_checkpoint_and_a_late_record_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        made = drains(60, B, BERT) + drains(60, A, ANNA, 100)
        store = await filled(tmp_path, made)
        chain = chain_over(store, hold=4)
        await chain.load()
        assert chain.fold.count > 100
        args = {"fingerprint": fingerprint(BERT), "last": [NOW_MS + 10, 0, id_text(B.id), 10]}
        cut = mesh_op("revoke_operator", args, 1, C, NOW_MS + 300)
        late = node_op("cordon", 2, NODES[4], NOW_MS + 2)
        more = [
            (C, 1, Stamp(NOW_MS + 300, 0), body_of(cut, ANNA), OP),
            (C, 2, Stamp(NOW_MS + 5, 0), body_of(late, BERT), OP),
        ]
        for parcel in (await parcels_of(more, tmp_path / "more"))[C.pub]:
            await store.take(ADMIN, [parcel], durable=False)
            chain.state()
            await chain.catch_up()
        verdicts = [verdict and verdict.partition(":")[0] for _, verdict in await chain.judged()]
        assert verdicts.count("revoked") == 50 and verdicts.count(None) == 72
        assert chain.state().desired(id_text(NODES[4].id)).cordoned
        again = chain_over(store, hold=4)
        assert await again.load() == chain.state()
        await store.close()

    run(scenario)


def test_signature_that_does_not_hold_is_void_in_every_life_of_the_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        forged = body_of(node_op("drain", 1, C), ANNA) | {
            "signature": body_of(node_op("drain", 2, C), ANNA)["signature"]
        }
        store = await filled(tmp_path, [(A, 1, Stamp(NOW_MS, 0), forged, OP), *drains(3, B)])
        for _ in range(3):
            chain = chain_over(store)
            await chain.load()
            assert [v and v.partition(":")[0] for _, v in await chain.judged()].count("bad_signature") == 1
            assert chain.reader.checked.holds(B.pub, 3) and not chain.reader.checked.holds(A.pub, 1)
            await chain.save()
        await store.close()

    run(scenario)


def test_what_was_checked_is_known_by_number_and_doubts_stay_few() -> None:
    checked = Checked()
    for number in (1, 2, 5, 6):
        checked.note(b"w", number, number != 2)
    assert [n for n in range(1, 8) if checked.holds(b"w", n)] == [1, 5, 6]
    checked.note(b"w", 3, True)
    again = Checked(checked.packed())
    assert [n for n in range(1, 8) if again.holds(b"w", n)] == [1, 3, 5, 6]
    for number in range(7, 3000):
        checked.note(b"w", number, number % 2 == 0)
    assert len(checked.packed()) < 20_000 and not any(checked.holds(b"w", n) for n in range(2, 1500))
    assert Checked(b"\x91\x92\xc4\x01w\x05").packed() == Checked(b"nonsense").packed() == Checked().packed()


def test_audit_is_listed_once_and_read_page_by_page(tmp_path: Path, read: list[int]) -> None:
    async def scenario() -> None:
        made = drains(50)
        told = [
            (
                NODES[n % 5],
                1,
                Stamp(NOW_MS + 1000 + n, 0),
                result_body(_op_id(made[n - 1]), "drain", "done", None),
                RESULT,
            )
            for n in (1, 2)
        ]
        store = await filled(tmp_path, [*made, *told, *drains(3, C, CARL, 500)])
        journal = Journal(tmp_path / "journal.db", READER, now_ms=lambda: NOW_MS + 20)
        refused = {"op_id": None, "op": "kill", "code": "role", "reason": "no", "by": "carl"}
        journal.append("control.refused", refused, Gated("no"))
        chain = chain_over(store, hold=8)
        clock = 0.0
        audit = Auditing(
            chain, store, journal, own="node/x", me=READER.id, now_ms=lambda: LATER, clock=lambda: clock
        )
        listed = await audit.listing()
        assert len(listed) == 54 and listed == sorted(listed, key=lambda e: e[:2])
        read.clear()
        rows, at, pages = [], 0, 0
        while at is not None:
            page = await audit.page(listed, at, lambda row: row, with_bytes=True, most_bytes=20_000)
            assert len(str(page["rows"])) < 40_000
            rows += page["rows"]
            at, pages = page["next"], pages + 1
        assert 2 < pages < 20 and len(read) <= 53 + pages
        results = [row["result"] for row in rows]
        assert (results.count("done"), results.count("accepted"), results.count("refused")) == (2, 49, 1)
        assert results.count("void") == 2 and sum(row["verified"] is True for row in rows) == 53
        assert all(row["message"] for row in rows if row["position"])
        read.clear()
        assert await audit.listing() == listed and not read
        late = (NODES[4], 1, Stamp(NOW_MS + 7, 1), body_of(node_op("cordon", 9, C, NOW_MS + 7), ANNA), OP)
        for parcel in (await parcels_of([late], tmp_path / "late"))[NODES[4].pub]:
            await store.take(ADMIN, [parcel], durable=False)
        assert len(await audit.listing()) == 55 and len(read) >= 55
        assert [row["result"] for row in await audit.taken_alone(10, lambda row: row)] == ["refused"]
        clock = 100.0
        audit.forget()
        read.clear()
        assert len(await audit.listing()) == 55 and len(read) >= 53
        journal.close()
        await store.close()

    run(scenario)


def _op_id(made: Made) -> str:
    return str(made[3]["op_id"])
