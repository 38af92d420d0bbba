"""Telling and hearing who holds what, over real links: pushed at once, repaired by notes, nonsense refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.data import announcing
from agent.data.announcing import Announcer
from agent.data.holdings import Item
from discovery.errors import Refused, RemoteError
from discovery.identity import Identity
from tests.agent.data_nodes import Station, entry_for, held_by, met, noise, world
from tests.discovery.loopback import until

DATA = noise(5_000)
KEY: Any = ("artifact", "model")


def chain(name: str = "log") -> Item:
    return Item("chain", name, size=5, count=1)


def knows(station: Station, other: Station, name: str = "log") -> bool:
    return any(item.name == name for item in station.room.holdings.held_by(other.id))


def test_change_reaches_every_live_member_at_once_as_a_delta(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 4) as stations:
            first = stations[0]
            first.room.holds(chain())
            await until(lambda: all(met(s, t) for s in stations for t in stations))
            asked = sum(s.room.announcer.counters["asked"] for s in stations)
            for at in range(20):
                first.room.holds(chain(f"more-{at}"))
            await until(lambda: all(knows(s, first, "more-19") for s in stations[1:]))
            first.room.lost("chain", "log")
            await until(lambda: not any(knows(s, first) for s in stations[1:]))
            assert sum(s.room.announcer.counters["asked"] for s in stations) == asked, (
                "deltas, nobody had to ask"
            )
            assert first.room.announcer.counters["pushes"] <= 3 * 4, "what comes together goes together"

    asyncio.run(run())


def test_push_that_was_lost_is_made_good_by_the_next_note(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (one, two):
            one.room.holds(chain())
            await until(lambda: met(two, one) and met(one, two))
            one.room.announcer.push = lambda: None  # type: ignore[method-assign]
            one.room.holds(chain("lost"))
            await asyncio.sleep(0.05)
            assert not knows(two, one, "lost")
            two.room.heard(one.id, one.room.note())
            await until(lambda: knows(two, one, "lost"))
            asked = two.room.announcer.counters["asked"]
            two.room.heard(one.id, one.room.note())
            two.room.heard(one.id, None)
            await asyncio.sleep(0.02)
            assert two.room.announcer.counters["asked"] == asked, "nothing is news"

    asyncio.run(run())


def test_whole_announcement_that_exceeds_a_frame_comes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(announcing, "CHANGES_A_FRAME", 100)
        async with world(tmp_path, 2) as (one, two):
            for at in range(1_000):
                one.room.own.add(chain(f"c{at:04}"))
            one.room.announcer.push()
            await until(lambda: len(two.room.holdings.held_by(one.id)) == 1_000)

    asyncio.run(run())


def test_note_that_is_none_is_counted_and_nothing_else(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 1) as (station,):
            notes: list[Any] = [5, "x", [1], [1, 2, 3], {"a": 1}, [1, -1, "a"], [[], [], []]]
            for note in notes:
                station.room.heard(7, note)
            assert station.room.announcer.counters == {"bad_note": len(notes)}

    asyncio.run(run())


def test_only_members_tell_and_ask(tmp_path: Path) -> None:
    from tests.agent.test_data_desk import person

    async def run() -> None:
        async with world(tmp_path, 1) as (station,), person(station) as link:
            for work in (
                link.call("holdings_changed", {"version": [1, 1]}),
                anext(aiter(link.stream("holdings", {}))),
                link.call("confirm", {"kind": "artifact", "name": "x", "head": ""}),
                link.call("place", {"kind": "artifact", "name": "x", "version": [1, 1]}),
                link.call("migrate", {"kind": "artifact", "name": "x", "version": [1, 1]}),
            ):
                with pytest.raises(Refused) as told:
                    await work
                assert told.value.code == "login"

    asyncio.run(run())


@pytest.mark.parametrize(
    "told", [5, [], [[1, 1], "a", None, [["x"]]], [[1, 1], "0" * 32, None, [[["chain", 5]]]]]
)
def test_nonsense_about_holdings_is_refused_counted_and_changes_nothing(tmp_path: Path, told: Any) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (one, two):
            one.room.holds(chain())
            await until(lambda: knows(two, one))
            link = await one.link_to(two.id)
            nonsense: list[Any] = [
                5,
                [],
                [[1, 1], "a", None, [["x"]]],
                [[1, 1], "0" * 32, None, [[["chain", 5]]]],
            ]
            for told in nonsense:
                with pytest.raises(RemoteError):
                    await link.call("holdings_changed", {"version": [1, 1], "told": told})
            assert two.room.announcer.counters["bad_told"] == len(nonsense) and knows(two, one)

    asyncio.run(run())


def test_restarted_node_is_heard_anew_and_keeps_its_artifacts(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            await low.take("model", DATA, replicas=2)
            await held_by([low, high], "model", 2)
            await low.world.end(high)
            assert low.room.holdings.leader(KEY) == low.id
            await high.start()
            low.world.changed()
            await held_by([low, high], "model", 2)
            assert low.room.holdings.leader(KEY) == high.id

    asyncio.run(run())


def test_version_that_nobody_who_may_has_put_is_disbelieved_and_the_true_one_stays(tmp_path: Path) -> None:
    """A member that claims a later version of a name, signed by a key of its own, takes nothing over."""
    stranger = Identity.from_seed(b"q" * 32)
    forged = entry_for("model", b"forged", replicas=2, at_ms=2_000, signer=stranger)

    def vouch(signer: Any, put: Any) -> None:
        if signer.fingerprint == forged.put_by:
            raise Refused("unknown_key", "not an operator here")

    async def run() -> None:
        async with world(tmp_path, 4, vouch=vouch) as stations:
            true = await stations[0].take("model", DATA, replicas=2)
            holding = await held_by(stations, "model", 2)
            liar = next(s for s in reversed(stations) if s not in holding)
            liar.room.artifacts._vouch = lambda signer, put: None
            part = liar.room.store.part(forged.hash, forged.size, _list(b"forged"))
            part.open()
            part.add(b"forged")
            liar.room.store.adopt(part)
            liar.room.store.keep(forged)
            liar.room.artifacts.refresh("model")
            honest = [s for s in stations if s is not liar]
            await until(lambda: all(s.room.holdings.counters["void"] for s in holding))
            for station in holding:
                assert station.room.store.entry("model") == true
                assert station.room.holdings.holders(KEY) == sorted(s.id for s in holding)
            await holding[0].world.end(holding[0])
            await until(lambda: sum(s.up and s.holds("model") for s in honest) == 2)
            for station in honest:
                if station.up:
                    assert station.room.store.entry("model") == true

    asyncio.run(run())


def _list(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


def test_announcer_that_is_closed_does_nothing_more(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (one, two):
            announcer: Announcer = one.room.announcer
            await announcer.close()
            one.room.holds(chain())
            announcer.ask(two.id)
            await asyncio.sleep(0.05)
            assert not knows(two, one) and not announcer._tasks

    asyncio.run(run())
