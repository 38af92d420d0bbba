"""The loop: one order of things at a tick, a bounded queue that loses nothing silently, no way to end it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from agent.loop import LoopClosed, MeshLoop, QueueFull
from agent.meshos.actions import Action, MarkAvoid
from agent.meshos.config import MeshOsConfig
from agent.meshos.events import (
    Admin,
    AdminOp,
    Event,
    Health,
    Id,
    Leaving,
    LocalFailure,
    RttSample,
    SelfHealth,
    Shutdown,
    Started,
    Synced,
    Tick,
)
from agent.meshos.own import Transition
from agent.meshos.reconcile import locality
from discovery.lifecycle import State

ME = 100
QUICK = MeshOsConfig(tick_interval_ms=10)


class Hand:
    """A loop driven by hand: a clock that only moves when told, and what the loop told its owner."""

    def __init__(self, config: MeshOsConfig | None = None, **options: Any) -> None:
        self.now = 1000.0
        self.moves: list[Transition] = []
        self.actions: list[Action] = []
        options = {"on_transition": self.moves.append, "on_action": self.actions.append} | options
        self.loop = MeshLoop(ME, config, clock=lambda: self.now, **options)

    def tick(self, after_s: float = 0.5) -> None:
        self.now += after_s
        self.loop.tick()

    def failures(self) -> list[tuple[str, Id | None, str]]:
        return [(f.source, f.target, f.reason) for f in self.loop.snapshot.recent_failures]


def running(
    body: Callable[[MeshLoop], Awaitable[Any]], config: MeshOsConfig = QUICK, **options: Any
) -> tuple[Any, dict[str, int]]:
    """What `body` returns with a loop that runs beside it, and the loop's stats once shut down."""

    async def main() -> tuple[Any, dict[str, int]]:
        callbacks = {"on_transition": lambda _: None, "on_action": lambda _: None} | options
        loop = MeshLoop(ME, config, **callbacks)
        task = asyncio.create_task(loop.run())
        result = await asyncio.wait_for(body(loop), 20)
        loop.try_publish(Shutdown())
        return result, await asyncio.wait_for(task, 20)

    return asyncio.run(main())


