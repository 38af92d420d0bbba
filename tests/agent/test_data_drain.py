"""Placement over minutes, in virtual time: a drain of fifty artifacts, a death, an overload, and the rates kept."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise

from agent.data.holdings import Item
from agent.meshos.actions import MigrateBlob, PullReplica
from agent.meshos.events import LocalReplicaIntent
from tests.agent.data_sim import Sim, in_virtual_time

COUNTS = {f"a{at:02}": (1, 2, 3, 0)[at % 4] for at in range(50)}


def pulls_keep_their_rate(sim: Sim) -> None:
    for node in sim.nodes:
        at_ms = [ms for ms, who, action in sim.went if who == node.id and isinstance(action, PullReplica)]
        assert all(later - earlier >= 250 for earlier, later in pairwise(at_ms)), "pulls 250 ms apart"


def migrations_keep_their_rate(sim: Sim) -> None:
    at_ms = [ms for ms, _, action in sim.went if isinstance(action, MigrateBlob)]
    for at, ms in enumerate(at_ms[10:]):
        assert ms - at_ms[at] >= 1000, "at most ten a second"


def test_drain_of_fifty_artifacts_moves_all_keeps_every_count_and_the_rates() -> None:
    async def run() -> None:
        sim = Sim(5)
        leaving = sim.nodes[4]
        low: list[tuple[int, str]] = []

        def check() -> None:
            for name, count in COUNTS.items():
                copies = sim.copies(name)
                counting = [node for node in copies if not node.runtime.loop.state.draining]
                if len(copies) < max(1, count - 1) or len(counting) < count - 1:
                    low.append((sim.now_ms, name))

        for name, count in COUNTS.items():
            item = Item("artifact", name, "aa", 20_000_000, count, 1, "")
            for node in (leaving, *sim.nodes[: max(0, count - 1)]):
                node.take(item)
                node.tell(LocalReplicaIntent(name, "hold"))
        await asyncio.sleep(5)
        assert not sim.went, "all counts are held: nothing is to be done"
        sim.check = check
        began = asyncio.get_running_loop().time()
        await sim.admin("drain", leaving.id)
        await sim.until(lambda: not leaving.runtime.loop.state.left(), 120.0)
        assert asyncio.get_running_loop().time() - began < 60
        assert not leaving.disk
        await asyncio.sleep(120)
        assert not low
        for name, count in COUNTS.items():
            holding = sim.copies(name)
            assert len(holding) == max(1, count) and leaving not in holding, name
        pulls_keep_their_rate(sim)
        migrations_keep_their_rate(sim)
        moved = Counter(action.KIND for _, _, action in sim.went)
        assert moved["migrate_blob"] == 12 and moved["request_placement"] == 38, "each once, by one arm"
        assert moved["request_eviction"] == 0, "no copy too many was ever made"
        taken = Counter(node.id for node in sim.nodes for name in node.disk)
        assert max(taken[n] for n in (1, 2, 3, 4)) - min(taken[n] for n in (1, 2, 3, 4)) < 26
        await sim.close()

    in_virtual_time(run)


def test_holder_that_dies_is_replaced_after_a_minute_and_evicted_from_when_it_is_back() -> None:
    async def run() -> None:
        sim = Sim(4)
        for node in sim.nodes[:2]:
            for at in range(10):
                node.take(Item("artifact", f"a{at}", "aa", 1_000_000, 2, 1, ""))
        await asyncio.sleep(5)
        dead = sim.nodes[0]
        dead.up = False
        await asyncio.sleep(50)
        assert not sim.went, "it may be back"
        await sim.until(lambda: all(len(sim.copies(f"a{at}")) == 2 for at in range(10)), 60.0)
        pulls_keep_their_rate(sim)
        dead.up = True
        for node in sim.nodes:
            dead.hear(node) if node is not dead else None
        await asyncio.sleep(10)
        await sim.until(lambda: all(len(sim.copies(f"a{at}")) == 2 for at in range(10)), 300.0)
        await sim.close()

    in_virtual_time(run)


def test_two_nodes_drained_at_once_lose_nothing() -> None:
    async def run() -> None:
        sim = Sim(4)
        lost: list[str] = []
        names = [f"a{at}" for at in range(8)]

        def check() -> None:
            lost.extend(name for name in names if not sim.copies(name))

        for name in names:
            for node in sim.nodes[2:]:
                node.take(Item("artifact", name, "aa", 1_000_000, 2, 1, ""))
        await asyncio.sleep(5)
        sim.check = check
        await sim.admin("drain", 3)
        await sim.admin("drain", 4)
        await sim.until(lambda: not sim.nodes[2].disk and not sim.nodes[3].disk, 200.0)
        assert not lost
        assert all(sorted(n.id for n in sim.copies(name)) == [1, 2] for name in names)
        pulls_keep_their_rate(sim)
        await sim.close()

    in_virtual_time(run)


def test_mesh_too_small_for_a_count_keeps_what_it_has_and_says_so() -> None:
    async def run() -> None:
        sim = Sim(2)
        sim.nodes[0].take(Item("artifact", "a", "aa", 1_000, 3, 1, ""))
        await asyncio.sleep(30)
        assert len(sim.copies("a")) == 2
        await sim.admin("drain", 2)
        await asyncio.sleep(60)
        assert len(sim.copies("a")) == 2
        assert sim.nodes[1].runtime.loop.state.left() == ["1 replica held (a)"]
        assert any("no node is fit" in why for node in sim.nodes for why in node.failed)
        await sim.close()

    in_virtual_time(run)


def test_holder_that_is_overloaded_is_moved_without_a_moment_below_the_count() -> None:
    async def run() -> None:
        sim = Sim(5)
        low: list[int] = []
        names = [f"a{at}" for at in range(6)]

        def check() -> None:
            low.extend(sim.now_ms for name in names if len(sim.copies(name)) < 2)

        for name in names:
            for node in sim.nodes[1:3]:
                node.take(Item("artifact", name, "aa", 1_000_000, 2, 1, ""))
        for node in sim.nodes:
            node.runtime.install_scorer(node.placing.scorer)
        sim.check = check
        await asyncio.sleep(60)
        assert not sim.went, "nobody is bad enough to be moved from"
        sim.nodes[1].load = 0.99
        await sim.until(lambda: not sim.nodes[1].disk, 400.0)
        assert not low
        assert all(len(sim.copies(name)) == 2 for name in names)
        pulls_keep_their_rate(sim)
        sim.went.clear()
        await asyncio.sleep(700)
        assert not sim.went, "and then it rests"
        await sim.close()

    in_virtual_time(run)
