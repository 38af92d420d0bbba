"""Arm 1: daemons are started, stopped and held back as the table of SEMANTICS 7 says; and their backoff."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.meshos.backoff import Backoff
from agent.meshos.config import MeshOsConfig
from agent.meshos.daemons import crashed
from agent.meshos.events import (
    ActionOutcome,
    BackoffRestored,
    DaemonIntent,
    Event,
    Leaving,
    Restored,
    Started,
    Synced,
    UpdateFailed,
    UpdateStarted,
)
from discovery.lifecycle import State
from tests.agent.meshos_events import runs
from tests.agent.meshos_play import ME, Play, backoff, start, stop


def test_run_and_absent_starts_once_until_a_signal_comes() -> None:
    node = Play().want("web")
    assert node.tick(500) == [start("web")]
    assert node.tick(1000) == []
    node.signal("web", "started")
    assert node.tick(1500) == []


@pytest.mark.parametrize("signal", ["started", "crashed", "exited_cleanly", "health", "saturation"])
def test_start_in_flight_ends_by_any_lifecycle_signal(signal: str) -> None:
    node = Play().want("web")
    node.tick(500)
    node.at(600).signal("web", signal, health="healthy")
    assert not node.state.in_flight


def test_start_in_flight_is_believed_lost_after_30_seconds() -> None:
    node = Play().want("web")
    node.tick(500)
    assert node.tick(30_499) == []
    assert node.tick(30_500) == [start("web")]


def test_stop_and_running_stops_with_30_seconds_of_grace() -> None:
    node = Play().running("web").want("web", "stop")
    assert node.tick(500) == [stop("web", 30_500)]
    assert node.tick(1000) == []
    node.signal("web", "exited_cleanly")
    assert node.tick(1500) == []


def test_stop_in_flight_ends_at_its_deadline() -> None:
    node = Play().running("web").want("web", "stop")
    node.tick(500)
    assert node.tick(30_499) == []
    assert node.tick(30_500) == [stop("web", 60_500)]


def test_changed_intent_frees_what_is_in_flight() -> None:
    node = Play().running("web").want("web", "stop")
    node.tick(500)
    node.want("web", "run")
    assert node.tick(1000) == []
    node.want("web", "stop")
    assert node.tick(1500) == [stop("web", 31_500)]


@pytest.mark.parametrize("outcome", ["failed", "gated", "dropped"])
def test_outcome_that_is_no_success_frees_a_start(outcome: Any) -> None:
    node = Play().want("web")
    node.tick(500)
    node.tell(ActionOutcome("start_daemon", "web", outcome))
    assert node.tick(1000) == [start("web")]


@pytest.mark.parametrize(("outcome", "retry_ms"), [("dispatched", None), ("failed", 200)])
def test_outcome_that_is_not_the_end_frees_nothing(outcome: Any, retry_ms: int | None) -> None:
    node = Play().want("web")
    node.tick(500)
    node.tell(ActionOutcome("start_daemon", "web", outcome, retry_after_ms=retry_ms))
    assert node.tick(1000) == []


def test_no_intent_is_ignored() -> None:
    assert Play().signal("web", "started").tick(500) == []


def test_intent_forgotten_leaves_what_runs() -> None:
    assert Play().running("web").want("web", "none").tick(500) == []


@pytest.mark.parametrize(
    ("pin", "expected"), [(None, [start("web")]), (ME, [start("web")]), (7, []), ("100", [])]
)
def test_run_pinned_elsewhere_is_stop(pin: Any, expected: list[Any]) -> None:
    assert Play().want("web", node=pin).tick(500) == expected


def test_running_daemon_pinned_elsewhere_is_stopped() -> None:
    assert Play().running("web").want("web", node=7).tick(500) == [stop("web", 30_500)]


def test_daemons_are_sorted_by_id_numbers_first() -> None:
    node = Play().want("b").want(10).want("a").want(9)
    assert [action["daemon"] for action in node.tick(500)] == [9, 10, "a", "b"]


# --- held back


def held(daemon: str, why: str = "needs 2 cores, 1 free of 1") -> DaemonIntent:
    return DaemonIntent(daemon, "run", held=why)


def test_daemon_that_is_held_is_not_started_and_shown_with_its_reason() -> None:
    node = Play().tell(held("web")).admin("cordon")
    assert node.tick(500) == []
    page = node.snapshot()
    assert page["held_back"] == [
        {"what": "start daemon web", "reason": "needs 2 cores, 1 free of 1", "in_ms": None}
    ]
    (row,) = page["daemons"]
    assert (row["intent"], row["state"], row["held_back"]) == ("run", "stopped", "needs 2 cores, 1 free of 1")
    assert row["age_ms"] is None, "it never was there"
    assert node.admin("uncordon").want("web").tick(1000) == [start("web")]


def test_running_daemon_that_is_held_from_now_on_is_stopped() -> None:
    node = Play().running("web").tell(held("web"))
    assert node.tick(500) == [stop("web", 30_500)]
    node.signal("web", "exited_cleanly")
    assert node.tick(1000) == []


def test_start_in_flight_of_a_daemon_that_is_held_is_freed() -> None:
    node = Play().want("web")
    assert node.tick(500) == [start("web")]
    assert node.tell(held("web")).tick(1000) == []
    assert node.snapshot()["daemons"][0]["state"] == "stopped"


def test_exit_from_maintenance_does_not_wait_for_a_daemon_that_is_held() -> None:
    node = Play().tell(held("web")).admin("enter_maintenance").observed("exiting_maintenance")
    assert [action["kind"] for action in node.tick(500)] == ["commit_maintenance_transition"]


# --- drain, maintenance, cordon


@pytest.mark.parametrize("op", ["drain", "enter_maintenance"])
def test_draining_stops_every_running_daemon_intent_or_none(op: str) -> None:
    node = Play().running("web").signal("stray", "started").want("later").admin(op)
    assert node.tick(500) == [stop("stray", 30_500), stop("web", 30_500)]
    node.signal("web", "exited_cleanly").signal("stray", "exited_cleanly")
    assert [a["kind"] for a in node.tick(1000)] == (
        ["commit_maintenance_transition"] if op != "drain" else []
    )


@pytest.mark.parametrize(
    ("state", "runs"),
    [("maintenance", False), ("drain_failed", False), ("exiting_maintenance", True)],
)
def test_maintenance_state_decides_whether_desired_daemons_run(state: str, runs: bool) -> None:
    node = Play().want("web").admin("enter_maintenance")
    node.observed(state)
    assert (start("web") in node.tick(500)) is runs


def test_recovery_runs_what_is_desired() -> None:
    node = Play().want("web").admin("enter_maintenance").observed("exiting_maintenance").observed("recovery")
    assert node.tick(500) == [start("web")]


def test_resume_starts_again_what_the_drain_stopped() -> None:
    node = Play().running("web").admin("drain")
    node.tick(500)
    node.signal("web", "exited_cleanly").admin("resume")
    assert node.tick(1000) == [start("web")]


def test_cordon_holds_back_what_has_not_run_since_and_leaves_what_runs() -> None:
    node = Play().running("old").admin("cordon").want("new")
    assert node.tick(500) == []
    node.at(90_000).signal("old", "crashed")
    assert node.tick(91_000) == [start("old")]
    assert [row["what"] for row in node.snapshot()["held_back"]] == ["start daemon new"]
    node.admin("uncordon")
    assert node.tick(91_500) == [start("new")]


def test_cordon_holds_back_what_had_ended_before_it() -> None:
    node = Play().running("web").at(5000).signal("web", "exited_cleanly").admin("cordon")
    assert node.tick(5500) == []


def test_cordon_taken_up_after_a_restart_holds_back_only_what_did_not_run_in_spite_of_it() -> None:
    node = Play().want("web").want("db").tell(Restored(cordoned=True, ran=("db",)))
    assert node.tick(500) == [start("db")]


def test_cordon_of_another_node_means_nothing_here() -> None:
    assert Play().want("web").admin("cordon", 7).tick(500) == [start("web")]


@pytest.mark.parametrize("event", [UpdateStarted(1000), Leaving("signal")])
def test_node_that_leaves_or_updates_starts_nothing_and_stops_nothing(event: Any) -> None:
    node = Play().tell(Started(), Synced()).running("a").want("b").tell(event)
    assert node.tick(500) == []


def test_update_that_failed_starts_what_waited() -> None:
    node = Play().tell(Synced(), UpdateStarted(1000)).want("b")
    node.tick(500)
    node.tell(UpdateFailed("x"))
    assert node.tick(1000) == [start("b")]


# --- backoff


def crash(node: Play, at_ms: int, run_ms: int = 10) -> None:
    node.at(at_ms - run_ms).signal("web", "started")
    node.at(at_ms).signal("web", "crashed")


def test_gated_daemon_gets_its_backoff_told_when_until_changed_and_starts_at_until_itself() -> None:
    node = Play().want("web")
    crash(node, 1000)
    assert node.tick(1001) == [backoff("web", 1500)]
    assert node.tick(1499) == []
    assert node.tick(1500) == [start("web")]
    crash(node, 2000)
    assert node.tick(2001) == [backoff("web", 3000)]


def test_backoff_doubles_from_half_a_second_to_a_minute() -> None:
    found, now_ms, tracker = [], 0, Backoff()
    for _ in range(10):
        now_ms += 16_000
        tracker.elapse(now_ms)
        tracker.crashed(now_ms, MeshOsConfig(crash_loop_crashes=99))
        assert tracker.until_ms is not None
        found.append(tracker.until_ms - now_ms)
        now_ms = tracker.until_ms
    assert found == [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000]


def test_five_crashes_within_a_minute_loop_for_300_seconds_one_exactly_a_minute_old_counts() -> None:
    node = Play().want("web")
    for at_ms in (1000, 16_000, 31_000, 46_000, 61_000):
        crash(node, at_ms)
    assert node.tick(61_001) == [backoff("web", 361_000)]
    assert node.snapshot()["daemons"][0]["state"] == "crash_looping"
    assert node.tick(360_999) == []
    assert node.tick(361_000) == [start("web")]


def test_five_crashes_in_more_than_a_minute_do_not_loop() -> None:
    node = Play().want("web")
    for at_ms in (1000, 16_000, 31_000, 46_000, 61_001):
        crash(node, at_ms)
    assert node.tick(61_002) == [backoff("web", 61_001 + 8000)]


def test_crash_loop_resets_the_doubling() -> None:
    node = Play().want("web")
    for at_ms in (1000, 2000, 3000, 4000, 5000):
        crash(node, at_ms)
    node.tick(305_000)
    crash(node, 400_000)
    assert node.tick(400_001) == [backoff("web", 400_500)]


@pytest.mark.parametrize(("run_ms", "delay_ms"), [(59_999, 1000), (60_000, 500)])
def test_run_of_a_minute_resets_the_doubling_at_its_end(run_ms: int, delay_ms: int) -> None:
    node = Play().want("web")
    crash(node, 1000)
    crash(node, 200_000, run_ms)
    assert node.tick(200_001) == [backoff("web", 200_000 + delay_ms)]


@pytest.mark.parametrize(("run_ms", "counts"), [(999, True), (1000, False)])
def test_clean_exit_after_less_than_a_second_counts_as_a_crash(run_ms: int, counts: bool) -> None:
    node = Play().want("web").at(1000).signal("web", "started")
    node.at(1000 + run_ms).signal("web", "exited_cleanly")
    expected = [backoff("web", 1000 + run_ms + 500)] if counts else [start("web")]
    assert node.tick(1000 + run_ms) == expected


@pytest.mark.parametrize("signal", ["crashed", "exited_cleanly"])
def test_exit_that_follows_our_own_stop_is_never_a_crash(signal: str) -> None:
    node = Play().running("web").want("web", "stop")
    node.tick(500)
    node.signal("web", signal).want("web")
    assert node.tick(1000) == [start("web")]


def test_stop_that_was_never_sent_makes_a_later_crash_no_less_a_crash() -> None:
    node = Play().running("web").want("web", "stop")
    node.tick(500)
    node.tell(ActionOutcome("stop_daemon", "web", "failed")).want("web").signal("web", "crashed")
    assert node.tick(501) == [backoff("web", 1000)]


def test_crash_while_gated_never_moves_the_gate_nearer() -> None:
    tracker = Backoff()
    for at_ms in range(5):
        tracker.crashed(at_ms, MeshOsConfig())
    assert tracker.until_ms == 300_004
    tracker.crashed(100_000, MeshOsConfig())
    assert tracker.until_ms == 300_004 and tracker.looping


@given(st.lists(st.tuples(st.integers(0, 100_000), st.none() | st.integers(0, 90_000)), max_size=30))
def test_gate_of_any_history_only_moves_away_while_closed(history: list[tuple[int, int | None]]) -> None:
    tracker, now_ms = Backoff(), 0
    for step_ms, run_ms in history:
        now_ms += step_ms
        tracker.elapse(now_ms)
        before = tracker.until_ms
        tracker.ended(run_ms, MeshOsConfig())
        tracker.crashed(now_ms, MeshOsConfig())
        assert tracker.until_ms is not None and tracker.until_ms >= max(now_ms + 500, before or 0)
        assert tracker.until_ms <= now_ms + 300_000
        assert len(tracker.crashes) <= 5


# --- backoff over the end of a process


def after(node: Play, now_ms: int) -> Play:
    """The next process of this node, which begins at that time."""
    return Play().at(now_ms).tell(Started(), *crashed(node.state), Synced())


def test_crash_loop_outlives_the_process_and_is_shown_from_its_first_moment() -> None:
    node = Play().want("web")
    for at_ms in (1000, 2000, 3000, 4000):
        crash(node, at_ms)
    node.at(4990).signal("web", "started").at(5000).signal("web", "crashed", reason="exit status 3")
    then = after(node, 65_000)
    (row,) = then.snapshot()["daemons"]
    assert (row["state"], row["until_in_ms"], row["age_ms"]) == ("crash_looping", 240_000, 60_000)
    assert row["reason"] == "exit status 3"
    assert (then.moves[-1].new, then.moves[-1].reason) == (State.DEGRADED, "daemon web crash-looping")
    then.want("web").admin("restart_all_daemons")
    asked = [action for at_ms in range(65_500, 305_000, 10_000) for action in then.tick(at_ms)]
    assert asked == [backoff("web", 305_000)]
    assert then.tick(305_000) == [start("web")]


def test_crashes_of_the_process_before_count_and_the_delay_goes_on_doubling() -> None:
    node = Play().want("web")
    for at_ms in (1000, 2000, 3000):
        crash(node, at_ms)
    node = after(node, 10_000).want("web")
    crash(node, 11_000)
    assert node.tick(11_001) == [backoff("web", 15_000)]
    node = after(node, 20_000).want("web")
    assert node.tick(20_500) == [start("web")], "its gate was over meanwhile"
    crash(node, 21_000)
    assert node.tick(21_001) == [backoff("web", 321_000)]


@pytest.mark.parametrize(("looping", "longest_ms"), [(True, 300_000), (False, 60_000)])
def test_restored_gate_is_never_longer_than_a_gate_is(looping: bool, longest_ms: int) -> None:
    node = Play().at(1000).tell(BackoffRestored("web", 10**9, looping, 500, (10**9,), 10**9)).want("web")
    assert node.tick(1500) == [backoff("web", 1000 + longest_ms)]
    assert node.snapshot()["daemons"][0]["age_ms"] == 500
    assert node.tick(1000 + longest_ms) == [start("web")]


def test_run_of_a_minute_forgets_what_was_restored() -> None:
    node = Play().at(1000).tell(BackoffRestored("web", None, False, 4000, (10, 20, 30, 40), 50))
    node.want("web").signal("web", "started").at(61_000).signal("web", "crashed")
    assert node.tick(61_001) == [backoff("web", 61_500)]


@given(runs(), st.integers(0, 400_000))
def test_whatever_happened_no_gate_is_another_one_in_the_next_process(
    events: list[Event], later_ms: int
) -> None:
    node = Play()
    for event in events:
        node.at(event.at_ms).tell(event)
    now_ms = node.state.now_ms + later_ms
    then = after(node, now_ms)
    for key, daemon in node.state.daemons.items():
        until_ms = daemon.backoff.until_ms
        shut = until_ms is not None and until_ms > now_ms
        assert then.state.gate_of(key) == (until_ms if shut else None)
        if shut or daemon.backoff.crashes:
            restored = then.state.daemons[key].backoff
            assert (restored.delay_ms, restored.crashes) == (daemon.backoff.delay_ms, daemon.backoff.crashes)
            assert restored.looping is (shut and daemon.backoff.looping)


# --- restart_all_daemons


def test_restart_all_stops_each_running_daemon_and_starts_it_again() -> None:
    node = Play().running("a", "b").want("c", "stop").signal("stray", "started")
    node.admin("restart_all_daemons")
    assert node.tick(500) == [stop("a", 30_500), stop("b", 30_500)]
    node.at(600).signal("a", "exited_cleanly").signal("b", "crashed")
    assert node.tick(1000) == [start("a"), start("b")]
    node.signal("a", "started").signal("b", "started")
    assert node.tick(1500) == []


def test_restart_all_does_not_open_the_gate_of_a_crash_loop() -> None:
    node = Play().want("web")
    for at_ms in (1000, 2000, 3000, 4000, 5000):
        crash(node, at_ms)
    node.admin("restart_all_daemons")
    asked = [action for at_ms in range(5500, 305_000, 10_000) for action in node.tick(at_ms)]
    assert asked == [backoff("web", 305_000)]


def test_restart_all_of_another_node_does_nothing_here() -> None:
    assert Play().running("a").admin("restart_all_daemons", 7).tick(500) == []


# --- what a daemon says of itself, and this node's own state


def test_unhealthy_daemon_degrades_the_node_until_it_is_well() -> None:
    node = Play().tell(Synced()).running("web")
    node.healthy("web", "unhealthy")
    assert (node.moves[-1].new, node.moves[-1].reason) == (State.DEGRADED, "daemon web unhealthy")
    node.healthy("web", "degraded")
    assert (node.moves[-1].new, node.moves[-1].reason) == (State.ALIVE, "daemon web no longer troubled")


def test_crash_looping_daemon_degrades_the_node_until_its_gate_opens() -> None:
    node = Play().tell(Synced()).want("web")
    for at_ms in (1000, 2000, 3000, 4000, 5000):
        crash(node, at_ms)
    assert node.moves[-1].new is State.DEGRADED
    node.tick(305_000)
    assert node.moves[-1].new is State.ALIVE


def test_many_daemons_in_trouble_are_told_in_a_few_words() -> None:
    node = Play().tell(Synced()).running(*range(9))
    for number in range(9):
        node.healthy(number, "unhealthy")
    assert node.state.life.reason.endswith("daemon 2 unhealthy, 6 more daemons in trouble")


@pytest.mark.parametrize(
    ("value", "kept"), [(0.5, 0.5), (2.0, 1.0), (-1.0, 0.0), (float("nan"), None), (None, None)]
)
def test_saturation_is_kept_between_0_and_1(value: float | None, kept: float | None) -> None:
    node = Play().running("web").signal("web", "saturation", saturation=value)
    assert node.snapshot()["daemons"][0]["saturation"] == kept


def test_age_of_a_daemon_that_never_ran_here_is_unknown() -> None:
    node = Play().at(10**9).want("web", "stop")
    assert node.snapshot()["daemons"][0]["age_ms"] is None
    node.signal("web", "started").at(10**9 + 5)
    assert node.snapshot()["daemons"][0]["age_ms"] == 5


def test_daemon_rows_say_state_and_what_is_left_of_the_gate() -> None:
    node = Play().want("web")
    states = []
    for act in (
        lambda: node.tick(500),
        lambda: node.at(600).signal("web", "started"),
        lambda: node.at(700).signal("web", "crashed", reason="exit 3"),
        lambda: node.tick(1200),
        lambda: node.signal("web", "started"),
        lambda: node.want("web", "stop").tick(1500),
        lambda: node.signal("web", "exited_cleanly"),
    ):
        act()
        row = node.snapshot()["daemons"][0]
        states.append((row["state"], row["restarts"], row["until_in_ms"]))
    assert states == [
        ("starting", 0, None),
        ("running", 0, None),
        ("backing_off", 0, 500),
        ("starting", 0, None),
        ("running", 1, None),
        ("stopping", 1, None),
        ("stopped", 1, None),
    ]