async def until(condition: Callable[[], Any], limit_s: float = 10.0) -> None:
    """Polls a condition; fails when it doesn't come true in time."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def test_tick_does_its_parts_in_the_documented_order() -> None:
    order: list[str] = []
    hand = Hand(
        on_action=lambda action: order.append(f"action {action.target}"),
        on_snapshot=lambda snapshot: order.append(f"snapshot avoiding {sorted(snapshot.avoid_list)}"),
        arms=(lambda look: order.append(f"reconcile at {look.now_ms}") or locality(look),),
    )

    def probe() -> Iterator[tuple[int, float]]:
        order.append(f"probe, tick {hand.loop.state.last_tick_ms} folded")
        yield 7, 300.0

    hand.loop.install_rtt_probe("rtt", probe)
    hand.loop.try_publish(RttSample(8, 300.0))
    hand.tick()
    order.append(f"queued folded: {8 in hand.loop.state.rtt}")
    assert order == [
        "probe, tick 1000500 folded",
        "reconcile at 1000500",
        "action 7",
        "snapshot avoiding [7]",
        "queued folded: True",
    ]


def test_tick_folds_at_most_32_queued_events() -> None:
    hand = Hand()
    for n in range(40):
        hand.loop.try_publish(RttSample(n + 1000, 1.0))
    hand.tick()
    assert len(hand.loop.state.rtt) == 32
    hand.tick()
    assert len(hand.loop.state.rtt) == 40


def test_tick_late_delays_the_next_and_is_measured() -> None:
    hand = Hand()
    hand.tick(0.5)
    assert hand.loop.stats()["late_ticks"] == 0
    hand.tick(1.0)
    assert hand.loop.stats()["late_ticks"] == 1
    hand.tick(0.5)
    assert hand.loop.stats() | {"ticks": 3, "late_ticks": 1} == hand.loop.stats()


def test_loop_late_in_three_samples_running_degrades_the_node() -> None:
    hand = Hand()
    hand.loop.try_publish(Synced())
    for _ in range(3):
        hand.tick(1.1)
        hand.loop.try_publish(SelfHealth(0, 0))
        hand.tick()
    assert [(move.new, move.reason) for move in hand.moves[1:]] == [
        (State.DEGRADED, "loop late by 500 ms or more for 15 s")
    ]


def test_events_are_stamped_by_the_loop_and_never_backwards() -> None:
    hand = Hand()
    hand.loop.try_publish(RttSample(7, 1.0, at_ms=5))
    hand.tick()
    assert hand.loop.state.rtt[7].at_ms == 1_000_500
    hand.now -= 60
    hand.loop.try_publish(RttSample(8, 1.0))
    hand.loop.tick()
    assert hand.loop.state.rtt[8].at_ms == 1_000_500


def test_transition_is_told_once_and_the_snapshot_already_shows_it() -> None:
    shown: list[tuple[State, State]] = []
    hand = Hand(on_transition=lambda move: shown.append((move.new, hand.loop.snapshot.local.state)))
    for event in (Started(), Synced(), Synced(), Admin(AdminOp("drain", ME))):
        hand.loop.try_publish(event)
    hand.tick()
    assert shown == [(state, state) for state in (State.JOINING, State.ALIVE, State.DRAINING)]


def test_idle_tick_makes_no_new_snapshot_though_probes_repeat_themselves() -> None:
    hand = Hand()
    hand.loop.install_rtt_probe("rtt", lambda: [(n, 5.0) for n in range(25)])
    hand.loop.install_health_probe("health", lambda: [(n, Health.HEALTHY, "") for n in range(25)])
    hand.tick()
    first = hand.loop.snapshot
    assert len(first.peers) == 25
    for _ in range(8):
        hand.tick()
    assert hand.loop.snapshot is first
    for _ in range(60):
        hand.tick()
    assert len(hand.loop.snapshot.peers) == 25


def test_probe_new_value_is_folded_at_once() -> None:
    hand = Hand()
    said = {"rtt": 5.0, "health": Health.HEALTHY}
    hand.loop.install_rtt_probe("rtt", lambda: [(7, said["rtt"])])  # type: ignore[list-item]
    hand.loop.install_health_probe("health", lambda: [(7, said["health"], "")])  # type: ignore[list-item]
    hand.tick()
    said |= {"rtt": 6.0, "health": Health.UNREACHABLE}
    hand.tick()
    peer = hand.loop.snapshot.peers[7]
    assert (peer.rtt_ms, peer.health) == (6.0, Health.UNREACHABLE)


def test_probe_that_raises_is_a_failure_record_and_the_others_are_polled() -> None:
    hand = Hand()

    def broken() -> Any:
        raise ValueError("boom")

    hand.loop.install_rtt_probe("broken", broken)
    hand.loop.install_rtt_probe("nonsense", lambda: [("x",)])  # type: ignore[list-item,return-value]
    hand.loop.install_health_probe("unheard-of", lambda: [(7, "splendid", "")])  # type: ignore[list-item]
    hand.loop.install_rtt_probe("good", lambda: [(7, 1.0)])
    hand.tick()
    assert [(source, target) for source, target, _ in hand.failures()] == [
        ("probe", "broken"),
        ("probe", "nonsense"),
        ("probe", "unheard-of"),
    ]
    assert hand.failures()[0][2] == "ValueError: boom"
    assert 7 in hand.loop.snapshot.peers


def test_probe_that_keeps_raising_is_recorded_twice_a_minute_and_counted_always() -> None:
    hand = Hand()
    hand.loop.install_rtt_probe("broken", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    for _ in range(120):
        hand.tick()
    assert len(hand.failures()) == 2
    assert hand.loop.stats()["probe_failures"] == 120


def test_probe_removed_is_polled_no_more() -> None:
    hand = Hand()
    hand.loop.install_rtt_probe("rtt", lambda: [(7, 1.0)])
    hand.loop.remove_probe("rtt")
    hand.tick()
    assert hand.loop.state.rtt == {}


def test_action_without_room_is_dropped_counted_and_told() -> None:
    hand = Hand(on_action=lambda _: False)
    hand.loop.try_publish(RttSample(7, 300.0))
    hand.tick()
    hand.tick()
    assert hand.loop.stats()["actions_dropped"] == 1
    assert hand.failures() == [("action", 7, "action queue full")]
    assert hand.loop.snapshot.recently_emitted == ()


def test_action_whose_receiver_raises_is_a_failure_and_the_next_goes_on() -> None:
    taken: list[Id] = []

    def receive(action: MarkAvoid) -> None:
        if action.peer == 7:
            raise OSError("no")
        taken.append(action.peer)

    hand = Hand(on_action=receive)
    hand.loop.try_publish(RttSample(7, 300.0))
    hand.loop.try_publish(RttSample(8, 300.0))
    hand.tick()
    hand.tick()
    assert taken == [8]
    assert hand.failures() == [("action", 7, "OSError: no")]


def test_callbacks_that_raise_do_not_stop_the_loop() -> None:
    def bad(_: object) -> None:
        raise RuntimeError("bad owner")

    hand = Hand(on_transition=bad, on_snapshot=bad)
    hand.loop.try_publish(Synced())
    hand.tick()
    hand.tick()
    assert hand.loop.life.state is State.ALIVE
    assert ("loop", "on_transition", "RuntimeError: bad owner") in hand.failures()
    assert hand.loop.stats()["callback_failures"] >= 2


def test_arm_that_raises_is_a_failure_record_and_the_loop_goes_on() -> None:
    hand = Hand(arms=(lambda look: 1 / 0,))
    hand.tick()
    hand.tick()
    assert hand.failures() == [("loop", "reconcile", "ZeroDivisionError: division by zero")]
    assert hand.loop.stats()["ticks"] == 2


def test_try_publish_to_a_full_queue_drops_counts_and_tells() -> None:
    hand = Hand(MeshOsConfig(event_queue_capacity=3))
    assert [hand.loop.try_publish(RttSample(n, 1.0)) for n in range(5)] == [True, True, True, False, False]
    hand.tick()
    assert hand.loop.stats()["events_dropped"] == 2
    assert ("loop", "event_queue", "event queue full: 2 events dropped") in hand.failures()


def test_shutdown_is_taken_even_by_a_full_queue() -> None:
    hand = Hand(MeshOsConfig(event_queue_capacity=1))
    assert hand.loop.try_publish(Synced())
    assert hand.loop.try_publish(Shutdown())


def test_publish_waits_for_room_and_keeps_the_order() -> None:
    async def main() -> list[str]:
        hand = Hand(MeshOsConfig(event_queue_capacity=2))
        publishers = [
            asyncio.create_task(hand.loop.publish(LocalFailure("t", "t", str(n)))) for n in range(5)
        ]
        await asyncio.sleep(0)
        assert sum(task.done() for task in publishers) == 2
        hand.tick()
        hand.tick()
        await asyncio.wait_for(asyncio.gather(*publishers), 5)
        hand.tick()
        return [failure.reason for failure in hand.loop.state.failures]

    assert asyncio.run(main()) == ["0", "1", "2", "3", "4"]


def test_publish_timeout_without_room_raises_queue_full_and_takes_nothing() -> None:
    async def main() -> dict[Id, Any]:
        hand = Hand(MeshOsConfig(event_queue_capacity=1))
        hand.loop.try_publish(RttSample(1, 1.0))
        with pytest.raises(QueueFull, match=r"full for 0\.01 s"):
            await hand.loop.publish_timeout(RttSample(2, 1.0), 0.01)
        hand.tick()
        await hand.loop.publish_timeout(RttSample(3, 1.0), 0.01)
        hand.tick()
        return hand.loop.state.rtt

    assert set(asyncio.run(main())) == {1, 3}


def test_publish_cancelled_while_waiting_takes_nothing_and_blocks_nobody() -> None:
    async def main() -> set[Id]:
        hand = Hand(MeshOsConfig(event_queue_capacity=1))
        hand.loop.try_publish(RttSample(1, 1.0))
        given_up = asyncio.create_task(hand.loop.publish(RttSample(2, 1.0)))
        patient = asyncio.create_task(hand.loop.publish(RttSample(3, 1.0)))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        hand.tick()
        await asyncio.wait_for(patient, 5)
        hand.tick()
        return set(hand.loop.state.rtt)

    assert asyncio.run(main()) == {1, 3}


def test_shutdown_wins_over_what_is_queued_behind_it() -> None:
    async def main() -> tuple[set[Id], dict[str, int]]:
        hand = Hand()
        for event in (RttSample(1, 1.0), Shutdown(), RttSample(2, 1.0)):
            await hand.loop.publish(event)
        behind = asyncio.create_task(hand.loop.publish_folded(Synced()))
        await asyncio.sleep(0)
        stats = await asyncio.wait_for(hand.loop.run(), 5)
        with pytest.raises(LoopClosed):
            await behind
        return set(hand.loop.state.rtt), stats

    rtt, stats = asyncio.run(main())
    assert rtt == {1}
    assert stats["events_dropped"] == 2


def test_closed_loop_refuses_every_way_of_publishing() -> None:
    async def main() -> None:
        hand = Hand(MeshOsConfig(event_queue_capacity=1))
        await hand.loop.publish(Shutdown())
        waiting = asyncio.create_task(hand.loop.publish(RttSample(1, 1.0)))
        await asyncio.sleep(0)
        await asyncio.wait_for(hand.loop.run(), 5)
        with pytest.raises(LoopClosed):
            await waiting
        with pytest.raises(LoopClosed):
            await hand.loop.publish(Synced())
        with pytest.raises(LoopClosed):
            await hand.loop.publish_timeout(Synced(), 1)
        with pytest.raises(LoopClosed):
            await hand.loop.publish_folded(Synced())
        assert hand.loop.try_publish(Synced()) is False
        assert hand.loop.snapshot.local.state is State.JOINING

    asyncio.run(main())


def test_running_loop_folds_events_as_they_arrive_not_at_the_tick() -> None:
    async def body(loop: MeshLoop) -> tuple[Transition | None, int]:
        await loop.publish_folded(Started())
        return await loop.publish_folded(Synced()), loop.stats()["ticks"]

    (move, ticks), _ = running(body, MeshOsConfig(tick_interval_ms=60_000))
    assert move is not None and (move.old, move.new) == (State.JOINING, State.ALIVE)
    assert ticks == 0


def test_running_loop_ticks_at_its_interval() -> None:
    async def body(loop: MeshLoop) -> None:
        await until(lambda: loop.stats()["ticks"] >= 5)

    running(body)


def test_running_loop_keeps_ticking_under_a_flood_of_events() -> None:
    async def body(loop: MeshLoop) -> int:
        flooding = True

        async def flood() -> None:
            n = 0
            while flooding:
                await loop.publish(RttSample(n % 50, 1.0))
                n += 1

        publishers = [asyncio.create_task(flood()) for _ in range(3)]
        await until(lambda: loop.stats()["ticks"] >= 5)
        flooding = False
        await asyncio.gather(*publishers)
        return loop.stats()["events"]

    events, _ = running(body)
    assert events > 500


def test_running_loop_probe_installed_at_run_time_is_polled_from_the_next_tick() -> None:
    async def body(loop: MeshLoop) -> None:
        await until(lambda: loop.stats()["ticks"] >= 1)
        loop.install_rtt_probe("rtt", lambda: [(7, 300.0)])
        await until(lambda: 7 in loop.snapshot.avoid_list)

    actions: list[Action] = []
    running(body, on_action=actions.append)
    assert [action.target for action in actions] == [7]


def test_running_loop_cancelled_closes_and_releases_its_publishers() -> None:
    async def main() -> None:
        loop = MeshLoop(
            ME, MeshOsConfig(tick_interval_ms=60_000), on_transition=print, on_action=lambda _: None
        )
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert loop.closed
        with pytest.raises(LoopClosed):
            await loop.publish(Synced())

    asyncio.run(main())


def test_leaving_answers_its_publisher_with_the_last_move() -> None:
    async def body(loop: MeshLoop) -> Transition | None:
        await loop.publish(Synced())
        return await loop.publish_folded(Leaving("control_op", "ann", "01K"))

    move, _ = running(body)
    assert (move.new, move.reason, move.by, move.op_id) == (State.LEAVING, "control_op", "ann", "01K")


def test_document_carries_the_loops_own_counts() -> None:
    hand = Hand()
    hand.loop.try_publish(RttSample(7, 300.0))
    hand.tick()
    hand.tick()
    shown = hand.loop.document(show=str)
    assert shown["stats"]["ticks"] == 2
    assert shown["peers"][0]["peer"] == "7"


def test_tick_published_by_others_is_taken_and_means_nothing() -> None:
    hand = Hand()
    hand.loop.try_publish(Tick(late_ms=9000))
    hand.tick()
    assert hand.loop.stats()["events"] == 1
    assert hand.loop.state.own_health.late is False


def test_event_types_without_a_fold_are_taken_quietly() -> None:
    class Unheard(Tick, frozen=True, tag="unheard"):
        """An event of a later build."""

    hand = Hand()
    events: list[Event] = [Unheard(), Synced()]
    for event in events:
        hand.loop.try_publish(event)
    hand.tick()
    assert hand.loop.life.state is State.ALIVE
