"""Arm 5: the maintenance machine, arc by arc, and what drains tell daemons and peers."""

from __future__ import annotations

from itertools import product

import pytest

from agent.meshos.config import MeshOsConfig
from agent.meshos.controls import DrainFinish, DrainStart, Shutdown, shutdown_by
from agent.meshos.events import ActionOutcome, Backpressure, Blob, Restored, Started, Surveyed, Synced
from agent.meshos.maintenance import ARCS, Maintenance
from agent.meshos.own import refusal
from agent.meshos.states import MaintenanceState
from discovery.lifecycle import State
from tests.agent.meshos_play import ME, Play, commit

LEGAL = {
    ("active", "entering_maintenance"),
    ("recovery", "entering_maintenance"),
    ("exiting_maintenance", "entering_maintenance"),
    ("drain_failed", "entering_maintenance"),
    ("entering_maintenance", "maintenance"),
    ("entering_maintenance", "drain_failed"),
    ("entering_maintenance", "exiting_maintenance"),
    ("maintenance", "exiting_maintenance"),
    ("drain_failed", "exiting_maintenance"),
    ("exiting_maintenance", "recovery"),
    ("recovery", "active"),
}
PAIRS = list(product(MaintenanceState, MaintenanceState))


def state(node: Play) -> str:
    return node.state.maintenance.state.value


def entering(deadline_ms: int | None = None) -> Play:
    node = Play().tell(Synced())
    node.tick(1000)
    return node.admin("enter_maintenance", deadline_ms=deadline_ms)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_observed_transition_moves_only_along_a_legal_arc(
    old: MaintenanceState, new: MaintenanceState
) -> None:
    maintenance = Maintenance(state=old)
    moved = maintenance.observed(new, None, 500, 1000)
    legal = (old.value, new.value) in LEGAL
    assert ((old, new) in ARCS) is legal
    assert moved is (False if old is new else True if legal else None)
    assert maintenance.state is (new if legal else old)


def test_illegal_observation_is_counted_and_ignored() -> None:
    node = Play().observed("recovery")
    assert (state(node), node.state.counts.transitions_refused) == ("active", 1)


def test_whole_walk_from_active_to_active() -> None:
    node = entering()
    assert state(node) == "entering_maintenance"
    assert node.tick(1500) == [commit("maintenance")]
    assert node.tick(2000) == []
    node.observed("maintenance")
    assert node.tick(2500) == []
    node.admin("exit_maintenance")
    assert node.tick(3000) == [commit("recovery")]
    node.observed("recovery")
    assert node.tick(302_999) == []
    assert node.tick(303_000) == [commit("active")]
    node.observed("active")
    assert (state(node), node.state.life.state) == ("active", State.ALIVE)
    assert [move.new.word for move in node.moves] == ["alive", "draining", "alive"]


def test_commit_changes_nothing_until_it_is_observed() -> None:
    node = entering()
    node.tick(1500)
    assert state(node) == "entering_maintenance"


@pytest.mark.parametrize(
    "what",
    ["daemon", "chain", "artifact"],
)
def test_entering_is_met_when_nothing_runs_and_nothing_of_users_is_held(what: str) -> None:
    node = Play().running("web") if what == "daemon" else Play()
    if what == "chain":
        node.holds(1, ME, 2)
    if what == "artifact":
        node.blob("x", ME, 2)
    node.admin("enter_maintenance")
    assert commit("maintenance") not in node.tick(500)
    assert node.snapshot()["local_maintenance"]["left"]
    if what == "daemon":
        node.signal("web", "exited_cleanly")
    elif what == "chain":
        node.gone(1, ME)
    else:
        node.tell(Blob("x", "removed", ME))
    assert node.tick(1000) == [commit("maintenance")]


def test_admin_chain_and_own_action_chain_do_not_count() -> None:
    node = Play(MeshOsConfig(exempt_chains=("admin", "actions/100")))
    node.holds("admin", ME, 2).holds("actions/100", ME).admin("enter_maintenance")
    assert node.tick(500) == [commit("maintenance")]
    other = Play(MeshOsConfig(exempt_chains=("admin", "actions/100")))
    other.holds("actions/7", ME, 7).admin("enter_maintenance")
    assert other.tick(500) == []


def test_deadline_passed_unmet_is_drain_failed_with_what_is_left() -> None:
    node = entering(5000).holds(7, ME, 2).running("web")
    node.tick(5999)
    assert node.tick(6000) == [
        commit("drain_failed", "not empty after 5 s: 1 daemon running (web), 1 replica held (7)")
    ]
    node.observed("drain_failed", reason="why not")
    shown = node.snapshot()["local_maintenance"]
    assert (shown["state"], shown["reason"]) == ("drain_failed", "why not")
    assert node.state.life.state is State.DRAINING
    assert node.state.life.reason == "drain failed: why not"


