"""The loop around the whole engine: probes of any event, the scorer, controls, and what is recorded of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.loop import MeshLoop
from agent.meshos.actions import Action
from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import DaemonControl, DrainStart
from agent.meshos.events import (
    Admin,
    AdminOp,
    DaemonIntent,
    DaemonLifecycle,
    Event,
    Id,
    ReplicaUpdate,
    RttSample,
)
from agent.meshos.replay import play, read
from agent.recorder import Recorder

ME = 100


class Hand:
    """A loop driven by hand, with what it told."""

    def __init__(self, config: MeshOsConfig | None = None, **options: Any) -> None:
        self.now = 1000.0
        self.actions: list[Action] = []
        self.controls: list[DaemonControl] = []
        options = {
            "on_transition": lambda move: None,
            "on_action": self.actions.append,
            "on_control": self.controls.append,
        } | options
        self.loop = MeshLoop(ME, config, clock=lambda: self.now, **options)

    def tell(self, *events: Event) -> None:
        for event in events:
            assert self.loop.try_publish(event)

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 0.5
            self.loop.tick()


def test_event_probe_is_folded_within_its_tick() -> None:
    hand = Hand()
    hand.loop.install_event_probe("daemons", lambda: [DaemonIntent("web", "run")])
    hand.tick()
    assert [(a.KIND, a.target) for a in hand.actions] == [("start_daemon", "web")]


def test_event_probe_that_raises_half_way_keeps_what_it_said() -> None:
    def half() -> Iterator[Event]:
        yield RttSample(7, 1.0)
        raise ValueError("boom")

    hand = Hand()
    hand.loop.install_event_probe("half", half)
    hand.tick()
    assert 7 in hand.loop.snapshot.peers
    assert [f.target for f in hand.loop.snapshot.recent_failures] == ["half"]
    hand.loop.remove_probe("half")
    hand.tick()
    assert hand.loop.stats()["probe_failures"] == 1


def leading(hand: Hand, count: int) -> None:
    hand.tell(*[ReplicaUpdate(chain, "added", ME, leader=ME) for chain in range(count)])


def test_scorer_is_asked_about_chains_led_here_a_few_a_tick_and_all_in_turn() -> None:
    asked: list[Id] = []

    def score(chain: Id) -> dict[Id, float | None]:
        asked.append(chain)
        return {ME: 0.9}

    hand = Hand(MeshOsConfig(scored_chains_per_tick=3, events_per_tick=100, score_refresh_ms=10_000))
    leading(hand, 7)
    hand.tell(ReplicaUpdate("not led", "added", ME, leader=7))
    hand.loop.install_scorer(score)
    hand.tick()
    asked.clear()
    hand.tick(3)
    assert asked == list(range(7))
    hand.tick(30)
    assert asked[7:] == list(range(7))


def test_scorer_that_raises_is_a_failure_record_and_the_loop_goes_on() -> None:
    hand = Hand()
    leading(hand, 1)
    hand.loop.install_scorer(lambda chain: 1 / 0)  # type: ignore[arg-type,return-value]
    hand.tick(3)
    assert [f.target for f in hand.loop.snapshot.recent_failures] == ["scorer"]


def test_scores_forgotten_by_an_operator_are_asked_for_again() -> None:
    hand = Hand(MeshOsConfig(score_refresh_ms=1000))
    leading(hand, 1)
    hand.loop.install_scorer(lambda chain: {ME: 0.9, 7: 0.8})
    hand.tick(2)
    hand.tell(Admin(AdminOp("invalidate_placement", ME)))
    hand.tick()
    assert hand.loop.state.scores == {}
    hand.tick(3)
    assert hand.loop.state.scores == {"0": {"100": 0.9, "7": 0.8}}


def test_controls_are_told_as_they_arise_and_a_raising_listener_is_a_failure() -> None:
    hand = Hand()
    hand.tell(Admin(AdminOp("drain", ME, 4000)))
    hand.tick()
    assert hand.controls == [DrainStart(4000)]
    bad = Hand(on_control=lambda control: 1 / 0)
    bad.tell(Admin(AdminOp("drain", ME)))
    bad.tick(2)
    assert [f.target for f in bad.loop.snapshot.recent_failures] == ["on_control"]


def test_stats_of_others_are_shown_among_the_loops_own() -> None:
    hand = Hand()
    hand.loop.add_stats(lambda: {"dispatched": 7})
    assert hand.loop.document()["stats"]["dispatched"] == 7


def test_what_a_tick_polled_is_recorded_behind_it_and_replays_within_it(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    hand = Hand(recorder=Recorder(path, ME, MeshOsConfig()))
    hand.loop.install_rtt_probe("rtt", lambda: [(7, 900.0)])
    hand.loop.install_rtt_probe("broken", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    hand.tell(DaemonIntent("web", "run"), DaemonLifecycle("web", "started"))
    hand.tick(2)
    hand.loop._close()
    assert [
        line.split(b'"event":"')[1].split(b'"')[0].decode() for line in path.read_bytes().splitlines()[1:]
    ] == [
        "tick",
        "rtt_sample",
        "local_failure",
        "daemon_intent",
        "daemon_lifecycle",
        "tick",
    ]
    with path.open("rb") as lines:
        first, second, _ = play(read(lines))
    assert [action["kind"] for action in first["actions"]] == ["mark_avoid"]
    assert second["actions"] == []


@pytest.mark.parametrize("capacity", [1, 2, 1024])
def test_full_queue_loses_nothing_silently(capacity: int) -> None:
    """Publishers wait or are told: what was accepted is folded, what was not is counted."""

    async def main() -> None:
        hand = Hand(MeshOsConfig(event_queue_capacity=capacity, events_per_tick=1))
        taken = [hand.loop.try_publish(RttSample(n, 1.0)) for n in range(5)]
        patient = [asyncio.create_task(hand.loop.publish(RttSample(n + 50, 1.0))) for n in range(5)]
        await asyncio.sleep(0)
        for _ in range(20):
            hand.tick()
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*patient), 5)
        assert len(hand.loop.state.rtt) == sum(taken) + 5
        assert hand.loop.stats()["events_dropped"] == 5 - sum(taken)

    asyncio.run(main())
