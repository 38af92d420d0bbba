"""Artifacts find their nodes: placed, evicted, drained and restored by the engine, over real links."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.data.holdings import Item
from agent.executor import DispatchError
from agent.meshos.actions import DropReplica, MigrateBlob, PullReplica, RequestPlacement
from agent.meshos.events import LocalReplicaIntent, PlacementIntent
from discovery.errors import Refused
from tests.agent.data_nodes import Station, held_by, noise, world
from tests.discovery.loopback import until

DATA = noise(3 * 2**20 // 2)
KEY: Any = ("artifact", "model")


def test_artifact_is_copied_until_its_count_is_held(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 4) as stations:
            await stations[0].take("model", DATA, replicas=3)
            holding = await held_by(stations, "model", 3)
            for station in holding:
                entry = station.room.store.entry("model")
                assert entry is not None
                assert station.room.store.blob_file(entry.hash).read_bytes() == DATA
            leader = max(s.id for s in holding)
            assert {s.room.holdings.leader(KEY) for s in stations} == {leader}

    asyncio.run(run())


def test_spec_count_goes_before_the_count_of_the_put(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            for station in stations:
                station.room.spec({KEY: 1})
            await stations[1].take("model", DATA, replicas=3)
            await held_by(stations, "model", 1)
            for station in stations:
                station.room.spec({KEY: 2})
            await held_by(stations, "model", 2)
            for station in stations:
                station.room.spec({KEY: 1})
            left = await held_by(stations, "model", 1)
            assert left[0].runtime.loop.state.desired.counts["model"] == 1

    asyncio.run(run())


def test_holder_that_vanishes_is_replaced_after_its_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            await stations[0].take("model", DATA, replicas=2)
            holding = await held_by(stations, "model", 2)
            await stations[0].world.end(holding[1])
            after = await held_by(stations, "model", 2)
            assert holding[1] not in after

    asyncio.run(run())


def test_drained_node_is_emptied_and_nothing_falls_below_its_count_less_one(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            names = [f"part-{at}" for at in range(4)]
            for at, name in enumerate(names):
                await stations[2].take(name, noise(50_000, at), replicas=2 if at % 2 else 1)
            for at, name in enumerate(names):
                await held_by(stations, name, 2 if at % 2 else 1)
            low: list[str] = []

            async def watch() -> None:
                while True:
                    for at, name in enumerate(names):
                        if sum(s.holds(name) for s in stations) < max(1, (2 if at % 2 else 1) - 1):
                            low.append(name)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            drained = stations[2]
            await drained.admin("drain")
            await until(lambda: not drained.runtime.loop.state.left(), 8.0)
            watching.cancel()
            assert not low
            for at, name in enumerate(names):
                holding = await held_by(stations, name, 2 if at % 2 else 1)
                assert drained not in holding

    asyncio.run(run())


def test_resumed_node_keeps_what_it_has_not_let_go_of(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 1) as (only,):
            await only.take("model", DATA, replicas=1)
            await until(lambda: "model" in only.runtime.loop.state.held_by.get(only.id, ()))
            await only.admin("drain")
            only.room.members_changed()
            await asyncio.sleep(0.1)
            assert only.holds("model"), "nobody else can have it: it stays, and the drain says so"
            assert "1 replica held (model)" in only.runtime.loop.state.left()
            await only.admin("resume")
            assert only.holds("model")

    asyncio.run(run())


def test_uncounted_artifact_moves_with_a_drain_as_a_blob_and_is_never_a_chain(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            first = stations[1]
            await first.take("loose", DATA, replicas=0)
            await held_by(stations, "loose", 1)
            await until(lambda: "loose" in first.runtime.loop.state.blobs_here)
            assert "loose" not in first.runtime.loop.state.chains
            await first.admin("drain")
            await until(lambda: not first.runtime.loop.state.left(), 8.0)
            holding = await held_by(stations, "loose", 1)
            assert first not in holding
            assert first.room.placing.counters["migrated"] == 1

    asyncio.run(run())


def test_later_put_of_a_name_takes_the_place_of_the_earlier_at_every_holder(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            old = await stations[0].take("model", DATA, replicas=2)
            holding = await held_by(stations, "model", 2)
            for station in holding:
                station.tell(LocalReplicaIntent("model", "hold"))
            other = next(s for s in stations if s not in holding)
            new = await other.take("model", noise(70_000, 9), replicas=2, at_ms=2_000)
            await held_by(stations, "model", 2)

            def all_new() -> bool:
                entries = [s.room.store.entry("model") for s in stations if s.holds("model")]
                return all(entry is not None and entry.hash == new.hash for entry in entries)

            await until(all_new)
            assert not any(s.room.store.has(old.hash) for s in stations)

    asyncio.run(run())


# --- what is refused


async def order(caller: Station, target: Station, method: str, **more: Any) -> Any:
    link = await caller.link_to(target.id)
    params = {"kind": "artifact", "name": "model", "version": list(caller.room.own.version), **more}
    return await link.call(method, params)


@pytest.mark.parametrize("method", ["place", "evict"])
def test_order_of_a_node_that_does_not_lead_is_refused(tmp_path: Path, method: str) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as stations:
            await stations[2].take("model", DATA)
            await held_by(stations, "model", 1)
            with pytest.raises(Refused) as told:
                await order(stations[1], stations[0], method)
            assert told.value.code == "not_leader"
            assert not stations[0].holds("model")

    asyncio.run(run())


def test_placement_rests_on_what_the_leader_holds_though_it_was_never_told(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            high.room.announcer.push = lambda: None  # type: ignore[method-assign]
            await high.take("model", DATA, replicas=1)
            assert low.room.holdings.live_holders(KEY) == []
            assert await order(high, low, "place") == {"held": False}
            assert low.room.holdings.leader(KEY) == high.id

    asyncio.run(run())


def test_node_without_room_is_passed_over_for_one_that_has(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 3) as (low, middle, high):
            middle.room.store.reserve_bytes = 2**60
            with pytest.raises(Refused) as told:
                await high.take("model", DATA, replicas=1)
                await order(high, middle, "place")
            assert told.value.code == "disk_full"
            for station in (low, middle, high):
                station.room.spec({KEY: 2})
            assert await held_by([low, middle, high], "model", 2) == [low, high]

    asyncio.run(run())


def test_pull_that_fills_the_disk_is_put_off_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            store = low.room.store
            full, room_for = True, store.room_for

            def no_more(more: int) -> None:
                if full and more < 2**20:
                    raise Refused("disk_full", "no room; it goes on when there is room")

            store.room_for = no_more  # type: ignore[method-assign]
            entry = await high.take("model", DATA, replicas=1)
            await held_by([low, high], "model", 1)
            with pytest.raises(DispatchError, match="no room") as told:
                await low.room.dispatch(PullReplica("model", high.id))
            assert told.value.retry_after_ms == 10_000
            part = tmp_path / low.name / "parts" / f"{entry.hash}.part"
            assert part.stat().st_size == 2**20, "what was got is kept"
            full, before = False, high.room.serving.counters["blob_bytes"]
            assert room_for is not store.room_for
            await low.room.dispatch(PullReplica("model", high.id))
            await until(lambda: low.holds("model"))
            assert high.room.serving.counters["blob_bytes"] - before == len(DATA) - 2**20
            assert store.blob_file(entry.hash).read_bytes() == DATA

    asyncio.run(run())


async def held_up(low: Station, high: Station) -> list[bool]:
    """A pull by `low` of what `high` put, come as far as one chunk; the one item says whether it is held up."""
    up = [True]

    def no_more(more: int) -> None:
        if up[0] and more < 2**20:
            raise Refused("disk_full", "no room; it goes on when there is room")

    low.room.store.room_for = no_more  # type: ignore[method-assign]
    entry = await high.take("model", DATA, replicas=2)
    part = low.place / "parts" / f"{entry.hash}.part"
    await until(lambda: part.exists() and part.stat().st_size == 2**20)
    return up


def test_puller_that_ended_half_way_goes_on_by_itself_when_it_is_back(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            await held_up(low, high)
            await low.world.end(low)
            before = high.room.serving.counters["blob_bytes"]
            await low.start()
            low.world.changed()
            assert await held_by([low, high], "model", 2) == [low, high]
            assert high.room.serving.counters["blob_bytes"] - before == len(DATA) - 2**20
            assert high.room.placing.counters["placed"] == 1, "nobody had to ask it again"

    asyncio.run(run())


def test_pull_that_a_drain_called_off_is_not_taken_up_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            await held_up(low, high)
            assert low.room.store.entry("model") is not None
            await low.admin("drain")
            low.room.members_changed()
            await until(lambda: low.room.store.entry("model") is None)
            assert not list((low.place / "parts").iterdir())

    asyncio.run(run())


def test_cordoned_node_takes_no_placement(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            low.cordoned = True
            await high.take("model", DATA)
            with pytest.raises(Refused) as told:
                await order(high, low, "place")
            assert told.value.code == "not_eligible"
            with pytest.raises(DispatchError, match="no node is fit"):
                await high.room.dispatch(RequestPlacement("model", (high.id,)))

    asyncio.run(run())


def test_drop_is_refused_without_so_many_who_have_the_same(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            await low.take("model", DATA, replicas=2)
            await held_by([low, high], "model", 2)
            with pytest.raises(DispatchError, match="1 other nodes hold it and count, 2 have to"):
                await low.room.dispatch(DropReplica("model"))
            assert low.holds("model")

    asyncio.run(run())


def test_drop_is_refused_when_the_other_holder_no_longer_has_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            entry = await low.take("model", DATA, replicas=1)
            low.tell(PlacementIntent("model", None))
            await high.take("model", DATA, replicas=1)
            await until(lambda: len(low.room.holdings.live_holders(KEY)) == 2)
            high.room.store.quarantine(entry.hash)
            with pytest.raises(DispatchError, match="0 of 1 other holders confirm"):
                await low.room.dispatch(DropReplica("model"))
            assert low.holds("model")

    asyncio.run(run())


def test_two_holders_that_drop_at_once_never_both_succeed(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            for turn in range(6):
                name = f"pair-{turn}"
                for station in (low, high):
                    await station.take(name, noise(10, turn), replicas=1)
                key: Any = ("artifact", name)
                await until(lambda k=key: all(len(s.room.holdings.live_holders(k)) == 2 for s in (low, high)))
                drops = (s.room.dispatch(DropReplica(name)) for s in (low, high))
                await asyncio.gather(*drops, return_exceptions=True)
                assert low.holds(name) or high.holds(name)

    asyncio.run(run())


def test_migration_to_a_node_that_does_not_see_the_giver_hold_it_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            with pytest.raises(Refused) as told:
                await order(high, low, "migrate")
            assert told.value.code == "not_a_holder"
            await high.room.dispatch(MigrateBlob("model", low.id))
            assert not low.holds("model")

    asyncio.run(run())


def test_chain_goes_before_an_artifact_of_its_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            low.room.holds(Item("chain", "model", count=1))
            await high.take("model", DATA, replicas=2)
            await until(lambda: ("chain", "model") in high.room.holdings.all_keys())
            await until(lambda: high.room.holdings.counters["name_conflict"] > 0)
            assert high.room.holdings.key_of("model") == ("chain", "model")

    asyncio.run(run())


def test_engine_hears_of_thousands_of_artifacts_at_once_and_loses_none(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path, 2) as (low, high):
            for at in range(2_000):
                low.room.own.add(Item("chain", f"c{at:04}", count=1))
            low.room.announcer.push()
            low.room._own_changed()
            state = high.runtime.loop.state
            await until(lambda: len(state.chains) == 2_000 == len(low.runtime.loop.state.led))
            assert all(chain.leader == low.id for chain in state.chains.values())
            assert high.runtime.stats()["events_dropped"] == 0 == len(high.room._outbox)

    asyncio.run(run())