def test_daemon_that_a_drain_or_maintenance_keeps_down_says_so() -> None:
    node = Play().running("web").admin("enter_maintenance")

    def held() -> str | None:
        (daemon,) = node.snapshot()["daemons"]
        return daemon["held_back"]

    node.tick(500)
    assert held() is None, "it still runs"
    node.signal("web", "exited_cleanly")
    assert held() == "entering maintenance"
    node.tick(1000)
    node.observed("maintenance")
    assert held() == "in maintenance"
    node.admin("exit_maintenance").tick(1500)
    assert held() is None
    node.admin("drain")
    assert held() == "drained"


def test_met_beats_late_on_the_same_tick() -> None:
    node = entering(500)
    assert node.tick(9000) == [commit("maintenance")]


def test_deadline_is_ten_minutes_unless_given() -> None:
    node = entering().holds(1, ME)
    assert node.tick(600_999) == []
    assert [a["target"] for a in node.tick(601_000)] == ["drain_failed"]


def test_times_are_anchored_on_the_last_tick() -> None:
    node = Play()
    node.tick(1000)
    node.at(1400).admin("enter_maintenance", deadline_ms=600)
    assert node.state.maintenance.since_ms == 1000
    assert node.state.maintenance.deadline_at_ms == 1600


def test_entering_again_sets_a_new_deadline_and_no_new_beginning() -> None:
    node = entering(1000).holds(1, ME)
    node.tick(1900)
    node.admin("enter_maintenance", deadline_ms=9000)
    assert node.state.maintenance.since_ms == 1000
    assert node.tick(10_899) == []
    assert [a["target"] for a in node.tick(10_900)] == ["drain_failed"]


@pytest.mark.parametrize("stage", ["recovery", "exiting_maintenance", "drain_failed", "active"])
def test_enter_acts_from(stage: str) -> None:
    node = Play()
    node.state.maintenance.state = MaintenanceState(stage)
    node.admin("enter_maintenance")
    assert state(node) == "entering_maintenance"


def test_enter_in_maintenance_has_no_effect() -> None:
    node = Play().admin("enter_maintenance").observed("maintenance").admin("enter_maintenance")
    assert state(node) == "maintenance"


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("entering_maintenance", "exiting_maintenance"),
        ("maintenance", "exiting_maintenance"),
        ("drain_failed", "exiting_maintenance"),
        ("active", "active"),
        ("recovery", "recovery"),
    ],
)
def test_exit_acts_from(stage: str, after: str) -> None:
    node = Play()
    node.state.maintenance.state = MaintenanceState(stage)
    assert state(node.admin("exit_maintenance")) == after


def test_exiting_waits_until_every_desired_daemon_runs_and_is_healthy() -> None:
    node = Play().running("a", "b").want("elsewhere", node=7).want("off", "stop")
    node.admin("enter_maintenance").admin("exit_maintenance")
    node.healthy("a", "degraded").signal("b", "exited_cleanly")
    assert [a["kind"] for a in node.tick(5000)] == ["start_daemon"]
    node.healthy("a", "healthy")
    assert node.tick(5500) == []
    node.signal("b", "started")
    assert node.tick(6000) == [commit("recovery")]


def test_exiting_does_not_wait_for_what_a_cordon_holds_back() -> None:
    node = Play().admin("cordon").want("a").admin("enter_maintenance").admin("exit_maintenance")
    assert node.tick(500) == [commit("recovery")]


@pytest.mark.parametrize("freed_by", ["observed", "admin", "outcome", "minute"])
def test_commit_in_flight_is_freed(freed_by: str) -> None:
    node = entering()
    node.tick(1500)
    if freed_by == "observed":
        node.observed("active")
    elif freed_by == "admin":
        node.admin("enter_maintenance")
    elif freed_by == "outcome":
        node.tell(ActionOutcome("commit_maintenance_transition", None, "failed"))
    assert node.tick(61_500 if freed_by == "minute" else 2000) == [commit("maintenance")]


def test_maintenance_of_another_node_is_mirrored_and_moves_nothing_here() -> None:
    node = Play().admin("enter_maintenance", 7)
    assert state(node) == "active"
    rows = node.snapshot()["peers"]
    assert [(row["peer"], row["maintenance"], row["draining"]) for row in rows] == [
        (7, "entering_maintenance", True)
    ]
    node.observed("maintenance", 7).admin("exit_maintenance", 7)
    assert node.snapshot()["peers"][0]["maintenance"] == "exiting_maintenance"
    node.observed("recovery", 7).observed("active", 7)
    assert node.snapshot()["peers"] == []


# --- lifecycle


@pytest.mark.parametrize("stage", ["entering_maintenance", "maintenance", "drain_failed"])
def test_lifecycle_shows_draining_and_resume_is_refused(stage: str) -> None:
    node = Play().tell(Synced()).admin("enter_maintenance")
    if stage != "entering_maintenance":
        node.observed(stage)
    assert node.state.life.state is State.DRAINING
    refused = refusal(State.DRAINING, "resume", MaintenanceState(stage))
    assert refused is not None and refused.code == "in_maintenance"
    node.admin("resume")
    assert (state(node), node.state.counts.ops_refused) == (stage, 1)


def test_drain_that_outlives_the_maintenance_keeps_draining() -> None:
    node = Play().tell(Synced()).admin("drain").admin("enter_maintenance").admin("exit_maintenance")
    assert node.state.life.state is State.DRAINING
    assert refusal(State.DRAINING, "resume", MaintenanceState.EXITING) is None
    node.admin("resume")
    assert node.state.life.state is State.ALIVE


def test_draining_says_who_and_why() -> None:
    node = Play().tell(Synced()).admin("enter_maintenance", by="ann", op_id="01M")
    move = node.moves[-1]
    assert (move.reason, move.by, move.op_id) == ("entering maintenance", "ann", "01M")
    node.observed("maintenance")
    assert node.state.life.reason == "maintenance"
    node.admin("exit_maintenance", by="bob", op_id="01X")
    move = node.moves[-1]
    assert (move.new, move.reason, move.by) == (State.ALIVE, "leaving maintenance", "bob")


def test_drain_past_its_deadline_stays_and_says_what_is_left() -> None:
    node = Play().tell(Synced()).running("web").admin("drain", deadline_ms=1000)
    node.tick(2000)
    local = node.snapshot()["local"]
    assert (local["state"], local["drain"]["past_deadline"]) == ("draining", True)
    assert local["drain"]["left"] == ["1 daemon running (web)"]


# --- restarts


@pytest.mark.parametrize("stage", list(MaintenanceState))
def test_restored_maintenance_goes_on_where_it_was(stage: MaintenanceState) -> None:
    node = Play()
    node.tick(1000)
    node.tell(Restored(True, stage, "why", 5000, 7000, "ann", "01M"))
    mine = node.state.maintenance
    assert (mine.state, mine.since_ms, mine.by) == (stage, -4000, "ann")
    assert mine.deadline_at_ms == (8000 if stage is MaintenanceState.ENTERING else None)
    assert node.state.life.cordoned


@pytest.mark.parametrize("stage", ["entering_maintenance", "recovery"])
def test_restored_before_the_first_tick_of_a_host_long_up_is_not_over_at_once(stage: str) -> None:
    node = Play().at(9_000_000).signal("web", "started")
    node.tell(Restored(False, MaintenanceState(stage), "", 5000, 7000))
    asked = node.tick(9_000_500) + node.tick(9_001_000)
    assert not [action for action in asked if action["kind"] == "commit_maintenance_transition"]


def test_restored_exiting_is_not_met_before_it_is_known_what_shall_run() -> None:
    node = Play().tell(Started(survey=True), Restored(maintenance=MaintenanceState.EXITING), Synced())
    assert node.tick(500) == [] and node.tick(60_000) == []
    node.want("web").tell(Surveyed())
    assert [a["kind"] for a in node.tick(60_500)] == ["start_daemon"]
    node.signal("web", "starting")
    assert node.tick(61_000) == []
    node.signal("web", "started")
    assert node.tick(61_500) == [commit("recovery")]


def test_restored_entering_is_not_met_before_it_is_known_what_runs_and_is_held() -> None:
    node = Play().tell(Started(survey=True))
    node.tick(500)
    node.tell(Restored(maintenance=MaintenanceState.ENTERING, left_ms=60_000), Synced())
    assert node.tick(1000) == []
    node.blob("x", ME).tell(Surveyed())
    assert commit("maintenance") not in node.tick(1500)
    node.tell(Blob("x", "removed", ME))
    assert node.tick(2000) == [commit("maintenance")]


# --- what daemons are told


def test_drain_start_goes_out_on_drain_with_the_time_left_and_finish_on_resume() -> None:
    node = Play().admin("drain", deadline_ms=4000)
    assert node.controls == [DrainStart(4000)]
    node.admin("drain", deadline_ms=9000).admin("resume")
    assert node.controls == [DrainStart(4000), DrainFinish()]


@pytest.mark.parametrize("end", ["maintenance", "drain_failed"])
def test_drain_start_goes_out_on_entering_and_finish_at_its_end(end: str) -> None:
    node = entering(3000)
    assert node.controls == [DrainStart(3000)]
    node.observed(end).admin("exit_maintenance")
    assert node.controls == [DrainStart(3000), DrainFinish()]


def test_drain_start_is_told_once_where_drain_and_maintenance_overlap() -> None:
    node = Play().admin("drain").admin("enter_maintenance").observed("maintenance")
    assert len(node.controls) == 1
    node.admin("exit_maintenance").admin("resume")
    assert node.controls[1:] == [DrainFinish()]


def test_backpressure_edges_are_told_once_each() -> None:
    node = Play().tell(Backpressure(True, 1500), Backpressure(True, 1500), Backpressure(False, 100))
    assert [type(control).__name__ for control in node.controls] == ["BackpressureOn", "BackpressureOff"]
    assert getattr(node.controls[0], "level") == 1.0  # noqa: B009


def test_shutdown_past_its_deadline_has_no_grace_left() -> None:
    assert (shutdown_by(500, 200), shutdown_by(500, 900)) == (Shutdown(300), Shutdown(0))
